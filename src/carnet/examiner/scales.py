"""What a recipe means, said a second time: which values its codes have, which numbers each code is nearest to, which scale is right.

The writer looks codes up in tables; here a code is right where the number that it stands for lies between the middles around the
code's value. Values come from ml_dtypes and numpy, scales are computed in f64 and rounded once.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import array_type
from carnet.quantize.recipes import BY_NAME, Recipe

Array = NDArray[Any]
Floats = NDArray[np.float32]

finfo: Any = ml_dtypes.finfo  # it has no types
FORMS = 256  # of a byte
COUNTED = 1 << 16  # scales that are counted together
LARGEST = 448.0  # of e4m3
TOP = 6.0 * LARGEST  # of e2m1 under e4m3
PAIRS = np.array(
    [byte & 15 | byte >> 4 << 8 for byte in range(256)], np.dtype("<u2")
)  # the two codes of a byte, the low one first


@dataclass(frozen=True, slots=True)
class Nearest:
    """For every code of a number format: its value, and the closed interval of numbers that it is nearest to."""

    value: Floats
    low: Floats
    high: Floats  # below ``low`` where no number has this code
    least: float  # numbers beyond these are cut off: there would be nearer codes, were there any more
    largest: float
    signed_zero: bool  # a zero has the sign of its number, which an interval cannot say

    def values(self, places: NDArray[np.intp], room: Floats | None = None) -> Floats:
        """Return the values of codes; ``places`` are the codes as numpy takes indices, ``room`` is memory for what is found."""
        return _looked_up(self.value, places, room)

    def is_right(
        self, codes: NDArray[np.uint8], places: NDArray[np.intp], quotients: Floats, room: Floats | None = None
    ) -> NDArray[np.bool_]:
        """Say which codes are the nearest to their numbers; ``places`` are the codes once more."""
        right = _looked_up(self.low, places, room) <= quotients
        right &= quotients <= _looked_up(self.high, places, room)
        if self.signed_zero:
            zeros = np.flatnonzero((codes & 0x7F) == 0)
            if len(zeros):
                right.reshape(-1)[zeros] &= np.signbit(quotients.reshape(-1)[zeros]) == (codes.reshape(-1)[zeros] > 0)
        return right

    def code(self, quotients: Floats) -> NDArray[np.uint8]:
        """Return the nearest codes themselves; slower, to say what a wrong one should have been."""
        known = np.flatnonzero(self.low <= self.high)
        order = known[np.lexsort((self.high[known], self.low[known]))]
        if self.signed_zero:
            order = order[order != 0]  # what is near to zero is near to minus zero too
        found: NDArray[np.uint8] = order[np.searchsorted(self.low[order], quotients, side="right") - 1].astype(np.uint8)
        if self.signed_zero:
            found[(found == len(self.value) // 2) & ~np.signbit(quotients)] = 0
        return found


def _looked_up(table: Array, places: NDArray[np.intp], room: Floats | None) -> Floats:
    into = None if room is None else room[: places.size * table.itemsize // 4].view(table.dtype).reshape(places.shape)
    found: Floats = np.take(table, places, out=into, mode="clip").view(np.float32)
    return found


@cache
def nearest(recipe: str) -> Nearest:
    """Return the codes of a recipe, unpacked: a byte each, as ``unpacked`` gives them."""
    of = BY_NAME[recipe]
    if of.code.integer:
        steps = np.arange(256, dtype=np.uint8).view(np.int8) if of.code.bits == 8 else np.arange(16) - 8
        return _steps(steps.astype(np.float32))
    bits = np.arange(1 << of.code.bits, dtype=np.uint8)
    kind = ml_dtypes.float8_e4m3fn if of.code.name == "e4m3" else ml_dtypes.float4_e2m1fn
    value = bits.view(kind).astype(np.float32)
    half = len(value) // 2
    size = value[:half][np.isfinite(value[:half])]
    middle = ((size[1:].astype(np.float64) + size[:-1]) / 2).astype(np.float32)
    even = np.arange(len(size)) % 2 == 0
    below, above = (
        (even, even) if of.code.ties == "even" else (np.zeros_like(even), np.ones_like(even))
    )  # ends that belong to it
    infinity, zero = np.float32(np.inf), np.float32(0)
    low = np.append(zero, np.where(below[1:], middle, np.nextafter(middle, infinity)))
    high = np.append(np.where(above[:-1], middle, np.nextafter(middle, zero)), infinity)
    lows, highs = np.full(len(value), infinity), np.full(len(value), -infinity)
    lows[: len(size)], highs[: len(size)] = low, high
    lows[half : half + len(size)], highs[half : half + len(size)] = -high, -low
    if of.code.minus_zero == "from below":  # minus zero is what a small negative number becomes, not a zero
        highs[half] = np.nextafter(zero, -infinity)
    elif of.code.minus_zero == "any":  # every zero becomes minus zero
        lows[0] = np.nextafter(zero, infinity)
    if of.scale.outer == "multiplies":  # modelopt reads minus zero as zero
        value = value + np.float32(0)
    reach = float(size[-1] + (size[-1] - size[-2]) / 2)
    return Nearest(value, lows, highs, -reach, reach, of.code.minus_zero == "kept")


@cache
def nearest_of_bytes(recipe: str) -> Nearest:
    """Return the same for every byte of stored codes: of two codes in a byte, two numbers in one item."""
    of = nearest(recipe)
    codes = unpacked(BY_NAME[recipe], np.arange(256, dtype=np.uint8).reshape(256, 1))
    value, low, high = (each[codes].view(f"u{4 * codes.shape[1]}")[:, 0] for each in (of.value, of.low, of.high))
    return replace(of, value=value, low=low, high=high)


def _steps(value: Floats) -> Nearest:
    """Return whole numbers; a number in the middle of two goes to the even one."""
    infinity = np.float32(np.inf)
    low, high, odd = value - np.float32(0.5), value + np.float32(0.5), value % 2 != 0
    low[odd], high[odd] = np.nextafter(low[odd], infinity), np.nextafter(high[odd], -infinity)
    low[value.argmin()], high[value.argmax()] = -infinity, infinity
    return Nearest(value, low, high, float(value.min()) - 0.5, float(value.max()) + 0.5, signed_zero=False)


def unpacked(recipe: Recipe, stored: Array) -> NDArray[np.uint8]:
    """Return the codes of a stored matrix, one a byte. Words of eight codes are bytes of two, the lowest first."""
    raw = np.ascontiguousarray(stored).view(np.uint8)
    return PAIRS.take(raw, mode="clip").view(np.uint8) if recipe.packing else raw


def block_amax(block: tuple[int, int], values: Floats) -> Floats:
    """Return the largest magnitude of each block of a matrix."""
    down, along = block
    sizes = np.abs(values) if down == 1 else _tall_amax(values, down or len(values))
    if not along:
        largest: Floats = sizes.max(axis=1, keepdims=True)
        return largest
    if sizes.shape[1] % along or along & (along - 1):
        return np.maximum.reduceat(sizes, range(0, sizes.shape[1], along), axis=1)
    while along > 1:  # neighbours by pairs: numpy is slow along an axis of few
        sizes, along = np.maximum(sizes[:, 0::2], sizes[:, 1::2]), along // 2
    return sizes


def _tall_amax(values: Floats, down: int) -> Floats:
    """Return the largest magnitude in each column of so many rows. It is at an end, and needs no array of all magnitudes."""
    bands = [values[row : row + down] for row in range(0, len(values), down)]
    found: Floats = np.abs([[band.max(axis=0), band.min(axis=0)] for band in bands]).max(axis=1)
    return found


def spread(block: tuple[int, int], grid: Floats, shape: tuple[int, ...]) -> Floats:
    """Return a number for each element of a matrix, from a number for each block; one axis may stay of length one."""
    down, along = block
    if along > 1:  # numpy.repeat would let no other thread work
        wide = np.empty((*grid.shape, along), np.float32)
        if along == 4:  # numpy is slow along an axis of few
            for column in range(along):
                wide[:, :, column] = grid
        else:
            wide[...] = grid[:, :, None]
        grid = wide.reshape(len(grid), -1)[:, : shape[1]]
    if down > 1:
        tall = np.empty((len(grid), down, grid.shape[1]), np.float32)
        tall[...] = grid[:, None, :]
        grid = tall.reshape(-1, grid.shape[1])[: shape[0]]
    return grid


def outer_scale(recipe: Recipe, amax: float, own: str) -> np.float32:
    """Return the scale of a whole tensor that stands over those of its blocks."""
    if recipe.scale.outer == "multiplies":
        return np.float32(amax / TOP) if amax else np.float32(1)
    least = float(finfo(array_type(own)).tiny)
    inverse = _rounded(np.array([1 / max(amax, least)]), own)  # torch divides a number by a tensor in two steps
    found = _rounded(TOP * inverse.astype(np.float64), own)[0]
    return np.float32(found if np.isfinite(found) else 1)


def scales(recipe: Recipe, amax: Floats, own: str, outer: np.float32 | None) -> Array:
    """Return the scales of blocks as they must be stored."""
    rule = recipe.scale
    if rule.kind == "power":
        return _powers(recipe, amax)
    exact = amax.astype(np.float64)
    if rule.kind == "two":
        assert outer is not None, "a scale under another needs it"
        if rule.outer == "multiplies":
            under = (exact / (np.float32(rule.divisor) * outer)).astype(np.float32)
            found = np.clip(np.where(under == 0, np.float32(1), under), np.float32(2.0**-9), np.float32(LARGEST))
            return found.astype(ml_dtypes.float8_e4m3fn)
        under = _rounded(exact / rule.divisor, own if rule.division == "own" else "f32")
        found = np.minimum(outer * under, np.float32(LARGEST)).astype(ml_dtypes.float8_e4m3fn)
        return _unless_zero(found, 0.125)
    stored = array_type(own if rule.stored == "own" else rule.stored)
    found = _rounded(exact / rule.divisor, own if rule.division == "own" else "f32")
    nothing = float(finfo(stored).eps) if rule.empty == "eps" else 1.0
    return _unless_zero(found, nothing).astype(stored)


def _unless_zero(found: Array, otherwise: float) -> Array:
    made: Array = np.where(found.astype(np.float32) == 0, found.dtype.type(otherwise), found)
    return made


def _rounded(exact: Array, to: str) -> Floats:
    """Round to f32, and from there to a narrower type, as programs do whose arithmetic is in f32."""
    with np.errstate(over="ignore"):
        return exact.astype(np.float32).astype(array_type(to)).astype(np.float32)


def _powers(recipe: Recipe, amax: Floats) -> Array:
    """Return exponents + 127: of the least power of two under which nothing is cut off, or of the nearest."""
    fraction, exponent = np.frexp(amax.astype(np.float64))  # fraction in [1/2, 1)
    most, size = np.frexp(recipe.scale.divisor)
    above = fraction > most if recipe.scale.round == "up" else fraction >= 0.875  # 1.75 and more count as two
    found = exponent - size + above
    return (np.clip(np.where(amax == 0, -127, found), -127, 127) + 127).astype(np.uint8)


def divisors(recipe: Recipe, stored: Array, outer: np.float32 | None) -> Floats:
    """Return what a weight is divided by, from the scales as they are stored."""
    if stored.dtype.itemsize == 1 and stored.size > FORMS:  # each once
        every = np.arange(FORMS, dtype=np.uint8).view(stored.dtype)
        return divisors(recipe, every, outer).take(stored.view(np.uint8), mode="clip")
    if recipe.scale.kind == "power":
        with np.errstate(over="ignore"):  # 255 is no power of two but infinite
            return np.ldexp(np.float32(1), stored.view(np.uint8).astype(np.int32) - 127).astype(np.float32)
    found = stored.astype(np.float32)
    if outer is None:
        return found
    with np.errstate(all="ignore"):  # a scale may be anything before it is found wrong
        return found * outer if recipe.scale.outer == "multiplies" else found / outer


def octaves(recipe: Recipe, stored: Array, outer: np.float32 | None) -> Counter[int]:
    """Return how many scales lie between a power of two and the next, by its exponent; what is no positive number counts nowhere.

    >>> octaves(BY_NAME["modelopt/fp8-channel"], np.array([1.0, 1.5, 0.25, 0.0], np.float32), None)
    Counter({0: 2, -2: 1})
    """
    found, flat = Counter[int](), stored.reshape(-1)
    if stored.dtype.itemsize == 1:
        raw = flat.view(np.uint8)
        times = sum(
            (np.bincount(raw[at : at + COUNTED], minlength=FORMS) for at in range(0, raw.size, COUNTED)), np.zeros(FORMS, int)
        )
        flat = np.arange(FORMS, dtype=np.uint8).view(stored.dtype)[times > 0]
        many = [(flat, times[times > 0])]
    else:
        many = [(part, np.ones(part.size, int)) for part in (flat[at : at + COUNTED] for at in range(0, flat.size, COUNTED))]
    for part, times in many:
        values = divisors(recipe, part, outer)
        good = np.isfinite(values) & (values > 0)
        exponents, times = np.frexp(values[good])[1] - 1, times[good]
        for exponent in np.unique(exponents):
            found[int(exponent)] += int(times[exponents == exponent].sum())
    return found


def input_scale(recipe: Recipe, amax: float, own: str) -> float:
    """Return the scale of activations whose largest magnitude is known, in the type that a style keeps it in."""
    if recipe.scale.outer:
        return float(outer_scale(recipe, amax, own))
    return float(_rounded(np.array([amax / LARGEST]), own if recipe.scale.division == "own" else "f32")[0])


def kept_scale(recipe: Recipe, scale: float, own: str) -> Array:
    """Return a scale that is known, alone in an array of the type that a style keeps it in."""
    found = _rounded(np.array([scale], np.float64), own if recipe.scale.division == "own" else "f32")
    return found.astype(array_type(own if recipe.scale.stored == "own" else recipe.scale.stored))


def name_scales(found: Floats, right: Floats) -> str:
    """Say what is wrong with scales, all of which are wrong."""
    with np.errstate(all="ignore"):
        if not (np.isfinite(found) & (found > 0)).all():
            return "scales that are no positive numbers"
        times = found / right
        if np.allclose(found * right, 1, rtol=0.01):
            return "scales are inverted"
        if np.allclose(times, times[0], rtol=0.01):
            words = {2.0: "doubled", 0.5: "halved"}
            word = next((word for factor, word in words.items() if np.isclose(times[0], factor, rtol=0.01)), None)
            if word is not None:
                return f"scales are {word}"
            if len(times) > 1:
                return f"scales are {times[0]:.3g} times what they must be"
    if sorted(found.tolist()) == sorted(right.tolist()):
        return f"{len(found)} scales rearranged"
    return "stale scales: they do not follow from the weights"
