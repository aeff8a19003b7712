"""The *lineage* of a target: the folders that it came from, back to the first source, by what their documents say of each other.

::

    run/iter_0000001 ──> hf ──> hf-fp8 ──> ranks          each arrow is a ``carnet.json``: what left the source is what lies in it

A document has no path of its source, which may have moved: whose digests fit is the source, whatever it is called. A folder without a
document (of a training program) is found by its name and ends the chain.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from os import curdir
from os.path import dirname

from carnet.deltas import chain
from carnet.errors import BadRequest, CarnetError, shown
from carnet.examiner import document as documents
from carnet.examiner.tensor_files import digest, tensor_files_of
from carnet.formats.detect import open_checkpoint
from carnet.formats.side_files import DOCUMENT
from carnet.formats.stored import label_of
from carnet.plans.options import local
from carnet.progress import verb
from carnet.storage.protocol import FILE, FOLDER, Folder
from carnet.storage.schemes import PathLike, folder_at

DEPTH = 3  # folders in folders: runs/llama/iter_0000100
MOST = 10_000  # folders that are looked at
LINK = "a link"
MOVED = "--at {}=FOLDER says where it lies"

Tensors = Mapping[str, tuple[str, str]]  # label -> type and digest; no digest is ""
Signature = Callable[[str], tuple[str, str]]  # path -> how it is signed, and what is wrong with that


@dataclass(frozen=True, slots=True)
class Source:
    """What a document says of a source."""

    name: str  # of its folder, when it was read
    tensors: Tensors
    whole: bool = True  # it names every tensor of the source, or leaves it behind by name
    sha256: Mapping[str, str] = field(default_factory=dict)  # label -> that of the tensor, where it has it


@dataclass(frozen=True, slots=True)
class Link:
    """From a folder to one that it came from."""

    name: str  # as the document says it
    folder: str  # path, "" where it is not found
    tensors: int  # that have the same digest on both sides
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One folder of a chain."""

    folder: str  # path
    layout: str  # its dialect
    state: str  # of its document: "proven", "" where it has none
    links: tuple[Link, ...]
    signature: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Lineage:
    """A chain of folders, the target first; false where a link of it is broken."""

    stages: tuple[Stage, ...]

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong: folder and words."""
        return [
            (each.folder, said)
            for each in self.stages
            for said in (each.problem, *(link.problem for link in each.links))
            if said
        ]

    def __bool__(self) -> bool:
        return not self.problems


class Around:
    """The folders in which sources are looked for, and the documents there."""

    def __init__(self, out: Folder, at: Mapping[str, PathLike], beside: Iterable[PathLike]) -> None:
        self.at = {name: folder_at(local("at", path)) for name, path in at.items()}
        roots = [folder_at(local("beside", path)) for path in beside]
        self._roots = roots or [folder_at(dirname(str(out)) or curdir), folder_at(curdir)]
        self._folders: dict[str, Folder] | None = None
        self._read: dict[str, Mapping[str, object]] = {}

    def folders(self) -> dict[str, Folder]:
        """Return the folders that may be a source, by their paths."""
        if self._folders is None:
            found = islice((folder for root in self._roots for folder in _below(root, DEPTH)), MOST)
            self._folders = {str(folder): folder for folder in found}
            read = {path: _read(folder)[0] for path, folder in self._folders.items() if folder.kind(DOCUMENT) == FILE}
            self._read = {path: said for path, said in read.items() if said is not None}
        return self._folders

    def documents(self, below: Collection[str]) -> Iterator[tuple[Folder, Mapping[str, object]]]:
        """Yield the folders that have a document which can be read, but for those that are ``below``."""
        folders = self.folders()
        for path, said in self._read.items():
            if identity(folders[path]) not in below:
                yield folders[path], said

    def bare(self, name: str) -> list[Folder]:
        """Return the folders of a name that are no carnet's: those in one with a document are what that document tells of."""
        return [
            folder
            for path, folder in self.folders().items()
            if folder.name == name and path not in self._read and dirname(path) not in self._read
        ]


