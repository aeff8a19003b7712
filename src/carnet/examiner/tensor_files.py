"""The bytes of a checkpoint as arrays: a region of a stored tensor put together from its chunks, and its digest."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import xxhash

from carnet.algebra.box import Box, Rack, intersect, slices, volume, whole
from carnet.dtypes import BY_NAME
from carnet.examiner.unfold import Array
from carnet.formats.stored import Checkpoint, Chunk, Stored, dense_strides
from carnet.storage.protocol import File, Opened

BLOCK = 1 << 20  # bytes of one side that are looked at together, where memory allows
RUN = 32 << 10  # bytes: runs this long are read one by one, shorter ones with what lies between them
SPAN = 1 << 20  # bytes that are read at once for the sake of short runs
OPEN = 64  # files that stay open
FEW = 8  # chunks that are all looked at for what they share with a box


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The files of a checkpoint. Arrays hold unsigned integers of the element's size: bits are compared, not numbers."""

    files: Opened[File]
    block: int = BLOCK  # bytes that are looked at together
    racks: dict[tuple[object, ...], Rack[Chunk]] = field(default_factory=dict)  # of stored tensors that have many chunks
    also: str | None = None  # a digest beside xxh3: "sha256"


class Hasher:
    """Says the digest of what it is told: xxh3-128, and behind a space a second one, where that is asked for."""

    def __init__(self, also: str | None) -> None:
        self._made: list[Any] = [xxhash.xxh3_128(), *([] if also is None else [hashlib.new(also, usedforsecurity=False)])]

    def update(self, data: memoryview | Array) -> None:
        """Hear what comes next."""
        for each in self._made:
            each.update(data)

    def hexdigest(self) -> str:
        """Return the digest of everything."""
        return " ".join(each.hexdigest() for each in self._made)


def tensor_files_of(checkpoint: Checkpoint, block: int = BLOCK, also: str | None = None) -> TensorFiles:
    """Return the files of a checkpoint; threads may share them."""
    return TensorFiles(Opened(checkpoint.root.open, OPEN), block, also=also)


def region(tensor_files: TensorFiles, stored: Stored, box: Box) -> Array:
    """Return a box of a stored tensor, put together from its chunks."""
    bits = np.dtype(f"u{BY_NAME[stored.dtype].nbytes}")
    shared = [
        (chunk, overlap) for chunk in _near(tensor_files, stored, box) if (overlap := intersect(chunk.box, box)) is not None
    ]
    covered = sum(volume(overlap) for _, overlap in shared) == volume(box)
    made: Array = np.empty(box.shape, bits) if covered else np.zeros(box.shape, bits)
    for chunk, overlap in shared:
        _read(tensor_files, chunk, overlap, made if overlap == box else made[slices(overlap, box)])
    return made


def _near(tensor_files: TensorFiles, stored: Stored, box: Box) -> Sequence[Chunk]:
    """Return the chunks that may share something with a box."""
    if len(stored.chunks) <= FEW:
        return stored.chunks
    key = (stored.unit, stored.name, stored.shape)
    if key not in tensor_files.racks:
        tensor_files.racks[key] = Rack(stored.chunks, lambda chunk: chunk.box)
    return tensor_files.racks[key].near(box)


def _read(tensor_files: TensorFiles, chunk: Chunk, box: Box, into: Array) -> None:
    """Fill an array with a box of a chunk."""
    skip = sum((s - c) * stride for s, c, stride in zip(box.start, chunk.box.start, chunk.strides, strict=True))
    if into.size:
        _gather(tensor_files, chunk.file, chunk.offset + skip * into.itemsize, chunk.strides, into)


def _gather(tensor_files: TensorFiles, file: str, offset: int, strides: tuple[int, ...], into: Array) -> None:
    """Fill an array whose elements lie at these strides (elements) in a file."""
    item, run, axes = into.itemsize, 1, into.ndim
    while axes and (into.shape[axes - 1] == 1 or strides[axes - 1] == run):  # the last axes that are one run
        run *= into.shape[axes - 1]
        axes -= 1
    if axes == 0 and into.flags.c_contiguous:
        tensor_files.files(file).read_into(offset, into.reshape(-1).view(np.uint8).data)
        return
    reach = 1 + sum((size - 1) * stride for size, stride in zip(into.shape, strides, strict=True))
    if run * item < RUN and reach * item <= SPAN:
        raw = np.empty(reach * item, np.uint8)
        tensor_files.files(file).read_into(offset, raw.data)
        into[...] = np.ndarray(into.shape, into.dtype, raw.data, 0, tuple(stride * item for stride in strides))
        return
    if axes == 0:
        dense: Array = np.empty(into.shape, into.dtype)
        _gather(tensor_files, file, offset, strides, dense)
        into[...] = dense
        return
    wide = max(range(axes), key=lambda axis: (into.shape[axis] > 1, strides[axis]))
    count = 1 if run * item >= RUN else max(1, min(SPAN // max(1, strides[wide] * item), into.shape[wide] // 2))
    for at in range(0, into.shape[wide], count):
        part = into[(slice(None),) * wide + (slice(at, at + count),)]
        _gather(tensor_files, file, offset + at * strides[wide] * item, strides, part)


def digest(tensor_files: TensorFiles, stored: Stored) -> str:
    """Return the xxh3-128 of a stored tensor's bytes, chunk after chunk in the order of their boxes; see ``Hasher``."""
    hasher = Hasher(tensor_files.also)
    bits = np.dtype(f"u{BY_NAME[stored.dtype].nbytes}")
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.box.start):
        if chunk.strides == dense_strides(chunk.box.shape):
            left, at = prod(chunk.box.shape) * bits.itemsize, chunk.offset
            buffer = memoryview(bytearray(min(left, tensor_files.block)))
            while left:
                piece = buffer[: min(left, len(buffer))]
                tensor_files.files(chunk.file).read_into(at, piece)
                hasher.update(piece)
                at, left = at + len(piece), left - len(piece)
        else:
            for box in blocks(whole(chunk.box.shape), tensor_files.block // bits.itemsize):
                moved = Box(tuple(a + b for a, b in zip(box.start, chunk.box.start, strict=True)), box.shape)
                made: Array = np.empty(box.shape, bits)
                _read(tensor_files, chunk, moved, made)
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
