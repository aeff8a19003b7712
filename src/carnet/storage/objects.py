"""Folders and files of an object store: a folder is what keys have in common before a slash, a file an object that is read by ranges.

A store answers in tens of milliseconds and then at the speed of the line. So a file is opened with the request that brings its first
bytes, small reads are served out of blocks that are read ahead, and what is expected is brought by several requests at once.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Self

from carnet.errors import BadCheckpoint, BadRequest, NotSupported, shown
from carnet.storage import object_drafts
from carnet.storage.blocks import BLOCK, Blocks
from carnet.storage.buckets import Bucket, Changed, Missing, Object, Past, Short, told
from carnet.storage.journal_lines import NAME as JOURNAL
from carnet.storage.protocol import AT_ONCE, FILE, FOLDER, LAST, Crossing, Draft, Folder, Part, Stamp, Target

HEAD = 64 << 10  # bytes that come with opening: the header of most files
GAP = 512 << 10  # bytes: reading fewer that nobody needs is cheaper than one more request
SPAN = 2 << 20  # bytes of one request for what is expected


@dataclass(frozen=True, slots=True)
class Shared:
    """What all folders of one bucket share."""

    bucket: Bucket
    blocks: Blocks = field(default_factory=Blocks)


@dataclass(frozen=True, slots=True)
class ObjectFolder:
    """What the keys of some objects have in common."""

    shared: Shared
    path: str  # without slashes at its ends; "" for the whole bucket
    unfinished: bool = False  # a target that is being written may be read

    @property
    def bucket(self) -> Bucket:
        """Return where it is."""
        return self.shared.bucket

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return self.path.rsplit("/", 1)[-1] or self.bucket.url.rsplit("/", 1)[-1]

    @property
    def far(self) -> bool:
        """Say yes."""
        return True

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.path}" if self.path else self.bucket.url

    def __truediv__(self, name: str) -> Self:
        return replace(self, path=self.key(name))

    def key(self, name: str) -> str:
        """Return the key of an object below, or the path of a folder."""
        return f"{self.path}/{name}".strip("/")

    def kind(self, name: str = "") -> str:
        """Return what has a name."""
        key = self.key(name)
        with told(f"cannot look for {shown(name or self.name)}", str(self)):
            if name and _is_name(name) and self.bucket.find(key) is not None:
                return FILE
            if any(self.bucket.below(f"{key}/" if key else "")):
                return FOLDER
            return FILE if not name and key and self.bucket.find(key) is not None else ""

    def entries(self) -> list[tuple[str, str]]:
        """Return the names and kinds of what is in it."""
        with told("cannot list the folder", str(self)):
            folders, files = self.bucket.below(f"{self.path}/" if self.path else "")
        names = [each.key.rsplit("/", 1)[-1] for each in files]
        if JOURNAL in names and LAST not in names and not self.unfinished:
            remedy = f"run the command that writes it again: it resumes; or remove what is there: carnet clean {self}"
            raise BadRequest(f"{self} is not finished", {"found": JOURNAL}, remedy=remedy)
        return sorted([*((name, FOLDER) for name in folders), *((name, FILE) for name in names if name)])

    def holds(self, name: str) -> bool:  # noqa: ARG002  nothing in a store leads elsewhere
        """Say yes."""
        return True

    def open(self, name: str) -> "ObjectFile":
        """Open an object, which brings its first bytes."""
        if not _is_name(name):
            raise BadCheckpoint(f"{shown(name)} cannot be a file's name", {"where": self})
        key, where = self.key(name), str(self)
        with told(f"cannot read {shown(name)}", where, name):
            found, head = self._first(key)
            _check(head, min(HEAD, found.nbytes), 0)
        if found.nbytes <= HEAD:
            self.shared.blocks.hold(key, found.version, head)
        return ObjectFile(where, Stamp(name, found.nbytes, found.version), self.shared, key, head)

    def _first(self, key: str) -> tuple[Object, memoryview]:
        """Return what an object is, with its first bytes."""
        try:
            found, head = self.bucket.read(key, 0, HEAD, None)
        except Past:
            found, head = self.bucket.find(key), memoryview(b"")
        if found is None:
            raise Missing("it went away")
        return found, head

    def put(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a small object."""
        with told(f"{shown(name)} cannot be written", str(self)):
            self.bucket.put(self.key(name), b"".join(chunks), {})

    def owned(
        self, names: Collection[str], crossing: Crossing, source: Folder | None, part: Part | None = None
    ) -> AbstractContextManager[Draft]:
        """Own the objects below."""
        return object_drafts.owned(self, names, crossing, source, part)

    def cleared(self) -> list[str]:
        """Remove what a crossing left."""
        return object_drafts.cleared(self)

    def joined(self) -> Callable[[str], Target]:
        """Refuse: an object has one writer."""
        remedy = "save to a folder of this machine, and bring that there"
        raise NotSupported("many processes cannot write an object together", {"where": self}, remedy=remedy)

    def meanwhile(self) -> Self:
        """Return the folder as its own crossing sees it."""
        return replace(self, unfinished=True)


