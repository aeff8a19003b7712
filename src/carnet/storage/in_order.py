"""A file that is written into at many places and leaves from its first byte to its last.

What comes before its time waits: in memory as long as all files together have room there, else in a file of this machine that has no
name::

    sent            waits             not yet written
    ###############|....bbbbb..cccc..|.................
                   ^ what comes here is sent, and whatever follows it
"""

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from carnet.storage.buckets import Upload

ROOM = 64 << 20  # bytes that wait in memory
PIECE = 1 << 20  # bytes of what waits elsewhere, or of zeros, that are sent together


class Room:
    """The memory that all files of a target share for what waits."""

    def __init__(self) -> None:
        self._left, self._lock = ROOM, threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Take so many bytes, where there are as many."""
        with self._lock:
            has = nbytes <= self._left
            self._left -= nbytes if has else 0
            return has

    def give(self, nbytes: int) -> None:
        """Have so many bytes again."""
        with self._lock:
            self._left += nbytes


@dataclass(slots=True)
class InOrder:
    """A target file; threads may share it."""

    nbytes: int
    begin: Callable[[], Upload]  # called when the first byte is sent
    room: Room
    whole: bool = False
    _at: int = 0  # what comes before is sent
    _upload: Upload | None = None
    _held: dict[int, bytes] = field(default_factory=dict)  # by offset
    _spooled: dict[int, int] = field(default_factory=dict)  # bytes by offset
    _spool: IO[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, offset: int, data: memoryview) -> None:
        """Send what is next, with what has waited for it; keep what is early."""
        with self._lock:
            if self.whole:  # by an earlier run; and a job that writes into two files may come again for the other
                return
            if offset == self._at:
                self._send(data)
            elif len(data):
                self._keep(offset, data)
            self._follow()

    def hold(self, offset: int, data: bytes) -> None:
        """Keep what is known before anything is written, until it is."""
        with self._lock:
            if not self.whole and data:
                self._keep(offset, memoryview(data))

    def settle(self) -> None:
        """Take what nobody wrote for zeros."""
        with self._lock:
            while not self.whole:
                until = min([self.nbytes, *self._held, *self._spooled])
                for at in range(self._at, until, PIECE):
                    self._send(memoryview(bytes(min(PIECE, until - at))))
                self._follow()

    def abandon(self) -> None:
        """Leave no object."""
        with self._lock:
            upload, self._upload = self._upload, None
            if upload is not None:
                upload.abandon()

    def _send(self, data: memoryview) -> None:
        if self._upload is None:
            self._upload = self.begin()
        self._upload.write(data)
        self._at += len(data)
        if self._at == self.nbytes:
            self._upload.close()
            self._upload, self.whole, self._spool = None, True, None

    def _keep(self, offset: int, data: memoryview) -> None:
        if self.room.take(len(data)):
            self._held[offset] = bytes(data)
            return
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115  it has no name, and goes with the last reference
        while data:
            done = os.pwrite(self._spool.fileno(), data, offset)
            self._spooled[offset] = done
            offset, data = offset + done, data[done:]

    def _follow(self) -> None:
        """Send what has waited for what was sent."""
        while not self.whole:
            if (held := self._held.pop(self._at, None)) is not None:
                self.room.give(len(held))
                self._send(memoryview(held))
            elif (size := self._spooled.pop(self._at, None)) is not None and self._spool is not None:
                begin = self._at
                for at in range(begin, begin + size, PIECE):
                    self._send(memoryview(os.pread(self._spool.fileno(), min(PIECE, begin + size - at), at)))
            else:
                return
