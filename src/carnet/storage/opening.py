"""Open files so that no other file is harmed and nothing is waited for.

A FIFO would hang who opens it and a device would act, so only regular files are opened. For writing no link is followed, neither
the last part of a name nor a folder on the way: names are opened one by one, each below the folder that is already open. A file
that has a second name (a hard link) is somebody else's, too.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from carnet.errors import NO_MORE_FILES, BadRequest, CarnetError, MachineFailed

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
KINDS = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


FULL = "the disk is full", "free space and run the same command again: it resumes"
FORBIDDEN = "a file may not be opened or written", "change its permissions"
IN_THE_WAY = "a file of its own is needed here", "move away what is there, or choose another place"
MEANINGS = {  # what the machine answers -> what that means, and a way out
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EMFILE: NO_MORE_FILES,
    errno.ENFILE: NO_MORE_FILES,
    errno.EFBIG: ("a file may not grow that large", "raise the limit (ulimit -f) and run again: it resumes"),
    errno.ENOENT: ("a file vanished", "bring it and its folder back and run the same command again: it resumes"),
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: ("the disk may only be read", "choose another disk"),
    errno.ENAMETOOLONG: ("a name is too long for the disk", "choose a shorter one"),
    **dict.fromkeys((errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), IN_THE_WAY),
}
UNFORESEEN = "the machine could not read or write a file", "see what its log says of this disk, and run the same command again"


def explained(error: OSError, name: str) -> CarnetError:
    """Return what the machine said as an error that names the file and a way out."""
    what, remedy = meaning(error)
    kind = BadRequest if what == IN_THE_WAY[0] else MachineFailed
    return kind(what, {"where": name, "found": error.strerror or str(error)}, remedy=remedy)


def failed(what: str, where: object, error: OSError) -> MachineFailed:
    """Return the error of something that the machine did not do for the reason that it gave, with a way out."""
    return MachineFailed(what, {"where": where, "reason": error.strerror or str(error)}, remedy=meaning(error)[1])


def meaning(error: OSError) -> tuple[str, str]:
    """Return what an answer of the machine means, and a way out."""
    return IN_THE_WAY if isinstance(error, NotPlain) else MEANINGS.get(error.errno or 0, UNFORESEEN)


@contextmanager
def told(name: object) -> Iterator[None]:
    """Explain what the machine refuses within, of a file or a folder."""
    try:
        yield
    except OSError as error:
        raise explained(error, str(name)) from error


class NotPlain(OSError):
    """The name is there and is not a regular file of its own; ``strerror`` says what it is."""


def open_regular(path: str | Path, flags: int = os.O_RDONLY, *, dir_fd: int | None = None) -> int:
    """Return the descriptor of a regular file that is there; for reading links are followed, as in the Hugging Face cache."""
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0)
    # looked at first, because opening a device may act; and again, because the name may have got another file meanwhile
    check_plain_file(os.stat(path, dir_fd=dir_fd, follow_symlinks=not flags & os.O_NOFOLLOW), writes=writes)
    descriptor = os.open(path, flags, dir_fd=dir_fd)
    try:
        check_plain_file(os.fstat(descriptor), writes=writes)
    except NotPlain:
        os.close(descriptor)
        raise
    return descriptor


def reading(path: str | Path, flags: int = 0) -> BinaryIO:
    """Open a regular file that stands alone, a plan or a text."""
    return open(open_regular(path, os.O_RDONLY | flags), "rb")


def appending(path: Path, begins: bytes) -> TextIO:
    """Open a regular file that stands alone to write at its end; one that is not there is made, one that is there begins so."""
    with told(path):
        with suppress(FileExistsError):
            os.close(os.open(path, NEW, 0o666))
        descriptor = open_regular(path, os.O_RDWR | os.O_APPEND)
        if not begins.startswith(os.pread(descriptor, len(begins), 0)):
            os.close(descriptor)
            raise BadRequest(f"{path} exists and is not a log", remedy="choose another file")
    return open(descriptor, "a", encoding="utf-8")


def check_plain_file(found: os.stat_result, *, writes: bool) -> None:
    """Raise NotPlain where something is not a regular file, or is to be written and has a second name."""
    if not stat.S_ISREG(found.st_mode):
        raise NotPlain(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file")
    if writes and found.st_nlink > 1:
        raise NotPlain(errno.EINVAL, "it is a hard link: the file has another name, too")


@contextmanager
def holder(base: int, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """Open the folder that holds a name below an open folder: (its descriptor, the last part of the name)."""
    *folders, last = name.split("/")
    at = os.dup(base)
    try:
        for folder in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=at)
            deeper = os.open(folder, FOLDER, dir_fd=at)
            os.close(at)
            at = deeper
        yield at, last
    finally:
        os.close(at)


def open_below(base: int, name: str, flags: int) -> int:
    """Return the descriptor of a regular file below an open folder, following no link on the way."""
    with holder(base, name) as (at, last):
        return open_regular(last, flags | os.O_NOFOLLOW, dir_fd=at)


def write_whole(at: int, name: str, temporary: str, chunks: Iterable[bytes], *, sync: bool) -> None:
    """Write a file in an open folder, under another name first: it is whole or not there. What had the name is replaced, not written.

    ``sync`` brings it to the disk before it gets its name.
    """
    descriptor = os.open(temporary, NEW, 0o666, dir_fd=at)
    try:
        with open(descriptor, "wb") as target:
            target.writelines(chunks)
            target.flush()
            if sync:
                os.fsync(descriptor)
        os.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=at)
        raise


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that stands alone, whole or not at all; whether what is there may go is for the caller to know."""
    at = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            check_plain_file(os.stat(path.name, dir_fd=at, follow_symlinks=False), writes=False)
        write_whole(at, path.name, f".{path.name}.{secrets.token_hex(4)}.tmp", chunks, sync=True)
    finally:
        os.close(at)
