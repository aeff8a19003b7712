"""Files by name, and whole reads, writes and copies where the kernel may do less than it was asked.

Sources are read with ``pread`` and never mapped: a mapped file that somebody truncates kills the process with SIGBUS, and so
does a mapped target on a full disk.
"""

import errno
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from carnet.errors import BadCheckpoint, BadRequest, CarnetError, MachineFailed
from carnet.formats.opening import NotPlain, open_below, open_regular

OPEN = 16  # files that one worker holds open: jobs come in the order of their source
CHUNK = 8 << 20  # bytes that the kernel copies before a worker looks up
# what a kernel or a file system answers when it cannot copy ranges between these two files
REFUSED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY)


@dataclass(frozen=True, slots=True)
class File:
    """An open file."""

    descriptor: int
    name: str  # for messages


@dataclass(frozen=True, slots=True)
class Folder:
    """The files below one folder, the last used ones open."""

    root: Path
    flags: int  # how files are opened
    base: int | None = None  # descriptor of the folder, where no link may lead out of it
    files: OrderedDict[str, File] = field(default_factory=OrderedDict)


def contained(name: str) -> str:
    """Return the name of a file if it stays below the folder it belongs to.

    >>> contained("rank0/model.safetensors")
    'rank0/model.safetensors'
    """
    parts = name.split("/")
    if not name or "\0" in name or ".." in parts or "" in parts or "." in parts:
        raise BadRequest(f"the plan names a file outside of its folder: {name!r}")
    return name


def opened(folder: Folder, name: str) -> File:
    """Return a file of a folder, opened now or before."""
    file = folder.files.get(name)
    if file is None:
        if len(folder.files) >= OPEN:
            os.close(folder.files.popitem(last=False)[1].descriptor)
        path = folder.root / contained(name)
        try:
            base = folder.base
            found = open_regular(path, folder.flags) if base is None else open_below(base, name, folder.flags)
            file = folder.files[name] = File(found, str(path))
        except OSError as error:
            raise explained(error, str(path)) from error
    folder.files.move_to_end(name)
    return file


def close(folder: Folder) -> None:
    """Close every file of a folder."""
    while folder.files:
        os.close(folder.files.popitem()[1].descriptor)


def read(file: File, offset: int, into: memoryview) -> None:
    """Fill a buffer from a place in a file."""
    done = 0
    try:
        while done < len(into):
            got = os.preadv(file.descriptor, [into[done:]], offset + done)
            if got == 0:
                found = os.fstat(file.descriptor).st_size
                raise too_short(file, offset + len(into), found)
            done += got
    except OSError as error:
        raise explained(error, file.name) from error


def write(file: File, offset: int, data: memoryview) -> None:
    """Write a whole buffer to a place in a file."""
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(file.descriptor, data[done:], offset + done)
    except OSError as error:
        raise explained(error, file.name) from error


def append(file: File, data: bytes) -> None:
    """Add bytes to the end of a file in one go."""
    try:
        done = os.write(file.descriptor, data)
    except OSError as error:
        raise explained(error, file.name) from error
    if done < len(data):
        raise MachineFailed("the disk is full", {"where": file.name}, remedy="free space and run again: it resumes")


def copy(source: File, begin: int, target: File, end: int, size: int, spare: memoryview) -> int:
    """Copy at most ``size`` bytes from file to file and return how many, in the kernel where it can."""
    if hasattr(os, "copy_file_range"):  # not on macOS
        try:
            done = os.copy_file_range(source.descriptor, target.descriptor, size, begin, end)
            if done:
                return done
        except OSError as error:
            if error.errno not in REFUSED:
                raise explained(error, target.name) from error
    size = min(size, len(spare))
    read(source, begin, spare[:size])
    write(target, end, spare[:size])
    return size


def too_short(file: File, expected: int, found: int) -> CarnetError:
    """Return the error of a source that ends before the plan says."""
    facts = {"where": file.name, "expected": f"at least {expected:,} bytes", "found": f"{found:,} bytes"}
    return BadCheckpoint("a source file ends too early", facts, remedy="copy the checkpoint again; it changed after planning")


def explained(error: OSError, name: str) -> CarnetError:
    """Return what the machine said as an error that names the file and a way out."""
    facts = {"where": name, "found": error.strerror or str(error)}
    if isinstance(error, NotPlain) or error.errno in (errno.ELOOP, errno.ENOTDIR):
        return BadRequest("a file of its own is needed here", facts, remedy="move away what is there, or choose another target")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineFailed("the disk is full", facts, remedy="free space and run the same command again: it resumes")
    if error.errno == errno.EFBIG:
        return MachineFailed("a file may not grow that large", facts, remedy="raise the limit and run again: it resumes")
    if error.errno == errno.ENOENT:
        return MachineFailed("a file vanished", facts, remedy="bring it back and run the same command again: it resumes")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MachineFailed("a file may not be opened or written", facts, remedy="change its permissions")
    return MachineFailed("the machine could not read or write a file", facts)
