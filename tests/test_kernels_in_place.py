"""Gradients written in place: every row as if it were alone, on any number of threads, and nothing beside."""

from __future__ import annotations

import math

import pytest
import torch

from coursepack.kernels import soft_target_loss


@pytest.fixture
def threads():
    """Gives torch its threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("divergence", ["kl", "js", "mse"])
@pytest.mark.parametrize("combine", ["mixture", "sum"])
@pytest.mark.parametrize("classes", [1, 3, 63, 64, 65, 100, 1000])
def test_every_row_is_computed_as_alone_and_nothing_is_written_beside(
    threads, monkeypatch, divergence, combine, classes
):
    rows = max(30, 45_000 // (3 * classes))  # enough for two threads
    generator = torch.Generator().manual_seed(classes)
    student = torch.randn(rows, classes, generator=generator) * 3
    teachers = (torch.randn(2, rows, classes, generator=generator) * 3).half()
    labels = torch.randint(classes, (rows,), generator=generator)
    empty, guards = torch.empty, []

    def guarded(*shape, dtype, device):
        """Memory with a known number on both sides."""
        size = math.prod(shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape)
        held = torch.full((size + 256,), 7.0, dtype=dtype, device=device)
        guards.append((held, size))
        return held[128 : 128 + size].view(*shape)

    def run(chosen):
        z = student[chosen].clone().requires_grad_(True)
        options = {"temperature": 4.0, "divergence": divergence, "combine": combine, "hard_weight": 0.5}
        monkeypatch.setattr(torch, "empty", guarded)
        loss = soft_target_loss(z, teachers[:, chosen], labels[chosen], **options)
        monkeypatch.setattr(torch, "empty", empty)
        loss.sum().backward()
        return loss.detach(), z.grad

    found = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        found[count] = run(slice(None))
    assert all(map(torch.equal, found[1], found[2]))
    for row in {*range(10), *range(rows - 10, rows)}:
        loss, grad = run(slice(row, row + 1))
        assert torch.equal(loss, found[2][0][row : row + 1])
        assert torch.equal(grad, found[2][1][row : row + 1])
    assert guards
    for held, size in guards:
        assert (held[:128] == 7).all()
        assert (held[128 + size :] == 7).all()
