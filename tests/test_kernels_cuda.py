"""The CUDA kernel of the fused loss: run by the host, compiled for devices, chosen, loaded, refused.

That it agrees with the reference is in the contracts (`LOSSES["cuda"]`); here are its own ways to go wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from contracts import (
    ADJUSTMENTS,
    COMBINATIONS,
    analytic_loss,
    assert_agrees,
    everything_at_once,
    make_case,
    run_loss,
)
from cuda_host import cuda_loss, library
from test_kernels_paths import KINDS
from test_kernels_rows import topk_rows

from coursepack.kernels import DenseRows, call, cuda, cuda_source, dispatch, nvrtc, soft_target_loss
from coursepack.kernels.request import check_request

PARTS = ("loss", "grad_student", "grad_weights")


def on(**host):
    """The path run by the host in a certain way."""
    return lambda *args, **options: cuda_loss(*args, host=host, **options)


def encoded_case(classes, combine, rows=5):
    case = everything_at_once(classes, 5, combine, torch.float32, rows=rows)
    return dataclasses.replace(case, teachers=[make(rows, classes) for make in KINDS.values()])


@pytest.mark.parametrize("classes", [1, 2, 17, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_every_kind_of_rows_at_every_length(classes, combine):
    case = encoded_case(classes, combine)
    numbers = {name: v.double() for name, v in case.options.items() if isinstance(v, torch.Tensor)}
    double = dataclasses.replace(case, student=case.student.double()).with_options(**numbers)
    got, want = run_loss(cuda_loss, case), run_loss(soft_target_loss, double)
    # float16 codes of a few units and temperatures to 100 decoded in float32: their error counts as well.
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-5, atol=3e-2)
    torch.testing.assert_close(got.grad_student.double(), want.grad_student, rtol=1e-4, atol=1e-4)
    beside = run_loss(analytic_loss, case)
    torch.testing.assert_close(got.grad_student, beside.grad_student, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.grad_weights, beside.grad_weights, rtol=1e-3, atol=1e-2)


ORDERS = [encoded_case(200, c, 6).with_options(adjustment=a) for c in COMBINATIONS for a in ADJUSTMENTS]
BARRIERS = [found.start() for found in re.finditer(r"__syncthreads\(\);", cuda_source.BODY)]


def is_racing(case, **host):
    """Whether the order of threads makes a difference."""
    try:
        up, down = (run_loss(on(downwards=order, **host), case) for order in (False, True))
    except RuntimeError as err:
        if "threads wait at different barriers" not in str(err):
            raise
        return True
    return not all(torch.equal(getattr(up, part), getattr(down, part)) for part in PARTS)


@pytest.mark.parametrize("classes", [33, 200, 1000])
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_the_order_of_threads_does_not_change_a_bit(combine, adjustment, classes):
    case = encoded_case(classes, combine).with_options(adjustment=adjustment)
    assert not is_racing(case, most_threads=1024)
    assert not is_racing(case, shared_bytes=0)


@pytest.mark.parametrize("start", BARRIERS)
def test_no_barrier_is_there_in_vain(start):
    """And the host sees one that is missing."""
    body = cuda_source.BODY[:start] + ";" + cuda_source.BODY[start + len("__syncthreads();") :]
    assert any(is_racing(case, body=body) for case in ORDERS)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize(
    "host", [{}, {"most_threads": 1024}, {"most_threads": 32}, {"shared_bytes": 0}], ids=str
)
def test_threads_and_place_of_the_rows_do_not_matter(host, combine, monkeypatch):
    monkeypatch.setattr(cuda, "MOST_BLOCKS", 2)  # fewer than rows
    assert_agrees(on(**host), everything_at_once(1500, 3, combine, torch.float32, rows=5))


def test_where_rows_are_kept(monkeypatch):
    kernel = mock.Mock(shared_bytes=8000)
    monkeypatch.setattr(nvrtc, "kernel_for", lambda _: kernel)
    monkeypatch.setattr(cuda, "MOST_BLOCKS", 2)
    seen = []
    for classes in (1000, 1001):
        student, teachers = torch.zeros(3, classes), torch.zeros(1, 3, classes)
        cuda.evaluate(student, None, check_request(student, teachers, None), True, False)
        seen.append(kernel.launch.call_args.args[1:4])
    assert seen == [(3, 256, 8000), (2, 256, 0)]
    assert [cuda.threads_for(c) for c in (1, 100, 21841, 10**6)] == [64, 64, 1024, 1024]


def test_bad_values_turn_their_row_to_nan():
    case = make_case(31, 33, 3, 9, torch.float32, adjustment="shift", hard_weight=0.2)
    ids = topk_rows(9, 5, 33).ids.to(torch.int64)
    good_rows = dataclasses.replace(topk_rows(9, 5, 33), ids=ids.to(torch.uint16))
    options = {
        "weights": torch.linspace(0.1, 1.5, 27).reshape(9, 3),
        "temperature": torch.full((9,), 2.0),
        "teacher_temperature": torch.full((3, 9), 3.0),
        "row_weight": torch.ones(9),
    }
    teachers = [case.teachers[0], good_rows, DenseRows(case.teachers[2].half())]
    clean = run_loss(cuda_loss, dataclasses.replace(case, teachers=teachers).with_options(**options))
    assert all(getattr(clean, part).isfinite().all() for part in PARTS)
    options = {name: value.clone() for name, value in options.items()}
    labels = case.labels.clone()
    labels[0], labels[1] = 33, -1
    options["weights"][2, 1], options["temperature"][3] = -1.0, 101.0
    options["row_weight"][4], options["teacher_temperature"][1, 5] = float("nan"), 0.0
    ids[6, 4] = ids[7, 4] = 33
    options["row_weight"][7], labels[7] = 0.0, -5
    teachers[1] = dataclasses.replace(good_rows, ids=ids.to(torch.uint16))
    bad = dataclasses.replace(case, teachers=teachers, labels=labels).with_options(**options)
    got = run_loss(cuda_loss, bad)
    for part in PARTS:
        values = getattr(got, part)
        assert values[:7].isnan().all(), part
        assert (values[7] == 0).all(), f"{part} of a row of weight zero"
        assert torch.equal(values[8], getattr(clean, part)[8]), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_of_any_dtype_and_stride(dtype):
    case = make_case(3, 20, 3, 4, torch.float32, combine="sum")
    wide = torch.rand(3, 4, generator=torch.Generator().manual_seed(5)).to(dtype).t()
    digits = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for weights in (wide, wide[0]):
        got = run_loss(cuda_loss, case.with_options(weights=weights))
        assert got.grad_weights.dtype == dtype
        want = run_loss(soft_target_loss, case.with_options(weights=weights))
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.grad_weights, want.grad_weights, rtol=digits, atol=1e-6)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_it_compiles_without_a_gpu(architecture):
    try:
        nvrtc.find_nvrtc()
    except nvrtc.KernelUnavailable as err:
        pytest.skip(str(err))
    options = [f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    code, log = nvrtc.compile_source(cuda_source.SOURCE, options)
    assert code.startswith(b"\x7fELF")
    assert "warning" not in log
    found = {
        name: int(number) for number, name in re.findall(r"(\d+) (registers|bytes smem|bytes spill)", log)
    }
    # 1024 threads share 65536 registers.
    assert found["registers"] <= 65536 // cuda_source.MOST_THREADS
    assert found["bytes smem"] <= nvrtc.STATIC_SHARED_BYTES
    assert found["bytes spill"] <= 64


def test_the_argument_is_what_a_launch_may_carry():
    assert cuda_source.ARGUMENT_BYTES <= 4096
    fields = 8 * (len(call.CALL.names) + cuda_source.MOST_TEACHERS * len(call.TEACHER.names))
    assert fields == cuda_source.ARGUMENT_BYTES


def test_a_source_with_a_mistake_says_where():
    try:
        nvrtc.find_nvrtc()
    except nvrtc.KernelUnavailable as err:
        pytest.skip(str(err))
    with pytest.raises(nvrtc.KernelUnavailable, match=r"(?s)NVRTC_ERROR_COMPILATION.*\.cu\(1\): error"):
        nvrtc.compile_source("__global__ void f() { g(); }", [])


@contextlib.contextmanager
def device(capability=(9, 0), capturing=False, version=torch.version.cuda or "13.0"):
    """A device as torch would tell of one, whose driver is the host's library."""
    found = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=232448)
    with contextlib.ExitStack() as stack:
        for name, value in {
            "get_device_properties": lambda _: found,
            "current_device": lambda: 0,
            "is_current_stream_capturing": lambda: capturing,
            "current_stream": lambda _: SimpleNamespace(cuda_stream=0),
            "device": lambda _: contextlib.nullcontext(),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(nvrtc, "find_driver", library))
        stack.enter_context(mock.patch.object(nvrtc, "_kernels", {}))
        stack.enter_context(mock.patch.dict("os.environ", {cuda.SWITCH: "1"}))
        stack.enter_context(mock.patch.object(torch.version, "cuda", version))
        yield


