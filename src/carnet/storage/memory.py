"""Files that are bytes in memory: what lies in another file and is read as if it were one."""

from collections.abc import Iterable
from dataclasses import dataclass

from carnet.storage.protocol import Stamp


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """Some bytes."""

    where: str
    stamp: Stamp
    data: bytes

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place; raise ValueError where there are no such bytes."""
        into[:] = self.data[offset : offset + len(into)]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Need to know nothing."""
