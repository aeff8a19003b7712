"""Functions of single numbers, computed on the way: each result is the f32 nearest to the true one, on every machine.

``minus_exp``, -exp(x): what programs that run Mamba keep of its ``A_log``. torch's exp, numpy's and those of GPUs are fast and off by
one in the last place now and then, each elsewhere (torch's on x86 of one f32 in a hundred; an H200's of three in ten, by up to two),
so none of them can be the definition.
Here f64 says the nearest f32, but where the error of f64 could matter, which is of one number in many millions: there decimals do.
"""

from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import array_type
from carnet.executor.casts import Array, cast
from carnet.steps import Elementwise

SURE = 2.0**-51  # no exp in f64 is off by more than this part of its result
DECIMALS = Context(prec=60)
TILE = 1 << 14  # numbers at a time: temporaries stay small


def compute(function: Elementwise, source: Array, target: Array, names: tuple[str, str]) -> bool:
    """Compute each element of ``target`` from that of ``source``; say whether every finite one stayed finite.

    Both arrays hold unsigned integers of the element's size: the bits. Names are carnet's element types.
    """
    if source.size > TILE and source.ndim:
        if len(source) == 1:
            return compute(function, source[0], target[0], names)
        half = len(source) // 2
        return compute(function, source[:half], target[:half], names) & compute(function, source[half:], target[half:], names)
    assert function == "minus_exp", "there is no other"
    numbers = source.view(array_type(names[0])).astype(np.float64)
    made = minus_exp(numbers)
    fits = not (np.isinf(made) & np.isfinite(numbers)).any()
    if names[1] == "f32":
        np.copyto(target, made.view(np.uint32))
        return fits
    return cast(made.view(np.uint32), target, ("f32", names[1]), np.empty(made.size * 8, np.uint8)) and fits


def minus_exp(numbers: NDArray[np.float64], sure: float = SURE) -> NDArray[np.float32]:
    """Return -exp(x) of each number, rounded to the nearest f32.

    >>> minus_exp(np.array([0.0, 1.0, -np.inf])).tolist()
    [-1.0, -2.7182817459106445, -0.0]
    """
    with np.errstate(over="ignore"):
        found = np.exp(numbers)
        low, high = (np.asarray(found * (1 + sign * sure)).astype(np.float32) for sign in (-1, 1))
    unsure = np.isfinite(high) & (low != high)
    for at in map(tuple, np.argwhere(unsure)):
        middle = Decimal((float(low[at]) + float(high[at])) / 2)  # of two neighbours in f32, which f64 holds
        low[at] = high[at] if DECIMALS.exp(Decimal(float(numbers[at]))) > middle else low[at]
    return -np.where(np.isinf(high), high, low)
