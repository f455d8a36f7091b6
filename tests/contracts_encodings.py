"""What every encoding has to do: a new one is tested by a row in `FAMILY`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings import encoding_from_dict, parse_encoding
from coursepack.kernels import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ROW_SHAPES = [(1,), (10,), (11,), (1000,), (4, 3), (2, 3, 4, 5)]
"""Logits and features, narrow and wide."""
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16)
FLOAT16 = np.unique(FLOAT16[np.isfinite(FLOAT16)].astype(np.float64))
"""Every float16, ascending."""


def ulp(values: NDArray[Any], bits: int, least: int) -> NDArray[np.float64]:
    """The unit in the last place of a format of `bits` bits at each value; exponents end at `least`."""
    exponent = np.frexp(np.abs(np.asarray(values, dtype=np.float64)))[1] - 1
    return 2.0 ** (np.maximum(exponent, least) - (bits - 1))


def float16_ulp(values: NDArray[Any]) -> NDArray[np.float64]:
    """The unit in the last place of float16 at each value, 2**-24 where it is subnormal."""
    return ulp(values, 11, -14)


def affine_step(values: NDArray[np.float32], levels: int) -> NDArray[np.float64]:
    """The scale of each row `(n, 1, ...)`: its range from float16 to float16, in so many steps.

    The range may be found in float32, which is what the factor is for.
    """
    flat = values.reshape(len(values), -1).astype(np.float64)
    minimum = FLOAT16[np.searchsorted(FLOAT16, flat.min(1), side="right") - 1]
    scale = FLOAT16[np.searchsorted(FLOAT16, (flat.max(1) - minimum) / levels * (1 + 2.0**-22))]
    return scale.reshape(-1, *[1] * (values.ndim - 1))


def some_labels(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Labels `(n,)`: the best class, the worst and the first in turn, where rows are logits."""
    if values.ndim != 2:
        return np.zeros(len(values), dtype=np.int64)
    best, worst = values.argmax(1), values.argmin(1)
    return np.choose(np.arange(len(values)) % 3, [best, worst, 0]).astype(np.int64)


def encode(spec: str, values: NDArray[np.float32], labels: NDArray[np.int64] | None = None) -> dict[str, Any]:
    """Components of the values."""
    labels = some_labels(values) if labels is None else labels
    return parse_encoding(spec).encode(values, np.arange(len(values)), labels)


def read(spec: str, stored: dict[str, Any], row_shape: tuple[int, ...]) -> Rows:
    """The rows that a reader makes of components."""
    tensors = {part: torch.from_numpy(array) for part, array in stored.items()}
    rows = parse_encoding(spec).rows(tensors, row_shape)
    assert isinstance(rows, Rows)
    return rows


def roundtrip(spec: str, values: NDArray[np.float32], temperature: float | None = None):
    """Values encoded, gathered as a reader would, and decoded."""
    rows = read(spec, encode(spec, values), values.shape[1:])
    assert rows.shape == values.shape
    at = None if temperature is None else torch.full((len(values),), temperature)
    decoded = rows.decode(at)
    assert decoded.dtype == torch.float32
    assert decoded.shape == values.shape
    return decoded.numpy()


def check_description(spec: str) -> None:
    """`to_dict` is plain JSON that gives an equal, hashable object back."""
    encoding = parse_encoding(spec)
    values = json.loads(json.dumps(encoding.to_dict()))
    assert encoding.name == spec
    name = spec.partition(":")[0]
    assert values["name"] == STORED_NAMES.get(name, name)
    assert encoding_from_dict(values) == encoding == parse_encoding(encoding.name)
    assert len({encoding, encoding_from_dict(values)}) == 1
    assert encoding.exact == (spec == "float32")


def check_components(spec: str, row_shape: tuple[int, ...]) -> None:
    """What `components` promises is what `encode` gives and `rows` takes, for any number of rows."""
    promised = parse_encoding(spec).components(row_shape)
    for count in (0, 1, 5):
        values = np.random.default_rng(count).normal(0, 5, (count, *row_shape)).astype(np.float32)
        labels = np.zeros(count, dtype=np.int64)
        kept = values.copy()
        stored = encode(spec, values, labels)
        assert stored.keys() == promised.keys()
        for part, component in promised.items():
            assert stored[part].dtype == np.dtype(component.dtype)
            assert stored[part].shape == (count, *component.row_shape)
            assert stored[part].nbytes == count * component.row_bytes
        assert np.array_equal(values, kept)
        assert read(spec, stored, row_shape).decode().shape == values.shape
        assert parse_encoding(spec).agrees(values, stored, 0.0).tolist() == [True] * count


