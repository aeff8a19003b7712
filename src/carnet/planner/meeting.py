"""Where target and source meet: a step for every box that a target tensor and a piece of the source share.

What is found for one layer holds for all that lie alike on both sides: only names and offsets are other ones.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import sub

from carnet.algebra.box import Box, Line, along, intersect, volume
from carnet.dialects.entry import Entry
from carnet.errors import CarnetError, NotSupported
from carnet.formats.stored import Chunk, dense_strides
from carnet.planner.decoding import begun
from carnet.planner.held import Held
from carnet.planner.pieces import Piece, cut, pieces, views_of
from carnet.planner.products import products, tail
from carnet.plans.columns import Gathered
from carnet.steps import Elementwise, Fill, Make, Move, Place, TargetFile, TargetTensor


@dataclass(frozen=True, slots=True)
class Cell:
    """A step of a target tensor, told from where the tensor and a piece of the source begin."""

    name: int  # which of the canonical tensors that its part of the stored one may hold
    piece: int | None  # which piece of that one in the source; None for what is filled
    form: int
    start: int
    more: int
    source: int  # from the beginning of the piece's chunk, as a place counts it
    target: int  # bytes from the beginning of the tensor
    factor: tuple[int, int] | None = None  # of a product the piece of its other operand, and from the beginning of that


def meet(
    places: Iterable[tuple[Entry, Box, TargetFile, TargetTensor]],
    kept: Mapping[str, Held],
    shifts: Mapping[str, float],
    gathered: Gathered,
) -> None:
    """Gather the steps that write some boxes of stored tensors, each in its place."""
    lines, kinds, known = dict[int, Line[int]](), dict[tuple[object, ...], int](), dict[tuple[object, ...], list[Cell]]()
    for entry, part, file, tensor in places:
        like, made = entry.like, entry.names
        where: tuple[object, ...] = part.start, part.shape
        which: Sequence[int] = range(len(made))
        if part.shape != like.shape and not like.padding:  # layers of one tensor lie alike, told from where the part begins
            if id(like) not in lines:
                lines[id(like)] = views_of(like.views)
            which = lines[id(like)].between(*along(part, 0))
            views = [like.views[at] for at in which]
            alike = [kinds.setdefault((view.box, view.places), len(kinds)) for view in views]
            where = part.shape, *alike, *[tuple(map(sub, view.origin, part.start)) for view in views]
        origins = [made[at].origins for at in which]
        held, factors = ([kept[each[end]] for each in origins] for end in (0, -1))  # the same but of products
        added = [shifts.get(each[0]) for each in origins] if shifts else ()
        key = (id(like), *where, tensor.dtype, file.space, *[id(each.cut) for each in (*held, *factors)], *added)
        if (cells := known.get(key)) is None:
            cells = known[key] = [*_cells(entry, which, part, (file, tensor), kept, shifts, gathered)]
        target = gathered.name(file.name)
        for cell in cells:
            name = gathered.name(origins[cell.name][0])
            spot = NOWHERE if cell.piece is None else held[cell.name].spots[cell.piece]
            source, scales, outer, source_at, first, scales_at, outer_at = spot
            if cell.factor is not None:
                scales, _, _, scales_at, *_ = factors[cell.name].spots[cell.factor[0]]
                scales_at += cell.factor[1]
            ids = cell.form, name, cell.start, cell.more, source, target, scales, outer
            gathered.row((*ids, source_at + cell.source, tensor.offset + cell.target, first, scales_at, outer_at))


NOWHERE = -1, -1, -1, 0, 0, 0, 0


def _cells(
    entry: Entry,
    which: Sequence[int],
    part: Box,
    place: tuple[TargetFile, TargetTensor],
    kept: Mapping[str, Held],
    shifts: Mapping[str, float],
    gathered: Gathered,
) -> Iterator[Cell]:
    """Yield the steps of a target tensor, and its padding."""
    file, tensor = place
    chunk = Chunk(part, "", 0, dense_strides(part.shape))
    for number, which_ in enumerate(which):
        made, view = entry.names[which_], entry.like.views[which_]
        name, function = made.origins[0], made.tensor.function
        pieces_ = kept[name].cut.pieces
        for target in pieces(view, chunk, tensor.dtype, entry.shape, file.space):
            moved = 0
            if function == "product":
                for form_, start, size, (at, gap), other, there in products(
                    made, target, pieces_, kept[made.origins[1]].cut.pieces
                ):
                    ids = gathered.form(form_), gathered.start(start), gathered.more(())
                    yield Cell(number, at, *ids, gap, there, other)
                    moved += size
            elif function == "tail":
                target = tail(target, pieces_, view.box.shape[1])
            for at in kept[name].cut.near(*along(target.box, 0)) if function != "product" else ():
                box = intersect(pieces_[at].box, target.box)
                if box is not None:
                    step = _step(name, box, pieces_[at], target, shifts, "minus_exp" if function == "minus_exp" else "")
                    more = gathered.more((None,) if isinstance(step, Make) else ())
                    form, gaps = gathered.form(step), (cut(pieces_[at], box).offset, cut(target, box).offset)
                    yield Cell(number, at, form, gathered.start(box.start), more, *gaps)
                    moved += volume(box)
            if moved != volume(target.box):
                raise CarnetError("the source does not fill the target", {"tensor": name, "file": file.name})
    for padding in entry.padding:
        shared = intersect(padding, part)
        if shared is not None:
            at_ = cut(Piece("", part, Place("", 0, chunk.strides, tensor.dtype, file.space)), shared)
            form = gathered.form(Fill("", shared.shape, begun(at_)))
            number = [*map(str, entry.names)].index(entry.padded)
            yield Cell(number, None, form, gathered.start(()), gathered.more(()), 0, at_.offset)


def _step(name: str, box: Box, source: Piece, target: Piece, shifts: Mapping[str, float], function: Elementwise) -> Move | Make:
    """Return the form of a step."""
    here, there = begun(source.place), begun(target.place)
    if source.encoding is None:
        return Move("", (), box.shape, here, there, shifts.get(name, 0.0), function)
    if name in shifts or function:
        raise NotSupported(f"{name!r} is stored as codes, and a number is computed of each on the way")
    return Make("dequantize", "", (), box.shape, here, there, source.encoding)
