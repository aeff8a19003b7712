"""Gathering strided pieces of source files into a worker's window.

Pieces are cut into blocks that fit the read buffer, blocks that lie close together are read in one go, and each is then moved
(or cast) from the read buffer, which stays in the processor's cache, to its place in the window. A block that lies there as it
lies in the source is read to its place at once.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from carnet.executor.casts import cast, out_of_range, shift
from carnet.executor.functions import compute
from carnet.executor.geometry import GAP, Piece, blocks, packed, reads, run, runs, span, sparse
from carnet.executor.worker import Bytes, Worker
from carnet.steps import Elementwise, Measure, Move, Same
from carnet.storage.protocol import File

NONE: Elementwise = ""


@dataclass(frozen=True, slots=True)
class Want:
    """A piece of the source that the window needs; its target offset counts from the window's start."""

    file: str
    piece: Piece
    tensor: str  # for messages
    types: tuple[str, str]  # carnet's names of the element types in the source and in the window
    add: float  # added on the way, in f32
    function: Elementwise  # or what is computed of it
    pack: bool  # read run by run


Group = tuple[int, int, list[Want]]  # first and last byte of one read, and what it is for


def want(step: Move | Measure | Same, file: str, piece: Piece, types: tuple[str, str], shift: int) -> Want:
    """Return a piece whose target lies in a file as one whose target lies in the window."""
    add, function = (step.add, step.function) if isinstance(step, Move) else (0.0, NONE)
    return Want(file, replace(piece, target=piece.target + shift), step.tensor, types, add, function, sparse(piece))


def gather(worker: Worker, wants: Iterable[Want]) -> None:
    """Bring every piece into the window, in the order in which the source lies on disk."""
    size = worker.block.size
    parts = heapq.merge(*(_blocks(each, size) for each in wants), key=lambda each: (each.file, each.piece.source))
    for low, high, group in _groups(parts, size):
        worker.tell(0)
        file = worker.sources(group[0].file)
        if group[0].pack:
            _read_runs(worker, file, group[0].piece)
            _place(worker, replace(group[0], piece=packed(group[0].piece)))
            continue
        if len(group) == 1 and _as_it_is(group[0]):
            place = group[0].piece.target
            file.read_into(low, worker.window.data[place : place + high - low])
            continue
        file.read_into(low, worker.block.data[: high - low])
        for each in group:
            _place(worker, replace(each, piece=replace(each.piece, source=each.piece.source - low)))


def _blocks(each: Want, size: int) -> Iterator[Want]:
    # an eighth of the buffer is left so that blocks which begin some bytes later in the same rows fit into the same read
    for block in blocks(each.piece, max(8, size - size // 8), pack=each.pack):
        yield replace(each, piece=block)


def _groups(parts: Iterable[Want], size: int) -> Iterator[Group]:
    """Join neighbours into one read as long as it fits the buffer and skips few bytes."""
    held: list[Want] = []
    low = high = 0
    for each in parts:
        begin, end = each.piece.source, each.piece.source + span(each.piece)
        alone = not held or each.pack or held[0].pack or each.file != held[0].file
        if alone or begin - high > GAP or max(end, high) - low > size:
            if held:
                yield low, high, held
            held, low, high = [], begin, end
        held.append(each)
        high = max(high, end)
    if held:
        yield low, high, held


def _as_it_is(each: Want) -> bool:
    """Say whether the bytes lie in the window as they lie in the source."""
    return each.types[0] == each.types[1] and not each.add and not each.function and run(each.piece) == span(each.piece)


def _read_runs(worker: Worker, file: File, piece: Piece) -> None:
    outer, width = reads(piece)
    spread = Piece(piece.source, 0, tuple(axis for axis in piece.axes[:outer] if axis[1]), (width, width))
    buffer, place = worker.block.data, 0
    for begin, _ in runs(spread):
        file.read_into(begin, buffer[place : place + width])
        place += width


def _place(worker: Worker, each: Want) -> None:
    piece = each.piece
    source = _bits(worker.block, piece.items[0], piece.source, piece, side=1)
    target = _bits(worker.window, piece.items[1], piece.target, piece, side=2)
    if each.function:
        done = compute(each.function, source, target, each.types)
    elif each.add:
        done = shift(source, target, each.types, each.add)
    elif each.types[0] == each.types[1]:
        np.copyto(target, source)
        done = True
    else:
        done = cast(source, target, each.types, worker.temporary)
    if not done:
        raise out_of_range(f"a value of {each.tensor}", each.tensor, f"a finite {each.types[0]} value", each.types[1])


def _bits(buffer: Bytes, item: int, offset: int, piece: Piece, *, side: int) -> NDArray[np.generic]:
    """Return a piece's elements in a buffer as unsigned integers; the bounds are checked by numpy."""
    shape, strides = tuple(axis[0] for axis in piece.axes), tuple(axis[side] for axis in piece.axes)
    return np.ndarray(shape, f"u{item}", buffer.data, offset, strides)
