"""Which path computes the fused loss, and that paths agree wherever they run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import pytest
import torch
from contracts import PRECISION, analytic_loss, assert_agrees, everything_at_once, make_case, run_loss
from spawned import run
from test_kernels_rows import bit_rows, int4_rows, int8_rows, packed_rows, topk_rows

from coursepack.kernels import (
    DenseRows,
    Int4Rows,
    Int8Rows,
    MixedLabels,
    compile_op,
    describe,
    dispatch,
    soft_target_loss,
    soft_targets,
)
from coursepack.kernels.spec import LossSpec, check_call

Z = torch.zeros(8, 10)
T = torch.zeros(2, 8, 10)


@pytest.fixture
def threads():
    """Gives torch its threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


REASONS = [
    (Z.double(), T, {}, "analytic: computes in float64"),
    (Z.to("meta"), T.to("meta"), {}, "analytic: not on the CPU"),
    (Z, T.double(), {}, "analytic: no kernel for one of the teachers"),
    (Z.view(8, 10)[:2], [bit_rows(2, (10,))], {}, "analytic: no kernel for one of the teachers"),
    (Z, T, {}, "kernel: rows on the CPU that the kernel reads; threads: 1 (too little work"),
    (Z.half(), [int8_rows((8, 10)), T[0].bfloat16()], {}, "kernel: "),
]


@pytest.mark.parametrize(("student", "teachers", "options", "text"), REASONS)
def test_describe_says_the_path_and_why(threads, student, teachers, options, text):
    torch.set_num_threads(2)
    assert str(describe(student, teachers, **options)).startswith(text)


def test_describe_says_how_many_threads_and_why(threads):
    torch.set_num_threads(2)
    large = torch.zeros(512, 100), torch.zeros(2, 512, 100)
    assert describe(*large).threads == 2
    assert "OpenMP" in describe(*large).threads_reason
    seen = []
    thread = threading.Thread(target=lambda: seen.append(describe(*large)))
    thread.start()
    thread.join()
    assert (seen[0].threads, seen[0].threads_reason) == (1, "not the main thread")
    torch.set_num_threads(1)
    assert describe(*large).threads_reason == "torch.get_num_threads() is 1"


def test_describe_refuses_what_the_loss_refuses():
    with pytest.raises(ValueError, match="temperature is 0"):
        describe(Z, T, temperature=0)


def test_without_numba_it_is_analytic(monkeypatch):
    monkeypatch.setattr(dispatch, "NUMBA_IS_INSTALLED", False)
    assert describe(Z, T).reason == "numba is not installed"


def test_a_tensor_subclass_is_left_to_torch():
    class Named(torch.Tensor):
        pass

    assert describe(Z.as_subclass(Named), T).path == "analytic"


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("combine", ["mixture", "sum"])
def test_threads_do_not_change_a_bit(count, combine, threads):
    case = everything_at_once(700, 3, combine, torch.float32, rows=97)
    torch.set_num_threads(1)
    want = run_loss(soft_target_loss, case)
    torch.set_num_threads(count)
    assert describe(case.student, case.teachers, case.labels, **case.options).threads == count
    got = run_loss(soft_target_loss, case)
    for part in ("loss", "grad_student", "grad_weights"):
        assert torch.equal(getattr(got, part), getattr(want, part))


def test_threads_of_python_may_call_it_at_once(threads):
    torch.set_num_threads(2)
    cases = [everything_at_once(300, 2, "mixture", torch.float32, rows=50 + i) for i in range(4)]
    wanted = [run_loss(soft_target_loss, case) for case in cases]
    wrong = []

    def work(case, want):
        for _ in range(10):
            got = run_loss(soft_target_loss, case)
            if not (torch.equal(got.loss, want.loss) and torch.equal(got.grad_student, want.grad_student)):
                wrong.append(case)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for case, want in zip(cases, wanted, strict=True):
        work(case, want)
    for worker in workers:
        worker.join()
    assert not wrong


