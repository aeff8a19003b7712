"""Coding a matrix: measured first where one scale serves all of it, then assembled tile by tile in the window and written as codes.

::

    window  |---- weights of a tile, as assembled ----|-- its codes --|      scales and codes go to their files from here
"""

from collections.abc import Iterator
from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME as DTYPES
from carnet.dtypes import array_type
from carnet.errors import BadCheckpoint
from carnet.executor.adapting import assemble
from carnet.executor.assemble import gather, want
from carnet.executor.cutting import cuts
from carnet.executor.dequantizing import largest_weight
from carnet.executor.geometry import Tile, clip, linear
from carnet.executor.jobs import Part
from carnet.executor.worker import Worker
from carnet.formats.stored import dense_strides
from carnet.quantize import arithmetic, groups
from carnet.quantize.codes import Codes
from carnet.quantize.recipes import BY_NAME, PACKED, WHOLE, Recipe, codes_dtype, grid
from carnet.steps import Make, Measure, Move, Place, Put

Array = NDArray[Any]
Box = tuple[slice, slice]  # rows and columns
TILE = 1 << 17  # elements that are coded at a time: their temporaries stay in the processor's cache


def measure(worker: Worker, step: Measure) -> float:
    """Return the largest magnitude of a box; NaN where one is."""
    if any(each.tensor == step.tensor for each in worker.plan.updates):
        return _largest_adapted(worker, step)
    if step.encoding is not None:
        return largest_weight(worker, step)
    found = [0.0]
    own = step.source.dtype
    item = DTYPES[own].nbytes
    dense = Place("", 0, dense_strides(step.shape), own)
    for low, high in cuts(step.shape, item, worker.window.size // 8 * 8):
        pieces = clip(step.shape, step.source, dense, linear(0, item, low, high))
        gather(worker, [want(step, step.source.file, piece, (own, own), 0) for piece in pieces])
        bits = worker.window[: high - low].view(f"u{item}")
        found.append(_largest(bits, own))
        worker.tell(high - low)
    return float(np.max(found))


def _largest_adapted(worker: Worker, step: Measure) -> float:
    """Return the largest magnitude of a box with what adapters add to it, in f32, before it is rounded to the type of the target."""
    found, dense = [0.0], Place("", 0, dense_strides(step.shape), "f32")
    box = step.tensor, step.start, step.shape, step.source, dense
    moved = Move(*box) if step.encoding is None else Make("dequantize", *box, step.encoding)
    for low, high in cuts(step.shape, 4, worker.window.size // 8 * 8):
        assemble(worker, (Part("", linear(0, 4, low, high), (moved,)),))
        found.append(_largest(worker.window[: high - low].view(np.uint32), "f32"))
        worker.tell((high - low) // 4 * DTYPES[step.source.dtype].nbytes)
    return float(np.max(found))


def _largest(bits: NDArray[np.unsignedinteger], own: str) -> float:
    """Return the largest magnitude without a temporary array: signed, the largest positive; unsigned, the largest negative."""
    signed = bits.view(f"i{bits.dtype.itemsize}")
    magnitude = max(int(signed.max()), int(bits.max()) & (1 << 8 * bits.dtype.itemsize - 1) - 1)
    return float(np.array([magnitude], bits.dtype).view(array_type(own)).astype(np.float32)[0])


def code(worker: Worker, step: Make, tile: Tile) -> None:
    """Code what the window holds of a matrix, and write codes and scales."""
    recipe = BY_NAME[step.encoding.recipe]
    (top, bottom), (left, right) = tile.rows, tile.columns
    rows, columns = bottom - top, right - left
    nbytes = rows * columns * tile.item
    bits = worker.window[:nbytes].view(f"u{tile.item}").reshape(rows, columns)
    packed = worker.window[nbytes : nbytes + rows * columns // PACKED[recipe.packing] * DTYPES[codes_dtype(recipe)].nbytes]
    codes: Array = packed.view(f"u{DTYPES[codes_dtype(recipe)].nbytes}").reshape(rows, -1)
    # where the scale is known nothing was measured: what is not a number is still to be refused
    largest = worker.amaxes.largest(step.amax) if step.given is None else _largest(bits, step.source.dtype)
    if recipe.block == WHOLE:
        _whole(worker, step, recipe, bits, codes, largest, first=not top and not left)
    else:
        _blocks(worker, step, recipe, bits, codes, largest, (top, left))
    _write(worker, step.target, codes, (top, left // PACKED[recipe.packing]))
    worker.tell(nbytes)


def _whole(worker: Worker, step: Make, recipe: Recipe, bits: Array, codes: Array, largest: float, *, first: bool) -> None:
    own = step.source.dtype
    _refuse_infinite(step, largest)
    stored, divisor = arithmetic.whole_scale(recipe, largest, own, step.given)
    if bits.dtype.itemsize == 2:
        arithmetic.look_up(_table(recipe.name, own, divisor), bits.reshape(-1), codes.reshape(-1))
    else:
        for box in _boxes(recipe, bits.shape):
            codes[box] = arithmetic.encode(recipe, bits[box], own, np.full((1, 1), divisor, np.float32))
    if first:
        _write(worker, step.encoding.scales, stored, (0, 0))


@lru_cache(maxsize=64)
def _table(recipe: str, own: str, divisor: float) -> Codes:
    return arithmetic.lookup(BY_NAME[recipe], own, divisor)


def _blocks(worker: Worker, step: Make, recipe: Recipe, bits: Array, codes: Array, largest: float, at: tuple[int, int]) -> None:
    own, outer = step.source.dtype, None
    if step.encoding.outer is not None:
        _refuse_infinite(step, largest)
        # measured in the source's own type; rounded as the weights are, it is the largest of those
        whole = float(arithmetic.rounded(np.full(1, largest, np.float32), "own", own)[0])
        outer = float(arithmetic.outer_scale(recipe, whole, own)) if step.given is None else step.given
        if at == (0, 0):
            _write(worker, step.encoding.outer, np.full((1, 1), outer, np.float32), (0, 0))
    rows, columns = bits.shape
    down, along = recipe.block[0], recipe.block[1] or columns
    if groups.takes(recipe, own, outer):
        _refuse_infinite(step, _largest(bits, own))
        stored = _groups(worker, groups.tables(recipe.name, outer), bits.reshape(-1), codes.reshape(-1))
        _write(worker, step.encoding.scales, stored.reshape(grid(recipe, bits.shape)), (at[0] // down, at[1] // along))
        return
    amax = np.empty(grid(recipe, (rows, columns)), np.float32)
    for box in _boxes(recipe, bits.shape):
        amax[_cut(box, down, along)] = arithmetic.block_amax(bits[box], own, recipe.block)
    _refuse_infinite(step, float(amax.max()))
    stored, divisors = arithmetic.scales(recipe, amax, own, outer)
    _write(worker, step.encoding.scales, stored, (at[0] // down, at[1] // along))
    for box in _boxes(recipe, bits.shape):
        made = arithmetic.encode(recipe, bits[box], own, divisors[_cut(box, down, along)])
        codes[_cut(box, 1, PACKED[recipe.packing])] = arithmetic.pack(recipe, made).view(codes.dtype)


def _groups(worker: Worker, of: groups.Tables, bits: Array, codes: Array) -> Array:
    size = worker.block.size // 64 * 32  # weights at a time: so many that other threads get their turn while numpy works
    each = PACKED[of.recipe.packing]
    parts = [slice(low, min(low + size, bits.size)) for low in range(0, bits.size, size)]
    return np.concatenate([groups.code(of, bits[part], codes[part.start // each : part.stop // each]) for part in parts])


def _cut(box: Box, down: int, along: int) -> Box:
    """Return where the blocks of a box lie among all blocks."""
    rows, columns = box
    return slice(rows.start // down, -(-rows.stop // down)), slice(columns.start // along, -(-columns.stop // along))


def _boxes(recipe: Recipe, shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut a matrix into boxes of whole blocks and about ``TILE`` elements."""
    down, along = recipe.block[0] or 1, recipe.block[1] or shape[1]
    wide = min(shape[1], max(along, TILE // down // along * along))
    tall = max(down, TILE // wide // down * down)
    for row in range(0, shape[0], tall):
        for column in range(0, shape[1], wide):
            yield slice(row, min(shape[0], row + tall)), slice(column, min(shape[1], column + wide))


def _refuse_infinite(step: Make, largest: float) -> None:
    if not isfinite(largest):
        facts = {"tensor": step.tensor, "found": "NaN or infinity"}
        raise BadCheckpoint(f"a weight of {step.tensor} is not a number, so it has no scale", facts)


def numbers(step: Put) -> bytes:
    """Return numbers that the plan knows as they are stored."""
    values = step.values * int(np.prod(step.shape)) if len(step.values) == 1 else step.values
    return np.array(values, np.float64).astype(array_type(step.target.dtype)).tobytes()


def _write(worker: Worker, place: Place, values: Array, at: tuple[int, int]) -> None:
    """Write rows and columns of a dense matrix into its file, from ``at`` on."""
    file = worker.targets(place.file)
    values = np.ascontiguousarray(values)
    item, pitch = values.dtype.itemsize, place.strides[0]
    begin = place.offset + (at[0] * pitch + at[1]) * item
    if values.shape[1] == pitch:
        file.write(begin, values.reshape(-1).view(np.uint8).data)
        return
    for row, line in enumerate(values):
        file.write(begin + row * pitch * item, line.view(np.uint8).data)