def request_on_cuda(student=None, teachers=None, **options):
    student = torch.zeros(2, 3) if student is None else student
    teachers = torch.zeros(1, 2, 3) if teachers is None else teachers
    request = check_request(student, teachers, None, **options)
    return dataclasses.replace(request, device=torch.device("cuda"))


def choose(student=None, teachers=None, **options):
    """The path and the reason, as for tensors on a GPU."""
    request = request_on_cuda(student, teachers, **options)
    return dispatch.choose(torch.zeros(2, 3) if student is None else student, request)


def test_it_is_compiled_loaded_and_launched():
    try:
        nvrtc.find_nvrtc()
    except nvrtc.KernelUnavailable as err:
        pytest.skip(str(err))
    case = make_case(1, 20, 3, 4, torch.float32, temperature=2.0)
    library()
    with device():
        assert choose() == ("cuda", "rows on a GPU, and COURSEPACK_CUDA_KERNEL is 1")
        kernel = nvrtc.kernel_for(torch.device("cuda"))
        assert kernel.shared_bytes == 232448 - 1024
        request = check_request(case.student, case.teachers, None, temperature=2.0)
        loss, grad, _ = cuda.evaluate(case.student, None, request, True, False)
    want = run_loss(soft_target_loss, case)
    torch.testing.assert_close(loss, want.loss)
    torch.testing.assert_close(grad, want.grad_student)


