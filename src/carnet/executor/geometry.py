"""A *piece* is a step, or a part of one, in bytes: where its first element lies on both sides, and byte strides a named axis.

Axes that both sides walk in one stride are merged, and axes are ordered by where the source walks widest, so that the last
one is the run that both sides hold in one go::

    source  |aaaa....bbbb....|   ->   target  |aaaabbbb|      axes ((2, 8, 4), (4, 1, 1))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from carnet.algebra.strided import within
from carnet.dtypes import BY_NAME
from carnet.steps import Place

Axis = tuple[int, int, int]  # number of indices; bytes from one to the next in the source, and in the target

GAP = 16 << 10  # bytes: reading fewer that nobody needs is cheaper than one more system call


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided move between two files, in bytes."""

    source: int  # offset of the first element in the source
    target: int  # offset of the first element in the target
    axes: tuple[Axis, ...]  # widest source stride first; none of one index
    items: tuple[int, int]  # size of an element in the source and in the target


@dataclass(frozen=True, slots=True)
class Tile:
    """Some columns of some rows of a target tensor; often one long row."""

    base: int  # bytes, from the start of the file to row 0, column 0
    pitch: int  # elements from one row to the next
    item: int  # bytes of an element
    rows: tuple[int, int]  # first, and one past the last
    columns: tuple[int, int]


def piece_of(shape: Sequence[int], source: Place, target: Place) -> Piece:
    """Return a whole step as one piece.

    >>> piece_of((2, 3, 2), Place("a", 8, (12, 2, 1), "bf16"), Place("b", 0, (6, 2, 1), "bf16"))
    Piece(source=8, target=0, axes=((2, 24, 12), (6, 2, 2)), items=(2, 2))
    """
    items = BY_NAME[source.dtype].nbytes, BY_NAME[target.dtype].nbytes
    axes = [(n, s * items[0], t * items[1]) for n, s, t in zip(shape, source.strides, target.strides, strict=True)]
    return Piece(source.offset, target.offset, merged(axes), items)


