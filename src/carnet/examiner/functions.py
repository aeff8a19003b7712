"""What a target may hold of a tensor that is computed: between which numbers the true result lies, and so which roundings are right.

Nothing here is the executor's. Numbers are computed in a way of their own, with a bound on what that way may be off by; a stored number
is right if it is the rounding of a number within the bound. All but one element in many millions has one right number alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box
from carnet.dtypes import array_type

Floats = NDArray[np.float64]
Between = tuple[Floats, Floats]  # the least and the largest that the true results may be

WIDE = 2.0**-50  # of a result: the exp of a C library in more than f64, or in f64, is off by less
BEYOND = 1e300  # any type that is not infinite there
UNIT = 2.0**-53  # what one operation in f64 is off by at most
# what another program's numbers are off by: an exp in f32 by two units in the last place (CUDA's), each operation by half of one
THEIR_EXP, THEIR_UNIT = 2.0**-22, 2.0**-24
BIAS = {"bf16": (-126, 8), "f16": (-14, 11), "f32": (-126, 24), "f64": (-1022, 53)}  # least exponent, bits of a fraction


def _between(
    function: str, operands: Sequence[Floats], box: Box, whole: Sequence[int], dtype: str, *, foreign: bool
) -> Between:
    """Return the bounds of what a function makes of its operands in a box, for a target of some type."""
    wide, unit = (THEIR_EXP, THEIR_UNIT) if foreign else (WIDE, UNIT)
    match function:
        case "minus_exp":
            found = np.exp(operands[0].astype(np.longdouble))
            found = np.where(np.isinf(operands[0]), found, np.minimum(found, BEYOND))
            return -(found * (1 + wide)).astype(np.float64), -(found * (1 - wide)).astype(np.float64)
        case "tail":
            first = operands[0].shape[1] - whole[1] + box.start[1]
            last = operands[0][:, first : first + box.shape[1]]
            return last, last
        case _:
            # a product of operands as the target has them; in whatever order sums are done, they are off by less than the bound
            right, left = (_rounded(each, dtype) for each in operands)
            depth, left = left.shape[1], left.swapaxes(1, 2)
            product = np.matmul(left, right[:, :depth])
            bound = np.matmul(np.abs(left), np.abs(right[:, :depth])) * (2 * depth * unit)
            return product - bound, product + bound


def is_wrong(
    function: str,
    operands: Sequence[Floats],
    box: Box,
    whole: Sequence[int],
    bits: NDArray[Any],
    dtype: str,
    *,
    foreign: bool = False,
) -> NDArray[np.bool_]:
    """Say which of some stored numbers are not the rounding of what a function makes of its operands.

    Carnet's are the nearest to the true result; those of a ``foreign`` program are as near as its arithmetic brings it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        between = _between(function, operands, box, whole, dtype, foreign=foreign)
        least, most = (_rounded(each, dtype) for each in between)
        found = np.ascontiguousarray(bits).view(array_type(dtype)).astype(np.float64)
        same = (found == least) & (np.signbit(found) == np.signbit(least))
        right: NDArray[np.bool_] = (
            same | ((least != most) & (found >= least) & (found <= most)) | (np.isnan(found) & np.isnan(least))
        )
        return ~right | (np.isinf(found) & np.isfinite(between[0]))


def _rounded(numbers: Floats, dtype: str) -> Floats:
    """Round numbers to those of a type, as numbers: to the nearest multiple of what its last bit is worth there, once."""
    least, bits = BIAS[dtype]
    _, exponents = np.frexp(numbers)
    worth = np.maximum(exponents - 1, least) - (bits - 1)
    found = np.ldexp(np.rint(np.ldexp(numbers, -worth)), worth)
    largest = float(np.ldexp(2.0 - 2.0 ** (1 - bits), -least + 1))
    inside: Floats = np.where(np.abs(found) > largest, np.copysign(np.inf, found), found)
    return inside
