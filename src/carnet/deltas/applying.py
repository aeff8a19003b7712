"""Applying deltas: the next version of a Hugging Face folder, from it and from one delta or several that follow each other.

Every frame is decoded while its tensor goes by: after each step the tensor must have the checksum that the shard says, and where the
delta has digests, those before and after. Files keep their names, headers and what lies beside the weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from carnet.deltas import chain
from carnet.deltas.means import Means, begun, choose, largest_first, work
from carnet.deltas.sides import Side, stored_side
from carnet.deltas.stepping import Stepping, Steps, check_base, close, steps_of
from carnet.dialects.kinds import KINDS, SHARDS
from carnet.errors import BadRequest
from carnet.examiner import document as documents
from carnet.examiner.frames import frames, gaps
from carnet.executor.files import contained
from carnet.executor.flusher import flushing
from carnet.executor.staging import put_asset
from carnet.formats.companions import companions
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.formats.files import check_unchanged, digest_of, read_whole
from carnet.formats.folder import BESIDE, CONFIG, INDEX
from carnet.formats.side_files import DOCUMENT
from carnet.formats.stored import Checkpoint, Stored
from carnet.plans.options import PathLike, local
from carnet.plans.request import MEMORY, memory_of, threads_of
from carnet.pool import Tell
from carnet.progress import Callback, Told, verb
from carnet.storage.protocol import Crossing, Draft, Opened, names_in, read_at
from carnet.storage.schemes import folder_at


@dataclass(frozen=True, slots=True)
class Applied:
    """What was applied to what."""

    target: str  # path or URL
    version: str
    base_version: str
    tensors: int  # of the model
    changed: int  # of them, in all steps
    nbytes: int  # of the model
    proven: bool  # every tensor has the digest that the deltas say
    checked: bool  # at least each that changed has its checksum; else frames alone have one, which no base does


@verb
def apply(
    base: PathLike,
    deltas: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
) -> Applied:
    """Write into a new folder what a Hugging Face folder becomes by a delta, or by several in their order.

    Raises BadRequest where ``base`` is not what the first is of, or one is missing or in another's place; BadCheckpoint where a delta
    is damaged. Nothing is there then.
    """
    space, wanted, said = memory_of({"memory": memory}), threads_of({"threads": threads}), local("out", out, out=True)
    told = Told(progress, "preparing")
    checkpoint = open_checkpoint(folder_at(local("base", base)))
    if KINDS[checkpoint.dialect].files != SHARDS:
        facts = {"where": checkpoint.root, "found": checkpoint.dialect}
        raise BadRequest("a delta applies to a Hugging Face folder", facts, remedy="carnet cross CKPT OUT --to hf")
    steps, side = steps_of(deltas), stored_side(checkpoint)
    check_base(side, steps)
    means = choose(space, (side,), steps.memory, wanted)
    beside = companions(checkpoint.root, checkpoint.config, frozenset(stamp.file for stamp in checkpoint.stamps), None)
    there = names_in(checkpoint.root)
    copied = {name: read_whole(checkpoint.root, name)[0] for name in (INDEX, BESIDE, CONFIG) if name in there}
    if INDEX in copied:
        copied[INDEX] = chain.at_version(copied[INDEX], steps.deltas[-1].version)
    names = [*_files(checkpoint), *copied, *beside.names, DOCUMENT]
    asked = [fingerprint(checkpoint), [(each.version, each.stamps) for each in steps.deltas]]
    crossing = Crossing(digest_of(repr(asked).encode()), beside=tuple(each.where for each in steps.deltas))
    with folder_at(said).owned([contained(name) for name in names], crossing, checkpoint.root) as draft:
        if not draft.whole:
            with begun(draft):
                for asset in beside.assets:
                    put_asset(asset, draft)
                digests = _write(checkpoint, side, steps, draft, means, told)
                for name, data in copied.items():
                    draft.put(name, [data])
                files = {name: digest_of(data) for name, data in copied.items()}
                files |= {asset.name: asset.digest for asset in beside.assets}
                draft.put(DOCUMENT, [documents.text(_document(checkpoint, steps, digests, files)).encode()])
                for name in (*names, ""):
                    draft.flush(name)
                for root, stamps in ((checkpoint.root, checkpoint.stamps), *((d.where, d.stamps) for d in steps.deltas)):
                    check_unchanged(root, stamps)
        draft.publish()
    last, first = steps.deltas[-1], steps.deltas[0]
    changed = len({name for each in steps.deltas for name in each.frames})
    return Applied(said, last.version, first.base_version, len(side.tensors), changed, side.nbytes, steps.proven, steps.checked)


def _write(checkpoint: Checkpoint, side: Side, steps: Steps, draft: Draft, means: Means, told: Told) -> Mapping[str, str]:
    """Write the files of tensors; return the digest of each tensor."""
    told.phase("writing")
    files, root = _files(checkpoint), checkpoint.root
    sizes = {name: root.open(name).stamp.nbytes for name in files}
    draft.reserve([*sizes.items()])
    for name, stored in files.items():
        source = root.open(name)
        around = gaps([(each.chunks[0].offset, each.chunks[0].offset + each.nbytes) for each in stored], sizes[name])
        draft.create(name, sizes[name], [(low, read_at(source, low, high - low)) for low, high in around])
    in_files = [each.name for stored in files.values() for each in stored]
    names = in_files if draft.in_order else largest_first((name, side.tensors[name].nbytes) for name in in_files)
    placed = {each.name: (name, each.chunks[0].offset) for name, stored in files.items() for each in stored}

    @contextmanager
    def hire(tell: Tell) -> Iterator[Callable[[int], str]]:
        targets, spare = Opened(draft.open), np.empty(means.window, np.uint8)
        with side.opened(means.window, tell) as reader:

            def serve(number: int) -> str:
                tensor = side.tensors[names[number]]
                (file, offset), stepping = placed[tensor.name], Stepping(steps, tensor)
                target = targets(file)
                for low, high in tensor.pieces(means.window):
                    piece = reader.read(tensor.name, low, high)
                    stepping.next(piece, spare)
                    target.write(offset + low, piece.data)
                    tell(high - low)
                return stepping.end()

            yield serve
        targets.close()

    try:
        with flushing(draft) as dirty:
            found = work(len(names), side.nbytes, means, hire, told.amount, lambda number: dirty({placed[names[number]][0]}))
    finally:
        close(steps)
    for name in files:
        draft.complete(name)
    told.phase("flushing")
    return dict(zip(names, found, strict=True))


def _files(checkpoint: Checkpoint) -> dict[str, list[Stored]]:
    """Return the files of a folder with their tensors, as they lie."""
    found = dict[str, list[Stored]]()
    for stored in checkpoint.tensors.values():
        found.setdefault(stored.chunks[0].file, []).append(stored)
    return {name: sorted(each, key=lambda stored: stored.chunks[0].offset) for name, each in sorted(found.items())}


def _document(checkpoint: Checkpoint, steps: Steps, digests: Mapping[str, str], files: Mapping[str, str]) -> dict[str, object]:
    """Return what the folder says of itself: what it holds, and by which steps."""
    held = {stored.name: stored for stored in checkpoint.tensors.values()}
    target = {
        "dialect": checkpoint.dialect,
        "format": checkpoint.format,
        "tensors": {name: documents.facts(stored, digests[name]) for name, stored in held.items()},
        "files": dict(sorted(files.items())),
        "frames": frames(checkpoint),  # headers are those of the base
    }
    return chain.applied_data([*chain.steps_to(checkpoint.root), *steps.told], target)
