"""Loss terms of an objective, one module each."""

from coursepack.distill.losses import (
    activation_boundaries,
    confidence_hint,
    contrast,
    discriminator,
    dist,
    dkd,
    factor_transfer,
    hint,
    label,
    latents,
    overhaul,
    relation,
    reviewkd,
    simkd,
    soft_target,
    triplet_order,
    vid,
    virtual_teacher,
)
from coursepack.distill.losses.base import Loss

LOSSES: dict[str, Loss] = {
    "soft_target": soft_target.LOSS,
    "label": label.LOSS,
    "angle": relation.ANGLE,
    "distance": relation.DISTANCE,
    "hint": hint.LOSS,
    "vid": vid.LOSS,
    "ab": activation_boundaries.LOSS,
    "crd": contrast.LOSS,
    "ofd": overhaul.LOSS,
    "ft": factor_transfer.LOSS,
    "latents": latents.LOSS,
    "dkd": dkd.LOSS,
    "dist": dist.LOSS,
    "virtual_teacher": virtual_teacher.LOSS,
    "reviewkd": reviewkd.LOSS,
    "simkd": simkd.LOSS,
    "confidence_hint": confidence_hint.LOSS,
    "triplet_order": triplet_order.LOSS,
    "discriminator": discriminator.LOSS,
}
"""Loss terms by name. To add one, write a module in this package and add a row here."""
