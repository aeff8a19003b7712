"""What a store answers: the folders of a checkpoint, files that are read by ranges of bytes, and targets that are being written.

A folder is a folder of a disk or a prefix of a bucket. It is shown by its path or URL, which ``schemes.folder_at`` takes again.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar

FILE, FOLDER = "file", "folder"  # kinds of what has a name; any other is in words, "a FIFO", and nothing is ""
TAKEN = "choose a folder that is empty or not there, or see whether it is the target already: carnet verify OUT"
LAST = "carnet.json"  # the document of a target: where a store cannot rename, a target without it is none
AT_ONCE = 8  # requests that are under way, where one takes long
OPEN = 16  # files that stay open: they are read in the order in which they lie


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file is still the same."""

    file: str  # path below a folder, with forward slashes
    nbytes: int
    version: str  # changes when it is written, and is the same on every machine: its time, an etag
    identity: str = ""  # of this very file on this machine, and of any change to it


class File(Protocol):
    """A file that is open for reading, by as many threads as like; it closes with the last reference to it."""

    @property
    def where(self) -> str:
        """Return the path or URL of the folder in which it was opened."""

    @property
    def stamp(self) -> Stamp:
        """Return what it was when it was opened."""

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place; raise BadCheckpoint where the file ends before."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Hear that these places (offset, bytes) will be read, one by one, and little else."""


