"""A *piece* is a box of a canonical tensor with its place in a file. Source and target are lists of pieces; a step is where two meet.

::

    source pieces of q     |---- chunk 0 ----|---- chunk 1 ----|
    target pieces of q     |-- rank 0 --|-- rank 1 --|-- rank 2 --|
    steps                  |-----1------|-2--|---3---|-----4------|
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from carnet.algebra.box import Box, Line, along, intersect, subtract, volume
from carnet.algebra.layout import View, clip
from carnet.dtypes import BY_NAME
from carnet.formats.stored import Chunk
from carnet.steps import Encoding, Place, Space


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a canonical tensor in a file."""

    tensor: str  # canonical name
    box: Box
    place: Place  # of the box's first element, with a stride per canonical axis
    encoding: Encoding | None = None  # where the file holds codes of it


def pieces(view: View, chunk: Chunk, dtype: str, shape: tuple[int, ...], space: Space = "file") -> Iterator[Piece]:
    """Yield what a chunk of a stored tensor of this shape holds of a view."""
    strides = tuple(stride * chunk.strides[dim] if stride else 0 for dim, stride in view.places)
    itemsize = BY_NAME[dtype].nbytes
    first = 0
    if view.origin != chunk.box.start:
        first = sum((o - b) * s for o, b, s in zip(view.origin, chunk.box.start, chunk.strides, strict=True))
    if chunk.box.shape == shape and volume(view.box):  # the chunk is the whole tensor
        yield Piece(view.tensor, view.box, Place(chunk.file, chunk.offset + first * itemsize, strides, dtype, space))
        return
    for box in clip(view, chunk.box):
        inside = sum((b - v) * s for b, v, s in zip(box.start, view.box.start, strides, strict=True))
        yield Piece(view.tensor, box, Place(chunk.file, chunk.offset + (first + inside) * itemsize, strides, dtype, space))


def cut(piece: Piece, box: Box) -> Place:
    """Return the place of a box inside a piece."""
    place = piece.place
    if box.start == piece.box.start:
        return place
    skip = sum((b - p) * s for b, p, s in zip(box.start, piece.box.start, place.strides, strict=True))
    return Place(place.file, place.offset + skip * BY_NAME[place.dtype].nbytes, place.strides, place.dtype, place.space)


def separate(found: Sequence[Piece]) -> tuple[list[Piece], list[tuple[Piece, Piece, Box]]]:
    """Split the pieces of one tensor into disjoint ones and copies: (kept piece, copy, the box they share).

    Ranks repeat KV heads and norms, and a tied head repeats the embedding: each element is kept once, its copies are to be compared.
    """
    if len(found) == 1:
        return [*found], []
    kept = PieceLine([])
    copies = []
    for piece in found:
        rest = [piece.box]
        for other in kept.near(piece.box):
            shared = intersect(piece.box, other.box)
            if shared is not None:
                copies.append((other, piece, shared))
                rest = [left for part in rest for left in subtract(part, other.box)]
        for box in rest:
            if volume(box):
                kept.add(Piece(piece.tensor, box, cut(piece, box), piece.encoding))
    return kept.pieces, copies


class PieceLine(Line[Piece]):
    """Pieces of one tensor along its first axis: a few of hundreds of experts."""

    def __init__(self, found: Iterable[Piece]) -> None:
        super().__init__(found, lambda piece: along(piece.box, 0))

    @property
    def pieces(self) -> list[Piece]:
        """Return all of them."""
        return self.things

    def near(self, box: Box) -> list[Piece]:
        """Return the pieces that may share something with a box."""
        return self.between(*along(box, 0))


def views_of(views: Sequence[View]) -> Line[int]:
    """Return the numbers of views along the first dimension of a stored tensor: those of a few of hundreds of layers."""
    return Line(range(len(views)), lambda at: _stored_interval(views[at]))


def _stored_interval(view: View) -> tuple[int, int]:
    reach = [(n - 1) * stride for n, (dim, stride) in zip(view.box.shape, view.places, strict=True) if dim == 0]
    return view.origin[0] if view.origin else 0, 1 + sum(reach)
