"""Work on many items in threads: order, how much is begun, errors, and a program that ends meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from coursepack.threads import map_in_threads

PATIENCE = 60


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("items", [0, 1, 2, 9])
def test_results_come_in_order_and_few_items_are_taken_ahead(count, items):
    taken = done = 0

    def numbers():
        nonlocal taken
        for item in range(items):
            taken += 1
            yield item

    def work(item):
        time.sleep(0.01 * (item % 3 == 0))
        return 2 * item

    for done, result in enumerate(map_in_threads(count, work, numbers())):
        assert result == 2 * done
        assert taken <= done + 1 + count
    assert taken == items
    assert done == max(0, items - 1)


def test_items_are_worked_on_side_by_side():
    meet = threading.Barrier(3, timeout=PATIENCE)

    def work(item):
        meet.wait()
        return item

    assert list(map_in_threads(3, work, range(6))) == list(range(6))


def test_after_an_error_no_item_is_begun():
    begun = []

    def work(item):
        begun.append(item)
        if item == 3:
            raise OSError("item 3")
        return item

    results = map_in_threads(1, work, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="item 3"):
        list(results)
    # The thread may have taken the next one before the error was seen.
    assert begun in ([0, 1, 2, 3], [0, 1, 2, 3, 4])


def test_a_program_that_ends_waits_for_the_items_that_were_begun_only(tmp_path):
    program = """
import contextlib, sys, threading, time
from coursepack.threads import map_in_threads

begun = threading.Event()

def work(item):
    print(item, flush=True)
    begun.set()
    time.sleep(0.5)

def run():
    with contextlib.suppress(RuntimeError):
        list(map_in_threads(2, work, range(1000)))

threading.Thread(target=run, daemon=True).start()
begun.wait()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert ended.stderr == ""
    assert 1 <= len(ended.stdout.split()) <= 4