def identity(folder: Folder) -> str:
    """Return what tells a folder with a document from any other, whatever path leads to it."""
    return folder.open(DOCUMENT).stamp.identity or str(folder)


def _below(folder: Folder, depth: int) -> Iterator[Folder]:
    """Yield the folders below one, those of a level before those below them."""
    try:
        names = [(name, kind) for name, kind in folder.entries() if not name.startswith(".") and kind in (FOLDER, LINK)]
    except CarnetError:
        return
    inside = [folder / name for name, kind in names if kind == FOLDER or (folder / name).kind() == FOLDER]
    yield from inside
    for each in inside if depth > 1 else ():
        yield from _below(each, depth - 1)


@verb
def follow(
    out: PathLike,
    *,
    at: Mapping[str, PathLike] | None = None,
    beside: Iterable[PathLike] = (),
    read: bool = False,
    signature: Signature | None = None,
) -> Lineage:
    """Return the chain of crossings that a target came by, each link checked.

    Sources are looked for in the folders ``beside`` (none: the target's own and this process'), three levels deep; ``at`` names the
    folder of one by the name that the document has. With ``read`` the tensors of a first source are read and compared; the bytes of the
    others are what ``carnet.verify`` compares with their documents. ``signature`` checks one of a folder.
    Raises BadRequest where the target has no document; a link that does not hold is a lineage that is false.
    """
    first = folder_at(local("out", out))
    if not first.kind(DOCUMENT):
        remedy = "name a folder that carnet wrote; carnet verify CKPT OUT --seal writes one into a target of another program"
        raise BadRequest(f"there is no {DOCUMENT}, so nothing says where this came from", {"where": first}, remedy=remedy)
    around = Around(first, at or {}, beside)
    stages, todo, seen = list[Stage](), [(first, frozenset([identity(first)]))], set[str]()
    while todo:
        folder, below = todo.pop(0)
        if str(folder) in seen:
            continue
        seen.add(str(folder))
        stages.append(_stage(folder, around, below, read, signature, alone=not stages))
        for found in (folder_at(link.folder) for link in stages[-1].links if link.folder):
            todo.append((found, below | ({identity(found)} if found.kind(DOCUMENT) else set())))
    return Lineage(tuple(stages))


def sources(data: Mapping[str, object]) -> list[Source]:
    """Return what a document says of the sources that its target was made from."""
    said, merged, left = data.get("source"), data.get("merge"), data.get("dropped")
    if data.get("state") != documents.PROVEN or not isinstance(said, Mapping):
        return []
    found = [Source(str(said.get("name")), _tensors(said), not isinstance(merged, Mapping), _sha256(said))]
    if isinstance(merged, Mapping) and isinstance(merged.get("sources"), Mapping) and isinstance(merged.get("names"), list):
        names = {str(at): str(name) for at, name in enumerate(merged["names"], 1)}
        found += [Source(names.get(at, at), _tensors(side), False, _sha256(side)) for at, side in merged["sources"].items()]
    lists = left.values() if isinstance(left, Mapping) else ()
    dropped = {str(name) for names in lists if isinstance(names, list) for name in names}
    return [replace(each, tensors={**dict.fromkeys(dropped, ("", "")), **each.tensors}) for each in found]


def held(data: Mapping[str, object]) -> Tensors:
    """Return the tensors that a document says its target has."""
    return _tensors(data.get("target"))


