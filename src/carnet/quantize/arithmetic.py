"""The arithmetic of recipes, on arrays: the largest magnitudes, the scales, the codes. Same bits as the programs that it follows."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import array_type
from carnet.quantize.codes import FORMS, Codes, Floats, squeeze, table
from carnet.quantize.codes import values as numbers
from carnet.quantize.recipes import OUTER, Recipe

Array = NDArray[Any]
Bits = NDArray[np.unsignedinteger]

finfo: Any = ml_dtypes.finfo  # it has no types
BF16 = np.dtype(ml_dtypes.bfloat16)
LEAST_FP8, LARGEST_FP8 = 2.0**-9, 448.0
SHORT = 32  # elements of a row
LOOKED_UP = 1 << 17  # elements


def block_amax(bits: Bits, own: str, block: tuple[int, int]) -> Floats:
    """Return the largest magnitude in each block of a matrix, given as the bits of its elements; NaN and infinity are largest of all.

    Shape: one for each block; the last blocks may be smaller than ``block``.
    """
    rows, columns = bits.shape
    sizes = bits & bits.dtype.type((1 << 8 * bits.dtype.itemsize - 1) - 1)
    down, along = block[0] or rows, block[1] or columns
    if down > 1:
        sizes = np.stack([sizes[row : row + down].max(0) for row in range(0, rows, down)])
    if columns % along:
        sizes = np.maximum.reduceat(sizes, range(0, columns, along), axis=1)
    else:
        while 1 < along <= SHORT and along % 2 == 0:  # halved: numpy is slow where its inner loop is short
            sizes, along = np.maximum(sizes[:, 0::2], sizes[:, 1::2]), along // 2
        sizes = sizes.reshape(len(sizes), -1, along).max(-1)
    return np.ascontiguousarray(sizes).view(array_type(own)).astype(np.float32)


def rounded(floats: Floats, to: str, own: str) -> Floats:
    """Return values as they are after rounding to f32 or to the weights' own type."""
    return floats if to == "f32" else floats.astype(array_type(own)).astype(np.float32)


def outer_scale(recipe: Recipe, amax: float, own: str) -> np.float32:
    """Return the scale of a whole tensor that stands over the blocks' own."""
    if recipe.scale.outer == "multiplies":
        return np.float32(amax or OUTER) / np.float32(OUTER)
    least = np.float32(finfo(array_type(own)).tiny)
    with np.errstate(over="ignore"):  # torch divides a number by a tensor in two steps, and rounds after each
        inverse = rounded(np.ones(1, np.float32) / np.maximum(np.float32(amax), least), "own", own)
        found = rounded(np.float32(OUTER) * inverse, "own", own)[0]
    return np.float32(found if np.isfinite(found) else 1.0)


def scales(recipe: Recipe, amax: Floats, own: str, outer: float | None = None) -> tuple[Array, Floats]:
    """Return the scale of each block: as it is stored, and the number that weights are divided by."""
    rule = recipe.scale
    if rule.kind == "power":
        exponent = _exponents(rule.round, amax, rule.divisor)
        return (exponent + 127).astype(np.uint8), np.ldexp(np.float32(1), exponent).astype(np.float32)
    if rule.kind == "two":
        assert outer is not None, "a scale under another needs it"
        return _inner(recipe, amax, own, np.float32(outer))
    if rule.empty == "largest":
        amax = np.where(amax == 0, np.float32(rule.divisor), amax)
    found = rounded(amax / np.float32(rule.divisor), rule.division, own)
    stored = array_type(own if rule.stored == "own" else rule.stored)
    empty = {"one": 1.0, "largest": 1.0, "eps": float(finfo(stored).eps)}[rule.empty]
    found = np.where(found == 0, np.float32(empty), found)
    return found.astype(stored), found


