"""What was read of objects a little ahead of those who read: small reads that follow each other cost one request for many.

Blocks of all files of a bucket share one room, and the last used ones stay. A block that follows one that is there brings several
with it::

    read 20 kB   |#.......|                            one block
    read on      |........|#.......|........|........|  as many as one request may bring
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

BLOCK = 1 << 20  # bytes
AHEAD = 8  # blocks that one request brings
MOST = 64  # blocks that are held

Key = tuple[str, str, int]  # object, version, number of the block
Read = Callable[[int, int], memoryview]  # takes where to begin and how many bytes


class Blocks:
    """Blocks by their keys; threads may share it, and two that want the same wait for one request."""

    def __init__(self) -> None:
        self._held: OrderedDict[Key, Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()

    def hold(self, name: str, version: str, data: memoryview) -> None:
        """Keep the beginning of an object that is one block or less, or one that is a whole block."""
        made: Future[memoryview] = Future()
        made.set_result(data)
        with self._lock:
            self._held[name, version, 0] = made
            self._forget()

    def get(self, name: str, version: str, number: int, size: int, read: Read) -> memoryview:
        """Return a block of an object of some size (bytes)."""
        with self._lock:
            found, made = self._held.get((name, version, number)), list[Future[memoryview]]()
            if found is None:
                made = self._promised(name, version, number, size)
            else:
                self._held.move_to_end((name, version, number))
        if found is not None:
            return found.result()
        try:
            data = read(number * BLOCK, min(len(made) * BLOCK, size - number * BLOCK))
        except BaseException as error:
            with self._lock:
                for at in range(len(made)):
                    self._held.pop((name, version, number + at), None)
            for each in made:
                each.set_exception(error)
            raise
        for at, each in enumerate(made):
            each.set_result(data[at * BLOCK : (at + 1) * BLOCK])
        return made[0].result()

    def _promised(self, name: str, version: str, number: int, size: int) -> list["Future[memoryview]"]:
        """Return places for a block and, where it follows another, those behind it that are not there."""
        most = AHEAD if (name, version, number - 1) in self._held else 1
        made = list[Future[memoryview]]()
        while (
            len(made) < most and (number + len(made)) * BLOCK < size and (name, version, number + len(made)) not in self._held
        ):
            self._held[name, version, number + len(made)] = Future()
            made.append(self._held[name, version, number + len(made)])
        self._forget()
        return made

    def _forget(self) -> None:
        while len(self._held) > MOST:
            self._held.popitem(last=False)
