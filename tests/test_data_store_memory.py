"""A store larger than a process may hold is written, verified, read and trained from within that limit."""

from __future__ import annotations

import json

import pytest
from spawned import run

LIMIT = 32 << 20
"""Bytes that a process may take beyond what it has after doing everything once with a small store."""
ROW_BYTES = 4000
SPREAD = 16 << 20
"""What the allocator keeps differs by some megabytes from run to run."""


def live(folder, samples, *, views=2, steps=("write", "verify", "train"), readings=("auto",), limit=LIMIT):
    """Anonymous memory in bytes by step, of a store's life under the limit."""
    facts = {"samples": samples, "views": views, "steps": steps, "readings": readings}
    facts |= {"limit": limit, "block_rows": 2000}
    folder.mkdir()
    done = run("code", "import limited_process; limited_process.main()", folder, json.dumps(facts))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert samples * ROW_BYTES > 2 * limit
    assert told["refused"], "the limit is real: a whole view in memory does not fit"
    return told["grown"]


def test_a_store_of_four_times_the_limit_is_written_verified_and_trained_from(tmp_path):
    samples, views = 17_000, 2
    assert samples * views * ROW_BYTES > 4 * LIMIT
    grown = live(tmp_path / "a", samples, views=views)
    assert grown.keys() == {"write", "verify", "train auto"}
    assert max(grown.values()) < LIMIT


@pytest.mark.slow
def test_anonymous_memory_is_flat_in_samples_and_views(tmp_path):
    every = {"steps": ("write", "verify", "read", "train"), "readings": ("windowed", "mapped")}
    sizes = {"few": (17_000, 2), "many samples": (100_000, 2), "many views": (17_000, 12)}
    grown = {
        name: live(tmp_path / name, samples, views=views, **every) for name, (samples, views) in sizes.items()
    }
    print(json.dumps(grown, indent=1))
    for step, few in grown["few"].items():
        # The store has 660 MB more.
        assert grown["many samples"][step] < few + SPREAD
        assert grown["many views"][step] < few + SPREAD