def merged(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return the same index space with as few axes as can be, widest source stride first."""
    found: list[Axis] = []
    for axis in sorted((axis for axis in axes if axis[0] != 1), key=lambda axis: (-axis[1], -axis[2])):
        if found and found[-1][1:] == (axis[0] * axis[1], axis[0] * axis[2]):
            axis = (found.pop()[0] * axis[0], axis[1], axis[2])
        found.append(axis)
    return tuple(found)


def linear(base: int, item: int, low: int, high: int) -> Tile:
    """Return the bytes ``[low, high)`` of a file, counted from ``base``, as a tile of row 0 alone.

    Its rows are longer than ``high``, so that whatever lies in another row lies after it.
    """
    return Tile(base, high // item + 1, item, (0, 1), (low // item, high // item))


def volume(tile: Tile) -> int:
    """Return the bytes of a tile."""
    return (tile.rows[1] - tile.rows[0]) * (tile.columns[1] - tile.columns[0]) * tile.item


def segments(tile: Tile) -> tuple[int, int, int, int]:
    """Return where a tile lies in its file: first byte, number of segments, bytes of one, bytes from one to the next.

    >>> segments(Tile(100, 8, 2, (1, 3), (4, 8)))
    (124, 2, 8, 16)
    """
    first = tile.base + (tile.rows[0] * tile.pitch + tile.columns[0]) * tile.item
    width = (tile.columns[1] - tile.columns[0]) * tile.item
    if width == tile.pitch * tile.item:
        return first, 1, volume(tile), volume(tile)
    return first, tile.rows[1] - tile.rows[0], width, tile.pitch * tile.item


@dataclass(frozen=True, slots=True)
class Spot:
    """A box of a step that falls into a tile."""

    axes: tuple[
        tuple[int, int, int], ...
    ]  # per axis of the step: first index, number of indices, elements of the dense tile between
    at: int  # element of the dense tile in which it begins


def spots(shape: Sequence[int], target: Place, tile: Tile) -> list[Spot]:
    """Return the boxes of a step that fall into a tile.

    >>> spots((2, 3), Place("b", 8, (4, 1), "bf16"), Tile(0, 8, 2, (0, 1), (5, 8)))
    [Spot(axes=((0, 1, 4), (1, 2, 1)), at=0)]
    """
    width = tile.columns[1] - tile.columns[0]
    row, column = divmod((target.offset - tile.base) // tile.item, tile.pitch)
    down = [axis for axis, extent in enumerate(shape) if extent > 1 and target.strides[axis] >= tile.pitch]
    along = [axis for axis in range(len(shape)) if axis not in down]
    tall = within([shape[axis] for axis in down], [target.strides[axis] // tile.pitch for axis in down], row, *tile.rows)
    wide = within([shape[axis] for axis in along], [target.strides[axis] for axis in along], column, *tile.columns)
    reach = [target.strides[axis] // tile.pitch * width if axis in down else target.strides[axis] for axis in range(len(shape))]
    found = []
    for vertical, horizontal in product(tall, wide):
        ours = dict([*zip(down, vertical, strict=True), *zip(along, horizontal, strict=True)])
        axes = tuple([(*ours[axis], reach[axis]) for axis in range(len(shape))])
        begin = (row - tile.rows[0]) * width + column - tile.columns[0]
        found.append(Spot(axes, begin + sum(first * far for first, _, far in axes)))
    return found


def clip(shape: Sequence[int], source: Place, target: Place, tile: Tile) -> list[Piece]:
    """Return the pieces of a step that fall into a tile; their target offsets count in the tile's own dense bytes."""
    item = BY_NAME[source.dtype].nbytes
    pieces = []
    for spot in spots(shape, target, tile):
        pairs = [*zip(spot.axes, source.strides, strict=True)]
        begin = source.offset + sum(first * stride for (first, _, _), stride in pairs) * item
        axes = [(extent, stride * item, reach * tile.item) for (_, extent, reach), stride in pairs]
        pieces.append(Piece(begin, spot.at * tile.item, merged(axes), (item, tile.item)))
    return pieces


def fits(shape: Sequence[int], target: Place, tile: Tile) -> bool:
    """Say whether a step goes down whole rows and along within one: then it can be cut by tiles of these rows."""
    column = (target.offset - tile.base) // tile.item % tile.pitch
    axes = [(extent, stride) for extent, stride in zip(shape, target.strides, strict=True) if extent > 1]
    last = column + sum((extent - 1) * stride for extent, stride in axes if stride < tile.pitch)
    return last < tile.pitch and all(stride < tile.pitch or stride % tile.pitch == 0 for _, stride in axes)


def count(piece: Piece) -> int:
    """Return the number of elements."""
    total = 1
    for extent, _, _ in piece.axes:
        total *= extent
    return total


def span(piece: Piece) -> int:
    """Return the bytes from the first byte that is read to the last."""
    return piece.items[0] + sum((extent - 1) * source for extent, source, _ in piece.axes)


def run(piece: Piece) -> int:
    """Return the length in bytes of a run that is contiguous on both sides.

    >>> run(Piece(0, 0, ((2, 24, 12), (6, 2, 2)), (2, 2)))
    12
    """
    if piece.axes and piece.axes[-1][1:] == piece.items and piece.items[0] == piece.items[1]:
        return piece.axes[-1][0] * piece.items[0]
    return piece.items[1]


def runs(piece: Piece) -> Iterator[tuple[int, int]]:
    """Give the source and target offset of each run, in the order of the source."""
    yield from _offsets(piece.source, piece.target, piece.axes[:-1] if run(piece) > piece.items[1] else piece.axes)


def _offsets(source: int, target: int, axes: tuple[Axis, ...]) -> Iterator[tuple[int, int]]:
    if not axes:
        yield source, target
        return
    (extent, wide, far), inner = axes[0], axes[1:]
    for index in range(extent):
        yield from _offsets(source + index * wide, target + index * far, inner)


def reads(piece: Piece) -> tuple[int, int]:
    """Return how many axes the source spreads over gaps, and the bytes of one contiguous read inside them.

    >>> reads(Piece(0, 0, ((2, 64, 2), (3, 4, 100), (2, 2, 50)), (2, 2)))
    (1, 12)
    """
    width, outer = piece.items[0], len(piece.axes)
    while outer and piece.axes[outer - 1][1] in (0, width):
        outer -= 1
        width *= piece.axes[outer][0] if piece.axes[outer][1] else 1
    return outer, width


def sparse(piece: Piece) -> bool:
    """Say whether reading run by run is cheaper than reading everything between the first and the last byte."""
    outer, width = reads(piece)
    number = 1
    for extent, source, _ in piece.axes[:outer]:
        number *= extent if source else 1
    return span(piece) - number * width > number * GAP


def packed(piece: Piece) -> Piece:
    """Return the piece as it lies once its source runs stand one after the other in a buffer, from 0."""
    axes: list[Axis] = []
    width = piece.items[0]
    for extent, source, target in reversed(piece.axes):
        axes.append((extent, width if source else 0, target))
        width *= extent if source else 1
    return replace(piece, source=0, axes=tuple(reversed(axes)))


def blocks(piece: Piece, budget: int, *, pack: bool) -> Iterator[Piece]:
    """Cut a piece where its source is widest until each part needs at most ``budget`` bytes of a read buffer.

    >>> [block.source for block in blocks(Piece(0, 0, ((4, 100, 8), (4, 2, 2)), (2, 2)), 108, pack=False)]
    [0, 200]
    """
    if not piece.axes or _held(piece, pack) <= budget:
        yield piece
        return
    (extent, source, target), inner = piece.axes[0], piece.axes[1:]
    inside = _held(replace(piece, axes=inner), pack)
    fit = budget // inside if pack else (budget - inside) // source + 1
    size = min(extent, max(1, fit))
    for first in range(0, extent, size):
        length = min(size, extent - first)
        axes = ((length, source, target), *inner) if length > 1 else inner
        part = Piece(piece.source + first * source, piece.target + first * target, axes, piece.items)
        if length == 1:
            yield from blocks(part, budget, pack=pack)
        else:
            yield part


def _held(piece: Piece, pack: bool) -> int:
    return span(packed(piece) if pack else piece)
