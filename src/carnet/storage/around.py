"""A folder around another one: what it does not do in its own way it does as that one."""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self

from carnet.storage.protocol import Crossing, Draft, File, Folder, Part, Target


@dataclass(frozen=True, slots=True)
class Around:
    """A folder that is another one."""

    root: Folder

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return self.root.name

    @property
    def far(self) -> bool:
        """Say whether it is far."""
        return self.root.far

    def __str__(self) -> str:
        return str(self.root)

    def __truediv__(self, name: str) -> Self:
        return replace(self, root=self.root / name)

    def kind(self, name: str = "") -> str:
        """Return what has a name."""
        return self.root.kind(name)

    def entries(self) -> list[tuple[str, str]]:
        """Return the names and kinds of what is in it."""
        return self.root.entries()

    def holds(self, name: str) -> bool:
        """Say whether a name leads to a place below."""
        return self.root.holds(name)

    def open(self, name: str) -> File:
        """Open a file."""
        return self.root.open(name)

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

    def meanwhile(self) -> Self:
        """Return the folder as its own crossing sees it."""
        return replace(self, root=self.root.meanwhile())

    def joined(self) -> Callable[[str], Target]:
        """Return what opens files of the target."""
        return self.root.joined()
