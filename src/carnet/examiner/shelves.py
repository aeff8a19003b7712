"""The bytes of a checkpoint as arrays: a region of a stored tensor put together from its chunks, and its digest.

Files are read into memory of a bounded size and never mapped: a mapped file that somebody truncates kills the process.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import xxhash

from carnet.algebra.box import Box, Rack, intersect, slices, volume, whole
from carnet.dtypes import BY_NAME
from carnet.errors import BadCheckpoint, MachineFailed
from carnet.examiner.unfold import Array
from carnet.formats.files import OpenFile, open_file, shown
from carnet.formats.stored import Chunk, Stored, dense_strides

BLOCK = 1 << 20  # bytes of one side that are looked at together, where memory allows
RUN = 32 << 10  # bytes: runs this long are read one by one, shorter ones with what lies between them
SPAN = 1 << 20  # bytes that are read at once for the sake of short runs
OPEN = 64  # files that stay open
FEW = 8  # chunks that are all looked at for what they share with a box


@dataclass(slots=True)
class _Held:
    """A file that is open, and how many threads read from it just now."""

    file: OpenFile
    opened: AbstractContextManager[OpenFile]
    readers: int = 0


@dataclass(frozen=True, slots=True)
class Shelves:
    """The files of a checkpoint. Arrays hold unsigned integers of the element's size: bits are compared, not numbers."""

    root: Path
    block: int = BLOCK  # bytes that are looked at together
    held: OrderedDict[str, _Held] = field(default_factory=OrderedDict)  # the last used ones, open
    lock: threading.Lock = field(default_factory=threading.Lock)
    racks: dict[tuple[object, ...], Rack[Chunk]] = field(default_factory=dict)  # of stored tensors that have many chunks


def close(shelves: Shelves) -> None:
    """Close all files."""
    with shelves.lock:
        while shelves.held:
            shelves.held.popitem()[1].opened.__exit__(None, None, None)


@contextmanager
def _reading(shelves: Shelves, name: str) -> Iterator[OpenFile]:
    """Give an open file; those that nobody has read for the longest time are closed."""
    with shelves.lock:
        held = shelves.held.get(name)
        if held is None:
            opened = open_file(shelves.root, name)
            held = shelves.held[name] = _Held(opened.__enter__(), opened)
        held.readers += 1
        shelves.held.move_to_end(name)
        idle = [other for other, each in shelves.held.items() if not each.readers][: max(0, len(shelves.held) - OPEN)]
        for other in idle:
            shelves.held.pop(other).opened.__exit__(None, None, None)
    try:
        yield held.file
    finally:
        with shelves.lock:
            held.readers -= 1


def fill(shelves: Shelves, name: str, offset: int, into: memoryview) -> None:
    """Fill a buffer from a place in a file."""
    done = 0
    with _reading(shelves, name) as file:
        while done < len(into):
            try:
                got = os.preadv(file.fd, [into[done:]], offset + done)
            except OSError as error:
                facts = {"where": shelves.root, "reason": error.strerror}
                raise MachineFailed(f"cannot read {shown(name)}", facts) from error
            if not got:
                facts = {"where": shelves.root, "expected": f"at least {offset + len(into):,} bytes"}
                raise BadCheckpoint(f"{shown(name)} ends early: it changed while it was read", facts)
            done += got


def region(shelves: Shelves, stored: Stored, box: Box) -> Array:
    """Return a box of a stored tensor, put together from its chunks."""
    bits = np.dtype(f"u{BY_NAME[stored.dtype].nbytes}")
    shared = [(chunk, overlap) for chunk in _near(shelves, stored, box) if (overlap := intersect(chunk.box, box)) is not None]
    covered = sum(volume(overlap) for _, overlap in shared) == volume(box)
    made: Array = np.empty(box.shape, bits) if covered else np.zeros(box.shape, bits)
    for chunk, overlap in shared:
        _read(shelves, chunk, overlap, made if overlap == box else made[slices(overlap, box)])
    return made


