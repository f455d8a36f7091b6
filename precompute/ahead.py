"""Iterator that a thread of its own advances, a limited number of items ahead of their use."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from coursepack.kernels.cpu.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

LOT, LOT_SECONDS = 4, 0.1
"""Number of items for which the thread that uses them is woken, and seconds after which it looks for fewer.

A thread that is woken competes with the one that woke it, for cores and for the interpreter.
"""


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Ahead(Generic[T]):
    """Items of a generator that a thread advances; an error in it is raised after the items before it.

    Items that come quickly are used several at a time. A context manager: leaving it ends the thread after
    its current item.
    """

    def __init__(self, name: str, items: Generator[T], most: int, threads: int) -> None:
        """Create the thread; entering the context starts it.

        Args:
            name: end of the thread's name.
            items: the generator, advanced and closed in the thread.
            most: maximum number of items that exist at a time, those in use included.
            threads: number of torch threads in the thread.
        """
        self._items = items
        self._most, self._threads = most, threads
        self._free = threading.Semaphore(most)
        """Counts the items that may still be begun."""
        self._stopped = threading.Event()
        self._made: deque[T | _End] = deque()
        self._wake = threading.Event()
        """Set when there are items enough to use."""
        self._thread = threading.Thread(target=self._run, name=f"coursepack-{name}", daemon=True)

    def __iter__(self) -> Iterator[T]:
        """Yield the items; each counts as in use until the next one is requested, or a few later."""
        used = 0
        while not isinstance(item := self._next(), _End):
            yield item
            used += 1
            if used >= self._lot or not self._made:
                self._free.release(used)
                used = 0
        if item.error is not None:
            raise item.error

    def _next(self) -> T | _End:
        while not self._made:
            self._wake.wait(LOT_SECONDS)
            self._wake.clear()
        return self._made.popleft()

    @property
    def _lot(self) -> int:
        return min(LOT, self._most // 2)

    def allow(self, more: int) -> None:
        """Raise the maximum number of items."""
        if more > 0:
            self._most += more
            self._free.release(more)

    @property
    def is_stopped(self) -> bool:
        """True once `stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End the thread after its current item, and the iteration after the items that were made."""
        self._stopped.set()
        self._free.release()
        self._end(_End())

    def _run(self) -> None:
        end = _End()
        try:
            use_threads(self._threads)
            with closing(self._items) as items:
                while self._may_begin():
                    try:
                        self._made.append(next(items))
                    except StopIteration:
                        break
                    if len(self._made) >= self._lot:
                        self._wake.set()
        except BaseException as error:
            end = _End(error)
        self._end(end)

    def _may_begin(self) -> bool:
        """Wait until one more item may exist; returns False after `stop`."""
        if not self._free.acquire(blocking=False):
            self._wake.set()
            self._free.acquire()
        return not self.is_stopped

    def _end(self, end: _End) -> None:
        self._made.append(end)
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join()
