"""One tensor's difference as one zstd frame, made and read piece by piece.

A frame is not believed: what it says of its size is compared first, its window is bounded, and no more is decoded than is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from carnet.errors import MADE_AGAIN, BadCheckpoint, MachineFailed
from carnet.storage.protocol import File, read_at

if TYPE_CHECKING:
    import zstandard

Bytes = NDArray[np.uint8]

LEVEL = 1  # what slime, miles and ModelExpress compress at
MOST_WINDOW = 8 << 20  # bytes that a decoder has to look back at most: RFC 8878, 3.1.1.1.2, asks every decoder for it
HEAD = 18  # bytes: no header of a frame is longer
READ = 64 << 10  # bytes of a frame that are read together
CODER, DECODER = 4 << 20, MOST_WINDOW + (1 << 20)  # bytes of memory that a coder takes at this level, and a decoder at most
ZEROS = memoryview(bytes(1 << 20))


def bound(nbytes: int) -> int:
    """Return the bytes that a frame of so many takes at most: three for each block of 128 KiB that is kept as it is."""
    return nbytes + (nbytes >> 10) + (4 << 10)


def zstd() -> ModuleType:
    """Return zstandard, or say how it comes here."""
    try:
        import zstandard
    except ModuleNotFoundError as missing:
        remedy = "pip install 'carnet[delta]'"
        raise MachineFailed("what compresses deltas is not installed", {"missing": missing.name}, remedy=remedy) from missing
    return zstandard


class Packer:
    """Makes the frame of a tensor; one in which nothing differs has none."""

    def __init__(self, compressor: "zstandard.ZstdCompressor", nbytes: int, put: Callable[[int, bytes], None]) -> None:
        """Begin a tensor of so many bytes, whose frame is ``put`` piece by piece: where in it, and what."""
        self._compressor, self._nbytes, self._to, self._at = compressor, nbytes, put, 0
        self._coder: zstandard.ZstdCompressionObj | None = None
        self._equal = 0  # bytes without a difference, before the first

    def add(self, piece: Bytes, *, differs: bool) -> None:
        """Take the next bytes of the difference."""
        if self._coder is None:
            if not differs:
                self._equal += piece.size
                return
            self._coder = self._compressor.compressobj(size=self._nbytes)
            for at in range(0, self._equal, len(ZEROS)):
                self._put(self._coder.compress(ZEROS[: self._equal - at]))
        self._put(self._coder.compress(piece.data))

    def close(self) -> int | None:
        """Return the bytes of the frame, None where nothing differs."""
        if self._coder is None:
            return None
        self._put(self._coder.flush())
        return self._at

    def _put(self, data: bytes) -> None:
        self._to(self._at, data)
        self._at += len(data)


class Unpacker:
    """Reads the frame of a tensor of so many bytes, from its first to its last."""

    def __init__(self, file: File, at: int, size: int, nbytes: int, name: str) -> None:
        """Begin a frame of ``size`` bytes at a place of a file."""
        self._zstd = zstd()
        self._facts = {"where": f"{file.where}/{file.stamp.file}", "tensor": name}
        self._nbytes, self._left = nbytes, nbytes
        with self._told():
            said = self._zstd.get_frame_parameters(read_at(file, at, min(HEAD, size)))
        known = said.content_size != self._zstd.CONTENTSIZE_UNKNOWN
        if known and said.content_size != nbytes:
            raise self._damaged("is of another tensor", f"{nbytes:,} bytes", f"a frame that says {said.content_size:,}")
        if said.window_size > MOST_WINDOW or said.dict_id:
            found = f"a dictionary, {said.dict_id}" if said.dict_id else f"{said.window_size:,} bytes"
            raise self._damaged("takes more memory than a frame of a delta may", f"a window of {MOST_WINDOW:,} bytes", found)
        decoder = self._zstd.ZstdDecompressor(max_window_size=MOST_WINDOW)
        self._reader = decoder.stream_reader(_Range(file, at, size), read_size=READ, read_across_frames=True)

    def into(self, piece: Bytes) -> None:
        """Fill a buffer with the next bytes; raise BadCheckpoint where the frame is damaged, ends before, or goes on after the last."""
        at = 0
        with self._told():
            while at < piece.size and (done := self._reader.readinto(piece.data[at:])):
                at += done
            self._left -= at
            if at < piece.size:
                raise self._damaged("ends too early", f"{self._nbytes:,} bytes", f"{self._nbytes - self._left:,}")
            if not self._left and self._reader.read(1):
                raise self._damaged("goes on after the tensor's last byte", f"{self._nbytes:,} bytes", "more")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._zstd.ZstdError as error:
            raise self._damaged("cannot be decoded", "a zstd frame", str(error)) from None

    def _damaged(self, what: str, expected: str, found: str) -> BadCheckpoint:
        facts = {**self._facts, "expected": expected, "found": found}
        return BadCheckpoint(f"the frame of {self._facts['tensor']} {what}", facts, remedy=MADE_AGAIN)


class _Range:
    """Some bytes of a file as something that can be read once."""

    def __init__(self, file: File, at: int, size: int) -> None:
        self._file, self._at, self._end = file, at, at + size

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, none at the end."""
        size = self._end - self._at if size < 0 else min(size, self._end - self._at)
        self._at += size
        return read_at(self._file, self._at - size, size)
