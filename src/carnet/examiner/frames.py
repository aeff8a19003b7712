"""A *frame* is what a data file holds beside its tensors: headers, padding, the pickles around them. It has a digest like any file.

Tensors and frame together are every byte of a file::

    +--------+-----------+----------+-----+----------+
    | frame  | tensor    | tensor   |frame| tensor   |
    +--------+-----------+----------+-----+----------+
"""

import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import xxhash

from carnet.dtypes import BY_NAME
from carnet.errors import MachineFailed
from carnet.formats.files import OpenFile, open_file, shown
from carnet.formats.stored import Checkpoint, dense_strides

STEP = 4 << 20  # bytes that are read at a time
Extent = tuple[int, int]  # first byte, one past the last


def frames(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digest of the frame of every file that holds tensors, by its path below the checkpoint's root."""
    found: dict[str, list[Extent]] = defaultdict(list)
    for stored in checkpoint.tensors.values():
        for chunk in stored.chunks:
            nbytes = (
                prod(chunk.box.shape) * BY_NAME[stored.dtype].nbytes if chunk.strides == dense_strides(chunk.box.shape) else 0
            )
            found[chunk.file].append((chunk.offset, chunk.offset + nbytes))  # what is no run of bytes counts to the frame
    return {file: _digest(checkpoint.root, file, extents) for file, extents in sorted(found.items())}


def file_digest(root: Path, name: str) -> str:
    """Return the digest of a whole file."""
    return _digest(root, name, [])


def _digest(root: Path, name: str, extents: list[Extent]) -> str:
    hasher = xxhash.xxh3_128()
    with open_file(root, name) as file:
        for start, end in gaps(extents, file.stamp.nbytes):
            if extents:  # of a file that is all frame the digest is that of its bytes
                hasher.update(struct.pack("<QQ", start, end))
            for piece in _pieces(file, start, end):
                hasher.update(piece)
    return hasher.hexdigest()


def gaps(extents: list[Extent], nbytes: int) -> Iterator[Extent]:
    """Yield what extents leave of a file.

    >>> [*gaps([(8, 16), (10, 12), (20, 24)], 24)]
    [(0, 8), (16, 20)]
    """
    at = 0
    for start, end in sorted(extents):
        if start > at:
            yield at, start
        at = max(at, end)
    if at < nbytes:
        yield at, nbytes


def _pieces(file: OpenFile, start: int, end: int) -> Iterator[bytes]:
    try:
        while start < end and (piece := os.pread(file.fd, min(STEP, end - start), start)):
            yield piece
            start += len(piece)
    except OSError as error:
        facts: Mapping[str, object] = {"where": file.root, "reason": error.strerror}
        raise MachineFailed(f"cannot read {shown(file.stamp.file)}", facts) from error