class Folder(Protocol):
    """A folder of a store."""

    @property
    def name(self) -> str:
        """Return the last part of its path."""

    @property
    def far(self) -> bool:
        """Say whether a request takes so long that many should be under way at once."""

    def __str__(self) -> str:
        """Return its path or URL."""

    def __truediv__(self, name: str) -> Self:
        """Return a folder below."""

    def kind(self, name: str = "") -> str:
        """Return what has a name below, or the folder itself; links are followed."""

    def entries(self) -> list[tuple[str, str]]:
        """Return name and kind of everything directly in it, sorted; a link is "a link", but for a file's in a cache of downloads."""

    def holds(self, name: str) -> bool:
        """Say whether a name leads, by whatever links, to a place below, or into the cache of downloads that the folder is part of."""

    def open(self, name: str) -> File:
        """Open a file: BadCheckpoint where it is missing or no regular file, MachineFailed where it cannot be read."""

    def put(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a small file in place of what has the name: it is whole or as it was. Raises MachineFailed."""

    def owned(
        self, names: Collection[str], crossing: "Crossing", source: "Folder | None", part: "Part | None" = None
    ) -> AbstractContextManager["Draft"]:
        """Own this folder as a target of files of these names, new or as an earlier run of the same crossing left it.

        A ``part`` owns it alone until ``share``, and then together with the other parts; one that comes later shares it at once.
        Raises BadRequest, with nothing touched, where the target exists or lies in its source, where another run holds it, where
        another plan began it or nobody of carnet's did, and where something lies in it that has none of these names.
        """

    def cleared(self) -> list[str]:
        """Remove what a crossing into this folder left that was not finished, and return the names of what it was.

        Raises BadRequest, with nothing touched, where there is none.
        """

    def meanwhile(self) -> "Folder":
        """Return the folder as its own crossing sees it, which is not finished."""

    def joined(self) -> Callable[[str], "Target"]:
        """Return what opens files of the target that another process owns, for writing."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """What is written from what: its work goes on where that of the same crossing stopped."""

    plan: str  # digest
    source: str = ""  # digest of what tells on every machine that no file of the source has changed
    identity: str = ""  # and of what tells more on this machine
    names: tuple[str, ...] = ()  # of the files that are written: what it may remove
    beside: tuple["Folder", ...] = ()  # what else is read, that the target must not lie in
    patience: float = 0.0  # seconds to wait for who holds it: a machine that is lost keeps its locks for a while


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a crossing a process does, beside others that do the other parts.

    >>> str(Part(3, 64))
    '3/64'
    """

    number: int  # from 1
    of: int
    joins: bool = False  # the target was prepared before: where it is not there, this is not the same disk

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class Target(Protocol):
    """A file of a draft, open for writing in any order by as many threads as like; it closes with the last reference to it."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write a whole buffer to a place."""

    def copy(self, source: File, begin: int, end: int, nbytes: int) -> int:
        """Copy at most so many bytes of a file from ``begin`` to ``end`` here; return how many, 0 where only memory can."""


class Draft(Protocol):
    """A target that is being written: nobody sees it until it is published, and until then one crossing owns it."""

    @property
    def where(self) -> str | Folder:
        """Return the folder in which it can be read meanwhile, or its path."""

    @property
    def in_order(self) -> bool:
        """Say whether files have to be written one after the other, each from its first byte to its last."""

    @property
    def kept(self) -> Collection[str]:
        """Return the files that an earlier run wrote, where whole files are what counts, and not jobs."""

    @property
    def whole(self) -> bool:
        """Say whether an earlier run was killed just after publishing it."""

    @property
    def done(self) -> frozenset[int]:
        """Return the jobs that an earlier run noted, where what it wrote still counts."""

    @property
    def measured(self) -> Mapping[int, float]:
        """Return what jobs found that an earlier run noted."""

    def measured_by_all(self) -> Mapping[int, float]:
        """Return what the jobs of all parts found until now."""

    @property
    def parts(self) -> int:
        """Return into how many parts others cut the crossing, 0 where nobody did."""

    @property
    def fresh(self) -> bool:
        """Say whether nothing counts that an earlier run wrote."""

    @property
    def ready(self) -> bool:
        """Say whether other parts have been let in: every file is there, and what is in it is theirs, too."""

    def share(self) -> None:
        """Let other parts in: every file is there. A draft that is nobody's part stays its owner's alone."""

    def note(self, job: int, found: float | None = None) -> None:
        """Remember that a job is done, and what it found."""

    def settle(self) -> None:
        """Remember that the files of all jobs that were noted until now are flushed."""

    def restart(self) -> None:
        """Remove what earlier runs wrote, and forget their jobs."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where it is not there."""

    def reserve(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Raise MachineFailed where there is less room than what files of these sizes (bytes) still need."""

    def create(self, name: str, nbytes: int, parts: Iterable[tuple[int, bytes]]) -> None:
        """Make a file in its full size, zeros but for some parts (offset, bytes); one that is there keeps what is in it."""

    def open(self, name: str) -> Target:
        """Open a file that was created."""

    def complete(self, name: str) -> None:
        """Hear that all is written into a file that was created: what nobody wrote is zeros."""

    def put(self, name: str, chunks: Iterable[bytes], *, sync: bool = False) -> None:
        """Write a small file in order, so that it is whole or not there."""

    def flush(self, name: str) -> None:
        """Bring a file, a folder, or (named "") the draft's own folder to where it outlives the machine's power."""

    def discard(self) -> None:
        """Remove what carnet wrote."""

    def publish(self) -> None:
        """Put the target in place: from one moment to the next everything is there. Raises BadRequest where somebody was faster."""


def names_in(folder: Folder) -> list[str]:
    """Return the names of everything directly in a folder, sorted."""
    return [name for name, _ in folder.entries()]


def walk(folder: Folder, enter: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, str]]:
    """Yield the path below a folder and the kind of everything in it, but of folders that are entered."""
    left = [""]
    while left:
        above = left.pop()
        for name, kind in (folder / above if above else folder).entries():
            path = f"{above}/{name}" if above else name
            if kind == FOLDER and enter(path):
                left.append(path)
            else:
                yield path, kind


def read_at(file: File, offset: int, nbytes: int) -> bytes:
    """Return exactly this many bytes of a file."""
    found = bytearray(nbytes)
    file.read_into(offset, memoryview(found))
    return bytes(found)


T = TypeVar("T")
U = TypeVar("U")


def asked(folder: Folder, ask: Callable[[T], U], things: Iterable[T]) -> Iterator[U]:
    """Yield what is answered of each thing, in their order; where the folder is far, some are asked at once."""
    if not folder.far:
        yield from map(ask, things)
        return
    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield from threads.map(ask, things)


class Opened(Generic[T]):
    """Files by name, the last used ones open. Threads may share it: who reads a file keeps it open."""

    def __init__(self, opens: Callable[[str], T], most: int = OPEN) -> None:
        self._file = lru_cache(most)(opens)

    def __call__(self, name: str) -> T:
        """Return a file, opened now or before."""
        return self._file(name)

    def close(self) -> None:
        """Close what nobody reads."""
        self._file.cache_clear()
