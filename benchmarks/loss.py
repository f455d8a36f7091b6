"""Fused loss compared with torch: time, memory and error.

    python benchmarks/loss.py [--json FILE] [--quick]

Each step is forward and backward of the mean over N samples at T = 4, with gradient to the student and
float16 teachers. Every call reads other buffers, which together exceed the cache. `naive` is the direct torch
implementation, `compile` is torch.compile of it, and `analytic` computes the gradient explicitly in torch
operations. The limits are `floor`, a compiled loop that reads every input once and writes a gradient once;
`exponentials`, one that also decodes every logit and computes its exponential; and `autograd`, an autograd
Function that computes nothing. gpu.py measures the loss on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from _harness import PATIENCE, Threads, alternate, arguments, exact, measure, ratios, report, row
from _loss_limits import Loop, only_autograd
from torch import Tensor

from coursepack.allocator import keep_freed_memory
from coursepack.data.encodings import parse_encoding
from coursepack.kernels import dispatch, soft_target_loss, soft_targets, teacher_stats
from coursepack.kernels.cpu import native
from coursepack.kernels.spec import LossSpec, check_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Row, Seconds

TEMPERATURE = 4.0
CELLS = ((128, 100, 4), (256, 1000, 1), (256, 1000, 4), (256, 1000, 8), (64, 21841, 2))
COLD_BYTES = 640 << 20
SMALL = 20_000
"""Number of logits of a batch below which the bar is another one."""


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    cells: tuple[tuple[int, int, int], ...] = CELLS
    encoded: tuple[tuple[int, int, int], ...] = ((256, 1000, 4), (64, 21841, 2))
    rounds: int = 40
    cold_bytes: int = COLD_BYTES
    memory_rows: int = 8192
    memory_rounds: int = 6
    compiled: bool = True
    patience: float = PATIENCE


FULL = Size()
QUICK = Size(
    ((16, 100, 2),), ((16, 100, 2),), rounds=2, cold_bytes=1 << 20, memory_rows=256, memory_rounds=1,
    compiled=False, patience=0,
)  # fmt: skip


def naive(student_logits: Tensor, teachers: Tensor) -> Tensor:
    """Return the loss from a direct implementation in torch."""
    probs = torch.softmax(teachers.float() / TEMPERATURE, dim=2).mean(0)
    log_probs = torch.log_softmax(student_logits / TEMPERATURE, dim=1)
    return F.kl_div(log_probs, probs, reduction="none").sum(1).mul(TEMPERATURE**2).mean()


def ours(student_logits: Tensor, teachers: Any, divergence: str = "kl") -> Tensor:
    return soft_target_loss(
        student_logits, teachers, temperature=TEMPERATURE, divergence=divergence, reduction="mean"
    )


def analytic(student_logits: Tensor, teachers: Any) -> Tensor:
    choice = (dispatch.ANALYTIC, "asked for by the benchmark")
    with mock.patch.object(dispatch, "choose", return_value=choice):
        return ours(student_logits, teachers)


class Kernel:
    """Kernel alone, without checks and autograd."""

    def __init__(self) -> None:
        self._calls: dict[int, Any] = {}

    def __call__(self, student: Tensor, teachers: Tensor) -> None:
        if teachers.data_ptr() not in self._calls:
            call = check_call(student, teachers, None, LossSpec(temperature=TEMPERATURE))
            self._calls[teachers.data_ptr()] = call
        native.evaluate(self._calls[teachers.data_ptr()], student, None, True, False)


class Cold:
    """Inputs in many copies that exceed the cache; each call uses the next copy."""

    def __init__(self, rows: int, classes: int, count: int, cold_bytes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = torch.randn(rows, classes, generator=generator).mul_(3)
        self.teachers = torch.randn(count, rows, classes, generator=generator).mul_(3).half()
        copies = max(2, cold_bytes // (self.student.nbytes + self.teachers.nbytes))
        self.students = [self.student.clone().requires_grad_(True) for _ in range(copies)]
        self.all_teachers: list[Any] = [self.teachers.clone() for _ in range(copies)]
        self.place = 0

    def _next(self) -> tuple[Tensor, Any]:
        self.place = (self.place + 1) % len(self.students)
        return self.students[self.place], self.all_teachers[self.place]

    def step(self, loss: Callable[[Tensor, Any], Tensor]) -> Callable[[], None]:
        """Return a function that runs forward and backward."""

        def run() -> None:
            student, teachers = self._next()
            loss(student, teachers).backward()
            student.grad = None

        return run

    def forward(self, function: Callable[[Tensor, Any], Any]) -> Callable[[], None]:
        """Return a function that runs forward only, on logits without gradient."""

        def run() -> None:
            student, teachers = self._next()
            function(student.detach(), teachers)

        return run


def limit(seconds: Seconds, under: str) -> list[float]:
    """Return the time of exponentials and autograd over that of a variant, for each round."""
    parts = zip(seconds["exponentials"], seconds["autograd"], seconds[under], strict=True)
    return [(exponentials + autograd) / other for exponentials, autograd, other in parts]


def speed(cell: tuple[int, int, int], threads: int, size: Size) -> list[Row]:
    """Measure every variant's time for one cell of the table, and ours over each."""
    rows, classes, count = cell
    cold = Cold(rows, classes, count, size.cold_bytes)
    variants = {
        "ours": cold.step(ours),
        "naive": cold.step(naive),
        "analytic": cold.step(analytic),
        "kernel": cold.forward(Kernel()),
        "floor": cold.forward(Loop("floor")),
        "exponentials": cold.forward(Loop("exponentials")),
        "autograd": cold.step(only_autograd),
    }
    if size.compiled:
        torch._dynamo.reset()
        variants["compile"] = cold.step(torch.compile(naive, fullgraph=True, dynamic=False))
        variants["ours under compile"] = cold.step(torch.compile(ours, fullgraph=True, dynamic=False))
    config = {"N": rows, "C": classes, "K": count, "threads": threads}
    name = f"({rows},{classes},{count}) {threads} thread{'s' if threads > 1 else ''}"
    many = count >= 4
    # Python and autograd take half of the time of a small batch.
    naive_bar = "<= 0.50" if rows * classes < SMALL else {1: "<= 0.40", 2: "<= 0.25"}[threads]
    bars = {
        ("ours", "naive"): naive_bar if many else None,
        ("ours", "compile"): {1: "<= 0.55", 2: "<= 0.40"}[threads] if many else None,
        ("ours", "analytic"): None,
        ("ours under compile", "compile"): None,
        ("kernel", "floor"): "<= 4",
        ("ours", "floor"): "<= 5.5",
    }

    def rows_of(seconds: Seconds) -> list[Row]:
        times = [
            row(f"{name} {which}", [1e6 * s for s in seconds[which]], "us", config) for which in variants
        ]
        compared = [
            row(f"{name} {over} / {under}", ratios(seconds, over, under), "ratio", config, bar)
            for (over, under), bar in bars.items()
            if over in variants and under in variants
        ]
        limits = [
            row(f"{name} (exponentials + autograd) / {under}", limit(seconds, under), "ratio", config)
            for under in ("naive", "compile")
            if under in variants
        ]
        return times + compared + limits

    return measure(variants, size.rounds, rows_of, patience=size.patience)