REASONS = {
    "float64": ({"student": torch.zeros(2, 3, dtype=torch.float64)}, "computes in float64"),
    "divergence": ({"divergence": "js"}, "no kernel for this divergence"),
    "teacher": ({"teachers": torch.zeros(1, 2, 3).double()}, "no kernel for one of the teachers"),
    "many": ({"teachers": torch.zeros(33, 2, 3)}, "more than 32 teachers"),
}


@pytest.mark.parametrize(("options", "reason"), REASONS.values(), ids=REASONS)
def test_what_it_cannot_do_is_left_to_torch(options, reason):
    with device():
        assert choose(**options) == ("analytic", reason)


def test_it_is_not_chosen_unless_asked_for(monkeypatch):
    monkeypatch.delenv(cuda.SWITCH, raising=False)
    assert choose() == ("analytic", "on CUDA, and COURSEPACK_CUDA_KERNEL is not 1")


UNAVAILABLE = {
    "no CUDA": ({"version": None}, "no CUDA kernel: torch is not built for CUDA"),
    "old": (
        {"capability": (6, 1)},
        r"no CUDA kernel: compute capability \(6, 1\), expected at least \(7, 0\)",
    ),
    "no NVRTC": (
        {"version": "99.1"},
        r"no CUDA kernel: libnvrtc\.so\.99 is neither known to the loader nor below",
    ),
    "capturing": ({"capturing": True}, "no CUDA kernel: not compiled before the capture of a CUDA graph"),
}


@pytest.mark.parametrize(("found", "reason"), UNAVAILABLE.values(), ids=UNAVAILABLE)
def test_where_it_cannot_be_had_the_reason_is_said(found, reason):
    with device(**found):
        path, said = choose()
        assert path == "analytic"
        assert re.match(reason, said), said
        assert choose() == (path, said)


def test_an_error_of_the_driver_is_a_reason(monkeypatch):
    library()
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: (b"not code", ""))
    with device():
        assert choose() == ("analytic", "no CUDA kernel: cuModuleLoadData gave error 200: no machine code")


def test_a_machine_without_a_driver_is_a_reason(monkeypatch):
    def none():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: (b"\x7fELF", ""))
    with device():
        monkeypatch.setattr(nvrtc, "find_driver", none)
        assert choose() == ("analytic", "no CUDA kernel: libcuda.so.1: cannot open shared object file")


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1, 10, 1000, 21841])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_device_computes_what_the_host_does(classes, combine):
    case = everything_at_once(classes, 4, combine, torch.float32)
    got, want = run_loss(cuda_loss, case.to("cuda")), run_loss(cuda_loss, case)
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got.grad_student.cpu(), want.grad_student, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_encoded_rows_on_a_device():
    case = encoded_case(1000, "mixture")
    moved = dataclasses.replace(case, teachers=[]).to("cuda")
    moved = dataclasses.replace(moved, teachers=[rows.to("cuda") for rows in case.teachers])
    got, want = run_loss(cuda_loss, moved), run_loss(cuda_loss, case)
    torch.testing.assert_close(got.grad_student.cpu(), want.grad_student, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_it_is_captured_in_a_graph_and_is_one_launch(monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "1")
    case = make_case(2, 100, 3, 8, torch.float32, temperature=2.0).to("cuda")
    student = case.student.requires_grad_(True)
    want = soft_target_loss(student, case.teachers, temperature=2.0).detach()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = soft_target_loss(student, case.teachers, temperature=2.0)
    loss.detach().zero_()
    graph.replay()
    assert torch.equal(loss.detach(), want)
    with torch.profiler.profile() as profile:
        soft_target_loss(student, case.teachers, temperature=2.0)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [e.name for e in kernels] == ["soft_target_loss"]
