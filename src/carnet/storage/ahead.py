"""A folder that is being written, read as it will be: small files that are known and not there yet are served from memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from carnet.storage.around import Around
from carnet.storage.memory import MemoryFile
from carnet.storage.protocol import FILE, FOLDER, File, Stamp


@dataclass(frozen=True, slots=True)
class Ahead(Around):
    """A folder with what it will hold; from the moment on that a file is there, it is the one that is read."""

    known: Mapping[str, bytes]  # path below -> content

    def __truediv__(self, name: str) -> Self:
        below = {path.removeprefix(f"{name}/"): data for path, data in self.known.items() if path.startswith(f"{name}/")}
        return type(self)(self.root / name, below)

    def kind(self, name: str = "") -> str:
        """Return what has a name, or will have it."""
        coming = FILE if name in self.known else FOLDER if any(path.startswith(f"{name}/") for path in self.known) else ""
        return self.root.kind(name) or coming

    def entries(self) -> list[tuple[str, str]]:
        """Return the names and kinds of what is in it, and of what will be."""
        first = {path.split("/")[0] for path in self.known}
        return sorted({**{name: self.kind(name) for name in first}, **dict(self.root.entries())}.items())

    def holds(self, name: str) -> bool:
        """Say whether a name leads to a place below."""
        return name in self.known or self.root.holds(name)

    def open(self, name: str) -> File:
        """Open what is there, or what will be."""
        if name in self.known and not self.root.kind(name):
            return MemoryFile(str(self), Stamp(name, len(self.known[name]), ""), self.known[name])
        return self.root.open(name)
