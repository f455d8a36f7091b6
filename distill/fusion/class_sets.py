"""Classes that each of several teachers knows, and how teachers are linked by them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


def linked_teachers(known: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the groups of teachers that are linked by common classes, directly or through others.

    >>> linked_teachers([(0, 1), (2, 3), (1, 4)])
    [[0, 2], [1]]
    """
    groups: list[tuple[list[int], set[int]]] = []
    for index, classes in enumerate(known):
        linked = [group for group in groups if group[1] & set(classes)]
        groups = [group for group in groups if group not in linked]
        members = sorted(itertools.chain([index], *(group[0] for group in linked)))
        groups.append((members, set(classes).union(*(group[1] for group in linked))))
    return sorted(group[0] for group in groups)


class ClassSets(nn.Module):
    """Classes that each teacher knows, and groups of the classes that the same teachers know."""

    def __init__(self, known: Sequence[Sequence[int]], classes: int) -> None:
        super().__init__()
        knows = np.zeros((classes, len(known)), dtype=np.bool_)
        for index, of_one in enumerate(known):
            knows[list(of_one), index] = True
            self.register_buffer(f"known{index}", torch.tensor(list(of_one)), persistent=False)
        found, inverse = np.unique(knows, axis=0, return_inverse=True)
        members, group = torch.from_numpy(found), torch.from_numpy(inverse.reshape(-1))
        shared = members.sum(1) > 1
        self.group: Tensor
        """Group of each class `(C,)`."""
        self.all_members: Tensor
        """Teachers that know the classes of each group `(groups, K)`."""
        self.members: Tensor
        """The same of the groups that several teachers know, `(G, K)`."""
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("all_members", members, persistent=False)
        self.register_buffer("members", members[shared], persistent=False)
        for number, index in enumerate(shared.nonzero()[:, 0].tolist()):
            self.register_buffer(f"group{number}", (group == index).nonzero()[:, 0], persistent=False)

    @property
    def groups(self) -> list[Tensor]:
        """Classes of each group that several teachers know."""
        return [self.get_buffer(f"group{number}") for number in range(len(self.members))]

    def placed(self, index: int, log_probs: Tensor) -> Tensor:
        """Return a teacher's log-probs `(N, C)`, minus infinity for the classes that it does not know."""
        known = self.get_buffer(f"known{index}")
        everything = log_probs.new_full((len(log_probs), len(self.group)), -torch.inf)
        return everything.index_copy(1, known, log_probs)
