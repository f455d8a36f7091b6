"""Forward passes whose outputs are copied to the host while the next batch runs.

On a GPU, pixels are copied from pinned buffers on a stream of their own, and outputs come back in the same
way. Events order the copies, so that starting a batch never waits for the device. On the CPU there are none.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import torch

from coursepack.models.teacher import finite_rows

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.models import TeacherRunner
    from coursepack.models.teacher import TeacherOutput

cuda: Any = torch.cuda  # its classes have no types

Arrays = dict[str, torch.Tensor]
Fetched = tuple[Arrays, Arrays]
"""Outputs `(N, ...)` on the CPU by array, and for each array whether a row is finite, `(N,)` bool."""


class Pending(Protocol):
    """Outputs of a batch that was started."""

    @property
    def row_bytes(self) -> int:
        """Size of the outputs of one row in bytes."""

    def fetch(self) -> Fetched:
        """Wait for the outputs and return them; they are valid until `release` is called."""

    def release(self) -> None:
        """Allow the memory of the outputs to be used for another batch."""


class Transfer(Protocol):
    """Runs a teacher on batches of pixels."""

    def start(self, pixels: Tensor) -> Pending:
        """Start the forward pass of pixels `(N, size, size, channels)` uint8 on the CPU."""


def transfer_for(runner: TeacherRunner, batch_size: int) -> Transfer:
    """Return the transfer for a teacher's device.

    Args:
        runner: the teacher.
        batch_size: number of rows of every batch but the last of a block.
    """
    return (CudaTransfer if runner.device.type == "cuda" else HostTransfer)(runner, batch_size)


class HostTransfer:
    """Runs a teacher on the CPU. Batches of a compiled teacher are padded to the batch size."""

    def __init__(self, runner: TeacherRunner, batch_size: int) -> None:
        self._runner = runner
        self._least = batch_size if runner.compiled else 0

    def start(self, pixels: Tensor) -> Pending:
        """Run the forward pass."""
        return _HostOutputs(self._runner.run(padded(pixels, self._least)), len(pixels))


class _HostOutputs:
    def __init__(self, output: TeacherOutput, rows: int) -> None:
        self._arrays = {name: value[:rows].contiguous() for name, value in output.arrays().items()}

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self._arrays)

    def fetch(self) -> Fetched:
        return self._arrays, finite_rows(self._arrays)

    def release(self) -> None:
        pass


class CudaTransfer:
    """Runs a teacher on a CUDA device, with one copy stream in each direction.

    Every batch is padded to the batch size, so that kernels are chosen for one shape only.
    """

    def __init__(self, runner: TeacherRunner, batch_size: int) -> None:
        self._runner, self._batch_size = runner, batch_size
        self._uploads = cuda.Stream(runner.device)
        self._downloads = cuda.Stream(runner.device)
        self._idle: deque[_Slot] = deque()

    def start(self, pixels: Tensor) -> Pending:
        """Queue the copy of the pixels, the forward pass and the copy of its outputs."""
        rows = len(pixels)
        slot = self._idle.popleft() if self._idle else _Slot(self._idle, self._batch_size)
        with torch.cuda.device(self._runner.device):
            output = self._runner.run(slot.upload(pixels, self._uploads, self._runner.device))
            arrays = {name: value[:rows].contiguous() for name, value in output.arrays().items()}
            slot.download(arrays, finite_rows(arrays), self._downloads)
        return slot


class _Slot:
    """Pinned buffers and events of one batch, for one batch after another."""

    def __init__(self, idle: deque[_Slot], batch_size: int) -> None:
        self._idle, self._batch_size = idle, batch_size
        self._pixels: Tensor | None = None
        self._images: Tensor | None = None
        self._sent: Fetched = {}, {}
        """Outputs and flags on the device, kept until they are copied."""
        self._received: Fetched = {}, {}
        """Pinned outputs and flags of a full batch."""
        self._rows = 0
        self._uploaded, self._computed = cuda.Event(), cuda.Event()
        self._downloaded = cuda.Event(blocking=True)

    def upload(self, pixels: Tensor, stream: torch.cuda.Stream, device: torch.device) -> Tensor:
        """Queue the copy of pixels, padded to the batch size, and return them on the device."""
        self._rows = len(pixels)
        if self._pixels is None or self._images is None:
            shape = (self._batch_size, *pixels.shape[1:])
            self._pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
            self._images = torch.empty(shape, dtype=torch.uint8, device=device)
            # Work that was queued earlier may still use this memory for another tensor.
            stream.wait_stream(torch.cuda.current_stream(device))
        self._pixels[: self._rows] = pixels
        self._pixels[self._rows :] = 0
        with torch.cuda.stream(stream):
            self._images.copy_(self._pixels, non_blocking=True)
            self._uploaded.record(stream)
        torch.cuda.current_stream(device).wait_event(self._uploaded)
        return self._images

    def download(self, arrays: Arrays, finite: Arrays, stream: torch.cuda.Stream) -> None:
        """Queue the copy of outputs, computed on the current stream, to pinned memory."""
        self._computed.record()
        stream.wait_event(self._computed)
        self._sent = arrays, finite
        with torch.cuda.stream(stream):
            for sent, received in zip(self._sent, self._received, strict=True):
                for name, value in sent.items():
                    if name not in received:
                        shape = (self._batch_size, *value.shape[1:])
                        received[name] = torch.empty(shape, dtype=value.dtype, pin_memory=True)
                    received[name][: self._rows].copy_(value, non_blocking=True)
            self._downloaded.record(stream)

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self._sent[0])

    def fetch(self) -> Fetched:
        self._downloaded.synchronize()
        self._sent = {}, {}
        arrays, finite = (
            {name: value[: self._rows] for name, value in received.items()} for received in self._received
        )
        return arrays, finite

    def release(self) -> None:
        self._idle.append(self)


def padded(pixels: Tensor, least: int) -> Tensor:
    """Return pixels `(N, size, size, channels)` with black images appended up to `least` rows."""
    if len(pixels) >= least:
        return pixels
    return torch.cat([pixels, pixels.new_zeros(least - len(pixels), *pixels.shape[1:])])


def _row_bytes(arrays: Arrays) -> int:
    return sum(value[0].nbytes for value in arrays.values())
