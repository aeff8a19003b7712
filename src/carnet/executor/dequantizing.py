"""Numbers out of codes: a few rows of codes at a time are read, looked up, scaled, and placed in the window.

A step's box is moved piece by piece as others are, but a piece counts in weights, and its rows are pulled apart so far that no axis
runs from one row into the next. What is decoded is a rectangle of the matrix, because a scale belongs to rows and columns::

    matrix   |..########..|        rows and columns of a piece; read from the disk in one go, or row by row where
             |..########..|        much lies between them
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME as DTYPES
from carnet.dtypes import array_type
from carnet.errors import BadCheckpoint
from carnet.executor.casts import out_of_range
from carnet.executor.geometry import Piece, Tile, clip
from carnet.executor.worker import Bytes, Worker
from carnet.formats.stored import dense_strides
from carnet.quantize import arithmetic
from carnet.quantize.recipes import BY_NAME, PER_BYTE, Recipe
from carnet.steps import Encoding, Make, Measure, Place

Array = NDArray[Any]
Span = tuple[int, int]  # first, and one past the last

SHEET = 1 << 19  # weights whose codes and scales are read in one go
TILE = 1 << 17  # weights that are decoded at a time: their temporaries stay in the processor's cache
GAP = 4 << 10  # bytes: reading fewer that nobody needs is cheaper than one more system call; these come from the page cache


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows and columns of a matrix as they are stored."""

    recipe: Recipe
    encoding: Encoding
    top: int  # the first row
    left: int  # the first column; it begins a byte
    codes: Array  # bytes
    factors: Array  # for each block that is touched
    large: bool  # whether a weight may be too large for its type


def pieces_of(step: Make | Measure, target: Place, tile: Tile) -> list[Piece]:
    """Return the pieces of a step that fall into a tile of ``target``, its rows pulled apart to twice their length."""
    assert step.encoding is not None, "codes are read with an encoding"
    columns = step.encoding.shape[1]
    row, column = divmod(step.source.offset - step.encoding.first, columns)
    strides = tuple(stride * 2 if stride >= columns else stride for stride in step.source.strides)
    return clip(step.shape, Place(step.source.file, 2 * row * columns + column, strides, "u8"), target, tile)


def dequantize(worker: Worker, step: Make, piece: Piece, base: int) -> None:
    """Bring a piece into the window, where its own target begins at ``base``."""
    for part, values in _decoded(worker, step.tensor, step.source.file, step.encoding, piece, step.target.dtype):
        shape, strides = tuple(axis[0] for axis in part.axes), tuple(axis[2] for axis in part.axes)
        np.copyto(np.ndarray(shape, values.dtype, worker.window.data, base + part.target, strides), values)


def largest_weight(worker: Worker, step: Measure) -> float:
    """Return the largest magnitude in a box of codes, NaN where one is not a number."""
    assert step.encoding is not None, "codes are read with an encoding"
    dense = Place("", 0, dense_strides(step.shape), "f32")
    size = int(np.prod(step.shape))
    found = [0.0]
    for piece in pieces_of(step, dense, Tile(0, size + 1, 4, (0, 1), (0, size))):
        for _, values in _decoded(worker, step.tensor, step.source.file, step.encoding, piece, "f32"):
            found.append(float(np.abs(values).max()))
            worker.tell(values.size)
    return float(np.max(found))


def _decoded(
    worker: Worker, tensor: str, file: str, encoding: Encoding, piece: Piece, to: str
) -> Iterator[tuple[Piece, Array]]:
    """Yield the parts of a piece that are decoded together, each with its numbers in its own axes."""
    pitch = 2 * encoding.shape[1]
    for whole in _parts(piece, pitch, min(SHEET, worker.block.size)):
        worker.tell(0)
        sheet = _sheet(worker, tensor, file, encoding, *_reach(whole, pitch), to)
        for part in _parts(whole, pitch, TILE):
            values = _rectangle(sheet, *_reach(part, pitch), to)
            if sheet.large and np.isinf(values.astype(np.float64)).any():
                raise out_of_range(f"a value of {tensor}", tensor, "a code whose value is", to, file)
            shape = tuple(axis[0] for axis in part.axes)
            if values.shape != shape:
                down, along = values.strides
                strides = tuple(s // pitch * down if s >= pitch else s * along for _, s, _ in part.axes)
                values = np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)
            yield part, values


def _reach(piece: Piece, pitch: int) -> tuple[Span, Span]:
    """Return the rows and the columns that a piece reaches over."""
    (top, left), (tall, wide) = divmod(piece.source, pitch), _extent(piece, pitch)
    return (top, top + tall), (left, left + wide)