def check_values(spec: str, values: NDArray[np.float32]) -> None:
    """What comes back is what the definition of the encoding says."""
    FAMILY[spec.partition(":")[0]].check(spec, values)


def within(bound: Callable[[NDArray[np.float32]], Any]) -> Callable[[str, NDArray[np.float32]], None]:
    """Check that every decoded value lies within the bound of its format, whatever the temperature."""

    def check(spec: str, values: NDArray[np.float32]) -> None:
        decoded = roundtrip(spec, values)
        error = np.abs(decoded.astype(np.float64) - values)
        assert (error <= bound(values)).all()
        assert np.array_equal(roundtrip(spec, values, 4.0), decoded)

    return check


def check_signs(spec: str, values: NDArray[np.float32]) -> None:
    """+1 for what is positive, -1 for the rest, zero of either sign included."""
    assert np.array_equal(roundtrip(spec, values), np.where(values > 0, 1, -1))


def log_sum_exp(values: NDArray[np.float64]) -> float:
    """Of a vector, in float64; of none it is -inf."""
    if values.size == 0:
        return -math.inf
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def check_topk(spec: str, values: NDArray[np.float32], labels: NDArray[np.int64] | None = None) -> None:
    """The largest logits and the label's are kept, and the mass of the rest is right."""
    k = int(spec.partition(":")[2])
    labels = some_labels(values) if labels is None else labels
    stored = encode(spec, values, labels)
    classes = values.shape[1]
    assert stored["ids"].dtype == (np.uint16 if classes <= 65536 else np.uint32)
    for n, row in enumerate(values):
        ids = stored["ids"][n].astype(np.int64)
        assert len(set(ids.tolist())) == k
        assert ids.min() >= 0
        assert ids.max() < classes
        assert labels[n] in ids
        assert np.array_equal(stored["values"][n], row[ids].astype(np.float16))
        largest = np.sort(row)[::-1][:k]
        if row[labels[n]] < largest[-1]:
            largest[-1] = row[labels[n]]
        assert np.array_equal(np.sort(row[ids])[::-1], largest)
        dropped = np.delete(row, ids).astype(np.float64) - row.max()
        masses = np.array([log_sum_exp(dropped / t) for t in TEMPERATURES])
        masses = masses.clip(-65504, None)
        assert (np.abs(stored["tail"][n] - masses) <= 0.5001 * float16_ulp(masses)).all()
    for temperature in (None, *TEMPERATURES, 0.05, 0.7, 1.3, 3.0, 6.0, 20.0, 100.0):
        decoded = read(spec, stored, (classes,)).decode(
            None if temperature is None else torch.full((len(values),), temperature)
        )
        check_topk_decoded(decoded.numpy(), stored, 1.0 if temperature is None else temperature)


