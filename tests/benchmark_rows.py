"""What a file of benchmark rows has to hold."""

import json

ROW = ["id", "value", "low", "high", "unit", "n", "config", "bar", "holds"]
MACHINE = {"processor", "device", "threads", "torch", "date"}


def check_rows(path, *, converted=False):
    """Check a file and return its rows' ids; figures converted from older tables may have no interval."""
    told = json.loads(path.read_text())
    assert set(told) == {"machine", "rows"}
    assert set(told["machine"]) > MACHINE
    assert ("note" in told["machine"]) == converted
    assert told["rows"]
    identifiers = [row["id"] for row in told["rows"]]
    assert len(set(identifiers)) == len(identifiers)
    for row in told["rows"]:
        check_row(row, converted)
    return set(identifiers)


def check_row(row, converted):
    assert list(row) == ROW
    assert row["unit"], row["id"]
    assert row["n"] >= 1, row["id"]
    assert row["config"]["interval"], row["id"]
    known = row["low"] is not None
    assert known or converted, row["id"]
    if known:
        assert row["low"] <= row["value"] <= row["high"], row["id"]
    if row["bar"] is None:
        assert row["holds"] is None, row["id"]
        return
    sign, limit = row["bar"].split()
    ends = (row["low"], row["high"]) if known else ()
    inside = [end <= float(limit) if sign == "<=" else end >= float(limit) for end in ends]
    answer = "undecided" if not inside else "yes" if all(inside) else "undecided" if any(inside) else "no"
    decided = row["config"]["interval"] in ("95 %", "exact") or (converted and row["n"] >= 15)
    assert row["holds"] == (answer if decided else "undecided"), row["id"]