def parent(source: Source, around: Around, below: Collection[str], *, read: bool = False) -> Link:
    """Return the link to a source: the folder whose digests are those that the document has of it; it is none of those ``below``.

    A folder without a document is one of the name that has such tensors; with ``read`` they are digested.
    """
    if not _counted(source):
        return Link(source.name, "", 0, f"its {DOCUMENT} names no tensor of its source {shown(source.name)!r}")
    named = around.at.get(source.name)
    known = [(named, _read(named)[0])] if named is not None else [*around.documents(below)]
    known.sort(key=lambda each: (each[0].name != source.name, str(each[0])))
    wrong = list[tuple[Folder, str]]()
    for folder, data in known:
        if data is None:
            continue
        problem = _odd(source, held(data))
        if not problem:
            return Link(source.name, str(folder), _counted(source))
        if named is not None or source.name in (folder.name, *_iterations(folder)):
            wrong.append((folder, problem))
    for folder in [named] if named is not None else around.bare(source.name):
        problem = "" if folder.kind(DOCUMENT) else _headers(source, folder) or (_bytes(source, folder) if read else "")
        if not problem and not folder.kind(DOCUMENT):
            return Link(source.name, str(folder), _counted(source) if read else 0)
        wrong += [(folder, problem)] if problem else []
    if wrong:
        what = f"{wrong[0][0]} is not what it was made from: {wrong[0][1]}"
        return Link(source.name, "", 0, f"{what}; {MOVED.format(shown(source.name))}")
    return Link(source.name, "", 0, f"its source {shown(source.name)!r} is not here; {MOVED.format(shown(source.name))}")


def _iterations(folder: Folder) -> list[str]:
    """Return the names of the iterations of a store, by which documents call it."""
    return [name for name, kind in folder.entries() if name.startswith("iter_") and kind == FOLDER]


def _stage(
    folder: Folder, around: Around, below: Collection[str], read: bool, signature: Signature | None, *, alone: bool
) -> Stage:
    """Return a folder with the links that lead from it; a delta that is asked for ``alone`` leads to both its versions."""
    data, problem = _read(folder)
    words, wrong = signature(str(folder)) if signature is not None else ("", "")
    if not folder.kind(DOCUMENT):
        return Stage(str(folder), _layout(folder), "", (), words, wrong)
    if data is None:
        return Stage(str(folder), "", "unreadable", (), words, wrong or problem)
    state = str(data.get("state"))
    if state == documents.APPLIED:
        links = _steps(data, around, below)
    else:
        of = _versions(folder, data) if alone and state == documents.DELTA else sources(data)
        links = [parent(each, around, below, read=read) for each in of]
    if state == documents.WRITTEN:
        problem = problem or "nobody has compared it with its source; carnet verify CKPT OUT does"
    elif not links and (alone or state != documents.DELTA):
        problem = problem or f"its {DOCUMENT} names no source"
    target = data.get("target")
    layout = str(target.get("dialect", "")) if isinstance(target, Mapping) else ""
    return Stage(str(folder), layout, state, tuple(links), words, wrong or problem)


def _read(folder: Folder) -> tuple[Mapping[str, object] | None, str]:
    """Return the document of a folder, and what is wrong with it."""
    try:
        said = documents.load(folder) if folder.kind(DOCUMENT) == FILE else None
    except CarnetError as error:
        return None, error.what
    if said is None:
        return None, ""
    return said.data, f"{said.problems[0].what}: {said.problems[0].detail}" if said.problems else ""


def _tensors(side: object) -> Tensors:
    """Return the tensors of one side of a document, none where it does not say them."""
    return {label: (str(facts.get("dtype")), str(facts.get("digest"))) for label, facts in _facts(side)}


def _sha256(side: object) -> Mapping[str, str]:
    """Return the SHA-256 of the tensors of one side of a document, where it has them."""
    return {label: str(facts["sha256"]) for label, facts in _facts(side) if "sha256" in facts}


