"""Read weights that are stored as codes: the codes themselves, the scales over them, and the numbers that both mean."""

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box, whole
from carnet.dtypes import array_type
from carnet.examiner.scales import Array, Floats, divisors, nearest, unpacked
from carnet.examiner.tensor_files import TensorFiles, region
from carnet.formats.stored import Coded, Stored
from carnet.quantize.recipes import BY_NAME, PACKED, WHOLE, Recipe, grid
from carnet.quantize.styles import around

MEANT = "f32"  # the type of the numbers that codes mean


def codes_at(tensor_files: TensorFiles, coded: Coded, box: Box) -> NDArray[np.uint8]:
    """Return the codes of a box of the weight, one a byte."""
    recipe = BY_NAME[coded.recipe]
    skip = box.start[-1] % PACKED[recipe.packing]
    return unpacked(recipe, stored_at(tensor_files, coded, box))[..., skip : skip + box.shape[-1]]


def stored_at(tensor_files: TensorFiles, coded: Coded, box: Box) -> NDArray[np.uint8]:
    """Return the bytes that hold the codes of a box of the weight."""
    recipe = BY_NAME[coded.recipe]
    each = PACKED[recipe.packing]
    first, last = box.start[-1] // each, -(-(box.start[-1] + box.shape[-1]) // each)
    start, shape = around(recipe, (*box.start[:-1], first)), around(recipe, (*box.shape[:-1], last - first))
    return np.ascontiguousarray(_around(recipe, region(tensor_files, coded.codes, Box(start, shape)))).view(np.uint8)


def _around(recipe: Recipe, stored: Array) -> Array:
    """Return what is stored with the rows and columns of the matrix."""
    return np.ascontiguousarray(stored.swapaxes(-1, -2)) if recipe.turned else stored


def scales_of(tensor_files: TensorFiles, coded: Coded, number: int) -> Array:
    """Return the scales of one matrix as they are stored, in their own type: rows and columns of blocks."""
    rows, columns = grid(BY_NAME[coded.recipe], (coded.shape[-2], coded.shape[-1]))
    found: Array = scales_at(tensor_files, coded, slice(number, number + 1), slice(0, rows), slice(0, columns))[0]
    return found


def scales_at(tensor_files: TensorFiles, coded: Coded, experts: slice, rows: slice, columns: slice) -> Array:
    """Return some of the scales as they are stored: experts, rows and columns of blocks."""
    assert coded.scales is not None, "codes stand under scales"
    count = prod(coded.shape[:-2])
    shape = grid(BY_NAME[coded.recipe], (coded.shape[-2], coded.shape[-1]))
    recipe = BY_NAME[coded.recipe]
    if around(recipe, coded.scales.shape) != (
        (count, *shape) if len(coded.shape) > 2 else shape
    ):  # one number, spelled otherwise
        found = numbers(tensor_files, coded.scales).reshape(-1, *shape)  # it may stand over all experts
        return np.broadcast_to(found, (count, *shape))[experts, rows, columns]
    parts = [experts, rows, columns][3 - len(coded.scales.shape) :]
    start, size = (
        around(recipe, tuple(map(of, parts))) for of in (lambda part: part.start, lambda part: part.stop - part.start)
    )
    held = np.ascontiguousarray(region(tensor_files, coded.scales, Box(start, size))).view(array_type(coded.scales.dtype))
    found = _around(recipe, held)
    return found.reshape(experts.stop - experts.start, rows.stop - rows.start, columns.stop - columns.start)


def outer_of(tensor_files: TensorFiles, coded: Coded, number: int = 0) -> np.float32 | None:
    """Return the scale that stands over those of the blocks: the only one, or that of a part of a matrix."""
    return None if coded.outer is None else np.float32(numbers(tensor_files, coded.outer).reshape(-1)[number])


def numbers(tensor_files: TensorFiles, stored: Stored) -> Array:
    """Return a stored tensor as numbers."""
    return np.asarray(region(tensor_files, stored, whole(stored.shape))).view(array_type(stored.dtype))


def meant(tensor_files: TensorFiles, coded: Coded, box: Box, *, rounds: bool = True) -> Array:
    """Return the numbers, as bits, that a box of a weight's codes mean under their scales.

    Without ``rounds`` they are not rounded to the type of the scales, as compared with the same codes and scales in another type.
    """
    recipe = BY_NAME[coded.recipe]
    under: Floats = np.concatenate([_under(tensor_files, coded, part, at) for part, at in _parts(coded, box)], axis=1)
    under = under.reshape(-1, *under.shape[-2:])
    values = nearest(coded.recipe).value.take(codes_at(tensor_files, coded, box)).reshape(-1, *box.shape[-2:]) * under
    # of compressed-tensors the product has the type of the scale; of the others it is f32, whatever type the scales have
    if rounds and coded.scales is not None and recipe.scale.kind == "linear" and recipe.scale.stored == "own":
        values = values.astype(array_type(coded.scales.dtype)).astype(np.float32)
    return np.ascontiguousarray(values).reshape(box.shape).view(np.uint32)


def _parts(coded: Coded, box: Box) -> Iterator[tuple[Box, int]]:
    """Yield a box in the parts that have scales of their own, each with its number."""
    begin, (low, high) = 0, (box.start[-2], box.start[-2] + box.shape[-2])
    for at, rows in enumerate(coded.parts_of or (coded.shape[-2],)):
        start, stop = max(low, begin), min(high, begin + rows)
        if start < stop:
            yield Box((*box.start[:-2], start, box.start[-1]), (*box.shape[:-2], stop - start, box.shape[-1])), at
        begin += rows


def _under(tensor_files: TensorFiles, coded: Coded, box: Box, part: int) -> Floats:
    """Return what each code of a box in one part stands under: experts, rows and columns, or one for all of these."""
    recipe = BY_NAME[coded.recipe]
    low, blocks = [], list[slice]()
    for start, length, block in zip(box.start[-2:], box.shape[-2:], recipe.block, strict=True):
        within = np.arange(start, start + length) // block if block else np.zeros(1, np.int64)
        low.append(within - within[0])
        blocks.append(slice(int(within[0]), int(within[-1]) + 1))
    experts = range(box.start[0], box.start[0] + box.shape[0]) if len(box.shape) == 3 else range(1)
    count = len(coded.parts_of)
    if recipe.block == WHOLE and count:
        assert coded.scales is not None, "codes stand under scales"
        scales = numbers(tensor_files, coded.scales).reshape(-1, count)[experts.start : experts.stop, part].reshape(-1, 1, 1)
    else:
        scales = scales_at(tensor_files, coded, slice(experts.start, experts.stop), *blocks)
    if count and coded.outer is not None:
        each = [outer_of(tensor_files, coded, expert * count + part) for expert in experts]
        under = np.concatenate([divisors(recipe, one[None], over) for one, over in zip(scales, each, strict=True)])
    else:
        under = divisors(recipe, scales, outer_of(tensor_files, coded))
    if recipe.block[1] != 0:
        under = under.take(low[1], axis=2)
    rows = low[0] if recipe.block[0] > 1 else np.zeros(box.shape[-2], np.int64) if under.shape[1] == 1 else None
    return under if rows is None else under.take(rows, axis=1)
