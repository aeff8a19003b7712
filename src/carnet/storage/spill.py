"""Bytes that wait for their place in a target: in a file of this machine that has no name, and goes with the processes that hold it."""

import os
import tempfile

from carnet.storage.opening import told


class Spill:
    """A file without a name, as long as somebody writes far; what nobody wrote takes no room. Processes that are forked share it."""

    def __init__(self, folder: str | None) -> None:
        """Begin one on the disk of a folder, or (None) where this machine keeps what is temporary."""
        self._where = folder or tempfile.gettempdir()
        with told(self._where):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as this

    def write(self, offset: int, data: bytes) -> None:
        """Write all of some bytes to a place."""
        left = memoryview(data)
        with told(self._where):
            while left:
                done = os.pwrite(self._file.fileno(), left, offset)
                offset, left = offset + done, left[done:]

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return so many bytes that were written to a place."""
        with told(self._where):
            return os.pread(self._file.fileno(), nbytes, offset)

    def close(self) -> None:
        """Give back the room that it takes."""
        self._file.close()
