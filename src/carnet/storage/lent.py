"""A folder with files that are lent from another: read as if they lay in it, under names that begin with a mark."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from carnet.storage.around import Around
from carnet.storage.protocol import File, Folder, Stamp

TOWER, ADAPTER = "lent:", "adapter:"  # marks: before the name of a file of a folder that lends a tower, or adapters


@dataclass(frozen=True, slots=True)
class LentFile:
    """A file of the other folder, under its name here."""

    file: File
    stamp: Stamp

    @property
    def where(self) -> str:
        """Return the path or URL of its own folder."""
        return self.file.where

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place."""
        self.file.read_into(offset, into)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Hear what will be read."""
        self.file.expect(ranges)


@dataclass(frozen=True, slots=True)
class WithLent(Around):
    """A folder, and another that lends it files; all else is the first one's."""

    lender: Folder
    mark: str

    def kind(self, name: str = "") -> str:
        """Return what has a name."""
        return self.lender.kind(name.removeprefix(self.mark)) if name.startswith(self.mark) else self.root.kind(name)

    def holds(self, name: str) -> bool:
        """Say whether a name leads to a place below."""
        return self.lender.holds(name.removeprefix(self.mark)) if name.startswith(self.mark) else self.root.holds(name)

    def open(self, name: str) -> File:
        """Open a file of either."""
        if not name.startswith(self.mark):
            return self.root.open(name)
        file = self.lender.open(name.removeprefix(self.mark))
        return LentFile(file, replace(file.stamp, file=name))
