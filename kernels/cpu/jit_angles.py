"""The angle loss over all triples of points and its gradient, compiled. Imported at first use.

The cosine at j between i and k depends on three distances, `(D_ij + D_jk - D_ik) / (2 sqrt(D_ij D_jk))` with
squared distances D. A pass over the triangles i < j < k therefore computes all three angles of each, without
the points, and adds to the gradient with respect to D. Everything is float64, in which the differences of
squared distances lose nothing that matters.

Rows of matrices are padded to a multiple of `LOT` with zeros, so that no loop has a remainder.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from coursepack.kernels.cpu.jit_base import SOURCES, intrinsic, jit, njit, types
from coursepack.kernels.cpu.jit_math import SUMS, wide_vectors

LOT = 16
SCOPES = ("distances", "slopes of i", "slopes of j")
"""Kinds of rows, no two of which overlap. LLVM is told, because it does not vectorize a loop with so many
rows if it has to find out."""
F64 = ir.DoubleType()


def _tag(builder: Any, instruction: Any, scope: str) -> Any:
    """Tell LLVM which rows an access may touch."""
    module = builder.module
    domain = module.add_metadata(["coursepack angles"])
    nodes = {name: module.add_metadata([name, domain]) for name in SCOPES}
    instruction.set_metadata("alias.scope", module.add_metadata([nodes[scope]]))
    others = [node for name, node in nodes.items() if name != scope]
    instruction.set_metadata("noalias", module.add_metadata(others))
    return instruction


def _place(builder: Any, args: Any) -> Any:
    return builder.gep(builder.inttoptr(args[0], F64.as_pointer()), [args[1]])


def _load(scope: str) -> Any:
    """Make an intrinsic `load(start, index)` that reads a float64 of a row."""

    def typed(typingctx: Any, start: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _tag(builder, builder.load(_place(builder, args), align=8), scope)

        return types.float64(types.int64, types.int64), generate

    return intrinsic(typed)


def _store(scope: str) -> Any:
    """Make an intrinsic `store(start, index, number)` that writes a float64 of a row."""

    def typed(typingctx: Any, start: Any, index: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _tag(builder, builder.store(args[2], _place(builder, args), align=8), scope)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float64), generate

    return intrinsic(typed)


load = _load(SCOPES[0])
load_i, store_i = _load(SCOPES[1]), _store(SCOPES[1])
load_j, store_j = _load(SCOPES[2]), _store(SCOPES[2])


@njit(forceinline=True)
def lots(count: int) -> int:
    """Round down to a multiple of `LOT`."""
    return (count >> 4) << 4


@njit(forceinline=True)
def minus(first: float, second: float) -> float:
    """Return the difference, which LLVM does not reorder: 0 wherever student and teacher are equal."""
    return first - second


@njit(forceinline=True)
def clamp(value: float) -> float:
    """Return the value between -1 and 1: the slope of SmoothL1."""
    value = value if value < 1.0 else 1.0
    return value if value > -1.0 else -1.0


@njit(fastmath=SUMS)
def pair_sum(
    i: int,
    j: int,
    width: int,
    ours: int,
    our_inverse: int,
    theirs: int,
    their_inverse: int,
    slopes: int,
) -> float:
    """Return the loss summed over the angles of the triangles (i, j, k) with k > j, and add their slopes."""
    wide_vectors()
    start = lots(j + 1)
    row_i, row_j = 8 * (i * width + start), 8 * (j * width + start)
    ij = i * width + j
    a, ra = load(ours, ij), load(our_inverse, ij)
    ta, tra = load(theirs, ij), load(their_inverse, ij)
    ua, va = minus(a, ta), minus(ra, tra)
    last = j - start
    total, opposite, adjacent = 0.0, 0.0, 0.0
    for c in range(lots(width - start)):
        b, rb = load(ours + row_i, c), load(our_inverse + row_i, c)
        d, rd = load(ours + row_j, c), load(our_inverse + row_j, c)
        tb, trb = load(theirs + row_i, c), load(their_inverse + row_i, c)
        td, trd = load(theirs + row_j, c), load(their_inverse + row_j, c)
        # Factors and cosines of the angles at i, j and k, and how much the teacher's are smaller.
        ub, ud, vb, vd = minus(b, tb), minus(d, td), minus(rb, trb), minus(rd, trd)
        qi, qj, qk = ra * rb, ra * rd, rb * rd
        ci, cj, ck = (a + b - d) * qi, (a + d - b) * qj, (b + d - a) * qk
        xi = (ua + ub - ud) * qi + (ta + tb - td) * (va * rb + tra * vb)
        xj = (ua + ud - ub) * qj + (ta + td - tb) * (va * rd + tra * vd)
        xk = (ub + ud - ua) * qk + (tb + td - ta) * (vb * rd + trb * vd)
        counts = c > last
        vi = clamp(xi) if counts else 0.0
        vj = clamp(xj) if counts else 0.0
        vk = clamp(xk) if counts else 0.0
        total += vi * (xi - 0.5 * vi) + vj * (xj - 0.5 * vj) + vk * (xk - 0.5 * vk)
        pi, pj, pk = vi * qi, vj * qj, vk * qk
        ei, ej, ek = vi * ci, vj * cj, vk * ck
        opposite += pi + pj - pk
        adjacent += ei + ej
        store_i(slopes + row_i, c, load_i(slopes + row_i, c) + (pi + pk - pj - rb * rb * (ei + ek)))
        store_j(slopes + row_j, c, load_j(slopes + row_j, c) + (pj + pk - pi - rd * rd * (ej + ek)))
    store_i(slopes, ij, load_i(slopes, ij) + (opposite - ra * ra * adjacent))
    return total


@njit(fastmath=SUMS)
def squared_distance(first: int, second: int, width: int) -> float:
    """Return the squared distance of two points at addresses of float64 values."""
    wide_vectors()
    total = 0.0
    for c in range(width):
        side = load(first, c) - load(second, c)
        total += side * side
    return total


def _distances(sources: int) -> Any:
    @jit
    def run(points: int, count: int, channels: int, out: int, width: int) -> None:
        """Write the squared distances of `count` points of `channels` float64 values to `(count, width)`.

        Differences and not products: a² + b² - 2ab cancels where points are close.
        """
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            for i in range(count):
                for j in range(i + 1, count):
                    value = squared_distance(points + 8 * i * channels, points + 8 * j * channels, channels)
                    store_i(out, i * width + j, value)
                    store_i(out, j * width + i, value)

    return run


def _triangles(sources: int) -> Any:
    @jit
    def run(
        count: int, width: int, ours: int, our_inverse: int, theirs: int, their_inverse: int, slopes: int
    ) -> float:
        """Return the sum of SmoothL1 over all angles, each once, and add its slopes with respect to D.

        Args:
            count: number of points N.
            width: values per row, N in whole lots.
            ours: address of the student's squared distances `(N, width)` float64, D.
            our_inverse: of `1 / sqrt(2 D)`, or 0 for points that count as the same.
            theirs: of the teacher's squared distances.
            their_inverse: of their `1 / sqrt(2 D)`, or 0.
            slopes: of the slopes of the sum with respect to D; those above the diagonal are written.
        """
        total = 0.0
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            for i in range(count):
                for j in range(i + 1, count):
                    total += pair_sum(i, j, width, ours, our_inverse, theirs, their_inverse, slopes)
        return total

    return run


write_distances, triangle_sum = _distances(SOURCES), _triangles(SOURCES)
write_distances.compile(types.void(*[types.int64] * 5))
triangle_sum.compile(types.float64(*[types.int64] * 7))