def _facts(side: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    said = side.get("tensors") if isinstance(side, Mapping) else None
    for label, facts in said.items() if isinstance(said, Mapping) else ():
        if isinstance(facts, Mapping):
            yield str(label), facts


def _counted(source: Source) -> int:
    return sum(bool(digest) for _, digest in source.tensors.values())


def _odd(source: Source, there: Tensors) -> str:
    """Return in what a folder's tensors are not those that a document has of its source, "" where they are."""
    for label, said in source.tensors.items():
        if said[1] and there.get(label) != said:
            return f"{shown(label)} has another digest there" if label in there else f"{shown(label)} is not there"
    more = sorted(there.keys() - source.tensors.keys()) if source.whole else []
    return f"{shown(more[0])} of it went nowhere" if more else ""


def _headers(source: Source, folder: Folder) -> str:
    """Return in what the headers of a folder without a document are not those of a source."""
    try:
        there = {label_of(key): stored.dtype for key, stored in open_checkpoint(folder).tensors.items()}
    except CarnetError as error:
        return error.what
    lacks = [label for label, (dtype, digest) in source.tensors.items() if digest and there.get(label) != dtype]
    return f"{shown(lacks[0])} is not there" if lacks else ""


def _bytes(source: Source, folder: Folder) -> str:
    """Return in what the tensors of a folder without a document are not those of a source."""
    checkpoint = open_checkpoint(folder)
    files, stored = tensor_files_of(checkpoint), {label_of(key): each for key, each in checkpoint.tensors.items()}
    try:
        there = {
            label: (stored[label].dtype, digest(files, stored[label])) for label, said in source.tensors.items() if said[1]
        }
    finally:
        files.files.close()
    return _odd(source, there)


def _layout(folder: Folder) -> str:
    try:
        return open_checkpoint(folder).dialect
    except CarnetError:
        return ""


def _steps(data: Mapping[str, object], around: Around, below: Collection[str]) -> list[Link]:
    """Return the links of a folder in which deltas were applied: to each delta, and to the base."""
    said, links, first = data.get("chain"), list[Link](), None
    last: Mapping[str, chain.Held] = {}
    for step in filter(lambda each: isinstance(each, Mapping), said if isinstance(said, list) else ()):
        name = f"{step.get('base_version')} to {step.get('version')}"
        for folder, each in around.documents(()):  # a delta may lead to the folder that is followed
            link = _delta(folder, each) if all(each.get(key) == step.get(key) for key in ("base_version", "version")) else None
            leads = link is not None and each.get("result") == step.get("digest", each.get("result"))
            if link is not None and leads and (not last or last == link.before):
                first, last = first or link, link.after
                links.append(Link(name, str(folder), len(link.after)))
                break
        else:
            return [*links, Link(name, "", 0, f"the delta {shown(name)} is not here; --beside says where deltas lie")]
    if first is None:
        return [Link("", "", 0, "its document names no step")]
    if {label: (each.dtype, each.digest) for label, each in last.items()} != held(data):
        return [*links, Link("", "", 0, "it is not what its last delta leads to")]
    before = {label: (each.dtype, each.digest) for label, each in first.before.items()}
    return [*links, parent(Source("base", before), around, below)]


def _versions(folder: Folder, data: Mapping[str, object]) -> list[Source]:
    """Return the two versions of a delta: the one that it is of, and the one that it leads to."""
    link = _delta(folder, data)
    if link is None:
        return []
    of = {"base_version": link.before, "version": link.after}
    return [
        Source(str(data[key]), {label: (each.dtype, each.digest) for label, each in held.items()}) for key, held in of.items()
    ]


def _delta(folder: Folder, data: Mapping[str, object]) -> chain.Link | None:
    """Return what a delta says of the versions that it leads from and to, None where it is none, or was altered."""
    tensors = data.get("tensors")
    if data.get("state") != documents.DELTA or not isinstance(tensors, Mapping):
        return None
    changed = {name for name, each in tensors.items() if isinstance(each, Mapping) and "base" in each}
    try:
        return chain.load(folder, str(data["version"]), str(data["base_version"]), changed)
    except CarnetError:
        return None