def tail_logit(
    values: NDArray[Any],
    tail: NDArray[Any],
    dropped: int,
    temperature: float,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> float:
    """The logit of each class that was dropped: its mass is linear in 1/T from knot to knot, and beyond."""
    inverse = 1 / temperature
    knots = [0.0, *(1 / t for t in temperatures[::-1])]
    masses = [math.log(dropped), *tail[::-1].tolist()]
    place = max(i for i in range(len(knots) - 1) if i == 0 or knots[i] < inverse)
    slope = (masses[place + 1] - masses[place]) / (knots[place + 1] - knots[place])
    mass = masses[place] + slope * (inverse - knots[place])
    return float(values.max()) + min(0.0, temperature * (mass - math.log(dropped)))


def check_topk_decoded(decoded: NDArray[np.float32], stored: dict[str, Any], temperature: float) -> None:
    """Kept logits as they are stored, and one logit for all others."""
    assert not np.isnan(decoded).any()
    for n, row in enumerate(decoded):
        ids, kept = stored["ids"][n].astype(np.int64), stored["values"][n].astype(np.float64)
        assert np.array_equal(row[ids], kept)
        others = np.delete(row, ids)
        if len(others) == 0:
            continue
        assert (others == others[0]).all()
        assert others[0] <= kept.max()
        tail = stored["tail"][n].astype(np.float64)
        size = abs(kept.max()) + temperature * (
            np.log(len(others)) + np.abs(tail).max() * (1 + 1 / temperature)
        )
        expected = tail_logit(kept, tail, len(others), temperature)
        assert abs(others[0] - expected) <= 1e-6 * size + 1e-6
        if temperature in TEMPERATURES:
            mass = np.log(len(others)) + (others[0] - kept.max()) / temperature
            known = min(tail[TEMPERATURES.index(temperature)], np.log(len(others)))
            assert abs(mass - known) <= 1e-6 * size + 1e-6


def entries_of(spec: str) -> int:
    """The number of entries of a sparse encoding."""
    return int(spec.partition(":")[2].partition(",")[0])


def unpacked(row: NDArray[np.uint8], k: int, classes: int) -> tuple[list[int], list[int]]:
    """Class ids and codes of a packed row, read bit by bit from its definition."""
    bits = int.from_bytes(row.tobytes(), "little")
    sizes = [k * low + k + ((classes - 1) >> low) for low in range(32)]
    low = sizes.index(min(sizes))
    high = sizes[low] - k * low
    ones = [place for place in range(high) if bits >> place & 1]
    assert len(ones) == k
    rest = bits >> high
    ids = [(place - i) << low | rest >> low * i & ((1 << low) - 1) for i, place in enumerate(ones)]
    codes = [rest >> (low * k + 6 * i) & 63 for i in range(k)]
    assert rest >> (low + 6) * k == 0
    assert len(row) == -(-(sizes[low] + 6 * k) // 8)
    return ids, codes


def packed(ids: NDArray[Any], codes: NDArray[Any], classes: int) -> NDArray[np.uint8]:
    """Packed rows of sorted class ids and codes `(n, k)`, written bit by bit from their definition."""
    k = ids.shape[1]
    sizes = [k * low + k + ((classes - 1) >> low) for low in range(32)]
    low = sizes.index(min(sizes))
    high, size = sizes[low] - k * low, -(-(sizes[low] + 6 * k) // 8)
    rows = []
    for row, own in zip(ids.tolist(), codes.tolist(), strict=True):
        bits = 0
        for i, (one, code) in enumerate(zip(row, own, strict=True)):
            bits |= 1 << (one >> low) + i
            bits |= (one & ((1 << low) - 1)) << high + low * i
            bits |= code << high + low * k + 6 * i
        rows.append(np.frombuffer(bits.to_bytes(size, "little"), dtype=np.uint8))
    return np.stack(rows)


def check_packed(spec: str, values: NDArray[np.float32], labels: NDArray[np.int64] | None = None) -> None:
    """The largest logits are kept to half a step, the label's too if asked for, and the mass of the rest."""
    k, keeps_label = entries_of(spec), not spec.endswith("label=no")
    labels = some_labels(values) if labels is None else labels
    stored = encode(spec, values, labels)
    classes = values.shape[1]
    made = []
    for n, row in enumerate(values.astype(np.float64)):
        ids, codes = unpacked(stored["entries"][n], k, classes)
        assert ids == sorted(set(ids))
        assert 0 <= ids[0] <= ids[-1] < classes
        largest = np.sort(row)[::-1][:k]
        if keeps_label:
            assert labels[n] in ids
            largest[-1] = min(largest[-1], row[labels[n]])
        assert np.array_equal(np.sort(row[ids])[::-1], largest)
        top, span, *tail = stored["scale"][n].astype(np.float64)
        assert top == np.float16(row.max())
        reach = row.max() - row[ids].min()
        assert span == FLOAT16[np.searchsorted(FLOAT16, reach)]
        gaps = span * (np.array(codes) / 63) ** 2
        half_step = span * (np.array(codes) + 0.25) / 63**2
        assert (np.abs(gaps - (row.max() - row[ids])) <= 1.0001 * half_step + 1e-12).all()
        dropped = np.delete(row, ids) - row.max()
        masses = np.array([log_sum_exp(dropped / t) for t in (1.0, 4.0)]).clip(-65504, None)
        assert (np.abs(tail - masses) <= 0.5001 * float16_ulp(masses)).all()
        made.append((ids, top - gaps, top, tail))
    for temperature in (None, 1.0, 4.0, 0.05, 0.7, 1.3, 3.0, 6.0, 20.0, 100.0):
        rows = read(spec, stored, (classes,))
        at = None if temperature is None else torch.full((len(values),), temperature)
        check_packed_decoded(rows.decode(at).numpy(), made, temperature or 1.0)


def check_packed_decoded(decoded: NDArray[np.float32], made: list[Any], temperature: float) -> None:
    """Kept logits as their codes say, and one logit for all others."""
    for row, (ids, logits, top, tail) in zip(decoded, made, strict=True):
        size = np.abs(logits).max() + abs(top)
        assert (np.abs(row[ids] - logits) <= 1e-6 * size).all()
        others = np.delete(row, ids)
        if len(others) == 0:
            continue
        assert (others == others[0]).all()
        expected = tail_logit(np.array([top]), np.array(tail), len(others), temperature, (1.0, 4.0))
        scale = temperature * (np.log(len(others)) + np.abs(tail).max() * (1 + 1 / temperature))
        assert abs(others[0] - expected) <= 1e-6 * (size + scale) + 1e-6


def nibbles(row: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Codes of four bits: those of the first half of the classes are in the lower bits of the bytes."""
    half = -(-classes // 2)
    codes = [row[c] & 15 if c < half else row[c - half] >> 4 for c in range(classes)]
    assert len(row) == half
    assert classes % 2 == 0 or row[-1] >> 4 == 0
    return np.array(codes, dtype=np.int64)


def paired(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Rows of four bits a class from their codes `(n, C)`."""
    low, high = np.array_split(codes, 2, axis=1)
    return (low + 16 * np.pad(high, ((0, 0), (0, codes.shape[1] % 2)))).astype(np.uint8)


INT4_LEVELS = np.array([(q / 15 + (q / 15) ** 2) / 2 for q in range(16)])
"""Gaps below the top logit that four bits stand for, as parts of the range."""


def check_int4(spec: str, values: NDArray[np.float32]) -> None:
    """Every gap below the top logit is rounded to the nearest level of a range that leaves out the lowest."""
    stored, decoded = encode(spec, values), roundtrip(spec, values)
    for n, row in enumerate(values.astype(np.float64)):
        codes = nibbles(stored["q"][n], len(row))
        top, span = stored["scale"][n].astype(np.float64)
        gaps = row.max() - row
        assert top == np.float16(row.max())
        reach = np.sort(gaps)[::-1][len(row) // 50]
        assert span == FLOAT16[np.searchsorted(FLOAT16, max(reach, 2.0**-24))]
        distances = np.abs(gaps[:, None] - span * INT4_LEVELS)
        assert (distances[np.arange(len(row)), codes] <= distances.min(1) * (1 + 1e-9) + 1e-11).all()
        assert (np.abs(decoded[n] - (top - span * INT4_LEVELS[codes])) <= 1e-6 * (abs(top) + span)).all()
    assert np.array_equal(roundtrip(spec, values, 4.0), decoded)


@dataclass(frozen=True)
class Member:
    """One encoding of the family."""

    limit: float
    """Largest value that it has to take."""
    check: Callable[[str, NDArray[np.float32]], None]
    """Check of what comes back; error bounds are written from the definition of the format."""
    parameters: tuple[str, ...] = ("",)
    """Parameters that it is tried with, as a flag has them."""


FAMILY = {
    "float32": Member(3e38, within(np.zeros_like)),
    "float16": Member(65504, within(lambda values: float16_ulp(values) / 2)),
    "bfloat16": Member(3e38, within(lambda values: ulp(values, 8, -126) / 2)),
    "int8": Member(32752, within(lambda v: 0.5001 * affine_step(v, 255) + 2.0**-22 * np.abs(v))),
    "int4": Member(32752, check_int4),
    "topk": Member(32752, check_packed, (":3", ":10", ":100", ":10,label=no")),
    "topk16": Member(65504, check_topk, (":3", ":10", ":100")),
    "bits": Member(3e38, check_signs),
}
"""Every encoding by its name in an option: a row here, and all of it is tested."""
STORED_NAMES = {"topk": "packed_topk", "topk16": "topk"}
"""Names in a manifest that differ from those in an option."""
SPECS = tuple(name + parameter for name, member in FAMILY.items() for parameter in member.parameters)
"""Every member of the family, as a flag names it."""


def takes(spec: str, shape: tuple[int, ...]) -> bool:
    """Whether an encoding is for such rows."""
    if spec == "int4":
        return len(shape) == 1
    return not spec.startswith("topk") or (len(shape) == 1 and shape[0] >= entries_of(spec))


CASES = [(spec, shape) for spec in SPECS for shape in ROW_SHAPES if takes(spec, shape)]
"""Encodings with the rows that they are for."""
