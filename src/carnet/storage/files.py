"""Regular files that are open, and whole reads, writes and copies where the kernel may do less than it was asked.

Files are read with ``pread`` and never mapped: a mapped file that somebody truncates kills the process with SIGBUS, and so
does a mapped target on a full disk.
"""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass

from carnet.errors import BadCheckpoint, CarnetError, shown
from carnet.storage.opening import explained, failed, told
from carnet.storage.protocol import File, Stamp

# what a kernel or a file system answers when it cannot copy ranges between these two files
REFUSED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY)


@dataclass(frozen=True, slots=True)
class PosixFile:
    """A regular file, open for reading."""

    where: str
    stamp: Stamp
    descriptor: int

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place."""
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.where, self.stamp.file, error) from error
            if not got:
                found = f"{os.fstat(self.descriptor).st_size:,} bytes"
                facts = {"where": self.where, "expected": f"at least {offset + len(into):,} bytes", "found": found}
                remedy = "copy the checkpoint again, and wait until nobody writes to it"
                raise BadCheckpoint(f"{shown(self.stamp.file)} ends too early", facts, remedy=remedy)
            done += got

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:  # noqa: ARG002  a disk needs to know no more than that they are small
        """Read nothing ahead."""
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)


@dataclass(frozen=True, slots=True)
class PosixTarget:
    """A file that is open for writing."""

    descriptor: int
    name: str  # for messages

    def __del__(self) -> None:
        os.close(self.descriptor)

    def write(self, offset: int, data: memoryview) -> None:
        """Write a whole buffer to a place."""
        done = 0
        with told(self.name):
            while done < len(data):
                done += os.pwrite(self.descriptor, data[done:], offset + done)

    def copy(self, source: File, begin: int, end: int, nbytes: int) -> int:
        """Let the kernel copy, where it can."""
        if not isinstance(source, PosixFile) or not hasattr(os, "copy_file_range"):  # macOS
            return 0
        try:
            return os.copy_file_range(source.descriptor, self.descriptor, nbytes, begin, end)
        except OSError as error:
            if error.errno not in REFUSED:
                raise explained(error, self.name) from error
            return 0


def unreadable(where: str, name: str, error: OSError) -> CarnetError:
    """Return the error of something that the machine does not let carnet read."""
    if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of this file, and said as where one is written
        return explained(error, os.path.join(where, name))
    return failed(f"cannot read {shown(name)}" if name else "cannot read the folder", where, error)