KINDS = {
    "float16": lambda n, c: DenseRows(torch.randn(n, c, generator=torch.Generator().manual_seed(c)).half()),
    "bfloat16": lambda n, c: torch.randn(n, c, generator=torch.Generator().manual_seed(c)).bfloat16(),
    "int8": lambda n, c: int8_rows((n, c), seed=c),
    "int4": lambda n, c: int4_rows((n, c), seed=c),
    "topk": lambda n, c: topk_rows(n, min(5, c), c, seed=c),
    "topk of 32 bits": lambda n, c: topk_rows(n, min(3, c), c, seed=c, dtype="uint32"),
    "packed": lambda n, c: packed_rows(n, min(5, c), c, seed=c),
    "packed, most classes": lambda n, c: packed_rows(n, -(-9 * c // 10), c, seed=c),
}


@pytest.mark.parametrize("classes", [1, 2, 17, 63, 64, 65, 129, 1100])
@pytest.mark.parametrize("combine", ["mixture", "sum"])
def test_every_kind_of_rows_at_every_length(classes, combine):
    """Lengths around whole lots of vectors, beside the analytic path on the same rows."""
    case = everything_at_once(classes, len(KINDS), combine, torch.float32, rows=6)
    case = dataclasses.replace(case, teachers=[make(6, classes) for make in KINDS.values()])
    assert describe(case.student, case.teachers, case.labels, **case.options).path == "kernel"
    double = dataclasses.replace(case, student=case.student.double())
    double = double.with_options(
        **{name: v.double() for name, v in case.options.items() if isinstance(v, torch.Tensor)}
    )
    got, want = run_loss(soft_target_loss, case), run_loss(soft_target_loss, double)
    # float16 codes of a few units and temperatures to 100 decoded in float32: their error counts as well.
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-5, atol=3e-2)
    torch.testing.assert_close(got.grad_student.double(), want.grad_student, rtol=1e-4, atol=1e-4)
    bits = run_loss(analytic_loss, case)
    torch.testing.assert_close(got.grad_student, bits.grad_student, rtol=1e-4, atol=1e-4)


def test_one_class_costs_nothing():
    student = torch.randn(5, 1, requires_grad=True)
    loss = soft_target_loss(student, torch.randn(3, 5, 1), temperature=100.0)
    loss.sum().backward()
    assert loss.abs().max() <= 1e-7
    assert (student.grad == 0).all()


def test_ids_outside_are_refused_and_those_of_rows_not_read_are_not():
    rows = topk_rows()
    ids = rows.ids.to(torch.int64)
    ids[6, 2] = 40
    bad = dataclasses.replace(rows, ids=ids.to(torch.uint16))
    with pytest.raises(ValueError, match=r"ids holds 40 in row 6, expected class ids 0\.\.36"):
        soft_target_loss(torch.zeros(8, 37), [bad])
    weight = torch.ones(8)
    weight[6] = 0
    assert soft_target_loss(torch.zeros(8, 37), [bad], row_weight=weight).isfinite().all()


def test_logits_seen_through_a_lazy_negation():
    pair = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    lazy = torch.complex(pair[0], pair[1]).conj().imag
    assert lazy.is_neg()
    teachers = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(soft_target_loss(lazy, teachers), soft_target_loss(-pair[1], teachers))


def test_an_argument_is_never_changed():
    case = everything_at_once(70, 3, "mixture", torch.float32)
    before = [case.student.clone(), case.teachers.clone(), case.labels.clone()]
    run_loss(soft_target_loss, case)
    for kept, now in zip(before, (case.student, case.teachers, case.labels), strict=True):
        assert torch.equal(kept, now)


COMPILED = {
    "dense": lambda: make_case(0, 40, 3, 6, torch.float32, temperature=4.0, hard_weight=0.3),
    "weights per row": lambda: make_case(
        2, 40, 3, 6, torch.float32, weights=torch.rand(6, 3), combine="sum", row_weight=torch.rand(6)
    ),
    "weights, temperatures of both kinds, shift": lambda: make_case(
        3,
        40,
        2,
        6,
        torch.float32,
        weights=torch.rand(2),
        temperature=torch.full((6,), 3.0),
        teacher_temperature=[1.0, 3.0],
        adjustment="shift",
    ),
    "half": lambda: make_case(4, 40, 2, 6, torch.float16, temperature=2.0),
    "mixed": lambda: _mixed(make_case(5, 40, 2, 6, torch.float32, hard_weight=0.5)),
    "encoded": lambda: dataclasses.replace(
        make_case(6, 37, 2, 8, torch.float32),
        teachers=[int8_rows((8, 37)), topk_rows(), packed_rows(), int4_rows((8, 37))],
    ),
    "reverse_kl": lambda: make_case(7, 40, 2, 6, torch.float32, divergence="reverse_kl", temperature=2.0),
}


def _mixed(case):
    lam = torch.linspace(0, 1, 6)
    return dataclasses.replace(case, labels=MixedLabels(case.labels, case.labels.flip(0), lam))


@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_a_compiled_step_equals_an_eager_one(make):
    case = make()

    def loss(student, teachers, labels, **options):
        # Something to fuse with on both sides.
        return soft_target_loss(student * 1.0, teachers, labels, **options) * 1.0

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = run_loss(compiled, case), run_loss(soft_target_loss, case)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_student, want.grad_student)
    if want.grad_weights is not None:
        torch.testing.assert_close(got.grad_weights, want.grad_weights)


