"""Fused loss on a device beside a copy of the same bytes, torch and torch.compile; decoding of encodings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import exact, ratios, row
from loss import naive, ours
from torch import Tensor

from coursepack.data.encodings import parse_encoding
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from _gpu import Device
    from _harness import Row

    Loss = Callable[[Tensor, Any], Tensor]
    Cell = tuple[int, int, int]

MAX_COPIES = 64
CACHE = 32 << 20
"""Bytes of cache that inputs exceed on the CPU; a GPU says how much it has."""
ENCODINGS = ("float16", "int8", "topk:10", "topk:50")


class Cold:
    """Inputs in copies that together exceed the cache; each call uses the next copy."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        rows, classes, count = cell
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": generator}
        student = torch.randn(rows, classes, **options).mul_(3)
        teachers = torch.randn(count, rows, classes, **options).mul_(3).half()
        # Every input is read once, and the gradient is written once.
        self.moved = 2 * student.nbytes + teachers.nbytes
        is_cuda = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if is_cuda else CACHE
        self.copies = max(2, min(MAX_COPIES, 4 * cache // self.moved))
        self.students = [student.clone().requires_grad_(True) for _ in range(self.copies)]
        self.teachers: list[Any] = [teachers.clone() for _ in range(self.copies)]

    def steps(self, loss: Loss) -> None:
        """Run forward and backward for every copy."""
        for student, teachers in zip(self.students, self.teachers, strict=True):
            torch.autograd.grad(loss(student, teachers), student)


class Copies:
    """Copies of as many bytes as a loss moves: half are read and half are written."""

    def __init__(self, moved: int, copies: int, device: torch.device) -> None:
        self._pairs = [
            tuple(torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
            for _ in range(copies)
        ]

    def run(self) -> None:
        """Copy every buffer."""
        for origin, target in self._pairs:
            target.copy_(origin)


def losses(device: Device, cell: Cell, rounds: int, *, compiled: bool) -> list[Row]:
    """Measure forward and backward of the mean loss at T = 4, launched one by one and from CUDA graphs."""
    cold = Cold(cell, device.device)
    copies = Copies(cold.moved, cold.copies, device.device)
    steps = {"ours": lambda: cold.steps(ours), "naive": lambda: cold.steps(naive), "copy": copies.run}
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(naive, fullgraph=True, dynamic=False)
        try:
            cold.steps(fast)
            steps["compile"] = lambda: cold.steps(fast)
        except Exception as error:  # it needs Triton, and compilers that a machine may not have
            device.leave_out("loss under torch.compile", str(error).strip().partition("\n")[0])
    else:
        device.leave_out("loss under torch.compile", "compilation takes a minute: run without --quick")
    variants = {name: device.timed(run, cold.copies) for name, run in steps.items()}
    if device.is_cuda:
        for name, run in steps.items():
            try:
                variants[f"{name} in a graph"] = device.timed(device.graph_of(run), cold.copies)
            except RuntimeError as error:
                device.leave_out(f"loss {cell}, {name} in a graph", str(error).partition("\n")[0])
    else:
        device.leave_out("loss in CUDA graphs", "the device is the CPU")
    seconds = device.alternate(variants, rounds)
    name = "loss ({},{},{})".format(*cell)
    config = {"N": cell[0], "C": cell[1], "K": cell[2], "bytes": cold.moved, "copies": cold.copies}
    rows = [row(f"{name} {each}", [1e6 * s for s in taken], "us", config) for each, taken in seconds.items()]
    pairs = [
        (f"{over}{how}", f"{under}{how}")
        for how in ("", " in a graph")
        for over, under in (("ours", "copy"), ("ours", "naive"), ("ours", "compile"), ("compile", "copy"))
    ]
    rows += [
        row(f"{name} {over} / {under}", ratios(seconds, over, under), "ratio", config)
        for over, under in pairs
        if over in seconds and under in seconds
    ]
    for each in ("ours", "naive"):
        launched, waited = device.launches(steps[each], cold.copies)
        rows.append(exact(f"{name} {each}, launches", launched, "launches", config))
        rows.append(exact(f"{name} {each}, synchronizations", waited, "synchronizations", config))
    return rows


def encodings(device: Device, cell: Cell, rounds: int) -> list[Row]:
    """Measure the copy, the decoding, and the loss of encoded rows, over those of float16 rows."""
    rows, classes, count = cell
    rng = np.random.default_rng(0)
    values = (3 * rng.standard_normal((count, rows, classes))).astype(np.float32)
    generator = torch.Generator(device.device).manual_seed(0)
    student = torch.randn(rows, classes, device=device.device, generator=generator).requires_grad_(True)
    hosts = {name: [_encoded(name, each) for each in values] for name in ENCODINGS}
    if device.is_cuda:
        hosts = {name: [_pinned(each) for each in of_name] for name, of_name in hosts.items()}
    else:
        device.leave_out("encodings: copy to the device", "the device is the CPU")
    there = {name: [each.to(device.device) for each in of_name] for name, of_name in hosts.items()}
    parts: dict[str, dict[str, Callable[[], float]]] = {
        "decode": {
            name: device.timed(lambda of_name=of_name: [decode(each) for each in of_name])
            for name, of_name in there.items()
        },
        "loss": {
            name: device.timed(lambda of_name=of_name: torch.autograd.grad(ours(student, of_name), student))
            for name, of_name in there.items()
        },
    }
    if device.is_cuda:
        parts["copy"] = {
            name: device.timed(
                lambda of_name=of_name: [each.to(device.device, non_blocking=True) for each in of_name]
            )
            for name, of_name in hosts.items()
        }
    found = []
    for what, variants in parts.items():
        seconds = device.alternate(variants, rounds)
        for name, taken in seconds.items():
            size = sum(part.nbytes for each in hosts[name] for part in vars(each).values()
                       if isinstance(part, Tensor))  # fmt: skip
            config = {"N": rows, "C": classes, "K": count, "bytes": size}
            identifier = f"rows ({rows},{classes},{count}) {name}, {what}"
            found.append(row(identifier, [1e6 * s for s in taken], "us", config))
            over = ratios(seconds, name, "float16")
            found.append(row(f"{identifier} / float16", over, "ratio", config))
    return found


def _encoded(name: str, values: Any) -> Any:
    encoding = parse_encoding(name)
    parts = encoding.encode(values, np.arange(len(values)), values.argmax(1))
    tensors = {key: torch.from_numpy(part) for key, part in parts.items()}
    return encoding.rows(tensors, values.shape[1:])


def _pinned(rows: Any) -> Any:
    parts = {key: part.pin_memory() if isinstance(part, Tensor) else part for key, part in vars(rows).items()}
    return type(rows)(**parts)
