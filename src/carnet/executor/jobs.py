"""A *job* is what one worker does in one go and what the journal counts. The list is a pure function of the plan.

* ``Direct``: runs that are long on both sides; the kernel copies them from file to file.
* ``Windows``: bytes of target tensors, assembled in a buffer from all steps that touch them: ranges, or squares where the
  source runs along the target's rows. Parts that read the same rows of the source (the ranks of a column cut) share a
  job, so that the rows are read once.
* ``Check``: two places of the source that must hold the same bytes.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt, prod

from carnet.dtypes import BY_NAME
from carnet.errors import BadRequest
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
    volume,
)
from carnet.quantize.recipes import BY_NAME as RECIPES
from carnet.quantize.recipes import ROW, Recipe
from carnet.steps import Fill, Make, Measure, Move, Plan, Same, Space, TargetTensor, kind

LONG = 64 << 10  # bytes: from this length on a run is the kernel's
LAVISH = 8  # times: reading that much more than is needed costs as much as writing in short segments
THIN = 1 / 64  # of a window: the smallest part, however little of its source rows a tensor takes
MOST = 64 << 20  # bytes of one direct job: what a killed crossing may have to do again, a worker


Writer = Move | Make | Fill  # a step that writes a box of a target tensor


@dataclass(frozen=True, slots=True)
class Direct:
    """A piece whose runs are long on both sides."""

    step: Move
    piece: Piece
    nbytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one target tensor."""

    file: str
    tile: Tile
    steps: tuple[Writer, ...]  # those that touch it