# torch's own checks look at the gradient of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_the_operator_passes_opcheck(make, monkeypatch):
    case = make()
    seen = []
    monkeypatch.setattr(compile_op, "compute", lambda *args: seen.append(args) or (Z[:, 0], Z, Z))
    student = case.student.requires_grad_(True)
    options = dict(case.options)
    if "weights" in options:
        options["weights"] = options["weights"].clone().requires_grad_(True)
    compile_op.call_op(student, check_call(student, case.teachers, case.labels, LossSpec(**options)))
    monkeypatch.undo()
    torch.library.opcheck(compile_op.compute, seen[0])


IN_TORCH = {
    "float64, mixed": lambda: _mixed(make_case(5, 40, 2, 6, torch.float64, hard_weight=0.5)),
    "js of rows": lambda: dataclasses.replace(
        make_case(6, 37, 2, 8, torch.float64, divergence="js", temperature=torch.linspace(1, 4, 8)),
        teachers=[int8_rows((8, 37)), topk_rows(), packed_rows(), int4_rows((8, 37))],
    ),
    "reverse_kl": lambda: make_case(
        8,
        40,
        2,
        6,
        torch.float64,
        divergence="reverse_kl",
        weights=torch.rand(2).double(),
        adjustment="shift",
    ),
}


# torch 2.11 makes one of our Function while it traces, and warns of it.
TRACED = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@TRACED
@pytest.mark.parametrize("make", IN_TORCH.values(), ids=IN_TORCH)
def test_what_no_kernel_does_is_one_graph_too(make):
    case = make()
    assert describe(case.student, case.teachers, case.labels, **case.options).path == "analytic"
    torch._dynamo.reset()
    compiled = torch.compile(soft_target_loss, fullgraph=True, backend="aot_eager")
    got, want = run_loss(compiled, case), run_loss(soft_target_loss, case)
    for part in ("loss", "grad_student", "grad_weights"):
        if getattr(want, part) is not None:
            torch.testing.assert_close(getattr(got, part), getattr(want, part), rtol=1e-5, atol=1e-6)


def test_soft_targets_are_one_graph():
    rows = [int8_rows((8, 37)), topk_rows(), packed_rows(), int4_rows((8, 37))]
    options = {"labels": torch.arange(8), "weights": torch.rand(8, 4), "adjustment": "shift"}
    torch._dynamo.reset()
    compiled = torch.compile(soft_targets, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, **options), soft_targets(rows, **options))


BAD = {
    "labels": {"labels": torch.tensor([0, 10, -100, 2]), "hard_weight": 0.5},
    "weights": {"weights": torch.tensor([[0.5, 0.5], [-0.1, 0.5], [0.0, 0.0], [1.0, 1.0]])},
    "temperature": {"temperature": torch.tensor([1.0, 0.0, 100.0, 4.0])},
}


