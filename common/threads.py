"""Work on many items in a few threads."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(count: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `work(item)` of every item, in order.

    Unlike `ThreadPoolExecutor.map`, it takes an item only when one of those before it is done, so a program
    that ends waits for the few that were begun and not for all.

    Args:
        count: number of threads.
        work: function that is called in the threads. The first error in it is raised here; no item is begun
            after that.
        items: its arguments. At most `count + 1` have been taken and are not done.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