def whole_scale(recipe: Recipe, largest: float, own: str, given: float | None) -> tuple[Array, float]:
    """Return the scale of a whole tensor, as it is stored ([1, 1]), and the number that weights are divided by.

    ``largest`` is the largest magnitude in it; ``given`` the scale itself, where it is known.
    """
    if given is None:
        amax = rounded(np.full((1, 1), largest, np.float32), "own", own)
        stored, divisors = scales(recipe, amax, own)
    else:
        divisors = np.full((1, 1), given, np.float32)
        stored = divisors.astype(array_type(own if recipe.scale.stored == "own" else recipe.scale.stored))
    return stored, float(divisors[0, 0])


def _inner(recipe: Recipe, amax: Floats, own: str, outer: np.float32) -> tuple[Array, Floats]:
    rule = recipe.scale
    if rule.outer == "multiplies":
        found = amax / (np.float32(rule.divisor) * outer)
        found = np.clip(np.where(found == 0, np.float32(1), found), LEAST_FP8, LARGEST_FP8)
        stored = found.astype(ml_dtypes.float8_e4m3fn)
        return stored, stored.astype(np.float32) * outer
    found = outer * rounded(amax / np.float32(rule.divisor), rule.division, own)
    stored = np.clip(found, -LARGEST_FP8, LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
    stored = np.where(stored == 0, ml_dtypes.float8_e4m3fn(0.125), stored)
    return stored, stored.astype(np.float32) / outer


def _exponents(rounding: str, amax: Floats, divisor: float) -> NDArray[np.int32]:
    """Return the power of two of each block, from -127 to 127."""
    if rounding == "up":
        fraction, exponent = np.frexp(amax / np.float32(divisor))
        found = np.where(fraction == 0.5, exponent - 1, exponent)
    else:
        # a quarter of the last place but one is added before the exponent is taken: 1.75 and more count as two
        bits = amax.astype(np.float32).view(np.uint32) + np.uint32(1 << 21)
        found = (bits >> 23).astype(np.int32) - 127 - int(np.log2(divisor))
    return np.clip(np.where(amax == 0, -127, found), -127, 127).astype(np.int32)


def lookup(recipe: Recipe, own: str, divisor: float) -> Codes:
    """Return the code of every form of a 16-bit type under one scale: a tensor is then coded by looking up."""
    forms = np.arange(FORMS, dtype=np.uint16).view(array_type(own)).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return _coded(recipe, forms / np.float32(divisor), own)


def look_up(table: Codes, places: Array, codes: Codes) -> None:
    """Fill ``codes`` from a table, so many at a time that numpy's indices, of eight bytes, stay few."""
    for low in range(0, places.size, LOOKED_UP):
        np.take(table, places[low : low + LOOKED_UP], out=codes[low : low + LOOKED_UP], mode="clip")


def encode(recipe: Recipe, bits: Bits, own: str, divisors: Floats) -> Codes:
    """Return the code of each element of a matrix, one a byte; ``divisors`` has one number for each block."""
    values = bits.view(array_type(own)).astype(np.float32)
    rows, columns = bits.shape
    down, along = recipe.block[0] or rows, recipe.block[1] or columns
    tall = np.repeat(divisors, down, axis=0)[:rows] if divisors.shape[0] > 1 and down > 1 else divisors
    if columns % along:
        values /= np.repeat(tall, along, axis=1)[:, :columns]
    else:
        values.reshape(rows, -1, along)[...] /= tall[:, :, None]
    return _coded(recipe, values, own)


def _coded(recipe: Recipe, quotients: Floats, own: str) -> Codes:
    if recipe.quotient == "own" and own == "bf16":
        return np.take(table(recipe.code), quotients.astype(BF16).view(np.uint16), mode="clip")
    quotients = np.ascontiguousarray(rounded(quotients, recipe.quotient, own))
    if recipe.code.integer:
        least = -recipe.code.largest - 1
        return np.clip(np.rint(quotients), least, recipe.code.largest).astype(np.int8).view(np.uint8)
    return np.take(table(recipe.code), squeeze(quotients), mode="clip")


def pack(recipe: Recipe, codes: Codes) -> Array:
    """Return codes as they are stored: one a byte, two a byte, or eight a word."""
    if not recipe.packing:
        return codes
    if recipe.packing == "words":
        codes = codes + np.uint8(8) & np.uint8(15)
    pairs = np.ascontiguousarray(codes).view(np.uint16)
    made: Array = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    return made if recipe.packing == "bytes" else made.view(np.int32)


def unpack(recipe: Recipe, stored: Array) -> Codes:
    """Return stored codes one a byte: what ``pack`` was given."""
    items = np.ascontiguousarray(stored).view(np.uint8)
    if not recipe.packing:
        return items
    made = np.empty((len(items), 2 * items.shape[1]), np.uint8)
    made[:, 0::2], made[:, 1::2] = items & 15, items >> 4
    return made if recipe.packing == "bytes" else made - np.uint8(8) & np.uint8(15)


@cache
def _readings(recipe: Recipe) -> Array:
    """Return the value of every byte of stored codes; of two values where two codes are in a byte, as one wide item."""
    found = numbers(recipe.code)[unpack(recipe, np.arange(256, dtype=np.uint8).reshape(256, 1))]
    if recipe.scale.outer == "multiplies":
        found = found + np.float32(0)  # modelopt's table of these numbers has no zero with a sign
    wide: Array = found.view(f"u{4 * found.shape[1]}")[:, 0]
    return wide


def factors(recipe: Recipe, scales: Array, outer: float | None = None) -> Floats:
    """Return what the codes of each block are multiplied by, in f32, from the scales as they are stored."""
    if recipe.scale.kind == "power":
        with np.errstate(over="ignore"):  # 255 is no power of two but infinite
            return np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
    found = scales.astype(np.float32)
    if outer is None:
        return found
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return found * np.float32(outer) if recipe.scale.outer == "multiplies" else found / np.float32(outer)


def decode(recipe: Recipe, stored: Array, factors: Floats, own: str, to: str) -> Array:
    """Return rows of weights, made from rows of bytes with codes as they are stored, in the type ``to``.

    ``factors`` broadcasts to the rows and columns of the weights. ``own`` is the type in which scales are stored, and a product with
    the scale of a block is rounded to it, as compressed-tensors does; modelopt's and DeepSeek's are f32, whatever type a published
    folder keeps its scales in. A product with a power of two, or with two scales, is f32.
    """
    product = _product(recipe, own)
    with np.errstate(over="ignore", invalid="ignore"):
        if factors.size == 1 and not recipe.packing:  # few products are looked up
            few = _narrowed(_readings(recipe).view(np.float32) * factors.reshape(()), product, to)
            made: Array = np.take(few, stored, mode="clip")
            return made
        found = np.take(_readings(recipe), stored, mode="clip").view(np.float32)
        found *= factors
        return _narrowed(found, product, to)


def is_large(recipe: Recipe, factors: Floats, own: str, to: str) -> bool:
    """Say whether a code may stand for more than the largest number of a type that it is rounded to."""
    # the least of the integers is one larger than the largest
    most = (recipe.code.largest + 1) * float(np.abs(factors).max(initial=0))
    return most >= min(float(finfo(_product(recipe, own)).max), float(finfo(array_type(to)).max))


def _product(recipe: Recipe, own: str) -> np.dtype[Any]:
    return array_type(own if recipe.scale.stored == "own" and recipe.scale.kind == "linear" else "f32")


def _narrowed(found: Floats, product: np.dtype[Any], to: str) -> Array:
    return found.astype(product, copy=False).astype(array_type(to), copy=False)


def input_scale(recipe: Recipe, amax: float, own: str) -> float:
    """Return the scale of activations as it is stored, from the largest of them that calibration saw."""
    if recipe.scale.outer:
        return float(outer_scale(recipe, amax, own))
    return float(rounded(np.array([amax], np.float32) / np.float32(448.0), recipe.scale.division, own)[0])
