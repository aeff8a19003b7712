"""A *side* is a model's tensors as a Hugging Face folder holds them, whatever lies on the disk: their names, types, shapes, and bytes.

Those of a Hugging Face folder are read as they are. Any other layout is planned into one, as a crossing would be, and a range of a
tensor's bytes is assembled when it is asked for, by the executor, from the steps that touch it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from secrets import token_hex
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from carnet import api
from carnet.dialects.kinds import KINDS, SHARDS
from carnet.dtypes import BY_NAME
from carnet.errors import BadOption, BadRequest, CarnetError, NotSupported, shown
from carnet.examiner.asked import asked_of
from carnet.examiner.examine import fields_apart
from carnet.examining import families, understood
from carnet.executor.adapting import assemble
from carnet.executor.cutting import cuts
from carnet.executor.files import sources
from carnet.executor.geometry import linear
from carnet.executor.groups import writers_of
from carnet.executor.jobs import Check, Part
from carnet.executor.memory import block_size
from carnet.executor.owning import known
from carnet.executor.quantizing import numbers
from carnet.executor.reading import reader, writing
from carnet.executor.work import work
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.formats.files import check_unchanged
from carnet.formats.stored import Checkpoint
from carnet.inventory.survey import Inventory
from carnet.plans.columns import Plan
from carnet.plans.options import PathLike, local
from carnet.plans.request import Request
from carnet.pool import Tell
from carnet.steps import Make, Measure, Put, Same
from carnet.storage.protocol import Folder
from carnet.storage.schemes import folder_at

Bytes = NDArray[np.uint8]
# keys of a config that say nothing of what the weights mean, or what the tensors' own types say
BESIDE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")


class Reading(TypedDict, total=False):
    """How a side is to be understood that is no Hugging Face folder: the words of a crossing."""

    dtype: str | None
    config: PathLike | None
    family: str | None
    vocab_size: int | None
    tokenizer: PathLike | None
    drop: str | tuple[str, ...]
    written_by: str | None
    tower: PathLike | None
    accept: str | tuple[str, ...]


class Saying(TypedDict, total=False):
    """What the index of a delta says."""

    version: str | None
    base_version: str | None
    after: PathLike | None  # the delta that leads to the old version
    checksum: str
    scope: str


class Differing(Reading, Saying, total=False):
    """The options of ``carnet delta`` that say which delta."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a side."""

    name: str
    dtype: str  # carnet's name
    shape: tuple[int, ...]

    @property
    def item(self) -> int:
        """Return the bytes of an element."""
        return BY_NAME[self.dtype].nbytes

    @property
    def nbytes(self) -> int:
        """Return the bytes of all."""
        return prod(self.shape) * self.item

    @property
    def bits(self) -> str:
        """Return what numpy compares elements as."""
        return f"u{self.item}" if self.item in (1, 2, 4, 8) else "u1"

    def pieces(self, window: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of its bytes, in their order, none longer than a window."""
        return cuts(self.shape, self.item, window) if self.nbytes else iter(())


@dataclass(frozen=True, slots=True)
class Reader:
    """What a worker reads a side with."""

    read: Callable[[str, int, int], Bytes]  # the bytes from one to another of a tensor, good until the next call
    check: Callable[[int], None]  # a copy of its source against the other, by number


@dataclass(frozen=True, slots=True)
class Side:
    """A model's tensors, and how their bytes are read."""

    checkpoint: Checkpoint | None  # None where they are in the memory of this process
    config: Mapping[str, object]  # as a Hugging Face folder has it
    tensors: Mapping[str, Tensor]
    opened: Callable[[int, Tell], AbstractContextManager[Reader]]  # takes the bytes of a window: no read is longer
    understood: Callable[[], Inventory] | None = None  # what carnet knows of it
    checks: int = 0  # how many pairs of copies must be equal
    steps: int = 0  # of its plan

    def __str__(self) -> str:
        return "the memory of this process" if self.checkpoint is None else str(self.checkpoint.root)

    @property
    def folder(self) -> Folder | None:
        """Return where its files are."""
        return None if self.checkpoint is None else self.checkpoint.root

    @property
    def state(self) -> str:
        """Return what tells one state of it from another."""
        return token_hex(8) if self.checkpoint is None else fingerprint(self.checkpoint)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def memory(self, window: int) -> int:
        """Return the bytes that a reader takes."""
        return window + (2 * block_size(window) if self.steps else 0)

    def check_unchanged(self) -> None:
        """Raise BadCheckpoint where a file of it was written since it was opened."""
        if self.checkpoint is not None:
            check_unchanged(self.checkpoint.root, self.checkpoint.stamps)


def sides_of(before: PathLike, after: PathLike, options: Reading) -> tuple[Side, Side]:
    """Return the sides that two checkpoints or targets are; raise BadRequest where one can be none.

    Where one is a Hugging Face folder and the other is not, the other is of the same family, unless a person says which.
    """
    folders = [local(name, path) for name, path in (("a", before), ("b", after))]
    found = [open_checkpoint(folder_at(each)) for each in folders]
    stored = [_is_stored(each, options) for each in found]
    idle = [name for name, value in options.items() if value not in (None, ()) and all(stored)]
    if idle:
        raise BadOption(f"{idle[0]} changes nothing: Hugging Face folders count as they are", remedy="leave it out")
    asked: list[Reading] = [
        {**options, "family": each} for each in families(found, Request("hf", family=options.get("family")))
    ]
    one, other = (
        stored_side(each) if whole else planned_side(api.plan(folder, to="hf", **said))
        for each, whole, folder, said in zip(found, stored, folders, asked, strict=True)
    )
    return one, other


def side_of(path: PathLike, options: Reading) -> Side:
    """Return the side that a checkpoint or a target alone is."""
    folder = local("base", path)
    checkpoint = open_checkpoint(folder_at(folder))
    return stored_side(checkpoint) if _is_stored(checkpoint, options) else planned_side(api.plan(folder, to="hf", **options))


def _is_stored(checkpoint: Checkpoint, options: Reading) -> bool:
    return KINDS[checkpoint.dialect].files == SHARDS and options.get("dtype") is None


def stored_side(checkpoint: Checkpoint) -> Side:
    """Return a Hugging Face folder as it is."""
    held = {stored.name: stored for stored in checkpoint.tensors.values()}

    @contextmanager
    def opened(window: int, tell: Tell) -> Iterator[Reader]:  # noqa: ARG001  who reads tells
        files, buffer = sources(checkpoint.root), np.empty(window, np.uint8)

        def read(name: str, low: int, high: int) -> Bytes:
            chunk, into = held[name].chunks[0], buffer[: high - low]
            files(chunk.file).read_into(chunk.offset + low, into.data)
            return into

        try:
            yield Reader(read, lambda number: None)
        finally:
            files.close()

    tensors = {name: Tensor(name, stored.dtype, stored.shape) for name, stored in held.items()}
    return Side(checkpoint, checkpoint.config, tensors, opened, lambda: understood(checkpoint.root, Request("hf")))


def planned_side(plan: Plan) -> Side:
    """Return what a crossing into a Hugging Face folder would write."""
    if any(isinstance(form, Measure) or (isinstance(form, Make) and form.function == "quantize") for form in plan.steps.forms):
        raise NotSupported(
            "a delta of what a crossing quantizes is not made", remedy="cross both sides, then take those folders"
        )
    source = known(plan, "").source
    placed = {(file.name, each.offset): each for file in plan.files for each in file.tensors}
    tensors = {each.name: Tensor(each.name, each.dtype, each.shape) for each in placed.values()}
    writers, puts = writers_of(plan), {(step.target.file, step.target.offset): numbers(step) for step in plan.steps.only(Put)}
    where = {each.name: (file, each) for (file, _), each in placed.items()}
    same = [*plan.steps.only(Same)]

    @contextmanager
    def opened(window: int, tell: Tell) -> Iterator[Reader]:
        worker = reader(plan, source.root, window, lambda nbytes: tell(0))

        def read(name: str, low: int, high: int) -> Bytes:
            file, tensor = where[name]
            into = worker.window[: high - low]
            if (known := puts.get((file, tensor.offset))) is not None:
                into[:] = np.frombuffer(known, np.uint8)[low:high]
                return into
            tile = linear(tensor.offset, BY_NAME[tensor.dtype].nbytes, low, high)
            assemble(worker, (Part(file, tile, writing(plan, writers[file, tensor.offset], low, high)),))
            return into

        def check(number: int) -> None:
            work(worker, Check(same[number], 0))

        try:
            yield Reader(read, check)
        finally:
            worker.sources.close()

    config = json.loads(next(text.text for text in plan.texts if text.name == "config.json"))
    said = asked_of(plan.request).request
    return Side(source, config, tensors, opened, lambda: understood(source.root, said), len(same), len(plan.steps))


def check_pair(before: Side, after: Side) -> None:
    """Raise BadRequest where two sides are not of one model."""
    ours, theirs = before.tensors, after.tensors
    facts: dict[str, object] = {"one": before, "other": after}
    remedy = "bring both to one form first: carnet cross CKPT OUT --to hf"
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        for label, held in (("in one", ours.get(odd[0])), ("in other", theirs.get(odd[0]))):
            facts[label] = "missing" if held is None else f"{held.dtype} {list(held.shape)}"
        facts |= {"in all": f"{len(odd)} of {len(ours.keys() | theirs.keys())} tensors"}
        raise BadRequest(f"two versions of one model have the same tensors, and {shown(odd[0])} is not", facts, remedy=remedy)
    for key, one, other in _apart(before, after):
        facts |= {f"one's {shown(key)}": shown(str(one)), f"other's {shown(key)}": shown(str(other))}
        what = f"the configs say otherwise of {shown(key)}, and a delta carries tensors alone"
        raise BadRequest(what, facts, remedy="publish the new version whole")


def _apart(before: Side, after: Side) -> Iterator[tuple[str, object, object]]:
    """Yield what two configs say otherwise: of the model, where carnet knows both, for one thing can be said in several ways."""
    if before.understood is None or after.understood is None:  # tensors alone have no config
        return
    keys = sorted((before.config.keys() | after.config.keys()) - {*BESIDE})  # one that is not there says what null does
    said = [(key, one, other) for key in keys if (one := before.config.get(key)) != (other := after.config.get(key))]
    if said:
        with suppress(CarnetError):
            said = [*fields_apart(before.understood().config, after.understood().config)]
    yield from said
