"""An upload from a thread of its own: whoever writes hands bytes over, and waits where the store is slower.

The library is given an iterator: where it raises, the library tells the store to forget what came before, so that no part of an
upload that was given up lies in the bucket. Only a process that is killed leaves some.
"""

import threading
from collections.abc import Callable, Iterator
from queue import Queue

from carnet.storage.buckets import Buffer

PIECE = 8 << 20  # bytes that are handed over together
WAITING = 2  # of these


class Abandoned(Exception):
    """Nobody writes on."""


class StreamedUpload:
    """An object that a library writes from an iterator."""

    def __init__(self, send: Callable[[Iterator[Buffer]], object]) -> None:
        self._pieces: Queue[Buffer | None] = Queue(WAITING)
        self._whole = self._ended = False  # the object is; nothing more comes
        self._failed: BaseException | None = None
        self._held = bytearray()
        self._thread = threading.Thread(target=self._run, args=(send,), daemon=True)
        self._thread.start()

    def write(self, data: Buffer) -> None:
        """Add bytes."""
        if self._failed is not None:
            raise self._failed
        self._held += data
        while len(self._held) >= PIECE:
            self._pieces.put(bytes(memoryview(self._held)[:PIECE]))
            del self._held[:PIECE]

    def close(self) -> None:
        """Wait until the object is there."""
        self._pieces.put(bytes(self._held))
        self._whole = True
        self._end()
        if self._failed is not None:
            raise self._failed

    def abandon(self) -> None:
        """Have the library forget what was written."""
        self._end()

    def _end(self) -> None:
        self._held = bytearray()
        self._pieces.put(None)
        self._thread.join()

    def _run(self, send: Callable[[Iterator[Buffer]], object]) -> None:
        try:
            send(self._iterate())
        except Abandoned:
            return
        except BaseException as error:  # noqa: BLE001  whatever it is, whoever writes must see it
            self._failed = error
            while not self._ended and self._pieces.get() is not None:  # nobody may wait for this thread
                pass

    def _iterate(self) -> Iterator[Buffer]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._ended = True
        if not self._whole:
            raise Abandoned
