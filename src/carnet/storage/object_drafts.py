"""A target in an object store. Nothing can be renamed there: objects are written where they will stay, and one says who writes them.

::

    OUT/journal.jsonl                  first to come and last to go: plan, source, and the names of all files of the target
    OUT/model-00001-of-00002.safetensors   there when its last byte is; marked with the crossing that wrote it
    OUT/...
    OUT/carnet.json                    last: without it there is no target

A run that was killed is gone on with by objects: those that bear the mark of the crossing are whole, and the others are written again.
"""

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from carnet.errors import BadRequest, MachineFailed, shown
from carnet.storage.buckets import Broken, Bucket, Object, Taken, told
from carnet.storage.in_order import InOrder, Room
from carnet.storage.journal_lines import NAME
from carnet.storage.protocol import LAST, TAKEN, Crossing, File, Folder, Part, read_at

if TYPE_CHECKING:
    from carnet.storage.objects import ObjectFolder

MARK = "carnet"  # of an object: the digest of its crossing
SMALL = 8 << 20  # bytes of a file that is sent in one go
LIMIT = 64 << 20  # bytes: no journal comes near this
AT_ONCE = 16  # objects that are asked for their marks


@dataclass(frozen=True, slots=True)
class ObjectTarget:
    """A file of a draft, open for writing."""

    file: InOrder
    name: str
    where: str

    def write(self, offset: int, data: memoryview) -> None:
        """Write a whole buffer to a place."""
        with _told(self.name, self.where):
            self.file.write(offset, data)

    def copy(self, source: File, begin: int, end: int, nbytes: int) -> int:  # noqa: ARG002  no store copies what is elsewhere
        """Leave it to memory."""
        return 0


