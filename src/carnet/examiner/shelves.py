"""The bytes of a checkpoint as arrays: a region of a stored tensor put together from its chunks, and its digest."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from carnet.box import Box, intersect
from carnet.dtypes import BY_NAME
from carnet.errors import MachineFailed
from carnet.examiner.unfold import Array
from carnet.formats.opening import open_regular
from carnet.formats.stored import Chunk, Stored, dense_strides

STEP = 8 << 20  # bytes that are hashed at a time


@dataclass(frozen=True, slots=True)
class Shelves:
    """The mapped files of a checkpoint. Arrays hold unsigned integers of the element's size: bits are compared, not numbers."""

    root: Path
    maps: dict[str, NDArray[np.uint8]] = field(default_factory=dict)  # file -> its bytes, mapped at first use


def mapped(shelves: Shelves, file: str) -> NDArray[np.uint8]:
    """Return the bytes of a file."""
    if file not in shelves.maps:
        try:
            with open(open_regular(shelves.root / file), "rb") as opened:
                shelves.maps[file] = np.memmap(opened, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise MachineFailed("a file cannot be read", {"where": shelves.root / file, "reason": error}) from error
    return shelves.maps[file]


def region(shelves: Shelves, stored: Stored, box: Box) -> Array:
    """Return a box of a stored tensor: a view where one chunk holds it, else put together."""
    bits = np.dtype(f"u{BY_NAME[stored.dtype].nbytes}")
    shared = [(chunk, overlap) for chunk in stored.chunks if (overlap := intersect(chunk.box, box)) is not None]
    if len(shared) == 1 and shared[0][1] == box:
        return _part(shelves, shared[0][0], box, bits)
    made: Array = np.zeros(box.shape, bits)
    for chunk, overlap in shared:
        inside = tuple(slice(s - b, s - b + n) for s, b, n in zip(overlap.start, box.start, overlap.shape, strict=True))
        made[inside] = _part(shelves, chunk, overlap, bits)
    return made


def _part(shelves: Shelves, chunk: Chunk, box: Box, bits: np.dtype[np.generic]) -> Array:
    skip = sum((s - c) * stride for s, c, stride in zip(box.start, chunk.box.start, chunk.strides, strict=True))
    strides = tuple(stride * bits.itemsize for stride in chunk.strides)
    return np.ndarray(box.shape, bits, mapped(shelves, chunk.file), chunk.offset + skip * bits.itemsize, strides)


def digest(shelves: Shelves, stored: Stored) -> str:
    """Return the xxh3-128 of a stored tensor's bytes, chunk after chunk in the order of their boxes."""
    hasher = xxhash.xxh3_128()
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.box.start):
        if chunk.strides == dense_strides(chunk.box.shape):
            raw = mapped(shelves, chunk.file)
            end = chunk.offset + _nbytes(chunk, stored.dtype)
            for at in range(chunk.offset, end, STEP):
                hasher.update(raw[at : min(at + STEP, end)].data)
        else:
            bits = np.dtype(f"u{BY_NAME[stored.dtype].nbytes}")
            hasher.update(np.ascontiguousarray(_part(shelves, chunk, chunk.box, bits)).data)
    return hasher.hexdigest()


def _nbytes(chunk: Chunk, dtype: str) -> int:
    return int(np.prod(chunk.box.shape, dtype=np.int64)) * BY_NAME[dtype].nbytes
