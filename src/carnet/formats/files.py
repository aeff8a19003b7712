"""What was seen of the files of a checkpoint, and names that metadata gives, which never lead out of the checkpoint's folder.

A *sighting* is one file that was looked at: its stamp and a digest of the header bytes that were read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import xxhash

from carnet.errors import MADE_AGAIN, BadCheckpoint, CarnetError, shown
from carnet.storage.protocol import File, Folder, Stamp, asked, read_at

TEXT_LIMIT = 32 << 20  # bytes: no config comes near this
STEP = 1 << 20  # bytes of a long file that are looked at together
TABLE_LIMIT = 256 << 20  # bytes: nor anything that lists every tensor, an index, this


@dataclass(frozen=True, slots=True)
class Sighting:
    """One file that was looked at."""

    stamp: Stamp
    header: str  # hex digest of the header bytes that were read; "" where the file holds data alone


def check_unchanged(root: Folder, stamps: Iterable[Stamp]) -> None:
    """Raise BadCheckpoint where a file is no longer the one that was looked at, or was written since."""
    for _ in asked(root, partial(_check, root), stamps):
        pass


def _check(root: Folder, stamp: Stamp) -> None:
    facts = {"where": root, "file": shown(stamp.file)}
    try:
        now = root.open(stamp.file).stamp
    except CarnetError as error:
        facts["reason"] = error.what
        raise BadCheckpoint("a file went away while it was used", facts, remedy="bring it back and run again") from None
    if now != stamp:
        if now.nbytes != stamp.nbytes:
            facts |= {"expected": f"{stamp.nbytes:,} bytes", "found": f"{now.nbytes:,} bytes"}
        raise BadCheckpoint("a file changed while it was used", facts, remedy="wait until nobody writes to it")


def read_whole(root: Folder, name: str, limit: int = TEXT_LIMIT) -> tuple[bytes, Sighting]:
    """Return the content of a small file and its sighting; ``limit`` is in bytes."""
    file = root.open(name)
    if file.stamp.nbytes > limit:
        facts = {"where": root, "expected": f"at most {limit} bytes", "found": f"{file.stamp.nbytes} bytes"}
        raise BadCheckpoint(f"{shown(name)} is too large for what it should hold", facts, remedy=MADE_AGAIN)
    data = read_at(file, 0, file.stamp.nbytes)
    return data, Sighting(file.stamp, digest_of(data))


def check_inside(root: Folder, name: str, named_by: str) -> None:
    """Raise BadCheckpoint unless a name from metadata leads, links followed, to a place below the root."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name
    if not plain or not root.holds(name):
        facts = {"where": root, "named by": named_by, "expected": "a file below the checkpoint's folder"}
        remedy = "where it is a link, put the file itself there (cp -rL); where it is not, trust nothing of this checkpoint"
        raise BadCheckpoint(f"the file name {shown(name)!r} leads out of the checkpoint", facts, remedy=remedy)


def check_plain(root: Folder, name: str, named_by: str) -> None:
    """Raise BadCheckpoint unless a name is one single name: it may be a symlink, as in the Hugging Face cache."""
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        facts = {"where": root, "named by": named_by, "expected": "a plain file name"}
        remedy = "have its producer write it again: trust nothing of this checkpoint"
        raise BadCheckpoint(f"the file name {shown(name)!r} leads out of the checkpoint", facts, remedy=remedy)


def contents(file: File, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file, or of a part of it, piece by piece."""
    end = file.stamp.nbytes if end is None else end
    for at in range(start, end, STEP):
        yield read_at(file, at, min(STEP, end - at))


def digest_file(root: Folder, name: str) -> tuple[int, str]:
    """Return the size in bytes of a file and the xxh3-128 digest of its content, hex, whatever its size."""
    file, hasher = root.open(name), xxhash.xxh3_128()
    for piece in contents(file):
        hasher.update(piece)
    return file.stamp.nbytes, hasher.hexdigest()


def digest_of(data: bytes) -> str:
    """Return the xxh3-128 digest of some bytes, hex."""
    return xxhash.xxh3_128_hexdigest(data)


def sum_up(sightings: Iterable[Sighting], inner: bytes = b"") -> tuple[tuple[Stamp, ...], str]:
    """Return the sorted stamps of everything seen, and one digest over all headers in that order, then ``inner`` ones."""
    ordered = sorted(sightings, key=lambda sighting: sighting.stamp.file)
    total = xxhash.xxh3_128()
    for sighting in ordered:
        if sighting.header:
            total.update(f"{sighting.stamp.file}\0{sighting.header}\0".encode("utf-8", "surrogateescape"))
    total.update(inner)
    return tuple(sighting.stamp for sighting in ordered), total.hexdigest()
