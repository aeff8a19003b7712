"""How the bytes of one target tensor are cut into jobs; tensors alike are cut alike.

Every place is told from where things begin: tiles from the start of the tensor, reads from the offset of the step that reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod

from carnet.dtypes import BY_NAME
from carnet.executor.geometry import (
    Piece,
    Tile,
    blocks,
    clip,
    count,
    fits,
    linear,
    piece_of,
    run,
    segments,
    span,
    sparse,
)
from carnet.quantize.recipes import BY_NAME as RECIPES
from carnet.quantize.recipes import ROW, Recipe
from carnet.steps import Fill, Make, Move, Product, TargetTensor, kind

LONG = 64 << 10  # bytes: from this length on a run is the kernel's
LAVISH = 8  # times: reading that much more than is needed costs as much as writing in short segments
THIN = 1 / 64  # of a window: the smallest part, however little of its source rows a tensor takes
MOST = 64 << 20  # bytes of one direct job: what a killed crossing may have to do again, a worker

Writer = Move | Make | Product | Fill  # a step that writes a box of a target tensor


@dataclass(frozen=True, slots=True)
class Run:
    """A block of a step whose runs are long on both sides."""

    step: int  # among the steps of the tensor
    block: int  # among its blocks
    first: int  # byte that it reads first, from the step's offset in the source
    place: int  # byte that it writes first, from the step's offset in the target
    nbytes: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A tile of a tensor that is assembled, and the steps that touch it."""

    tile: Tile  # its base is 0
    steps: tuple[int, ...]  # among the steps of the tensor
    reader: int  # the first of them that reads, or the first where none does
    first: int  # byte that it reads first, from its offset in the source
    wide: int  # bytes from there to the last one that it reads


def runs_of(steps: Sequence[Writer], *, zeros: bool) -> list[Run] | None:
    """Return the blocks that the kernel copies, None where the bytes of a tensor come in runs too short for it.

    Where ``zeros`` have to be written, a tensor that has some is none of the kernel's.
    """
    if not _straight(steps) or (zeros and any(isinstance(step, Fill) for step in steps)):
        return None
    # else a step that fills needs no job: the file was created as one hole, which reads as zeros
    moves = [(at, step) for at, step in enumerate(steps) if isinstance(step, Move)]
    return [
        Run(at, number, piece.source - step.source.offset, piece.target - step.target.offset, count(piece) * piece.items[1])
        for at, step in moves
        for number, piece in enumerate(blocks_of(step))
    ]


def blocks_of(step: Move) -> Iterator[Piece]:
    """Return the pieces in which the kernel copies a step."""
    return blocks(piece_of(step.shape, step.source, step.target), MOST, pack=True)


def cells_of(
    tensor: TargetTensor, steps: Sequence[Writer], coded: Make | None, window: int, *, zeros: bool, squares: bool = True
) -> Iterator[Cell]:
    """Cut a tensor, or a matrix that is ``coded``, into tiles that fit a window (bytes), each with the steps that touch it.

    Tiles of nothing but zeros are left out, but where ``zeros`` have to be written; without ``squares`` every tile is a range of bytes.
    """
    spans = sorted((*reach(step), number) for number, step in enumerate(steps))
    active: list[tuple[int, int, int]] = []
    coming = 0
    for tile in _tiles(window, tensor, steps, squares) if coded is None else _matrix_tiles(tensor, coded, window):
        low, lines, width, pitch = segments(tile)
        while coming < len(spans) and spans[coming][0] < low + (lines - 1) * pitch + width:
            active.append(spans[coming])
            coming += 1
        active = [row for row in active if row[1] > low]
        touching = tuple(sorted(number for _, _, number in active)) if coded is None else tuple(range(len(steps)))
        found = _first(tile, steps, touching)
        if found is None and zeros:
            found = touching[0], 0, 0
        if found is not None:
            yield Cell(replace(tile, base=tile.base - tensor.offset), touching, *found)


def _first(tile: Tile, steps: Sequence[Writer], touching: Sequence[int]) -> tuple[int, int, int] | None:
    """Return which step of a tile reads first, where and how far; None where zeros are all there is."""
    for number in touching:
        step = steps[number]
        if not isinstance(step, Fill):
            pieces = clip(step.shape, step.source, step.target, tile)
            if pieces:
                begin = min(piece.source for piece in pieces)
                return number, begin - step.source.offset, max(piece.source + span(piece) for piece in pieces) - begin
    return None


