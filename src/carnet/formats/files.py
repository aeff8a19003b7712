"""Open the files of a checkpoint safely, and remember what was seen of them.

A *sighting* is one file that was looked at: its stamp and a digest of the header bytes that were read. Only regular files are
opened (a FIFO would hang, a device would act), and a name that metadata gives never leads out of the checkpoint's folder.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from carnet.errors import BadCheckpoint, MachineFailed, printable
from carnet.formats.opening import NotPlain, open_regular
from carnet.formats.stored import Stamp

TEXT_LIMIT = 32 << 20  # bytes: no config comes near this
STEP = 1 << 20  # bytes of a long file that are looked at together
TABLE_LIMIT = 256 << 20  # bytes: nor anything that lists every tensor, an index, this


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file, open for reading."""

    fd: int  # file descriptor
    root: Path  # the checkpoint's folder
    stamp: Stamp  # name below the root, size and time


@dataclass(frozen=True, slots=True)
class Sighting:
    """One file that was looked at."""

    stamp: Stamp
    header: str  # hex digest of the header bytes that were read; "" where the file holds data alone


@contextmanager
def open_file(root: Path, name: str) -> Iterator[OpenFile]:
    """Open one regular file below a folder; raise BadCheckpoint where it is missing, MachineFailed where it is unreadable."""
    path = root / name
    try:
        fd = open_regular(path)
    except NotPlain as error:
        raise BadCheckpoint(f"{shown(name)} is not a regular file", {"where": root, "found": error.strerror}) from None
    except FileNotFoundError:
        if os.path.islink(path):  # a Hugging Face cache that was copied without its blobs
            facts = {"where": root, "leads to": shown(os.readlink(path))}
            remedy = "copy what the links lead to (cp -rL), or download the files again"
            raise BadCheckpoint(f"{shown(name)} is a link to a file that is not there", facts, remedy=remedy) from None
        raise BadCheckpoint(f"{shown(name)} is missing", {"where": root}) from None
    except ValueError:  # a NUL in the name
        raise BadCheckpoint(f"{shown(name)} cannot be a file's name", {"where": root}) from None
    except OSError as error:
        raise _unreadable(root, name, error) from None
    try:
        yield OpenFile(fd, root, stamp_of(name, os.fstat(fd)))
    finally:
        os.close(fd)


def stamp_of(name: str, found: os.stat_result) -> Stamp:
    """Return the stamp of a file below a root."""
    return Stamp(name, found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino, found.st_ctime_ns))


def check_unchanged(root: Path, stamps: Iterable[Stamp]) -> None:
    """Raise BadCheckpoint where a file is no longer the one that was looked at, or was written since."""
    for stamp in stamps:
        facts = {"where": root, "file": shown(stamp.file)}
        try:
            now = stamp_of(stamp.file, os.stat(root / stamp.file))
        except OSError as error:
            raise BadCheckpoint("a file went away while it was used", {**facts, "reason": error.strerror}) from None
        if now != stamp:
            what = (
                {"expected": f"{stamp.nbytes:,} bytes", "found": f"{now.nbytes:,} bytes"} if now.nbytes != stamp.nbytes else {}
            )
            raise BadCheckpoint("a file changed while it was used", {**facts, **what}, remedy="wait until nobody writes to it")


def read_at(file: OpenFile, offset: int, nbytes: int) -> bytes:
    """Return exactly this many bytes of a file, or raise BadCheckpoint where it ends before."""
    parts, missing = [], nbytes
    while missing > 0:
        try:
            part = os.pread(file.fd, missing, offset)
        except OSError as error:
            raise _unreadable(file.root, file.stamp.file, error) from None
        if not part:
            facts = {"where": file.root, "expected": f"{nbytes} bytes at this place", "found": f"{nbytes - missing} bytes"}
            raise BadCheckpoint(f"{shown(file.stamp.file)} ends early", facts, remedy="copy the checkpoint again")
        if len(part) == nbytes:
            return part
        parts.append(part)
        missing -= len(part)
        offset += len(part)
    return b"".join(parts)


def read_whole(root: Path, name: str, limit: int = TEXT_LIMIT) -> tuple[bytes, Sighting]:
    """Return the content of a small file and its sighting; ``limit`` is in bytes."""
    with open_file(root, name) as file:
        if file.stamp.nbytes > limit:
            facts = {"where": root, "expected": f"at most {limit} bytes", "found": f"{file.stamp.nbytes} bytes"}
            raise BadCheckpoint(f"{shown(name)} is too large for what it should hold", facts)
        data = read_at(file, 0, file.stamp.nbytes)
        return data, Sighting(file.stamp, digest_of(data))


def list_names(root: Path) -> list[str]:
    """Return the sorted names in a folder, or raise MachineFailed where it cannot be listed."""
    try:
        return sorted(path.name for path in root.iterdir())
    except OSError as error:
        raise _unreadable(root, ".", error) from None


def check_inside(root: Path, name: str, named_by: str) -> None:
    """Raise BadCheckpoint unless a name from metadata leads, links followed, to a place below the root."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name
    if plain and Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
        return
    facts = {"where": root, "named by": named_by, "expected": "a file below the checkpoint's folder"}
    raise BadCheckpoint(f"the file name {shown(name)!r} leads out of the checkpoint", facts)


def check_plain(root: Path, name: str, named_by: str) -> None:
    """Raise BadCheckpoint unless a name is one single name: it may be a symlink, as in the Hugging Face cache."""
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        facts = {"where": root, "named by": named_by, "expected": "a plain file name"}
        raise BadCheckpoint(f"the file name {shown(name)!r} leads out of the checkpoint", facts)


def digest_file(root: Path, name: str) -> tuple[int, str]:
    """Return the size in bytes of a file and the xxh3-128 digest of its content, hex, whatever its size."""
    with open_file(root, name) as file:
        hasher, at = xxhash.xxh3_128(), 0
        while at < file.stamp.nbytes:
            piece = read_at(file, at, min(STEP, file.stamp.nbytes - at))
            hasher.update(piece)
            at += len(piece)
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


def shown(text: str) -> str:
    """Return a text from a file as it may go to a terminal: one line, printable, not endless.

    >>> shown("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    clean = printable(text)
    return clean if len(clean) <= 200 else clean[:197] + "..."


def _unreadable(root: Path, name: str, error: OSError) -> MachineFailed:
    return MachineFailed(f"cannot read {shown(name)}", {"where": root, "reason": error.strerror or str(error)})
