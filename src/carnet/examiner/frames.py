"""A *frame* is what a data file holds beside its tensors: headers, padding, the pickles around them. It has a digest like any file.

Tensors and frame together are every byte of a file::

    +--------+-----------+----------+-----+----------+
    | frame  | tensor    | tensor   |frame| tensor   |
    +--------+-----------+----------+-----+----------+
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from math import prod

import xxhash

from carnet.dtypes import BY_NAME
from carnet.formats.files import contents
from carnet.formats.stored import Checkpoint, dense_strides
from carnet.storage.protocol import Folder

Extent = tuple[int, int]  # first byte, one past the last


def frames(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digest of the frame of every file that holds tensors, by its path below the checkpoint's root."""
    found: dict[str, list[Extent]] = defaultdict(list)
    for stored in checkpoint.tensors.values():
        for chunk in stored.chunks:
            nbytes = (
                prod(chunk.box.shape) * BY_NAME[stored.dtype].nbytes if chunk.strides == dense_strides(chunk.box.shape) else 0
            )
            found[chunk.file].append((chunk.offset, chunk.offset + nbytes))  # what is not a run of bytes counts to the frame
    return {file: _digest(checkpoint.root, file, extents) for file, extents in sorted(found.items())}


def _digest(root: Folder, name: str, extents: list[Extent]) -> str:
    hasher = xxhash.xxh3_128()
    file = root.open(name)
    for start, end in gaps(extents, file.stamp.nbytes):
        if extents:  # of a file that is all frame the digest is that of its bytes
            hasher.update(struct.pack("<QQ", start, end))
        for piece in contents(file, start, end):
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