@TRACED
@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_in_a_graph_of_torch_a_bad_value_turns_its_row_to_nan(options):
    student, teachers = Z[:4].double(), T[:, :4].double()
    with pytest.raises(ValueError, match="holds"):
        soft_target_loss(student, teachers, **options)
    torch._dynamo.reset()
    compiled = torch.compile(soft_target_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(student, teachers, **options)
    assert loss.isnan().tolist() == [False, True, False, False]


def test_under_compile_the_operator_is_used():
    seen = []

    @torch.compile(fullgraph=True, backend="eager")
    def step(student, teachers):
        seen.append(describe(student, teachers).path)
        return soft_target_loss(student, teachers).sum()

    step(Z, T)
    assert seen == ["op"]
    assert describe(Z, T).path == "kernel"


# The process is a fork itself, of one that never computed.
CHILD = """
import os, signal, torch
from coursepack.kernels import describe, soft_target_loss
from coursepack.kernels.cpu import threads
threads._IMPORTED_IN = os.getpid()
torch.set_num_threads(2)
z, t = torch.randn(300, 200), torch.randn(2, 300, 200)
want = soft_target_loss(z, t)
assert describe(z, t).threads == 2, describe(z, t)
child = os.fork()
if child == 0:
    signal.alarm(60)  # rather than wait for ever for threads that a fork leaves behind
    told = describe(z, t)
    same = bool((soft_target_loss(z, t).numpy() == want.numpy()).all())
    os._exit(0 if (told.threads, told.threads_reason) == (1, "forked child") and same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (soft_target_loss(z, t).numpy() == want.numpy()).all()
"""


def test_a_forked_child_computes_alone():
    result = run("code", CHILD)
    assert result.returncode == 0, result.stderr


# As on a CPU without F16C and AVX.
BARE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import test_kernels_loss as tests
from contracts import make_case, assert_agrees
from coursepack.kernels import soft_target_loss
from test_kernels_convert import check_every_half
check_every_half()
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    case = make_case(4, 100, 3, 6, torch.float32, temperature=4.0, hard_weight=0.2, adjustment="shift")
    rows = [case.teachers[0].half(), case.teachers[1].bfloat16(), case.teachers[2]]
    assert_agrees(soft_target_loss, tests.replace(case, teachers=rows, student=case.student.to(dtype)))
assert not [name for name in sys.modules if name.startswith("coursepack.") and "jit_decode" in name]
"""


@pytest.mark.integration
def test_without_float16_instructions(tmp_path):
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", BARE, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_functions_are_compiled_where_numba_may_keep_nothing(monkeypatch):
    from coursepack.kernels.cpu.jit_base import compiled, jit, types

    def nowhere(self):
        raise OSError("read-only")

    def double(value):
        return 2 * value

    monkeypatch.setattr(numba.core.caching._CacheLocator, "ensure_cache_path", nowhere)
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(double)
    assert jit(double)(4) == 8
    assert compiled(types.int64(types.int64))(double).ctypes(4) == 8


def test_precision_of_float32_is_that_of_the_design():
    assert PRECISION[torch.float32] == 1e-6
    case = everything_at_once(1000, 4, "mixture", torch.float32)
    assert_agrees(soft_target_loss, case)


def test_rows_of_any_stride():
    base = torch.randn(6, 90, generator=torch.Generator().manual_seed(3))
    wide = torch.randint(0, 255, (6, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    affine = torch.rand(12, 2).half()
    rows = Int8Rows(wide[:, 3:80], affine[::2])
    student = torch.randn(6, 77)
    got = soft_target_loss(student, [rows, base[:, 3:80], base.t().contiguous().t()[:, 3:80]])
    plain = Int8Rows(wide[:, 3:80].clone(), affine[::2].clone())
    want = soft_target_loss(student, [plain, base[:, 3:80].clone(), base[:, 3:80].clone()])
    assert torch.equal(got, want)
    own, scale = wide[:, 5:44], torch.rand(12, 2).half()[::2]
    got = soft_target_loss(student, [Int4Rows(own, scale, 77)])
    assert torch.equal(got, soft_target_loss(student, [Int4Rows(own.clone(), scale.clone(), 77)]))


@pytest.mark.parametrize("classes", [1, 37, 128, 1000])
@pytest.mark.parametrize("adjustment", [["none", "shift", "smooth"], "shift"])
def test_the_compiled_mixture_is_the_mixture(classes, adjustment):
    case = everything_at_once(classes, 3, "mixture", torch.float32)
    names = ("weights", "temperature", "teacher_temperature", "smoothing")
    options = {name: case.options[name] for name in names} | {"adjustment": adjustment}
    half, kept = case.teachers[0].half(), min(5, classes)
    rows = [half, int8_rows((4, classes)), topk_rows(4, kept, classes)]
    others = [half, packed_rows(4, kept, classes), packed_rows(4, classes, classes)]
    fours = [half, int4_rows((4, classes)), int4_rows((4, classes), seed=1)]
    for teachers in (case.teachers, rows, others, fours):
        got = soft_targets(teachers, case.labels, **options)
        with_gradient = {**options, "weights": options["weights"].clone().requires_grad_(True)}
        want = soft_targets(teachers, case.labels, **with_gradient)
        assert want.requires_grad
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach(), rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="labels holds"):
        soft_targets(case.teachers, torch.full((4,), classes), **options)


def test_compiled_code_is_told_by_all_the_sources():
    from coursepack.kernels.cpu import jit_base, jit_divergences, jit_loss, jit_mixture, jit_stats

    for module in (jit_divergences, jit_loss, jit_mixture, jit_stats):
        (cell,) = module.run._pyfunc.__closure__
        assert cell.cell_contents == jit_base.SOURCES > 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-42])
def test_tiny_temperatures(temperature):
    case = make_case(7, 40, 3, 6, torch.float32, scale=1e4, temperature=temperature)
    case = case.with_options(weights=torch.full((6, 3), 0.25))
    case.teachers[1] = case.student
    result = run_loss(soft_target_loss, case)
    assert all(part.isfinite().all() for part in (result.loss, result.grad_student, result.grad_weights))
    if temperature == 1e-3:
        assert_agrees(soft_target_loss, case)
