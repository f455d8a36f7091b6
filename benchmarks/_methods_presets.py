"""Rows of the study in which every method has its own numbers: teachers, and layers that are compared.

All of them train a small convolutional student. Methods that compare one teacher's features learn from the
resnet, and `fsp`, which needs a teacher with the student's numbers of channels, from the cnn, which is the
student's network. So do the methods for generations of one network. All others learn from three teachers.
Methods of students that learn from each other are in `benchmarks/peers.py`.
"""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods import METHODS

STUDENT, LEARNING_RATE = "digits-cnn", 0.01
"""At a learning rate of 0.03, which trains others faster, `dkd`, `dist` and `nst` stay at 20 % or below."""
TAPS = {
    "mlp": ("hidden1", "hidden2"),
    "cnn": ("conv2", "hidden", "conv1+conv2:gram"),
    "resnet": ("layer1", "layer2", "layer2:pooled", "layer2.0.bn1:sign", "layer2.1.bn1:sign",
               "layer2.0.bn1:margin", "layer2.1.bn1:margin"),
}  # fmt: skip
"""Taps of the teachers' stores, by teacher."""
LAST, EVERY = (("layer2", "conv2"),), (("layer1", "conv1"), ("layer2", "conv2"))
EMBEDDING = (("layer2:pooled", "hidden"),)
PAIRS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "fitnets": {"hint": EVERY[:1]},
    "vid": {"vid": EVERY},
    "ab": {"ab": (("layer2.0.bn1:sign", "conv1"), ("layer2.1.bn1:sign", "conv2"))},
    "crd": {"crd": EMBEDDING},
    "ofd": {"ofd": (("layer2.0.bn1:margin", "conv1"), ("layer2.1.bn1:margin", "conv2"))},
    "ft": {"ft": LAST},
    "reviewkd": {"reviewkd": EVERY},
    "at": {"at": EVERY},
    "sp": {"sp": LAST},
    "rkd": {"distance": EMBEDDING, "angle": EMBEDDING},
    "pkt": {"pkt": EMBEDDING},
    "cc": {"cc": EMBEDDING},
    "nst": {"nst": LAST},
    "fsp": {"fsp": (("conv1+conv2:gram", "conv1+conv2"),)},
}
"""Taps and student layers that are compared, by method and term; those of others are chosen by default."""
FROM_RESNET = {*PAIRS, "simkd"} - {"fsp"}
FROM_CNN = {"fsp", "tf-kd-self", "born-again", "born-again-cwtm", "born-again-dkpp"}
SIMKD = {"terms": {"simkd": {"tap": "layer2", "layer": "conv2"}}}


def presets(teachers: list[str]) -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """Return every method for one student, with changes of its objective and the indices of its teachers."""
    everyone, made = tuple(range(len(teachers))), []
    for name, method in METHODS.items():
        needs = method.objective.needs()
        if needs.peers:
            continue
        chosen = everyone if needs.teachers else ()
        if name in FROM_RESNET | FROM_CNN:
            chosen = (teachers.index("cnn" if name in FROM_CNN else "resnet"),)
        terms = {
            term: {"pairs": [{"teacher": 0, "tap": tap, "layer": layer} for tap, layer in pairs]}
            for term, pairs in PAIRS.get(name, {}).items()
        }
        made.append((name, SIMKD if name == "simkd" else {"terms": terms} if terms else {}, chosen))
    return made
