"""Methods that regress features through adapters, or compare them across layers."""

from __future__ import annotations

from coursepack.distill.methods.base import Method, objective

FEATURES: dict[str, Method] = {
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
