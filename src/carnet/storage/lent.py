"""A folder with files that are lent from another: read as if they lay in it, under names that begin with a mark."""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self

from carnet.storage.protocol import Crossing, Draft, File, Folder, Part, Stamp, Target

MARK = "lent:"  # before the name of a file of the other folder


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
class WithLent:
    """A folder, and another that lends it files; all else is the first one's."""

    root: Folder
    lender: Folder

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return self.root.name

    def __str__(self) -> str:
        return str(self.root)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.root / name, self.lender)

    def kind(self, name: str = "") -> str:
        """Return what has a name."""
        return self.lender.kind(name.removeprefix(MARK)) if name.startswith(MARK) else self.root.kind(name)

    def entries(self) -> list[tuple[str, str]]:
        """Return the names and kinds of what is in the folder itself."""
        return self.root.entries()

    def holds(self, name: str) -> bool:
        """Say whether a name leads to a place below."""
        return self.lender.holds(name.removeprefix(MARK)) if name.startswith(MARK) else self.root.holds(name)

    def open(self, name: str) -> File:
        """Open a file of either."""
        if not name.startswith(MARK):
            return self.root.open(name)
        file = self.lender.open(name.removeprefix(MARK))
        return LentFile(file, replace(file.stamp, file=name))

    def put(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a small file."""
        self.root.put(name, chunks)

    def owned(
        self, names: Collection[str], crossing: Crossing, source: Folder | None, part: Part | None = None
    ) -> AbstractContextManager[Draft]:
        """Own the folder as a target."""
        return self.root.owned(names, crossing, source, part)

    def cleared(self) -> list[str]:
        """Remove what a crossing left."""
        return self.root.cleared()

    def joined(self) -> Callable[[str], Target]:
        """Return what opens files of the target."""
        return self.root.joined()
