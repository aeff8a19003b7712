"""What a weight is with what an adapter adds to it, computed in f64 and judged by the rounding that the definition states.

The definition (docs/adapters.md) sums ``r`` products in f32, each rounded, one after another, times a scale, plus the weight. With
``u = 2**-24``, ``P`` the sum of the products' magnitudes and ``v`` the exact value, all roundings together lead away from ``v`` by no
more than ``(r + 1) * u / (1 - (r + 1) * u) * |scale| * P * (1 + u) + u * |v|``, and less than a subnormal for each operation that
underflows; ``P`` is at most the norm of B's row times that of A's column. Everything within that distance rounds to the same number of
the target's type but where ``v`` is next to a tie: there alone the sum is carried out step by step. So the answer is exact everywhere,
in any type.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import array_type

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

UNIT = 2.0**-24
SMALL = 2.0**-149  # the least f32
SLACK = 1 + 2.0**-6  # over what is left out above: powers of u, and the roundings of f64
SHEET = 1 << 15  # elements that are looked at together: their temporaries stay in the processor's cache
ALONE = 1 << 18  # products of one call that BLAS does without threads of its own (OpenBLAS interface/gemm.c, SMP_THRESHOLD_MIN)
MANY = 1 / 8  # of the elements: where more are next to a tie, all are carried out
LARGE = 0x7F7F8000  # f32 bits from which on a magnitude rounds to infinity in bf16


def rounding_alike(weight: Floats, b: Floats, a: Floats, scale: float, wanted: str) -> Singles:
    """Return f32 numbers that round to the type ``wanted`` as those of the definition do.

    ``weight`` is outputs | inputs, ``b`` outputs | rank, ``a`` rank | inputs: the numbers, exact in f32.
    """
    found, places = np.empty(weight.shape, np.float32), list[NDArray[np.intp]]()
    rank, (rows, columns) = len(a), weight.shape
    wide = min(columns, SHEET)
    tall = max(1, SHEET // wide)
    far = (rank + 2) * UNIT * SLACK * abs(scale) * np.sqrt((b * b).sum(1)), np.sqrt((a * a).sum(0))
    least = (rank + 2) * SMALL * (1 + abs(scale))
    with np.errstate(over="ignore", invalid="ignore"):
        for top in range(0, rows, tall):
            for left in range(0, columns, wide):
                box = slice(top, top + tall), slice(left, left + wide)
                ours, theirs = b[box[0]], a[:, box[1]]
                value = _product(ours * scale, theirs)  # of 24 bits each: exact
                value += weight[box]
                reach = np.abs(value)
                reach *= UNIT * SLACK
                reach += far[0][box[0], None] * far[1][box[1]].max() + least
                found[box] = value
                near = _is_torn((value - reach).astype(np.float32), (value + reach).astype(np.float32), wanted)
                if np.count_nonzero(near) > MANY * near.size:
                    found[box] = _carried_out(weight[box], ours.T[:, :, None], theirs[:, None, :], scale)
                elif near.any():
                    places.append(np.nonzero(near) + np.array([[top], [left]]))
        if places:  # all at once: there are few in each sheet
            down, along = np.concatenate(places, axis=1)
            found[down, along] = _carried_out(weight[down, along], b[down].T, a[:, along], scale)
    return found


def lengths(rows: Singles) -> Singles:
    """Return for each row the number of f32 that is nearest to its length.

    Its square is a sum of squares, each exact in f64: summed there it is off by no more than a unit for each. Where that leaves two
    numbers to choose from, it is held against the square of what lies between them, in fractions.
    """
    wide = rows.astype(np.float64)
    found = np.sqrt((wide * wide).sum(1))
    off = found * (rows.shape[1] + 4) * 2.0**-52
    low: Singles = (found - off).astype(np.float32)
    high: Singles = (found + off).astype(np.float32)
    for row in np.flatnonzero(low != high).tolist() if np.isfinite(found).all() else ():
        exact = sum((Fraction(each) ** 2 for each in wide[row].tolist()), Fraction(0))
        tie = (Fraction(float(low[row])) + Fraction(float(high[row]))) / 2
        even = low[row] if not low.view(np.uint32)[row] % 2 else high[row]
        low[row] = even if exact == tie**2 else low[row] if exact < tie**2 else high[row]
    return low


def _product(b: Floats, a: Floats) -> Floats:
    """Return a product of matrices."""
    found = np.empty((len(b), a.shape[1]))
    wide = max(1, ALONE // (max(1, len(a)) * len(b)))
    for left in range(0, a.shape[1], wide):
        found[:, left : left + wide] = b @ a[:, left : left + wide]
    return found


def _is_torn(low: Singles, high: Singles, wanted: str) -> NDArray[np.bool_]:
    """Say where not all numbers between two round to the same."""
    one, other = low.view(np.uint32), high.view(np.uint32)
    if wanted != "bf16":
        kind = array_type(wanted)
        apart: NDArray[np.bool_] = np.not_equal(*(each.astype(kind).view(f"u{kind.itemsize}") for each in (low, high)))
        return apart
    # of one sign bits sort as magnitudes do; of two they are far apart
    least, most = np.minimum(one, other), np.maximum(one, other)
    least += np.uint32(0x7FFF)  # a tie is torn, whichever way it would be rounded
    least >>= np.uint32(16)
    torn: NDArray[np.bool_] = least != (most + np.uint32(0x8000)) >> np.uint32(16)
    return torn | ((most & np.uint32(0x7FFFFFFF)) >= LARGE)


def _carried_out(weight: Floats, b: Floats, a: Floats, scale: float) -> Singles:
    """Return what the definition says, step by step, each rounded to f32; the first axis of both factors is the rank."""
    left, right = b.astype(np.float32), a.astype(np.float32)
    total: Singles = left[0] * right[0]
    for one, other in zip(left[1:], right[1:], strict=True):
        total = total + one * other
    return weight.astype(np.float32) + total * np.float32(scale)
