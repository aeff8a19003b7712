"""Codes: the numbers that a stored item of few bits can be, and the nearest one to any value.

A value is looked up, not computed. bf16 has 65,536 forms, so a table gives the code of each; an f32 goes through the same table
once its lower half is squeezed into one *sticky* bit, which says "and a little more": bf16 keeps at least two bits more than
any code here has, and with the sticky bit no tie is taken for one that is none (this is rounding to odd).
"""

from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]

FORMS = 1 << 16


@dataclass(frozen=True, slots=True)
class Code:
    """A number format of at most eight bits."""

    name: str
    bits: int
    largest: float  # the largest magnitude on the positive side
    minus_zero: str = "kept"  # what a zero with a sign, and a small negative value, becomes: "kept", "from below", "any"
    ties: str = "even"  # where a value in the middle of two goes: "even", "zero" (towards it)
    integer: bool = False  # two's complement, with one value more on the negative side


E4M3 = Code("e4m3", 8, 448.0)
E2M1 = Code("e2m1", 4, 6.0)
INT8 = Code("int8", 8, 127.0, integer=True)
INT4 = Code("int4", 4, 7.0, integer=True)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1


@cache
def values(code: Code) -> Floats:
    """Return the value of every code, by its bits.

    >>> values(E2M1)[[1, 7, 9]].tolist()
    [0.5, 6.0, -0.5]
    """
    if code.name == "e4m3":
        bits = np.arange(256, dtype=np.uint8)
        return np.asarray(bits.view(ml_dtypes.float8_e4m3fn), np.float32)
    if code.name == "e2m1":
        return np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)], np.float32)
    steps = np.arange(1 << code.bits, dtype=np.uint8).astype(np.int32)
    return np.where(steps >= 1 << code.bits - 1, steps - (1 << code.bits), steps).astype(np.float32)


@cache
def table(code: Code) -> Codes:
    """Return the code nearest to each bf16, by its bits; beyond the largest there is the largest.

    Made by comparing with the middles between neighbours, so that it is a statement about ``values`` and nothing else.
    """
    every = np.arange(FORMS, dtype=np.uint16)
    magnitudes = (every & 0x7FFF).astype(np.uint32) << 16
    with np.errstate(invalid="ignore"):  # of the NaNs
        size = magnitudes.view(np.float32).astype(np.float64)
    positive = values(code)[: 1 << code.bits - 1].astype(np.float64)
    positive = positive[positive <= code.largest]  # e4m3 has a NaN
    middles = (positive[1:] + positive[:-1]) / 2
    low = np.searchsorted(middles, size, side="left")  # a tie stays below
    high = np.searchsorted(middles, size, side="right")  # or goes above
    nearest = np.where((low != high) & (high % 2 == 0), high, low) if code.ties == "even" else low
    negative = every >= FORMS // 2
    sign = np.where(negative, 1 << code.bits - 1, 0)
    if code.minus_zero == "from below":
        sign[every == FORMS // 2] = 0
    elif code.minus_zero == "any":
        sign[(every & 0x7FFF) == 0] = 1 << code.bits - 1
    if code.integer:
        least = 1 << code.bits - 1
        nearest = np.where(negative, np.where(size >= least - 0.5, least, nearest), nearest)
        return ((np.where(negative, -nearest, nearest)) & ((1 << code.bits) - 1)).astype(np.uint8)
    return (nearest + sign).astype(np.uint8)


def squeeze(floats: Floats) -> Halves:
    """Return, for each f32, the bf16 below it with its lowest bit set where something was cut off."""
    bits = floats.view(np.uint32)
    squeezed = bits & np.uint32(0xFFFF)
    squeezed += np.uint32(0xFFFF)  # carries into the upper half, unless nothing is cut off
    squeezed |= bits
    return squeezed.view(np.uint16)[..., 1::2]
