"""Tests of the iterator that a thread advances: order, limits, errors, and what is handed over together."""

from __future__ import annotations

import threading

import pytest

from coursepack.precompute import ahead
from coursepack.precompute.ahead import LOT, Ahead

PATIENCE = 60


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("seconds", [0.001, 3600])
def test_all_items_come_in_order_and_no_more_exist_than_may(monkeypatch, most, seconds):
    monkeypatch.setattr(ahead, "LOT_SECONDS", seconds)
    made, used, largest = 0, 0, 0

    def items():
        nonlocal made, largest
        for item in range(100):
            made += 1
            largest = max(largest, made - used)
            yield item

    with Ahead("test", items(), most, 1) as found:
        for count, item in enumerate(found):
            assert item == count
            used = count
    assert made == 100
    assert largest <= most + 1  # an item counts as in use until the next one is requested


def test_quick_items_wake_the_other_thread_once_a_lot(monkeypatch):
    monkeypatch.setattr(ahead, "LOT_SECONDS", 3600)
    waiting, used = threading.Event(), threading.Event()

    class Wake(threading.Event):
        def wait(self, timeout=None):
            waiting.set()
            return super().wait(timeout)

    def items():
        assert waiting.wait(PATIENCE)
        for item in range(2 * LOT):
            if item == LOT - 1:
                assert not used.wait(0.2), "an item is used before there are enough"
            yield item

    quick = Ahead("test", items(), 2 * LOT, 1)
    quick._wake = Wake()
    with quick as found:
        taken = []
        for item in found:
            used.set()
            taken.append(item)
    assert taken == list(range(2 * LOT))


def test_items_are_used_though_the_next_does_not_come(monkeypatch):
    """A generator may wait until what it gave before is used."""
    monkeypatch.setattr(ahead, "LOT_SECONDS", 0.01)
    received = threading.Event()

    def items():
        yield 0
        assert received.wait(PATIENCE), "the first item waits for the second"
        yield 1

    with Ahead("test", items(), 64, 1) as found:
        for _ in found:
            received.set()


def test_an_item_is_used_when_no_more_may_be_begun(monkeypatch):
    monkeypatch.setattr(ahead, "LOT_SECONDS", 3600)
    with Ahead("test", iter_of(7), 1, 1) as found:
        assert list(found) == list(range(7))


def iter_of(count):
    yield from range(count)


@pytest.mark.parametrize("seconds", [0.001, 3600])
def test_an_error_comes_after_the_items_before_it(monkeypatch, seconds):
    monkeypatch.setattr(ahead, "LOT_SECONDS", seconds)

    def items():
        yield from range(5)
        raise ConnectionError("no more")

    with Ahead("test", items(), 64, 1) as started:
        found = iter(started)
        assert [next(found) for _ in range(5)] == list(range(5))
        with pytest.raises(ConnectionError, match="no more"):
            next(found)


def test_more_items_may_exist_once_they_are_allowed():
    reached = threading.Event()

    def items():
        for item in range(20):
            if item == 9:
                reached.set()
            yield item

    with Ahead("test", items(), 3, 1) as found:
        first = next(iter(found))
        found.allow(7)
        assert reached.wait(PATIENCE)
    assert first == 0
