"""What a target may hold of a tensor that is computed: between which numbers the true result lies, and so which roundings are right.

Nothing here is the executor's. Numbers are computed in a way of their own, with a bound on what that way may be off by; a stored number
is right if it is the rounding of a number within the bound. All but one element in many millions has one right number alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME, array_type

Floats = NDArray[np.float64]
Operand = Callable[[int], Floats]  # the numbers of an operand, by its place, in the box that is asked about
Between = tuple[Floats, Floats]  # the least and the largest that the true results may be

WIDE = 2.0**-50  # of a result: the exp of a C library in more than f64, or in f64, is off by less


def _minus_exp(operand: Operand) -> Between:
    with np.errstate(over="ignore"):
        found = np.exp(operand(0).astype(np.longdouble))
        return -(found * (1 + WIDE)).astype(np.float64), -(found * (1 - WIDE)).astype(np.float64)


FUNCTIONS: Mapping[str, Callable[[Operand], Between]] = {"minus_exp": _minus_exp}


def is_wrong(function: str, operand: Operand, bits: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Say which of some stored numbers are not the rounding of what a function makes of its operands."""
    least, most = (np.ascontiguousarray(_rounded(each, dtype)) for each in FUNCTIONS[function](operand))
    found = np.ascontiguousarray(bits).view(array_type(dtype))
    low, high, own = (each.view(f"u{BY_NAME[dtype].nbytes}") for each in (least, most, found))
    between = (low != high) & (found >= least) & (found <= most)
    beyond = np.isinf(found) & np.isfinite(operand(0))
    right: NDArray[np.bool_] = (own == low) | between | (np.isnan(found) & np.isnan(least))
    return ~right | beyond


def _rounded(numbers: Floats, dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers.astype(array_type(dtype))
