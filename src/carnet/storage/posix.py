"""Folders of this machine's file systems. Only regular files are opened: a FIFO would hang who opens it, a device would act."""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from carnet.errors import BadCheckpoint, shown
from carnet.storage import clearing, drafts
from carnet.storage.files import PosixFile, PosixTarget, unreadable
from carnet.storage.opening import KINDS, NotPlain, failed, open_regular, replace_file
from carnet.storage.protocol import FILE, FOLDER, Crossing, Folder, Part, Stamp

HUB = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")  # where the files of a snapshot in the Hugging Face cache lead


@dataclass(frozen=True, slots=True)
class PosixFolder:
    """A folder of a file system."""

    path: str  # absolute; not resolved, which would lead into the Hugging Face cache

    @classmethod
    def at(cls, path: str) -> Self:
        """Return the folder of a path."""
        return cls(os.path.abspath(path))

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return os.path.basename(self.path)

    @property
    def far(self) -> bool:
        """Say no."""
        return False

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> Self:
        return type(self)(self._at(name))

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    def kind(self, name: str = "") -> str:
        """Return what has a name; a link that leads nowhere is "a link"."""
        path = self._at(name)
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return "a link" if os.path.islink(path) else ""
        return _kind(mode)

    def entries(self) -> list[tuple[str, str]]:
        """Return the names and kinds of what is in it."""
        try:
            with os.scandir(self.path) as found:
                return sorted((each.name, self._kind_of(each)) for each in found)
        except OSError as error:
            raise unreadable(self.path, "", error) from None

    def _kind_of(self, each: "os.DirEntry[str]") -> str:
        if each.is_symlink():
            return FILE if HUB.fullmatch(os.readlink(each.path)) and os.path.isfile(each.path) else "a link"
        if each.is_file(follow_symlinks=False):
            return FILE
        return FOLDER if each.is_dir(follow_symlinks=False) else _kind(each.stat(follow_symlinks=False).st_mode)

    def holds(self, name: str) -> bool:
        """Say whether a name leads to a place below, or from ``snapshots/x`` to ``blobs`` beside it, as in the Hugging Face cache."""
        home = Path(os.path.realpath(self.path))
        real = Path(os.path.realpath(home / name))
        cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        return real.is_relative_to(home) or real.is_relative_to(cache)

    def open(self, name: str) -> PosixFile:
        """Open a regular file below."""
        path = self._at(name)
        try:
            descriptor = open_regular(path)
        except NotPlain as error:
            facts = {"where": self, "found": error.strerror}
            raise BadCheckpoint(f"{shown(name)} is not a regular file", facts, remedy="put the file itself there") from None
        except FileNotFoundError:
            if os.path.islink(path):  # a Hugging Face cache that was copied without its blobs
                facts = {"where": self, "leads to": shown(os.readlink(path))}
                remedy = "copy what the links lead to (cp -rL), or download the files again"
                raise BadCheckpoint(f"{shown(name)} is a link to a file that is not there", facts, remedy=remedy) from None
            remedy = "bring it back, or copy the whole folder again"
            raise BadCheckpoint(f"{shown(name)} is missing", {"where": self}, remedy=remedy) from None
        except ValueError:  # a NUL in the name
            raise BadCheckpoint(f"{shown(name)} cannot be a file's name", {"where": self}) from None
        except OSError as error:
            raise unreadable(self.path, name, error) from None
        found = os.fstat(descriptor)
        identity = f"{found.st_dev}:{found.st_ino}:{found.st_ctime_ns}"
        return PosixFile(self.path, Stamp(name, found.st_size, str(found.st_mtime_ns), identity), descriptor)

    def put(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a small file, whole or not at all."""
        try:
            replace_file(Path(self._at(name)), chunks)
        except OSError as error:
            raise failed(f"{shown(name)} cannot be written", self, error) from error

    def owned(
        self, names: Collection[str], crossing: Crossing, source: Folder | None, part: Part | None = None
    ) -> AbstractContextManager[drafts.PosixDraft]:
        """Own the staging folder beside this one."""
        here = [Path(each.path) for each in (source, *crossing.beside) if isinstance(each, PosixFolder)]
        return drafts.owned(Path(self.path), names, crossing, here, part)

    def cleared(self) -> list[str]:
        """Remove what a crossing left in the staging folder beside this one."""
        return clearing.cleared(Path(self.path))

    def meanwhile(self) -> Self:
        """Return the folder: what is not finished has another name."""
        return self

    def joined(self) -> Callable[[str], PosixTarget]:
        """Return what opens files of the staging folder."""
        return drafts.joined(Path(self.path))


def _kind(mode: int) -> str:
    return FILE if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else KINDS.get(stat.S_IFMT(mode), "a device")
