"""What the source holds of each canonical tensor: how its pieces lie, and where each of them begins.

The tensors of all layers lie alike: so a *cut* is made once, with every place told from where its chunk begins, and a tensor is
a cut with a *spot* for each piece.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.algebra.box import Box, Line, along, intersect, overlap, uncovered, whole
from carnet.dialects.entry import Entry
from carnet.errors import BadCheckpoint
from carnet.formats.stored import Chunk, Stored, label_of
from carnet.inventory.survey import Inventory
from carnet.model.tensors import Canonical
from carnet.planner.decoding import Spot, alike, begun, coded_pieces
from carnet.planner.pieces import Piece, cut, pieces, separate
from carnet.planner.touches import Extent, Extents, Named
from carnet.plans.columns import Gathered
from carnet.steps import Encoding, Same

Found = Mapping[
    str, Sequence[tuple[Piece, Spot]]
]  # canonical tensor -> its pieces, of no name and no file, and where they begin


class Cut:
    """How the pieces of a tensor lie along its first axis: a few of hundreds of experts."""

    def __init__(self, found: Sequence[Piece]) -> None:
        self.pieces = found
        self.dtypes = {None if piece.encoding is not None else piece.place.dtype for piece in found}  # None: of codes
        self._line = Line(range(len(found)), lambda at: along(found[at].box, 0))

    def near(self, start: int, length: int) -> list[int]:
        """Return the numbers of the pieces that may share something with an interval of the first axis."""
        return self._line.between(start, length)


@dataclass(frozen=True, slots=True)
class Held:
    """A canonical tensor of the source."""

    cut: Cut
    spots: Sequence[Spot]  # of each piece


def source_pieces(
    source: Inventory,
    dtype: str | None,
    gathered: Gathered,
    carried: Iterable[Named] = (),
) -> tuple[Found, Extents]:
    """Return where every canonical tensor lies, and every extent that must be used up: ``carried`` instead of codes' numbers."""
    found: dict[str, list[tuple[Piece, Spot]]] = defaultdict(list)
    extents = [*carried]
    for name, piece, spot in () if extents else coded_pieces(source, dtype, gathered, extents):
        found[name].append((piece, spot))
    known = dict[tuple[object, ...], list[tuple[Extent, list[tuple[int, Piece]]]]]()
    lying = set[tuple[int, str, int]]()  # weights that are their own masters lie there once
    for key, entry in source.entries.items():
        if key in source.coded:
            continue
        stored = source.checkpoint.tensors[key]
        names, label = entry.names, label_of((stored.unit, stored.name))
        like = (id(entry.like), stored.dtype, *[(chunk.box.start, chunk.box.shape, chunk.strides) for chunk in stored.chunks])
        if (parts := known.get(like)) is None:
            parts = known[like] = [_of_chunk(entry, stored, chunk) for chunk in stored.chunks]
        for chunk, (extent, pieces_) in zip(stored.chunks, parts, strict=True):
            if (place := (id(extent), chunk.file, chunk.offset)) not in lying:
                extents.append((label, extent, chunk.file, chunk.offset))
                lying.add(place)
            spot = gathered.name(chunk.file), -1, -1, chunk.offset, 0, 0, 0
            for number, piece in pieces_:
                found[names[number]].append((piece, spot))
    return found, Extents.named(extents)


def _of_chunk(entry: Entry, stored: Stored, chunk: Chunk) -> tuple[Extent, list[tuple[int, Piece]]]:
    """Return the extent of a chunk, and what it holds of each view; both told from its beginning."""
    padding = [shared for box in entry.padding if (shared := intersect(box, chunk.box)) is not None]
    inside = tuple([Box(tuple(s - c for s, c in zip(box.start, chunk.box.start, strict=True)), box.shape) for box in padding])
    first = replace(chunk, file="", offset=0)
    found = [
        (at, piece) for at, view in enumerate(entry.like.views) for piece in pieces(view, first, stored.dtype, stored.shape)
    ]
    return Extent("", "", 0, chunk.box.shape, chunk.strides, stored.dtype, inside), found


def keep(
    found: Found,
    source: Inventory,
    shapes: Mapping[Canonical, tuple[int, ...]],
    gathered: Gathered,
    carried: Collection[str] = (),
) -> dict[str, Held]:
    """Keep each element of the source once, but for parts of ``carried``; what repeats it is to be compared."""
    kept, cuts, places = dict[str, Held](), dict[tuple[int, ...], Cut](), dict[Piece, Piece]()
    for name, shape in shapes.items():
        like = tuple([id(piece) for piece, _ in found.get(name, ())])
        if like not in cuts:
            distinct, copies = separate([_placed(piece, spot, gathered) for piece, spot in found.get(name, ())])
            if name not in carried:
                _check_whole(name, shape, distinct, source)
            if copies:
                parts = [_begun(piece, gathered) for piece in distinct]
                shared = [places.setdefault(piece, piece) for piece, _ in parts]
                again = tuple(map(id, shared))
                kept[name] = Held(cuts.setdefault(again, Cut(shared)), [spot for _, spot in parts])
                _compare(name, copies, gathered)
                continue
            cuts[like] = Cut([piece for piece, _ in found.get(name, ())])
        kept[name] = Held(cuts[like], [spot for _, spot in found.get(name, ())])
    return kept


def _check_whole(name: str, shape: tuple[int, ...], distinct: Iterable[Piece], source: Inventory) -> None:
    boxes = [piece.box for piece in distinct]
    if uncovered(whole(shape), boxes) is not None or overlap(boxes) is not None:
        raise BadCheckpoint(f"the chunks of {name!r} do not make up the whole tensor", {"where": str(source.checkpoint.root)})


def _compare(name: str, copies: Iterable[tuple[Piece, Piece, Box]], gathered: Gathered) -> None:
    for piece, copy, box in copies:
        if piece.encoding is not None or copy.encoding is not None:
            for step in alike(name, box, piece, copy):
                gathered.add(step)
        else:
            gathered.add(Same(name, box.start, box.shape, cut(piece, box), cut(copy, box)))


def _placed(piece: Piece, spot: Spot, gathered: Gathered) -> Piece:
    """Return a piece where it lies."""
    source, scales, outer, source_at, first, scales_at, outer_at = spot
    encoding = piece.encoding
    if encoding is not None:
        over = encoding.outer and replace(encoding.outer, file=gathered.called(outer), offset=outer_at)
        beside = replace(encoding.scales, file=gathered.called(scales), offset=scales_at)
        encoding = Encoding(encoding.recipe, encoding.shape, first, beside, over)
    place = replace(piece.place, file=gathered.called(source), offset=source_at + piece.place.offset)
    return Piece(piece.tensor, piece.box, place, encoding)


def _begun(piece: Piece, gathered: Gathered) -> tuple[Piece, Spot]:
    """Return a piece told from where it begins, and that."""

    place, encoding = piece.place, piece.encoding
    spot: Spot = (gathered.name(place.file), -1, -1, place.offset, 0, 0, 0)
    if encoding is not None:
        scales, outer = encoding.scales, encoding.outer
        over = (-1, 0) if outer is None else (gathered.name(outer.file), outer.offset)
        spot = spot[0], gathered.name(scales.file), over[0], place.offset, encoding.first, scales.offset, over[1]
        encoding = replace(encoding, first=0, scales=begun(scales), outer=outer and begun(outer))
    return Piece("", piece.box, begun(place), encoding), spot
