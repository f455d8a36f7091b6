"""Loss terms of an objective, one module each."""

from coursepack.distill.losses import (
    at,
    cc,
    dist,
    dkd,
    fsp,
    hint,
    label,
    latents,
    nst,
    pkt,
    relation,
    reviewkd,
    simkd,
    soft_target,
    sp,
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
    "reviewkd": reviewkd.LOSS,
    "simkd": simkd.LOSS,
    "at": at.LOSS,
    "sp": sp.LOSS,
    "pkt": pkt.LOSS,
    "cc": cc.LOSS,
    "nst": nst.LOSS,
    "fsp": fsp.LOSS,
}
"""Loss terms by name. To add one, write a module in this package and add a row here."""