def encoded(cell: tuple[int, int, int], threads: int, size: Size) -> list[Row]:
    """Measure teachers as int8, int4 and top-k rows, as stores give them, over the same as float16 rows."""
    rows, classes, count = cell
    cold = {
        name: Cold(rows, classes, count, size.cold_bytes) for name in ("float16", "int8", "int4", "topk:50")
    }
    for name in cold:
        encoding = parse_encoding(name)
        values = cold[name].teachers.float().numpy()
        labels = values.argmax(2)
        places = np.arange(rows)
        teachers = []
        for k in range(count):
            parts = encoding.encode(values[k], places, labels[k])
            teachers.append({key: torch.from_numpy(part) for key, part in parts.items()})
        cold[name].all_teachers = [
            [encoding.rows({key: part.clone() for key, part in t.items()}, (classes,)) for t in teachers]
            for _ in cold[name].students
        ]
    config = {"N": rows, "C": classes, "K": count, "threads": threads}
    name = f"({rows},{classes},{count}) {threads} thread{'s' if threads > 1 else ''}"

    def rows_of(seconds: Seconds) -> list[Row]:
        title = f"{name} {{}} rows / float16 rows".format
        return [
            row(title(which), ratios(seconds, which, "float16"), "ratio", config, "<= 1.0")
            for which in ("int8", "int4", "topk:50")
        ]

    variants = {name: each.step(ours) for name, each in cold.items()}
    return measure(variants, size.rounds, rows_of, patience=size.patience)


