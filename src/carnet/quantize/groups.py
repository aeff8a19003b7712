"""Coding bf16 in groups, the blocks that are a short part of a row: neither scales nor codes are computed, both are looked up.

A scale of eight bits is a power of two times one of at most eight numbers. A power of two moves nothing but a weight's exponent, so
that a weight's code follows from a difference of bits, and from which of the numbers it is::

    bits of the weight    e e e e e e e e m m m m m m m       without the sign
    - those of the scale  x x x x x x x x 0 0 0 0 0 0 0
    = a place in the row that the scale's number has in the table of codes; what lies beyond an end of the row is as its end

Weights are looked at four at a time: of groups that lie under each other, the first four of each, then the next four. So numpy's
loops run along the groups, not inside of them, and take so long that other threads get their turn at Python's lock meanwhile.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, frexp, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import array_type
from carnet.quantize import arithmetic
from carnet.quantize.arithmetic import LARGEST_FP8
from carnet.quantize.codes import Code, Codes, values
from carnet.quantize.recipes import BY_NAME, PACKED, Recipe

Array = NDArray[Any]
Halves = NDArray[np.uint16]

FOUR = 4  # weights of eight bytes
BINADE = 1 << 7  # forms of bf16 with one exponent
SIGN = 1 << 15
LEAST = -60  # exponent: smaller weights are no longer normal when they are divided, and what they become is computed
MOST = 16  # and under larger scales the least weights become zero, which may have another sign; under one, where quotients are bf16
ONE = 0x38  # e4m3's one, whose mantissas follow it
NEGATIVE = {  # what has the sign bit in its code: of these types, compared so, with this
    "kept": (np.dtype(np.int16), np.less, 0),
    "any": (np.dtype(np.int16), np.less_equal, 0),  # every zero
    "from below": (np.dtype(np.uint16), np.greater, SIGN),  # no zero
}


@dataclass(frozen=True, slots=True)
class Tables:
    """What a recipe makes of groups, under one scale of the whole tensor where it has that."""

    recipe: Recipe
    outer: float | None
    scales: Codes  # of every largest magnitude, by its bits: the scale as it is stored
    shifts: NDArray[np.uint64]  # of every scale: what is taken from a weight's bits, four times
    rows: NDArray[np.uint64]  # and where the row of codes begins, four times
    codes: Codes  # rows of codes, without their signs
    row: int  # length of a row
    largest: int  # scale, as it is stored


def takes(recipe: Recipe, own: str, outer: float | None) -> bool:
    """Say whether groups can be coded by looking up."""
    if own != "bf16" or recipe.block[0] != 1 or recipe.scale.kind not in ("power", "two"):
        return False
    if outer is None:
        return True
    least, most = arithmetic.factors(recipe, np.array([1, LARGEST_FP8], np.float32), outer)
    return bool(least >= 2.0**LEAST and most <= 2.0**MOST)


@lru_cache(maxsize=32)
def tables(name: str, outer: float | None) -> Tables:
    """Return the tables of a recipe: made from its arithmetic, so that they say the same."""
    recipe = BY_NAME[name]
    magnitudes = np.arange(SIGN, dtype=np.uint16).view(array_type("bf16")).astype(np.float32)
    with np.errstate(all="ignore"):  # of NaN and infinity, which are no weights
        stored = arithmetic.scales(recipe, magnitudes, "bf16", outer)[0].view(np.uint8)
    every = np.arange(256, dtype=np.uint8)
    if recipe.scale.kind == "power":
        numbers, which, power = np.array([127], np.uint8), np.zeros(256, np.int64), every.astype(np.int64) - 127
        power[power < LEAST - 10] = 0  # that of zeros: no other group that is looked up has so small a scale
    else:
        numbers = ONE + np.arange(8, dtype=np.uint8)
        fraction, exponent = np.frexp(np.nan_to_num(np.abs(every.view(array_type("f8_e4m3")).astype(np.float32))))
        which, power = (np.maximum(fraction * 16 - 8, 0)).astype(np.int64), exponent.astype(np.int64) - 1
    divisors = arithmetic.factors(recipe, numbers.view(array_type(recipe.scale.stored)), outer)
    bottom, top = _reach(recipe.code)
    least = frexp(float(divisors.min()))[1] - 1
    begin, row = (127 + least + bottom) * BINADE, (top - bottom) * BINADE
    forms = np.arange(begin, begin + row).astype(np.uint16)[None]
    codes = np.concatenate([arithmetic.encode(recipe, forms, "bf16", divisor.reshape(1, 1)) for divisor in divisors], 1)[0]
    codes &= np.uint8((1 << recipe.code.bits - 1) - 1)
    most = 127 + (MOST if recipe.quotient == "f32" else 0)
    return Tables(recipe, outer, stored, _four(power * BINADE + begin), _four(which * row), codes, row, most)


def _reach(code: Code) -> tuple[int, int]:
    """Return powers of two below which there is no code but zero, and above which there is none but the largest."""
    least = float(values(code)[1])
    return int(log2(least)) - 2, ceil(log2(code.largest)) + 2  # divisors of one table are less than two binades apart


def _four(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    return np.repeat(numbers.astype(np.uint16), FOUR).view(np.uint64)


def code(of: Tables, bits: Halves, codes: Codes) -> Codes:
    """Code groups that follow each other, weights that are finite, as codes are stored; return the scales as they are stored."""
    recipe, size = of.recipe, of.recipe.block[1]
    count, fours = bits.size // size, size // FOUR
    turned = np.ascontiguousarray(bits.view(np.uint64).reshape(count, fours).T).view(np.uint16)
    kind, compare, number = NEGATIVE[recipe.code.minus_zero]
    signs = compare(turned.view(kind), kind.type(number)).view(np.uint8)
    turned &= np.uint16(SIGN - 1)
    largest = turned.max(0)
    for _ in range(2):  # of four
        largest = np.maximum(largest[0::2], largest[1::2])
    scales: Codes = np.take(of.scales, largest, mode="clip")
    largest -= np.uint16(1)  # zeros wrap around: they are never too small
    if largest.min() < (127 + LEAST) * BINADE - 1 or scales.max() > of.largest:
        return _computed(recipe, bits.reshape(count, size), of.outer, codes)
    places = turned.view(np.int16)
    places -= np.take(of.shifts, scales, mode="clip").view(np.int16)
    np.clip(places, np.int16(0), np.int16(of.row - 1), out=places)
    if len(of.codes) > of.row:
        places += np.take(of.rows, scales, mode="clip").view(np.int16)
    found = np.empty(places.shape, np.uint8)
    arithmetic.look_up(of.codes, places.reshape(-1), found.reshape(-1))
    signs *= np.uint8(1 << recipe.code.bits - 1)  # numpy is slow to shift bytes
    found |= signs
    packed = arithmetic.pack(recipe, found).view(f"u{FOUR // PACKED[recipe.packing]}")
    for column, line in zip(codes.view(packed.dtype).reshape(count, fours).T, packed, strict=True):
        column[...] = line
    return scales


def _computed(recipe: Recipe, bits: Halves, outer: float | None, codes: Codes) -> Codes:
    stored, divisors = arithmetic.scales(recipe, arithmetic.block_amax(bits, "bf16", recipe.block), "bf16", outer)
    codes[...] = arithmetic.pack(recipe, arithmetic.encode(recipe, bits, "bf16", divisors)).reshape(-1)
    return stored.view(np.uint8).reshape(-1)
