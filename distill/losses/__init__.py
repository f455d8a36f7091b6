"""Loss terms, one file each: everything that a student can be asked to do about a batch."""

from coursepack.distill.losses import hint, label, latents, relation, soft_target
from coursepack.distill.losses.base import Loss

LOSSES: dict[str, Loss] = {
    "soft_target": soft_target.LOSS,
    "label": label.LOSS,
    "angle": relation.ANGLE,
    "distance": relation.DISTANCE,
    "hint": hint.LOSS,
    "latents": latents.LOSS,
}
"""Every loss term by name. A new one is a file beside these and a row here."""