def companions(size: Size) -> list[Row]:
    """Measure the mixture and the teachers' statistics, compiled and in torch."""
    rows, classes, count = size.encoded[0]
    cold = Cold(rows, classes, count, size.cold_bytes)
    labels = cold.student.argmax(1)
    functions = {
        "soft_targets": lambda _, teachers: soft_targets(teachers, temperature=TEMPERATURE),
        "teacher_stats": lambda student, teachers: teacher_stats(teachers, labels, student_logits=student),
    }
    variants = {name: cold.forward(function) for name, function in functions.items()}
    for name in functions:
        variants[f"{name} in torch"] = without_numba(variants[name])
    seconds = alternate(variants, size.rounds)
    config = {"N": rows, "C": classes, "K": count, "threads": 1}
    result = [row(name, [1e6 * s for s in values], "us", config) for name, values in seconds.items()]
    both = [(name, f"{name} in torch") for name in functions]
    return result + [row(f"{a} / in torch", ratios(seconds, a, b), "ratio", config) for a, b in both]


def divergences(size: Size) -> list[Row]:
    """Measure the other divergences, compiled and as a direct implementation in torch."""
    rows, classes, count = size.encoded[0]
    cold = Cold(rows, classes, count, size.cold_bytes)
    direct = {"reverse_kl": naive_reverse_kl, "js": naive_js, "mse": naive_mse}
    variants = {}
    for name, function in direct.items():
        variants[name] = cold.step(partial(ours, divergence=name))
        variants[f"{name} in torch"] = cold.step(function)
    config = {"N": rows, "C": classes, "K": count, "threads": 1}
    seconds = alternate(variants, size.rounds)
    result = [row(name, [1e6 * s for s in values], "us", config) for name, values in seconds.items()]
    return result + [
        row(f"{name} / in torch", ratios(seconds, name, f"{name} in torch"), "ratio", config)
        for name in direct
    ]