@dataclass(frozen=True, slots=True)
class Windows:
    """Bytes that one worker assembles together."""

    parts: tuple[Part, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Check:
    """Two places that must be equal."""

    step: Same
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gauge:
    """A box of the source whose largest magnitude is needed before anything can be coded."""

    step: Measure
    nbytes: int


@dataclass(frozen=True, slots=True)
class Encode:
    """A tile of a matrix that is assembled and written as codes."""

    step: Make  # that quantizes
    part: Part
    nbytes: int


Job = Direct | Windows | Check | Gauge | Encode
_Where = tuple[str, int]  # source file, offset
_Seen = tuple[_Where, int, Part]  # where a part begins in the source, bytes that it spans there, the part


def jobs_of(plan: Plan) -> list[Job]:
    """Return the jobs of a plan, in the order in which their source lies on disk."""
    placed: list[tuple[_Where, Job]] = []
    windows: list[_Seen] = []
    coded = {step.source.offset: step for step in plan.steps if isinstance(step, Make) and step.function == "quantize"}
    for (space, file, tensor), steps in _by_tensor(plan).items():
        if space == "scratch":
            placed += _encodings(plan, tensor, steps, coded[tensor.offset])
        elif _straight(steps):
            placed += _direct(steps)
        else:
            windows += _windows(plan, file, tensor, steps)
    placed += _together(sorted(windows, key=lambda seen: (seen[0], seen[2].file, segments(seen[2].tile))), plan.window)
    for step in plan.steps:
        if isinstance(step, Same | Measure) and 0 not in step.shape:
            nbytes = prod(step.shape) * BY_NAME[step.source.dtype].nbytes
            job = Check(step, nbytes) if isinstance(step, Same) else Gauge(step, nbytes)
            placed.append(((step.source.file, step.source.offset), job))
    placed.sort(key=lambda pair: pair[0])
    return [job for _, job in placed]


def touched(job: Job) -> set[str]:
    """Return the names of the target files that a job writes."""
    match job:
        case Direct():
            return {job.step.target.file}
        case Windows():
            return {part.file for part in job.parts}
        case Encode():
            encoding = job.step.encoding
            return {place.file for place in (job.step.target, encoding.scales, encoding.outer) if place is not None}
        case Check() | Gauge():
            return set()


def _by_tensor(plan: Plan) -> dict[tuple[Space, str, TargetTensor], list[Writer]]:
    files = (*plan.files, plan.scratch)
    tensors = {(file.space, file.name): [tensor for tensor in file.tensors if 0 not in tensor.shape] for file in files}
    offsets = {where: [tensor.offset for tensor in found] for where, found in tensors.items()}
    groups: dict[tuple[Space, str, TargetTensor], list[Writer]] = defaultdict(list)
    for step in plan.steps:
        if not isinstance(step, Writer) or kind(step) == "quantize" or 0 in step.shape:
            continue
        place = step.target
        where = place.space, place.file
        index = bisect.bisect_right(offsets.get(where, []), place.offset) - 1
        if index < 0:
            raise BadRequest(f"the plan writes {step.tensor} outside of every target tensor", {"where": place.file})
        groups[*where, tensors[where][index]].append(step)
    return groups


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


def _direct(steps: Sequence[Writer]) -> Iterator[tuple[_Where, Job]]:
    # a step that fills needs no job: the file was created as one hole, which reads as zeros
    for step in steps:
        if isinstance(step, Move):
            for piece in blocks(piece_of(step.shape, step.source, step.target), MOST, pack=True):
                yield (step.source.file, piece.source), Direct(step, piece, count(piece) * piece.items[1])


def _windows(plan: Plan, file: str, tensor: TargetTensor, steps: Sequence[Writer]) -> Iterator[_Seen]:
    """Cut a tensor into parts that fit a buffer, each with the steps that touch it."""
    reach = sorted((*_reach(step), number) for number, step in enumerate(steps))
    active: list[tuple[int, int, int]] = []
    coming = 0
    for tile in _tiles(plan, tensor, steps):
        low, lines, width, pitch = segments(tile)
        while coming < len(reach) and reach[coming][0] < low + (lines - 1) * pitch + width:
            active.append(reach[coming])
            coming += 1
        active = [row for row in active if row[1] > low]
        part = Part(file, tile, tuple(steps[number] for number in sorted(number for _, _, number in active)))
        where = _first(part)
        if where is not None:  # else there is nothing but zeros, and those are there
            yield *where, part


def _encodings(plan: Plan, tensor: TargetTensor, steps: Sequence[Writer], coded: Make) -> Iterator[tuple[_Where, Job]]:
    """Cut a matrix into tiles of whole blocks that fit a buffer beside their codes."""
    (rows, columns), item = coded.encoding.shape, BY_NAME[tensor.dtype].nbytes
    wide, tall = _whole_blocks(RECIPES[coded.encoding.recipe], rows, columns, plan.window // (item + 1))
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            tile = Tile(tensor.offset, columns, item, (top, min(rows, top + tall)), (left, min(columns, left + wide)))
            part = Part("scratch", tile, tuple(steps))
            where = _first(part)
            if where is not None:
                yield where[0], Encode(coded, part, volume(tile))


def _whole_blocks(recipe: Recipe, rows: int, columns: int, most: int) -> tuple[int, int]:
    """Return the columns and rows of a tile of whole blocks with at most so many elements: whole rows where they fit."""
    down, along = recipe.block[0] or 1, recipe.block[1]
    step = columns if recipe.block == ROW else along or 8  # eight: a packed item may not be cut
    wide = columns if columns * down <= most else min(columns, max(step, most // down // step * step))
    return wide, min(rows, max(down, most // wide // down * down))


def _tiles(plan: Plan, tensor: TargetTensor, steps: Sequence[Writer]) -> list[Tile]:
    """Cut a tensor into ranges that fit a buffer, as do the source rows that they are cut from; or into squares.

    A range of a transposed tensor takes a little of every source row: reading for it means reading everything again and again.
    """
    item = BY_NAME[tensor.dtype].nbytes
    limit = int(plan.window * _density(steps))
    ranges = [linear(tensor.offset, item, low, high) for low, high in cuts(tensor.shape, item, limit)]
    squares = _squares(tensor, item, limit)
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


def _reach(step: Writer) -> tuple[int, int]:
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


def _first(part: Part) -> tuple[_Where, int] | None:
    """Return where the first step of a part reads, and how far; None where zeros are all there is."""
    for step in part.steps:
        if not isinstance(step, Fill):
            pieces = clip(step.shape, step.source, step.target, part.tile)
            if pieces:
                begin = min(piece.source for piece in pieces)
                return (step.source.file, begin), max(piece.source + span(piece) for piece in pieces) - begin
    return None


def _together(parts: Iterable[_Seen], window: int) -> Iterator[tuple[_Where, Job]]:
    """Join parts that follow each other and read mostly the same source, as long as they fit one buffer."""
    held: list[Part] = []
    nbytes, begin, until = 0, ("", 0), 0
    for where, wide, part in parts:
        size = volume(part.tile)
        joins = where[0] == begin[0] and where[1] < until and nbytes + size <= window
        if held and not joins:
            yield begin, Windows(tuple(held), nbytes)
            held, nbytes = [], 0
        if not held:
            begin, until = where, where[1] + wide // 2
        held.append(part)
        nbytes += size
    if held:
        yield begin, Windows(tuple(held), nbytes)
