"""Serial decoders of encoded rows, compiled. Imported at first use: numba is slow to import.

Decoding a batch takes tens of microseconds; a parallel region would compete with the student's threads.
"""

from __future__ import annotations

import numpy as np

from coursepack.kernels.cpu.jit_base import jit


@jit
def int8_decode(q: np.ndarray, affine: np.ndarray, out: np.ndarray) -> None:
    """Write `affine[n, 1] + affine[n, 0] * q` to `out (N, D)` float32; `q (N, D)` uint8, `affine (N, 2)`."""
    for n in range(q.shape[0]):
        scale, minimum = affine[n, 0], affine[n, 1]
        for d in range(q.shape[1]):
            out[n, d] = minimum + scale * np.float32(q[n, d])


@jit
def topk_decode(
    ids: np.ndarray,
    values: np.ndarray,
    tail: np.ndarray,
    inverse: np.ndarray,
    knots: np.ndarray,
    out: np.ndarray,
) -> int:
    """Decode top-k rows on the CPU.

    Args:
        ids: `(N, k)` unsigned.
        values: `(N, k)` float32.
        tail: `(N, J)` float32, log masses at 1/T = `knots[J], ..., knots[1]`.
        inverse: 1/T of each row `(N,)` float32.
        knots: `(J + 1,)` float32, from 0 upwards.
        out: `(N, C)` float32.

    Returns:
        -1, or the first row with a class id out of range, which is not written.
    """
    classes = out.shape[1]
    dropped = classes - ids.shape[1]
    limit = np.log(np.float32(dropped)) if dropped > 0 else np.float32(0)
    last = tail.shape[1]
    for n in range(out.shape[0]):
        top = values[n, 0]
        for i in range(1, ids.shape[1]):
            top = max(top, values[n, i])
        segment = 0
        while segment < last - 1 and knots[segment + 1] < inverse[n]:
            segment += 1
        low = limit if segment == 0 else tail[n, last - segment]
        high = tail[n, last - segment - 1]
        share = (inverse[n] - knots[segment]) / (knots[segment + 1] - knots[segment])
        excess = (low + (high - low) * share - limit) / inverse[n]
        out[n, :] = top + min(excess, np.float32(0))
        for i in range(ids.shape[1]):
            if ids[n, i] >= classes:
                return n
            out[n, ids[n, i]] = values[n, i]
    return -1


@jit
def bit_decode(bits: np.ndarray, out: np.ndarray) -> None:
    """Write +1 or -1 for every bit of `bits (N, B)` uint8, highest bit first, into `out (N, D)` float32."""
    for n in range(out.shape[0]):
        for d in range(out.shape[1]):
            bit = (bits[n, d >> 3] >> (7 - (d & 7))) & 1
            out[n, d] = np.float32(2 * np.int64(bit) - 1)
