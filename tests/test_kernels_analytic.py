"""The analytic loss as a device sees it: few launches, no synchronization, one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from contracts import analytic_loss, make_case, run_loss
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = ("alias", "detach", "expand", "permute", "select", "slice", "t", "unbind", "unsqueeze", "view")


class LaunchCount(TorchDispatchMode):
    """Counts the ATen calls that compute something: each is at least one launch on a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


CALLS = {
    "temperature 4": ({"temperature": 4.0}, 45, 8),
    "labels": ({"temperature": 4.0, "hard_weight": 0.3}, 71, 8),
    "shift": ({"temperature": 4.0, "adjustment": "shift"}, 63, 17),
    "row weight": ({"row_weight": torch.rand(8), "hard_weight": 0.3}, 80, 8),
    "sum": ({"combine": "sum"}, 59, 29),
    "mse": ({"divergence": "mse"}, 23, 3),
    "js": ({"divergence": "js"}, 50, 8),
    "reverse_kl": ({"divergence": "reverse_kl"}, 46, 8),
}
"""Options, most calls for one teacher, and for each teacher more."""


@pytest.mark.parametrize(("options", "most", "more"), CALLS.values(), ids=CALLS)
def test_calls_are_few(options, most, more):
    for count in (1, 2, 4):
        case = make_case(0, 100, count, 8, torch.float32, **options)
        labels = case.labels if {"hard_weight", "adjustment"} & set(options) else None
        case.student.requires_grad_(True)
        with LaunchCount() as counted:
            analytic_loss(case.student, case.teachers.half(), labels, **case.options).sum().backward()
        assert len(counted.names) <= most + (more * (count - 1) + 2 if count > 1 else 0), counted.names


def test_no_buffer_is_left_behind():
    """The gradient is all of size N x C that outlives the forward pass."""
    case = make_case(0, 100, 4, 8, torch.float32, temperature=4.0, hard_weight=0.3)
    case.student.requires_grad_(True)
    loss = analytic_loss(case.student, case.teachers, case.labels, **case.options)
    assert [gradient.shape for gradient in loss.grad_fn.gradients if gradient is not None] == [(8, 100)]


@pytest.mark.gpu
@pytest.mark.parametrize(("options", "most", "more"), CALLS.values(), ids=CALLS)
def test_launches_are_few_on_cuda(options, most, more):
    case = make_case(0, 100, 4, 8, torch.float32, **options).to("cuda")
    run_loss(analytic_loss, case)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        run_loss(analytic_loss, case)
        torch.cuda.synchronize()
    launches = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # A scatter, and the copy that a test makes, may be two.
    assert len(launches) <= most + 3 * more + 6, launches


@pytest.mark.gpu
@pytest.mark.parametrize(("options", "most", "more"), CALLS.values(), ids=CALLS)
def test_a_step_is_captured_in_a_cuda_graph(options, most, more):
    case = make_case(2, 100, 3, 8, torch.float32, **options).to("cuda")
    student = case.student.requires_grad_(True)

    def step():
        loss = analytic_loss(student, case.teachers, case.labels, **case.options)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        return loss.detach(), gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = [each.clone() for each in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in got:
        each.zero_()
    graph.replay()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