def _near(shelves: Shelves, stored: Stored, box: Box) -> Sequence[Chunk]:
    """Return the chunks that may share something with a box."""
    if len(stored.chunks) <= FEW:
        return stored.chunks
    key = (stored.unit, stored.name, stored.shape)
    if key not in shelves.racks:
        shelves.racks[key] = Rack(stored.chunks, lambda chunk: chunk.box)
    return shelves.racks[key].near(box)


def _read(shelves: Shelves, chunk: Chunk, box: Box, into: Array) -> None:
    """Fill an array with a box of a chunk."""
    skip = sum((s - c) * stride for s, c, stride in zip(box.start, chunk.box.start, chunk.strides, strict=True))
    if into.size:
        _gather(shelves, chunk.file, chunk.offset + skip * into.itemsize, chunk.strides, into)


def _gather(shelves: Shelves, file: str, offset: int, strides: tuple[int, ...], into: Array) -> None:
    """Fill an array whose elements lie at these strides (elements) in a file."""
    item, run, axes = into.itemsize, 1, into.ndim
    while axes and (into.shape[axes - 1] == 1 or strides[axes - 1] == run):  # the last axes that are one run
        run *= into.shape[axes - 1]
        axes -= 1
    if axes == 0 and into.flags.c_contiguous:
        fill(shelves, file, offset, into.reshape(-1).view(np.uint8).data)
        return
    reach = 1 + sum((size - 1) * stride for size, stride in zip(into.shape, strides, strict=True))
    if run * item < RUN and reach * item <= SPAN:
        raw = np.empty(reach * item, np.uint8)
        fill(shelves, file, offset, raw.data)
        into[...] = np.ndarray(into.shape, into.dtype, raw.data, 0, tuple(stride * item for stride in strides))
        return
    if axes == 0:
        dense: Array = np.empty(into.shape, into.dtype)
        _gather(shelves, file, offset, strides, dense)
        into[...] = dense
        return
    wide = max(range(axes), key=lambda axis: (into.shape[axis] > 1, strides[axis]))
    count = 1 if run * item >= RUN else max(1, min(SPAN // max(1, strides[wide] * item), into.shape[wide] // 2))
    for at in range(0, into.shape[wide], count):
        part = into[(slice(None),) * wide + (slice(at, at + count),)]
        _gather(shelves, file, offset + at * strides[wide] * item, strides, part)


def digest(shelves: Shelves, stored: Stored) -> str:
    """Return the xxh3-128 of a stored tensor's bytes, chunk after chunk in the order of their boxes."""
    hasher = xxhash.xxh3_128()
    bits = np.dtype(f"u{BY_NAME[stored.dtype].nbytes}")
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.box.start):
        if chunk.strides == dense_strides(chunk.box.shape):
            left, at = prod(chunk.box.shape) * bits.itemsize, chunk.offset
            buffer = memoryview(bytearray(min(left, shelves.block)))
            while left:
                piece = buffer[: min(left, len(buffer))]
                fill(shelves, chunk.file, at, piece)
                hasher.update(piece)
                at, left = at + len(piece), left - len(piece)
        else:
            for box in blocks(whole(chunk.box.shape), shelves.block // bits.itemsize):
                moved = Box(tuple(a + b for a, b in zip(box.start, chunk.box.start, strict=True)), box.shape)
                made: Array = np.empty(box.shape, bits)
                _read(shelves, chunk, moved, made)
                hasher.update(made.data)
    return hasher.hexdigest()


def blocks(box: Box, limit: int) -> Iterator[Box]:
    """Yield boxes of at most ``limit`` elements that make up a box in its own order, cutting its outermost axes first.

    >>> [b.shape for b in blocks(Box((0, 0), (3, 4)), 8)]
    [(2, 4), (1, 4)]
    """
    if volume(box) <= limit or not box.shape:
        if volume(box):
            yield box
        return
    inner = volume(box) // box.shape[0]
    step = max(1, limit // inner) if inner else box.shape[0]
    for at in range(0, box.shape[0], step):
        cut = Box((box.start[0] + at, *box.start[1:]), (min(step, box.shape[0] - at), *box.shape[1:]))
        if volume(cut) <= limit or len(cut.shape) == 1:
            yield cut
        else:
            for rest in blocks(Box(cut.start[1:], cut.shape[1:]), limit):
                yield Box((cut.start[0], *rest.start), (1, *rest.shape))