def _straight(steps: Sequence[Writer]) -> bool:
    """Say whether a tensor's bytes come in runs that are long enough for the kernel."""
    copied = number = 0
    for step in steps:
        if isinstance(step, Fill):
            continue
        if kind(step) != "copy":
            return False
        piece = piece_of(step.shape, step.source, step.target)
        copied += count(piece) * piece.items[0]
        number += count(piece) * piece.items[0] // run(piece)
    return number <= 1 or copied >= number * LONG


def _matrix_tiles(tensor: TargetTensor, coded: Make, window: int) -> Iterator[Tile]:
    """Cut a matrix into tiles of whole blocks that fit a window beside their codes."""
    (rows, columns), item = coded.encoding.shape, BY_NAME[tensor.dtype].nbytes
    wide, tall = _whole_blocks(RECIPES[coded.encoding.recipe], rows, columns, window // (item + 1))
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            yield Tile(tensor.offset, columns, item, (top, min(rows, top + tall)), (left, min(columns, left + wide)))


def _whole_blocks(recipe: Recipe, rows: int, columns: int, most: int) -> tuple[int, int]:
    """Return the columns and rows of a tile of whole blocks with at most so many elements: whole rows where they fit."""
    down, along = recipe.block[0] or 1, recipe.block[1]
    step = columns if recipe.block == ROW else along or 8  # eight: a packed item may not be cut
    wide = columns if columns * down <= most else min(columns, max(step, most // down // step * step))
    return wide, min(rows, max(down, most // wide // down * down))


def _tiles(window: int, tensor: TargetTensor, steps: Sequence[Writer], may_square: bool) -> list[Tile]:
    """Cut a tensor into ranges that fit a buffer, as do the source rows that they are cut from; or into squares.

    A range of a transposed tensor takes a little of every source row: reading for it means reading everything again and again.
    """
    item = BY_NAME[tensor.dtype].nbytes
    limit = int(window * _density(steps))
    ranges = [linear(tensor.offset, item, low, high) for low, high in cuts(tensor.shape, item, limit)]
    squares = _squares(tensor, item, limit) if may_square else []
    if not squares or not all(fits(step.shape, step.target, squares[0]) for step in steps):
        return ranges
    return squares if _waste(ranges[0], steps) > max(LAVISH, 4 * _waste(squares[0], steps)) else ranges


def _squares(tensor: TargetTensor, item: int, limit: int) -> list[Tile]:
    pitch = tensor.shape[-1] if tensor.shape else 1
    rows, side = prod(tensor.shape) // pitch, max(1, isqrt(limit // item))
    down = [(low, min(rows, low + side)) for low in range(0, rows, side)]
    along = [(low, min(pitch, low + side)) for low in range(0, pitch, side)]
    return [Tile(tensor.offset, pitch, item, tall, wide) for tall in down for wide in along] if len(along) > 1 else []


def _waste(tile: Tile, steps: Sequence[Writer]) -> float:
    """Return how many bytes lie between the first and the last that a tile reads, for one that it needs."""
    moves = [step for step in steps if not isinstance(step, Fill)]
    pieces = [piece for step in moves for piece in clip(step.shape, step.source, step.target, tile)]
    return sum(map(span, pieces)) / max(1, sum(count(piece) * piece.items[0] for piece in pieces))


def reach(step: Writer) -> tuple[int, int]:
    """Return the first byte of a target file that a step writes, and one past the last."""
    place = step.target
    last = sum((extent - 1) * stride for extent, stride in zip(step.shape, place.strides, strict=True))
    return place.offset, place.offset + (1 + last) * BY_NAME[place.dtype].nbytes


def _density(steps: Sequence[Writer]) -> float:
    """Return which share of the source bytes that are read a tensor's steps use, on average."""
    used = wide = 0
    for step in steps:
        if not isinstance(step, Fill):
            piece = piece_of(step.shape, step.source, step.target)
            nbytes = count(piece) * piece.items[0]
            used += nbytes
            wide += nbytes if sparse(piece) else span(piece)
    return max(THIN, min(1.0, used / wide)) if wide else 1.0


def cuts(shape: Sequence[int], item: int, limit: int) -> Iterator[tuple[int, int]]:
    """Give byte ranges of a dense array, of about equal size and of whole rows where a row fits.

    >>> list(cuts((5, 4), 2, 16))
    [(0, 8), (8, 24), (24, 40)]
    """
    unit = 1
    for extent in reversed(shape):
        if unit * extent * item > limit:
            break
        unit *= extent
    units = prod(shape) // unit
    number = -(-units // max(1, limit // (unit * item)))
    for index in range(number):
        yield units * index // number * unit * item, units * (index + 1) // number * unit * item
