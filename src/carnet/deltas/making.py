"""Making a delta: both versions are read once, side by side; what differs is compressed tensor by tensor.

::

    A ─ window ─┐
                xor ── zstd ──> spill ──> shards, the index, carnet.json
    B ─ window ─┘  └─ digests, checksum

How large frames are is known when all are made, so they wait in a file without a name; shards are cut then, the same ones whoever
many worked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Unpack

import numpy as np
from xxhash import xxh3_128

from carnet.deltas import artifact, chain, packing
from carnet.deltas.artifact import ADLER, CHECKSUMS, COMPRESSED, SCOPES, WHOLE
from carnet.deltas.chain import FIRST, Held, following
from carnet.deltas.means import Means, begun, choose, largest_first, work
from carnet.deltas.sides import Differing, Reading, Saying, Side, check_pair, sides_of
from carnet.errors import BadOption, BadRequest, shown
from carnet.examiner import document as documents
from carnet.formats.files import digest_of
from carnet.formats.folder import INDEX
from carnet.formats.safetensors import layout_file, render_header
from carnet.formats.side_files import DOCUMENT
from carnet.plans.options import PathLike, local
from carnet.plans.request import MEMORY, memory_of, only, threads_of
from carnet.pool import Tell
from carnet.progress import Callback, Told, verb
from carnet.steps import TargetFile
from carnet.storage.protocol import Crossing, Draft
from carnet.storage.schemes import folder_at
from carnet.storage.spill import Spill

SHARD = 2 << 30  # bytes of a shard, where there are not too many: ModelExpress reads each whole
SHARDS = 16
COPIED = 1 << 20  # bytes that go from the spill into a shard together


@dataclass(frozen=True, slots=True)
class Made:
    """A delta that was made."""

    target: str  # path or URL
    version: str
    base_version: str
    tensors: int  # of the model
    changed: int  # of them
    elements: int  # that changed
    whole: int  # elements of the model
    nbytes: int  # of the model
    packed: int  # bytes of the frames


@dataclass(frozen=True, slots=True)
class Wish:
    """What a delta is to say of itself."""

    version: str
    base_version: str
    checksum: str
    scope: str
    before: chain.Link | None  # of the delta that leads to its base


@dataclass(frozen=True, slots=True)
class Difference:
    """What was found out about a tensor."""

    digests: tuple[str, str]  # before and after
    frame: int | None  # bytes, None where nothing differs
    checksum: str
    elements: int  # that differ


@verb
def delta(
    a: PathLike,
    b: PathLike,
    out: PathLike,
    *,
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
    **options: Unpack[Differing],
) -> Made:
    """Write what changed from version ``a`` of a model to version ``b`` into a new folder.

    Both are checkpoints or targets that carnet reads. A Hugging Face folder counts as it is, any other layout (and, where ``dtype`` is
    given, every one) as a crossing into one would write it; ``options`` are those of that crossing, and what the index says.
    The versions are what ``a`` is known to be, or 000000, and the next. ``after`` is the delta that leads to ``a``: that it does is
    compared. Raises BadRequest where the two are not of one model.
    """
    packing.zstd()
    only(Differing.__optional_keys__, options)
    reading: Reading = {name: value for name, value in options.items() if name in Reading.__optional_keys__}  # type: ignore[assignment]
    saying: Saying = {name: value for name, value in options.items() if name not in reading}  # type: ignore[assignment]
    check(saying)
    return between(
        *sides_of(a, b, reading),
        out,
        *(memory_of({"memory": memory}), threads_of({"threads": threads})),
        progress=progress,
        **saying,
    )


def check(saying: Saying) -> None:
    """Raise BadOption where an option says what no index can."""
    for name, known in (("checksum", CHECKSUMS), ("scope", SCOPES)):
        if (value := saying.get(name, next(iter(known)))) not in known:
            raise BadOption(f"{name} cannot be {shown(repr(value))}", {"known": ", ".join(filter(None, known))})
    for name in ("version", "base_version"):
        if saying.get(name) == "":
            raise BadOption(f"{name} cannot be ''", remedy="name one, or leave the option out")


def between(
    before: Side,
    new: Side,
    out: PathLike,
    memory: int,
    wanted: int | None,
    *,
    progress: Callback | None = None,
    **saying: Unpack[Saying],
) -> Made:
    """Write what differs between two sides, in so many bytes and (where it is said) threads."""
    told = Told(progress, "preparing")
    check_pair(before, new)
    said, after = local("out", out, out=True), saying.get("after")
    last = None if after is None else artifact.read(folder_at(local("after", after)))
    base = saying.get("base_version") or (last and last.version) or _known(before) or FIRST
    made = saying.get("version") or following(base)
    if made is None:
        raise BadRequest("nothing says the version after this one", {"base version": shown(base)}, remedy="name it: --version")
    if made == base:
        raise BadRequest("a version does not follow itself", {"version": shown(made)}, remedy="name another --version")
    if last is not None:
        if last.link is None:
            facts = {"where": last.where}
            remedy = f"leave out --after, and say --base-version {shown(last.version)}"
            raise BadRequest("the delta before has no digests, so nothing tells whether it leads here", facts, remedy=remedy)
        chain.check_follows((last.where, last.version, last.link), (before, base, None))
    wish = Wish(made, base, saying.get("checksum", ADLER), saying.get("scope", WHOLE), None if last is None else last.link)
    means = choose(memory, (before, new), lambda window: window // 2 + packing.CODER, wanted)
    asked = [
        made,
        base,
        wish.checksum,
        wish.scope,
        before.state,
        new.state,
        sorted((n, t.dtype) for n, t in new.tensors.items()),
    ]
    folders = before.folder, new.folder, None if last is None else last.where
    beside = tuple(each for each in folders if each is not None)
    with folder_at(said).owned(_names(), Crossing(digest_of(repr(asked).encode()), beside=beside), None) as draft:
        if not draft.whole:
            with begun(draft):
                _write(wish, before, new, draft, means, told)
                for side in (before, new):
                    side.check_unchanged()
        draft.publish()
    return _made(said)


def _known(side: Side) -> str | None:
    return None if side.folder is None else chain.version_of(side.folder)


def _write(wish: Wish, before: Side, new: Side, draft: Draft, means: Means, told: Told) -> None:
    """Write everything that is in the folder of a delta."""
    tensors = dict(sorted(new.tensors.items()))  # one order, whatever the layouts
    sizes = [(name, tensor.nbytes) for name, tensor in tensors.items()]
    place = dict(zip(tensors, accumulate((packing.bound(nbytes) for _, nbytes in sizes), initial=0), strict=False))
    spill = Spill(draft.where if isinstance(draft.where, str) else None)
    try:
        told.phase("comparing")
        found = _differences(wish, before, new, means, (spill, place), told)
        held = [
            {name: Held(each.dtype, each.shape, found[name].digests[at]) for name, each in tensors.items()} for at in (0, 1)
        ]
        if wish.before is not None and wish.before.after != held[0]:
            said = wish.before.after
            name = min(name for name in said.keys() | held[0].keys() if said.get(name) != held[0].get(name))
            facts = {"where": before, "tensor": shown(name)}
            raise BadRequest("the old version is not what the delta before leads to", facts, remedy="name the one that does")
        told.phase("writing")
        frames = {name: found[name].frame or 0 for name in tensors if found[name].frame is not None}
        sums = {name: found[name].checksum for name in frames}
        shards = [
            layout_file(file, [(name, "u8", (frames[name],)) for name in names], {name: sums[name] for name in names})
            for file, names in _shards(frames)
        ]
        _copy(shards, spill, place, draft, means)
    finally:
        spill.close()
    counts = {
        "changed": len(frames),
        "elements": sum(each.elements for each in found.values()),
        "whole": sum(prod(tensor.shape) for tensor in new.tensors.values()),
        "bytes": sum(nbytes for _, nbytes in sizes),
        "packed": sum(frames.values()),
    }
    weights = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    draft.put(INDEX, [artifact.index(wish.version, wish.base_version, wish.checksum, wish.scope, weights).encode()])
    link = chain.link_data((wish.base_version, wish.version), held[0], held[1], counts)
    draft.put(DOCUMENT, [documents.text(link).encode()])
    told.phase("flushing")
    for file in (INDEX, DOCUMENT, ""):
        draft.flush(file)


def _copy(shards: Sequence[TargetFile], spill: Spill, place: Mapping[str, int], draft: Draft, means: Means) -> None:
    """Write the shards: of a store one after the other, for an upload takes memory."""
    draft.reserve([(shard.name, shard.nbytes) for shard in shards])

    @contextmanager
    def hire(tell: Tell) -> Iterator[Callable[[int], None]]:
        def serve(number: int) -> None:
            shard = shards[number]
            draft.create(shard.name, shard.nbytes, [(0, render_header(shard))])
            target = draft.open(shard.name)
            for tensor in shard.tensors:
                for at in range(0, tensor.shape[0], COPIED):
                    data = spill.read(place[tensor.name] + at, min(COPIED, tensor.shape[0] - at))
                    target.write(tensor.offset + at, memoryview(data))
                    tell(0)
            draft.complete(shard.name)
            draft.flush(shard.name)

        yield serve

    work(len(shards), 0, Means(COPIED, 1 if draft.in_order else means.workers, threads=True), hire, None)


def _differences(
    wish: Wish, before: Side, new: Side, means: Means, spilled: tuple[Spill, Mapping[str, int]], told: Told
) -> dict[str, Difference]:
    """Compare all tensors, and have their frames in the spill; compare, too, what copies a source has of one tensor."""
    spill, place = spilled
    names = largest_first((name, tensor.nbytes) for name, tensor in new.tensors.items())
    checks = [(at, number) for at, side in enumerate((before, new)) for number in range(side.checks)]

    @contextmanager
    def hire(tell: Tell) -> Iterator[Callable[[int], Difference | None]]:
        with before.opened(means.window, tell) as old, new.opened(means.window, tell) as young:
            compressor, unequal = packing.zstd().ZstdCompressor(level=packing.LEVEL), np.empty(means.window, np.bool_)

            def serve(number: int) -> Difference | None:
                if number >= len(names):
                    at, copy = checks[number - len(names)]
                    (old, young)[at].check(copy)
                    return None
                tensor = new.tensors[names[number]]
                checksum, digests, elements = CHECKSUMS[wish.checksum](), (xxh3_128(), xxh3_128()), 0

                def put(at: int, data: bytes) -> None:
                    if wish.scope == COMPRESSED:
                        checksum.update(memoryview(data))
                    spill.write(place[tensor.name] + at, data)

                packer = packing.Packer(compressor, tensor.nbytes, put)
                for low, high in tensor.pieces(means.window):
                    theirs, ours = old.read(tensor.name, low, high), young.read(tensor.name, low, high)
                    for digest, piece in zip(digests, (theirs, ours), strict=True):
                        digest.update(piece.data)
                    if wish.scope == WHOLE:
                        checksum.update(ours.data)
                    np.bitwise_xor(theirs, ours, out=theirs)
                    items = theirs.view(tensor.bits)
                    differ = int(np.count_nonzero(np.not_equal(items, 0, out=unequal[: items.size])))
                    packer.add(theirs, differs=differ > 0)
                    elements += differ
                    tell(high - low)
                frame = packer.close()
                said = digests[0].hexdigest(), digests[1].hexdigest()
                return Difference(said, frame, checksum.hexdigest(), elements)

            yield serve

    found = work(len(names) + len(checks), new.nbytes, means, hire, told.amount)
    return {name: each for name, each in zip(names, found, strict=False) if each is not None}


def _shards(frames: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    """Cut frames (bytes), in their order, into shards; return the file and the tensors of each."""
    limit = max(SHARD, -(-sum(frames.values()) // SHARDS))
    groups, begun = dict[int, list[str]](), 0
    for name, nbytes in frames.items():
        groups.setdefault(begun // limit, []).append(name)
        begun += nbytes
    return [(_name(at, len(groups)), names) for at, names in enumerate(groups.values())]


def _name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def _names() -> list[str]:
    """Return the names that files of a delta may have."""
    shards = [_name(number, of) for of in range(1, SHARDS + 2) for number in range(of)]
    return [INDEX, DOCUMENT, *shards]


def _made(target: str) -> Made:
    """Return what the document of a delta says of it."""
    said = documents.load(folder_at(target))
    assert said is not None, "it was written a moment ago"
    data: Mapping[str, Any] = said.data
    counts = data["counts"]
    found = (counts[name] for name in ("changed", "elements", "whole", "bytes", "packed"))
    return Made(target, data["version"], data["base_version"], len(data["tensors"]), *found)