def _extent(piece: Piece, pitch: int) -> tuple[int, int]:
    """Return how many rows and columns a piece reaches over."""
    rows = 1 + sum((extent - 1) * (stride // pitch) for extent, stride, _ in piece.axes if stride >= pitch)
    columns = 1 + sum((extent - 1) * stride for extent, stride, _ in piece.axes if stride < pitch)
    return rows, columns


def _parts(piece: Piece, pitch: int, most: int) -> Iterator[Piece]:
    """Cut a piece where its source is widest until each part reaches over at most so many weights."""
    rows, columns = _extent(piece, pitch)
    if rows * columns <= most:
        yield piece
        return
    (extent, stride, far), inner = piece.axes[0], piece.axes[1:]
    tall, wide = _extent(Piece(0, 0, inner, piece.items), pitch)
    fit = (most // columns - tall) // (stride // pitch) if stride >= pitch else (most - wide) // stride
    size = min(extent, max(0, fit) + 1)
    for first in range(0, extent, size):
        length = min(size, extent - first)
        axes = ((length, stride, far), *inner) if length > 1 else inner
        yield from _parts(Piece(piece.source + first * stride, piece.target + first * far, axes, piece.items), pitch, most)


def _sheet(worker: Worker, tensor: str, file: str, encoding: Encoding, rows: Span, columns: Span, to: str) -> Sheet:
    recipe = BY_NAME[encoding.recipe]
    each = PER_BYTE[recipe.packing]
    left, right = _bytes(recipe, columns)
    tall, wide = encoding.shape[0], encoding.shape[1] // each
    strides = (1, tall) if recipe.turned else (wide, 1)
    codes = region(worker, file, encoding.first // each, strides, 1, rows, (left, right), worker.block)
    (top, bottom), (start, stop) = _blocks(encoding, recipe, rows, columns)
    scales = _numbers(worker, encoding.scales, (top, bottom), (start, stop))
    outer = None if encoding.outer is None else float(_numbers(worker, encoding.outer, (0, 1), (0, 1)).astype(np.float32)[0, 0])
    factors = arithmetic.factors(recipe, scales, outer)
    if not isfinite(float(np.abs(factors).max())):
        facts = {"tensor": tensor, "where": encoding.scales.file, "found": "a scale that is NaN or infinite"}
        raise BadCheckpoint(f"a scale of {tensor} is not a number", facts)
    large = arithmetic.is_large(recipe, factors, encoding.scales.dtype, to)
    return Sheet(recipe, encoding, rows[0], left * each, codes, factors, large)


def _bytes(recipe: Recipe, columns: Span) -> Span:
    """Return which bytes of a row hold the codes of some columns."""
    each = PER_BYTE[recipe.packing]
    return columns[0] // each, -(-columns[1] // each)


def _blocks(encoding: Encoding, recipe: Recipe, rows: Span, columns: Span) -> tuple[Span, Span]:
    """Return which blocks some rows and columns fall into."""
    down, along = recipe.block[0] or encoding.shape[0], recipe.block[1] or encoding.shape[1]
    return (rows[0] // down, -(-rows[1] // down)), (columns[0] // along, -(-columns[1] // along))


def _rectangle(sheet: Sheet, rows: Span, columns: Span, to: str) -> Array:
    """Return some columns of some rows as numbers."""
    recipe, encoding, own = sheet.recipe, sheet.encoding, sheet.encoding.scales.dtype
    each, (left, right) = PER_BYTE[recipe.packing], _bytes(recipe, columns)
    start = sheet.left // each
    codes = sheet.codes[rows[0] - sheet.top : rows[1] - sheet.top, left - start : right - start]
    (over, under), (before, behind) = _blocks(encoding, recipe, rows, (left * each, right * each))
    (top, _), (first, _) = _blocks(encoding, recipe, (sheet.top, sheet.top + 1), (sheet.left, sheet.left + 1))
    factors = sheet.factors[over - top : under - top, before - first : behind - first]
    if behind - before > 1:
        along = recipe.block[1]
        factors = np.repeat(factors, along, axis=1)[:, left * each - before * along : right * each - before * along]
    down = recipe.block[0] or encoding.shape[0]
    if down == 1 or under - over == 1:
        made = arithmetic.decode(recipe, codes, factors, own, to)
    else:
        made = np.empty((rows[1] - rows[0], (right - left) * each), array_type(to))
        for band in range(over, under):
            inside = slice(max(0, band * down - rows[0]), (band + 1) * down - rows[0])
            made[inside] = arithmetic.decode(recipe, codes[inside], factors[band - over, None], own, to)
    return made[:, columns[0] - left * each : columns[1] - left * each]


def _numbers(worker: Worker, place: Place, rows: Span, columns: Span) -> Array:
    item = DTYPES[place.dtype].nbytes
    strides = tuple(stride * item for stride in place.strides)
    return region(worker, place.file, place.offset, strides, item, rows, columns).view(array_type(place.dtype))


def region(
    worker: Worker,
    name: str,
    begin: int,
    strides: tuple[int, ...],
    item: int,
    rows: Span,
    columns: Span,
    buffer: Bytes | None = None,
) -> Array:
    """Return the bytes of some rows and columns of items of a source; columns may stand under each other. All sizes are bytes."""
    begin += rows[0] * strides[0] + columns[0] * strides[1]
    tall, wide = rows[1] - rows[0], columns[1] - columns[0]
    turned = strides[1] > item
    pitch, (lines, width) = (strides[1], (wide, tall)) if turned else (strides[0], (tall, wide))
    space = np.empty(lines * max(width * item, pitch), np.uint8) if buffer is None else buffer
    found = _read(worker, name, begin, pitch, (lines, width * item), space)
    if turned:
        found = found.reshape(lines, width, item).transpose(1, 0, 2).reshape(tall, wide * item)
    return np.ascontiguousarray(found) if buffer is None or turned else found


def _read(worker: Worker, name: str, begin: int, pitch: int, size: tuple[int, int], buffer: Bytes) -> Array:
    """Return bytes of a file: so many lines of such a width, ``pitch`` bytes from one to the next."""
    file = worker.sources(name)
    lines, width = size
    reach = (lines - 1) * pitch + width
    if lines == 1 or (pitch - width <= GAP and reach <= buffer.size):
        file.read_into(begin, buffer.data[:reach])
        return np.ndarray(size, np.uint8, buffer.data, 0, (pitch, 1))
    buffer = buffer if lines * width <= buffer.size else np.empty(lines * width, np.uint8)
    for line in range(lines):
        file.read_into(begin + line * pitch, buffer.data[line * width : (line + 1) * width])
    return np.ndarray(size, np.uint8, buffer.data, 0, (width, 1))
