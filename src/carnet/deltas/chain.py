"""The digests of a chain of versions: of each tensor before and after a step, and one over all, which must be where the next begins.

::

    base ──digest──> delta 1 ──digest──> delta 2 ──digest──> ...

``carnet.json`` of a delta is a *link*; that of the folder in which deltas were applied says what it holds and how that came.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.errors import MADE_AGAIN, BadCheckpoint, BadRequest, shown
from carnet.examiner import document as documents
from carnet.examiner.document import APPLIED, DELTA, VERSION
from carnet.formats.files import TABLE_LIMIT, digest_of, read_whole
from carnet.formats.folder import INDEX
from carnet.formats.jsons import parse_object
from carnet.formats.side_files import DOCUMENT
from carnet.storage.protocol import Folder, Stamp, names_in

FIRST = "000000"  # the version of what no delta was applied to; slime's engines begin there
WIDTH = 6  # digits of a version


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as a version has it."""

    dtype: str
    shape: tuple[int, ...]
    digest: str  # xxh3-128 of its bytes


@dataclass(frozen=True, slots=True)
class Link:
    """What a delta says of the versions that it leads from and to."""

    before: Mapping[str, Held]
    after: Mapping[str, Held]
    stamp: Stamp


def digest(tensors: Mapping[str, Held]) -> str:
    """Return one digest over all tensors of a version, in whatever files they lie."""
    lines = [f"{name}\0{held.dtype}\0{list(held.shape)}\0{held.digest}\n" for name, held in sorted(tensors.items())]
    return digest_of("".join(lines).encode())


def following(version: str) -> str | None:
    """Return the version after one, None where that is not to be known.

    >>> following("000009"), following("step-3")
    ('000010', None)
    """
    return f"{int(version) + 1:0{WIDTH}d}" if len(version) >= WIDTH and version.isascii() and version.isdigit() else None


def link_data(
    versions: tuple[str, str], before: Mapping[str, Held], after: Mapping[str, Held], counts: Mapping[str, int]
) -> dict[str, object]:
    """Return the document of a delta from one version to another."""
    tensors = {
        name: {"dtype": held.dtype, "shape": list(held.shape), "digest": held.digest}
        | ({} if before[name] == held else {"base": before[name].digest})
        for name, held in after.items()
    }
    return documents.sealed(
        {
            "carnet": VERSION,
            "state": DELTA,
            "version": versions[1],
            "base_version": versions[0],
            "base": digest(before),
            "result": digest(after),
            "tensors": tensors,
            "counts": dict(counts),
            "digest": "xxh3-128",
            "versions": documents.versions(),
        }
    )


def applied_data(steps: Sequence[Mapping[str, str]], target: Mapping[str, object]) -> dict[str, object]:
    """Return the document of a folder in which deltas were applied; ``target`` is as other documents have it."""
    return documents.sealed(
        {
            "carnet": VERSION,
            "state": APPLIED,
            "chain": list(steps),
            "target": target,
            "digest": "xxh3-128",
            "versions": documents.versions(),
        }
    )


def load(where: Folder, version: str, base_version: str, changed: Collection[str]) -> Link | None:
    """Return what a delta says of digests, None where it says nothing; raise BadCheckpoint where it contradicts its index."""
    said = documents.load(where)
    if said is None:
        return None
    data = said.data
    facts: dict[str, object] = {"where": where / DOCUMENT}
    if said.problems or data.get("state") != DELTA:
        raise BadCheckpoint("the carnet of a delta was altered", facts, remedy=MADE_AGAIN)
    tensors = data["tensors"]
    if not isinstance(tensors, Mapping) or not all(_describes(each) for each in tensors.values()):
        raise BadCheckpoint("the carnet of a delta does not describe tensors", facts, remedy=MADE_AGAIN)
    after = {name: Held(each["dtype"], tuple(each["shape"]), each["digest"]) for name, each in tensors.items()}
    before = {name: replace(held, digest=tensors[name].get("base", held.digest)) for name, held in after.items()}
    theirs, ours = (data["base_version"], data["version"]), (base_version, version)
    if theirs != ours:
        found = {"index": " to ".join(ours), "carnet.json": " to ".join(map(str, theirs))}
        raise BadCheckpoint("a delta and its carnet are of other versions", facts | found, remedy=MADE_AGAIN)
    odd = sorted({name for name, each in tensors.items() if "base" in each} ^ {*changed})
    if odd:
        which = "in no shard" if odd[0] in tensors else "not in the carnet"
        what = f"a delta and its carnet disagree on {shown(odd[0])!r}"
        raise BadCheckpoint(what, facts | {"found": which, "in all": len(odd)}, remedy=MADE_AGAIN)
    if (data["base"], data["result"]) != (digest(before), digest(after)):
        raise BadCheckpoint("the carnet of a delta was altered", facts, remedy=MADE_AGAIN)
    return Link(before, after, said.stamp)


def _describes(said: object) -> bool:
    """Say whether a value is what a link says of a tensor."""
    if not isinstance(said, Mapping) or said.keys() - {"base"} != {"dtype", "shape", "digest"}:
        return False
    texts, shape = (said["dtype"], said["digest"], said.get("base", "")), said["shape"]
    return all(isinstance(each, str) for each in texts) and isinstance(shape, list) and all(type(n) is int for n in shape)


def steps_to(where: Folder) -> list[Mapping[str, str]]:
    """Return the steps by which a folder came about in which deltas were applied, none where nothing says it."""
    try:
        said = documents.load(where)
    except BadCheckpoint:  # of another version of carnet's; what it says is of no matter here
        return []
    steps = None if said is None or said.data.get("state") != APPLIED or said.problems else said.data.get("chain")
    return [each for each in steps if isinstance(each, Mapping)] if isinstance(steps, list) else []


def version_of(where: Folder) -> str | None:
    """Return the version of a folder: of the last delta that was applied there, or as its index says; None where nothing says it."""
    steps = steps_to(where)
    said: Mapping[str, object] = steps[-1] if steps else {}
    if not steps and INDEX in names_in(where):  # of a whole version: slime's and ModelExpress' index
        metadata = parse_object(read_whole(where, INDEX, TABLE_LIMIT)[0], INDEX, where).get("metadata")
        said = metadata if isinstance(metadata, dict) else {}
    version = said.get("version")
    return version if isinstance(version, str) else None


def at_version(index: bytes, version: str) -> bytes:
    """Return an index that says another version, where it says one."""
    said = json.loads(index)
    metadata = said.get("metadata")
    if not isinstance(metadata, dict) or "version" not in metadata:
        return index
    metadata["version"] = version
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def check_follows(first: tuple[object, str, Link | None], second: tuple[object, str, Link | None]) -> None:
    """Raise BadRequest where a delta (where, base version, link) is not the next step after another (where, version, link)."""
    (here, version, ours), (there, base, theirs) = first, second
    facts = {"delta": there, "applies to": base, "found": f"{version} ({here})"}
    remedy = "give the deltas in their order, none left out"
    if version != base:
        raise BadRequest("a delta is missing, or in another's place", facts, remedy=remedy)
    if ours is not None and theirs is not None and ours.after != theirs.before:
        name = min(n for n in ours.after.keys() | theirs.before.keys() if ours.after.get(n) != theirs.before.get(n))
        facts |= {"tensor": shown(name), "in all": sum(ours.after.get(n) != held for n, held in theirs.before.items()) or 1}
        raise BadRequest(f"version {shown(version)} of one delta is not that of the next", facts, remedy=remedy)