@dataclass(slots=True)
class ObjectDraft:
    """A target that is being written, owned."""

    out: "ObjectFolder"
    names: frozenset[str]  # of the files that are written
    mark: str  # digest of the crossing
    fresh: bool  # nothing in it counts
    stale: bool  # and something is there
    kept: dict[str, int]  # bytes of the objects that are whole, by name
    whole: bool = False  # an earlier run was killed between its last object and the removal of its journal
    done: frozenset[int] = frozenset()  # objects count here, not jobs
    in_order: bool = True
    measured: Mapping[int, float] = field(default_factory=dict)
    parts: int = 0
    ready: bool = False
    files: dict[str, InOrder] = field(default_factory=dict)
    room: Room = field(default_factory=Room)
    last: bytes | None = None  # the document, until everything else is there

    @property
    def where(self) -> str | Folder:
        """Return the folder, which others are refused meanwhile."""
        return self.out.meanwhile()

    @property
    def bucket(self) -> Bucket:
        """Return what it is in."""
        return self.out.bucket

    def measured_by_all(self) -> Mapping[int, float]:
        """Return nothing: nobody shares it."""
        return {}

    def share(self) -> None:
        """Do nothing: whoever writes an object of this crossing may."""

    def note(self, job: int, found: float | None = None) -> None:
        """Note nothing: what counts are objects."""

    def settle(self) -> None:
        """Do nothing: an object that is there is there to stay."""

    def restart(self) -> None:
        """Remove what earlier runs wrote."""
        self.abandon()
        if self.stale:  # else there was nothing, and what is there by now is another part's
            self._remove(self.names)
        self.kept = {}

    def size(self, name: str) -> int | None:
        """Return the bytes of a file that is whole."""
        return self.kept.get(name)

    def reserve(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Take it that a store has room."""

    def create(self, name: str, nbytes: int, parts: Iterable[tuple[int, bytes]]) -> None:
        """Begin a file with some parts, which wait for what comes before them."""
        is_there, key, marks = self.kept.get(name) == nbytes, self.out.key(name), {MARK: self.mark}
        if not is_there:  # an object of another size is none of this crossing, whatever its mark
            self.kept.pop(name, None)
        self.files[name] = InOrder(nbytes, lambda: self.bucket.upload(key, marks, nbytes), self.room, is_there)
        for offset, data in parts:
            self.files[name].hold(offset, data)

    def open(self, name: str) -> ObjectTarget:
        """Open a file that was created; what goes into another one is another part's."""
        file = self.files.get(name) or InOrder(0, lambda: self.bucket.upload(name, {}, 0), self.room, whole=True)
        return ObjectTarget(file, name, str(self.out))

    def complete(self, name: str) -> None:
        """Have what nobody wrote be zeros."""
        with _told(name, str(self.out)):
            self.files[name].settle()

    def put(self, name: str, chunks: Iterable[bytes], *, sync: bool = False) -> None:  # noqa: ARG002  what is there stays there
        """Write a small file; the document waits until the target is published."""
        if name == LAST:
            self.last = b"".join(chunks)
            return
        held, left = b"", iter(chunks)
        while len(held) <= SMALL and (chunk := next(left, None)) is not None:
            held += chunk
        key, marks = self.out.key(name), {MARK: self.mark}
        with _told(name, str(self.out)):
            if len(held) <= SMALL:
                self.bucket.put(key, held, marks)
                return
            upload = self.bucket.upload(key, marks, LIMIT)
            try:
                upload.write(held)
                for chunk in left:
                    upload.write(chunk)
            except BaseException:
                upload.abandon()
                raise
            upload.close()

    def flush(self, name: str) -> None:
        """Do nothing: what is in a store is there to stay."""

    def discard(self) -> None:
        """Remove what carnet wrote."""
        self.abandon()
        self._remove([*self.names, NAME])

    def publish(self) -> None:
        """Write the document; then the target is there."""
        with _told(LAST, str(self.out)):
            if self.last is not None:
                self.bucket.put(self.out.key(LAST), self.last, {MARK: self.mark})
        self._remove([NAME])

    def abandon(self) -> None:
        """Write no more."""
        for file in self.files.values():
            file.abandon()

    def _remove(self, names: Iterable[str]) -> None:
        _remove(self.out, names)


def _told(name: str, where: str) -> AbstractContextManager[None]:
    return told(f"{shown(name)} cannot be written", where)


@contextmanager
def owned(
    out: "ObjectFolder", names: Collection[str], crossing: Crossing, source: Folder | None, part: Part | None = None
) -> Iterator[ObjectDraft]:
    """Own a folder of a store as a target; errors are those of ``Folder.owned``.

    There are no locks in a store: two runs of one crossing write the same objects, and the journal refuses one of another crossing.
    """
    for each in (source, *crossing.beside):
        _refuse_overlap(out, each)
    if not out.path or NAME in names:
        raise BadRequest(f"{out} names no folder that could be new", remedy="name a folder of the bucket")
    mark = xxhash.xxh3_128_hexdigest(f"{crossing.plan} {crossing.source}".encode())
    there = _there(out)
    fresh = stale = False
    if NAME not in there:
        if there or _is_object(out):
            raise BadRequest(f"{out} exists", remedy=TAKEN)
        if part is not None and part.joins:
            remedy = "give every machine the same store under the same URL"
            raise MachineFailed("this machine does not see the target that others write", {"where": out}, remedy=remedy)
        fresh = _begin(out, names, crossing, new=True)
    said = _said(out)
    if said.get("plan") != crossing.plan:
        facts = {"where": out, "expected": f"plan {crossing.plan}", "found": shown(f"plan {said.get('plan')}")}
        remedy = f"finish that crossing first, or remove what it left: carnet clean {out}"
        raise BadRequest(f"{out} belongs to another plan", facts, remedy=remedy)
    for name in sorted(there.keys() - {*names, NAME}):
        facts = {"where": out, "found": shown(name)}
        remedy = "move it away; then the same command goes on where it stopped"
        raise BadRequest("the target holds something that carnet did not write", facts, remedy=remedy)
    if said.get("source") != crossing.source:
        fresh = stale = _begin(out, names, crossing)
    kept = {} if fresh else _kept(out, names, mark)
    draft = ObjectDraft(out, frozenset(names), mark, fresh, stale, kept, whole=LAST in kept)
    try:
        yield draft
    finally:
        draft.abandon()


def cleared(out: "ObjectFolder") -> list[str]:
    """Remove what a crossing left that was not finished, and return the names of what it was; of a finished one only the journal."""
    there = _there(out)
    if NAME not in there:
        raise BadRequest(f"no unfinished crossing of carnet is at {out}", {"expected": f"{out / NAME}"})
    names = _said(out).get("names")
    ours = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    found = [NAME] if LAST in there else [*sorted(there.keys() & {*ours}), NAME]
    _remove(out, found)
    return found


def _refuse_overlap(out: "ObjectFolder", source: Folder | None) -> None:
    """Raise BadRequest where the target would be written into its source, or the source lies where the target is written."""
    here, there = f"{out}/", f"{source}/"
    if here.startswith(there) or there.startswith(here):
        facts = {"source": source, "target": out}
        raise BadRequest("the target and its source lie in each other", facts, remedy="choose a target outside of the source")


def _there(out: "ObjectFolder") -> dict[str, Object]:
    """Return all objects below a folder, by their names there."""
    with told("the target cannot be looked at", str(out)):
        begin = len(out.key("")) + 1
        return {each.key[begin:]: each for each in out.bucket.every(f"{out.path}/") if each.key[begin:]}


def _is_object(out: "ObjectFolder") -> bool:
    with told("the target cannot be looked at", str(out)):
        return out.bucket.find(out.path) is not None


def _begin(out: "ObjectFolder", names: Collection[str], crossing: Crossing, *, new: bool = False) -> bool:
    """Write the journal, and say whether it was this process."""
    holder = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    head = {"carnet-journal": 1, "plan": crossing.plan, "source": crossing.source, "names": sorted(names), **holder}
    data = (json.dumps(head) + "\n").encode()
    with _told(NAME, str(out)), suppress(Taken):  # whose it is then, is looked at
        try:
            out.bucket.put(out.key(NAME), data, {}, new=new)
        except Broken:  # no library asks again for what may have been done
            out.bucket.put(out.key(NAME), data, {}, new=new)
        return True
    return False


def _said(out: "ObjectFolder") -> Mapping[str, object]:
    """Return what a journal says."""
    file = out.open(NAME)
    try:
        found = json.loads(read_at(file, 0, min(file.stamp.nbytes, LIMIT)))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "carnet-journal" not in found:
        remedy = "see what its folder holds and move it away, or choose another target"
        raise BadRequest(f"{out / NAME} is not a journal of carnet", remedy=remedy)
    return found


def _kept(out: "ObjectFolder", names: Collection[str], mark: str) -> dict[str, int]:
    """Return the bytes of the objects of these names that this crossing wrote; each is asked, because a listing may lag behind."""
    with told("the target cannot be looked at", str(out)), ThreadPoolExecutor(AT_ONCE) as threads:
        found = threads.map(lambda name: out.bucket.look(out.key(name)), names)
        return {
            name: each[0].nbytes
            for name, each in zip(names, found, strict=True)
            if each is not None and each[1].get(MARK) == mark
        }


def _remove(out: "ObjectFolder", names: Iterable[str]) -> None:
    there = _there(out)
    with told("what carnet wrote cannot be removed", str(out)):
        out.bucket.remove([each.key for name in names if (each := there.get(name)) is not None])
