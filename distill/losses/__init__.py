"""Loss terms of an objective, one module each."""

from coursepack.distill.losses import (
    confidence_hint,
    discriminator,
    dist,
    dkd,
    hint,
    label,
    latents,
    relation,
    soft_target,
    triplet_order,
    virtual_teacher,
)
from coursepack.distill.losses.base import Loss

LOSSES: dict[str, Loss] = {
    "soft_target": soft_target.LOSS,
    "label": label.LOSS,
    "angle": relation.ANGLE,
    "distance": relation.DISTANCE,
    "hint": hint.LOSS,
    "latents": latents.LOSS,
    "dkd": dkd.LOSS,
    "dist": dist.LOSS,
    "virtual_teacher": virtual_teacher.LOSS,
    "confidence_hint": confidence_hint.LOSS,
    "triplet_order": triplet_order.LOSS,
    "discriminator": discriminator.LOSS,
}
"""Loss terms by name. To add one, write a module in this package and add a row here."""
