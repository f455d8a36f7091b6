"""Iterator that a thread of its own advances, a limited number of items ahead of their use."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from coursepack.kernels.cpu.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType
    from typing import Self

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Ahead(Generic[T]):
    """Items of a generator that a thread advances; an error in it is raised after the items before it.

    A context manager: leaving it ends the thread after its current item.
    """

    def __init__(self, name: str, items: Generator[T], most: int, threads: int) -> None:
        """Create the thread; entering the context starts it.

        Args:
            name: end of the thread's name.
            items: the generator, advanced and closed in the thread.
            most: maximum number of items that exist at a time, the one in use included.
            threads: number of torch threads in the thread.
        """
        self._items = items
        self._threads = threads
        self._free = threading.Semaphore(most)
        """Counts the items that may still be begun."""
        self._stopped = threading.Event()
        self._queue: SimpleQueue[T | _End] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"coursepack-{name}", daemon=True)

    def __iter__(self) -> Iterator[T]:
        """Yield the items; each counts as in use until the next one is requested."""
        while not isinstance(item := self._queue.get(), _End):
            yield item
            self._free.release()
        if item.error is not None:
            raise item.error

    def allow(self, more: int) -> None:
        """Raise the maximum number of items."""
        if more > 0:
            self._free.release(more)

    @property
    def is_stopped(self) -> bool:
        """True once `stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End the thread after its current item, and the iteration at once, without waiting."""
        self._stopped.set()
        self._free.release()
        self._queue.put(_End())

    def _run(self) -> None:
        end = _End()
        try:
            use_threads(self._threads)
            with closing(self._items) as items:
                while self._free.acquire() and not self.is_stopped:
                    try:
                        self._queue.put(next(items))
                    except StopIteration:
                        break
        except BaseException as error:
            end = _End(error)
        self._queue.put(end)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join()
