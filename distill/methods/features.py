"""Methods that regress features through adapters, or compare them across layers."""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods.base import Method, objective

# Published coefficients of losses that take other means than docs/decisions/reduction.md, all of them:
#
# FitNets     RepDistiller's 100 times the mean over samples and values; `hint` is the mean over values per
#             sample, so the number stays. The paper's loss is half the sum over values.
_FITNETS = 100.0
# VID         RepDistiller's 1 times the mean over samples and values: the same.
_VID = 1.0
# AB          3 / 1000 times the sum over values, divided by the number of samples.
_AB = 3 / 1000
# CRD         RepDistiller's 0.8 times the mean over samples of the sum over negatives and both directions.
_CRD = 0.8
# OFD         the sum over samples and values, divided by the number of samples and by 1000.
_OFD = 1 / 1000
# FT          500 times the mean over samples and values of the absolute difference.
_FT = 500.0

_PHASE_EPOCHS = 30
"""Epochs of the first phase of AB in RepDistiller."""


def _step(start: float, end: float) -> dict[str, Any]:
    return {"shape": "step", "start": start, "end": end, "epochs": _PHASE_EPOCHS}


FEATURES: dict[str, Method] = {
    "fitnets": Method(
        formula="100 mean (r(student's layer) - teacher's layer)² + CE, r convolution, BN and ReLU",
        source="Romero et al. 2015 (FitNets), arXiv 1412.6550, equation 3; RepDistiller, ConvReg",
        evidence="re-implementation",
        objective=objective(terms={"hint": {"weight": _FITNETS, "adapter": "conv-bn-relu"}}),
        note="the paper trains the student up to its middle layer first, then with kd; RepDistiller, as "
        "here, in one stage. The regressor ends in a ReLU: choose taps after one, or "
        "terms.hint.adapter=linear with a weight below 1",
    ),
    "vid": Method(
        formula="sum_l mean 1/2 ((mu_l(student) - teacher)² / v_c + log v_c) + CE",
        source="Ahn et al. 2019 (VID), arXiv 1904.05835; RepDistiller, VIDLoss",
        evidence="re-implementation",
        objective=objective(terms={"vid": {"weight": _VID}}),
        note="may be negative. In mdistiller the variances reach no optimizer and stay at 5: "
        "terms.vid.variance=fixed",
    ),
    "ab": Method(
        formula="0.003 sum_l 2^(l - L) sum relu(1 - sign(t) r_l(s))² for 30 epochs, then CE",
        source="Heo et al. 2019 (AB), arXiv 1811.03233; its release, and RepDistiller's 30 epochs",
        evidence="release",
        objective=objective(hard_weight=_step(0.0, 1.0), terms={"ab": {"weight": _step(_AB, 0.0)}}),
        note="s and t before their activation. One optimizer and one learning-rate schedule for both phases; "
        "in the releases the second phase begins with new ones. Stores are read in both phases",
    ),
    "crd": Method(
        formula="0.8 sum over both directions of -log u_i / (u_i + c) - sum_j log c / (u_j + c) + CE",
        source="Tian, Krishnan and Isola 2020 (CRD), arXiv 1910.10699; RepDistiller, CRDLoss",
        evidence="release",
        objective=objective(terms={"crd": {"weight": _CRD}}),
        note="negatives are drawn with replacement (in the release without), anew in every epoch. Memories "
        "are updated with the embeddings of the forward pass, as in the release",
    ),
    "ofd": Method(
        formula="0.001 sum_l 2^(l - L) sum (r_l(s) - t')² 1{r_l(s) > t' or t' > 0} + CE, t' = max(t, margin)",
        source="Heo et al. 2019 (OFD), arXiv 1904.01866; its release",
        evidence="release",
        objective=objective(terms={"ofd": {"weight": _OFD}}),
        note="s and t before their activation. The release runs the teacher in train mode; stores hold it in "
        "evaluation mode. Maps of other sizes than the teacher's are pooled",
    ),
    "ft": Method(
        formula="mean |decoder(encoder(t)) - t| + CE for 6 epochs, then "
        "500 mean |n(translator(s)) - n(encoder(t))| + CE, n to unit length",
        source="Kim, Park and Kwak 2018 (FT), arXiv 1802.04977; its release",
        evidence="release",
        objective=objective(terms={"ft": {"weight": _FT}}),
        note="in the release the paraphraser is trained before the student; here the student learns from "
        "labels meanwhile. RepDistiller compares attention of the factors, with weight 200: "
        "terms.ft.compare=attention",
    ),
    "reviewkd": Method(
        formula="CE + 5 min(1, epoch / 20) mean_k sum_l HCL(ABF_l(student's levels from l on), k's level l)",
        source="Chen, Liu, Zhao and Jia 2021, arXiv 2104.09044; numbers of its release for resnet32x4 to "
        "resnet8x4",
        objective=objective(
            hard_weight=1.0, terms={"reviewkd": {"weight": {"shape": "warmup", "end": 5.0, "epochs": 20}}}
        ),
        evidence="release",
        note="the release's weight differs between pairs of networks, from 0.6 (resnet56 to resnet20) to 8 "
        "(resnet32x4 to ShuffleNetV2). It compares the teacher's maps before the last ReLU of a layer; here "
        "as they are stored. Its last level is the mean of the last map, which is one more pair: "
        "LAYER:pooled. Several teachers: ours, the mean over them",
    ),
    "simkd": Method(
        formula="mean (projector(student's last map) - teacher's last map)²; predictions are the teacher's "
        "head on the projected map's mean",
        source="Chen et al. 2022, arXiv 2203.14001; numbers of its release",
        objective=objective(hard_weight=0.0, terms={"simkd": {}}),
        evidence="release",
        note="labels and logits are not learned from, as in the release. The projector is a part of the "
        "trained network, and has half the teacher's channels between its convolutions (terms.simkd.factor)",
    ),
}