def naive_reverse_kl(student_logits: Tensor, teachers: Tensor) -> Tensor:
    log_p = torch.softmax(teachers.float() / TEMPERATURE, dim=2).mean(0).log()
    log_q = torch.log_softmax(student_logits / TEMPERATURE, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mul(TEMPERATURE**2).mean()


def naive_js(student_logits: Tensor, teachers: Tensor) -> Tensor:
    p = torch.softmax(teachers.float() / TEMPERATURE, dim=2).mean(0)
    q = torch.softmax(student_logits / TEMPERATURE, dim=1)
    log_m = ((p + q) / 2).log()
    return (p * (p.log() - log_m) + q * (q.log() - log_m)).sum(1).mul(TEMPERATURE**2 / 2).mean()


def naive_mse(student_logits: Tensor, teachers: Tensor) -> Tensor:
    return F.mse_loss(student_logits, teachers.float().mean(0))


def without_numba(run: Callable[[], None]) -> Callable[[], None]:
    def other() -> None:
        with mock.patch.object(dispatch, "NUMBA_IS_INSTALLED", False):
            run()

    return other


FIRST_CALL = """
import time, torch
from coursepack.kernels import soft_target_loss
student, teachers = torch.randn(4, 8, requires_grad=True), torch.randn(2, 4, 8)
started = time.perf_counter()
soft_target_loss(student, teachers).sum().backward()
print(time.perf_counter() - started)
"""


EMPTY_FUNCTION = """
import time, torch
started = time.perf_counter()
import numba

@numba.cfunc(numba.types.void(numba.types.voidptr))
def run(data):
    pass

run.address
print(time.perf_counter() - started)
"""


def first_call() -> list[Row]:
    """Measure the seconds of a process's first call, which imports numba, with an empty and a full cache.

    numba itself sets limits: what it takes without the optimization of LLVM, and for a function that does
    nothing.
    """
    variants: list[tuple[str, str, dict[str, str], str | None]] = [
        ("first call, cold, LLVM does not optimize", FIRST_CALL, {"NUMBA_OPT": "0"}, None),
        ("first call, cold", FIRST_CALL, {}, "<= 4"),
        ("first call, cached", FIRST_CALL, {}, "<= 0.5"),
        ("first call of numba, an empty function", EMPTY_FUNCTION, {}, None),
    ]
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for name, program, options, bar in variants:
            environment = os.environ | {"NUMBA_CACHE_DIR": folder} | options
            seconds = []
            for _ in range(6):
                if "cold" in name:
                    shutil.rmtree(folder)
                command = [sys.executable, "-c", program]
                done = subprocess.run(command, env=environment, check=True, capture_output=True)
                seconds.append(float(done.stdout))
            cache = "cold" if "cold" in name else "cached"
            result.append(row(name, seconds, "s", {"cache": cache}, bar))
    return result


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the peak increase of this process's resident memory during `step`, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def memory(size: Size) -> list[Row]:
    """Measure the peak extra memory of forward and backward, in units of the student's logits."""
    classes, result = 1000, []
    for count in (1, 4, 8):
        cold = Cold(size.memory_rows, classes, count, 0)
        variants = {"ours": (ours, "<= 1.1"), "naive": (naive, None)}
        if size.compiled:
            torch._dynamo.reset()
            compiled = torch.compile(ours, fullgraph=True, dynamic=False)
            variants["ours under compile"] = (compiled, "<= 2.1")
        for which, (loss, bar) in variants.items():
            step = cold.step(loss)
            step()
            extra = [peak_bytes(step) / cold.student.nbytes for _ in range(size.memory_rounds)]
            config = {"N": size.memory_rows, "C": classes, "K": count, "threads": 2}
            result.append(row(f"peak extra memory, K={count}, {which}", extra, "x N C 4 bytes", config, bar))
    return result


def errors() -> list[Row]:
    """Measure errors against float64, in units of their bounds (docs/loss.md)."""
    result = []
    for temperature in (1.0, 4.0, 20.0, 100.0):
        loss_error, grad_error = [], []
        for seed, (classes, scale) in enumerate(((10, 3), (1000, 1), (1000, 10), (21841, 3))):
            generator = torch.Generator().manual_seed(seed)
            teachers = torch.randn(4, 16, classes, generator=generator).mul_(scale).half()
            student = torch.randn(16, classes, generator=generator).mul_(scale).requires_grad_(True)
            double = student.detach().double().requires_grad_(True)
            got = soft_target_loss(student, teachers, temperature=temperature)
            want = soft_target_loss(double, teachers.double(), temperature=temperature)
            got.sum().backward()
            want.sum().backward()
            p = torch.softmax(teachers.double() / temperature, 2).mean(0)
            log_q = torch.log_softmax(double.detach() / temperature, 1)
            size = 1 + temperature**2 * (torch.special.xlogy(p, p).abs() + p * log_q.abs()).sum(1)
            grad_size = temperature * (log_q.exp().amax(1) + p.amax(1))
            loss_error += ((got - want).detach().abs() / (1e-6 * size)).tolist()
            worst = (student.grad - double.grad).abs().amax(1)
            grad_error += (worst / (1e-6 * grad_size)).tolist()
        bar = "<= 1.0" if temperature <= 20 else None
        config = {"T": temperature, "rows": len(loss_error)}
        for what, values in (("loss", loss_error), ("gradient", grad_error)):
            # The bar applies to the worst row, not the median.
            title = f"largest error of the {what} / bound, T={temperature:g}"
            result.append(exact(title, max(values), "ratio", config, bar))
    return result


def main() -> None:
    chosen = arguments("The fused loss beside torch.").parse_args()
    size = QUICK if chosen.quick else FULL
    keep_freed_memory()
    rows = []
    for threads in (1, 2):
        with Threads(threads):
            for cell in size.cells:
                rows += speed(cell, threads, size)
            for cell in size.encoded:
                rows += encoded(cell, threads, size)
    with Threads(1):
        rows += companions(size)
        rows += divergences(size)
    if not chosen.quick:
        rows += first_call()
    with Threads(2):
        rows += memory(size)
        rows += errors()
    report("The fused loss", rows, chosen.json)


if __name__ == "__main__":
    main()