@dataclass(slots=True)
class _Expected:
    """Spans of a file that will be read, one after the other, and those that are here."""

    spans: list[tuple[int, int]]  # begin and end
    begins: list[int]
    held: dict[int, memoryview] = field(default_factory=dict)


@dataclass(slots=True)
class ObjectFile:
    """An object that is read."""

    where: str
    stamp: Stamp
    shared: Shared
    key: str
    head: memoryview
    expected: _Expected | None = None

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place."""
        end = offset + len(into)
        if end > self.stamp.nbytes:
            facts = {"where": self.where, "expected": f"at least {end:,} bytes", "found": f"{self.stamp.nbytes:,} bytes"}
            remedy = "copy the checkpoint again, and wait until nobody writes to it"
            raise BadCheckpoint(f"{shown(self.stamp.file)} ends too early", facts, remedy=remedy)
        if end <= len(self.head):
            into[:] = self.head[offset:end]
        elif (found := self._expectedly(offset, end)) is not None:
            into[:] = found
        elif len(into) >= BLOCK:
            into[:] = self._get(offset, len(into))
        else:
            at = offset
            while at < end:
                number, skip = divmod(at, BLOCK)
                block = self.shared.blocks.get(self.key, self.stamp.version, number, self.stamp.nbytes, self._get)
                some = block[skip : skip + end - at]
                into[at - offset : at - offset + len(some)] = some
                at += len(some)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Join ranges to spans that are worth a request."""
        spans = list[tuple[int, int]]()
        for begin, nbytes in sorted(ranges):
            low, high = spans[-1] if spans else (0, -GAP - 1)
            if begin - high <= GAP and max(high, begin + nbytes) - low <= SPAN:
                spans[-1] = low, max(high, begin + nbytes)
            else:
                spans.append((begin, begin + nbytes))
        self.expected = _Expected(spans, [begin for begin, _ in spans])

    def _expectedly(self, offset: int, end: int) -> memoryview | None:
        """Return bytes that were expected to be read, with a request for each of the next spans where they are not here."""
        expected = self.expected
        at = -1 if expected is None else bisect_right(expected.begins, offset) - 1
        if expected is None or at < 0 or expected.spans[at][1] < end:
            return None
        begin = expected.begins[at]
        if begin not in expected.held:
            coming = [(low, high - low) for low, high in expected.spans[at : at + AT_ONCE]]
            with ThreadPoolExecutor(AT_ONCE) as threads:
                found = [*threads.map(lambda span: self._get(*span), coming)]
            expected.held = {low: data for (low, _), data in zip(coming, found, strict=True)}
        return expected.held[begin][offset - begin : end - begin]

    def _get(self, begin: int, nbytes: int) -> memoryview:
        """Return bytes of the object that was opened, and of no other that has its key since."""
        name, stamp = self.stamp.file, self.stamp
        with told(f"cannot read {shown(name)}", self.where, name):
            found, data = self.shared.bucket.read(self.key, begin, nbytes, stamp.version)
            if found is not None and (found.nbytes, found.version) != (stamp.nbytes, stamp.version):
                raise Changed(_difference(stamp, found))
            _check(data, nbytes, begin)
            return data


def _is_name(name: str) -> bool:
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _check(data: memoryview, nbytes: int, begin: int) -> None:
    if len(data) != nbytes:
        raise Short(f"it gave {len(data):,} of {nbytes:,} bytes from {begin:,} on")


def _difference(stamp: Stamp, found: Object) -> str:
    sizes = f"it had {stamp.nbytes:,} bytes and has {found.nbytes:,}"
    return sizes if found.nbytes != stamp.nbytes else "it has another etag than before"
