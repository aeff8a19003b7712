"""A running model, described as a checkpoint is: the memory of every rank stands in place of a file.

Nobody asks the other ranks what they hold: it follows from the config and the grid, and so every rank knows all of it. The
description has the names of Megatron's global tensors; under which names a rank keeps them is its own affair (binding.py).
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from carnet.algebra.box import whole
from carnet.architectures.known import dialect_of, hear_config, recognise
from carnet.dialects.configs import lookup
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.kinds import KINDS, RANKS
from carnet.dialects.megatron.programs import known_release
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import Dialect, less_one
from carnet.dialects.sharing import shared
from carnet.dialects.units import Unit, units
from carnet.dialects.vocabulary import MULTIPLE, Vocabulary, by_config, counts_anew, padded_rows, vocabulary
from carnet.dtypes import BY_NAME, named
from carnet.errors import BadRequest, NotSupported
from carnet.formats.files import digest_of
from carnet.formats.stored import Checkpoint, Chunk, Key, Stored, dense_strides
from carnet.formats.wrapped import arguments_of, program_of, read_config
from carnet.inventory.survey import Inventory
from carnet.live.grid import Grid, Seat, megatron_units, seats
from carnet.model.fields import Config, Value
from carnet.model.model import canonical_shapes, value
from carnet.plans.request import Request
from carnet.storage.posix import PosixFolder

WHERE = "the running model"
MODULES = replace(MEGATRON, stacked=False, kind=replace(MEGATRON.kind, files=RANKS))  # a rank's own modules: a tensor a layer


@dataclass(frozen=True, slots=True)
class Placement:
    """What the ranks of one side hold."""

    seats: Mapping[int, Seat]  # global rank -> its place
    units: Mapping[str, tuple[Unit, Sequence[int]]]  # name -> a share of the model, and the ranks that hold it


@dataclass(frozen=True, slots=True)
class Source:
    """A running model."""

    inventory: Inventory
    placement: Placement
    ranks: Mapping[Key, Sequence[int]]  # (unit, described name) -> all ranks that hold the same
    offsets: Mapping[str, tuple[Sequence[int], Sequence[str]]]  # unit -> where its tensors begin, and their names

    @property
    def dtypes(self) -> dict[str, str]:
        """Return the element type of every canonical tensor."""
        inventory = self.inventory
        stored = inventory.checkpoint.tensors
        return {name: stored[key].dtype for key, entry in inventory.entries.items() for name in entry.names}

    def holders(self, unit: str, offset: int) -> Sequence[int]:
        """Return the ranks that hold what lies at a place of a unit."""
        starts, names = self.offsets[unit]
        return self.ranks[unit, names[bisect_right(starts, offset) - 1]]


def describe(
    config: Mapping[str, object] | str | Path,
    grid: Grid,
    ranks: Sequence[int],
    dtypes: Mapping[str, str],
    padded: int | None,
    *,
    written_by: str | None = None,
    era: str = "",
    accept: Sequence[str] = (),
    family: str | None = None,
) -> Source:
    """Return a running model of Megatron, from its config alone; raise CarnetError where it cannot be one.

    ``config``: Megatron's training arguments, or a Hugging Face config, or the path of one; ``dtypes``: patterns of described names ->
    element types, where they are not the config's; ``padded``: rows of the vocabulary with its padding; ``written_by``, ``era`` and
    ``accept`` say what the program that built the model made of the arguments: dialects/megatron/programs.py; ``family`` is the one
    that a person names, where the config names none.
    """
    types = {pattern: named(word).name for pattern, word in dtypes.items()}
    raw = read_config(config) if isinstance(config, str | Path) else dict(config)
    said = arguments_of(raw, WHERE)
    writer = written_by or program_of(raw)
    told = _told(said, padded, known_release(writer, era))
    heard = hear_config(KINDS["megatron"], said, WHERE, writer, era, accept)
    found, fields = recognise("megatron", heard.said, WHERE, {} if told is None else {"vocab": told.tokens}, family)
    places = seats(grid, ranks)
    fields["padded_vocab"] = _padded(fields, raw, grid, padded)
    held = megatron_units(grid, fields, places)
    unit_of = {name: unit for name, (unit, _) in held.items()}
    tensors: dict[Key, Stored] = {}
    described: dict[Key, Entry] = {}
    owners: dict[Key, list[int]] = {}
    first: dict[object, Key] = {}
    ends: dict[str, int] = dict.fromkeys(held, 0)
    offsets: dict[str, tuple[list[int], list[str]]] = {name: ([], []) for name in held}
    for entry in entries(MODULES, fields, None, "te", list(unit_of.values())):
        same = tuple((view.tensor, view.box) for view in entry.views)
        key = first.setdefault(same, (entry.unit, entry.name))
        if key != (entry.unit, entry.name):
            owners[key] += held[entry.unit][1]
            continue
        dtype = _dtype(entry, fields, types)
        chunk = Chunk(whole(entry.shape), entry.unit, ends[entry.unit], dense_strides(entry.shape))
        offsets[entry.unit][0].append(ends[entry.unit])
        offsets[entry.unit][1].append(entry.name)
        ends[entry.unit] += prod(entry.shape) * BY_NAME[dtype].nbytes
        tensors[key] = Stored(*key, dtype, entry.shape, (chunk,))
        described[key], owners[key] = entry, list(held[entry.unit][1])
    known = {name for entry in described.values() for name in entry.names}
    lost = next((name for name in canonical_shapes(fields) if name not in known), None)
    if lost is not None:
        raise NotSupported(f"no model of Megatron has {lost!r}", {"where": WHERE, "family": found.name})
    digest = digest_of(json.dumps([fields, list(map(str, tensors.items())), list(owners.values())], default=str).encode())
    checkpoint = Checkpoint(PosixFolder(WHERE), "megatron", "live", raw, tensors, {}, (), digest, {})
    vocabulary_of, centred = told or by_config(fields), less_one(MODULES, fields)
    inventory = Inventory(checkpoint, found, MODULES, fields, described, {}, None, {}, {}, vocabulary_of, centred, heard)
    return Source(inventory, Placement(places, held), owners, offsets)


def _told(said: Mapping[str, object], padded: int | None, release: str) -> Vocabulary | None:
    """Return the vocabulary that arguments of Megatron tell, None where they do not say how many rows there are."""
    rows = padded or said.get("padded_vocab_size")
    if type(rows) is not int or lookup(said, "architectures"):
        return None
    return vocabulary(said, rows, WHERE, new=counts_anew(release))


def _padded(fields: Config, raw: Mapping[str, object], grid: Grid, given: int | None) -> int:
    """Return how many rows the ranks hold of the vocabulary: megatron/training/tokenizer pads it for tensor parallelism."""
    vocab, said, multiple = value(fields, "vocab"), value(fields, "padded_vocab"), raw.get("make_vocab_size_divisible_by")
    assert isinstance(vocab, int), "a model has a vocabulary"
    rows: object = given or (
        said if isinstance(said, int) else padded_rows(vocab, grid.tp, multiple if isinstance(multiple, int) else MULTIPLE)
    )
    if not isinstance(rows, int) or rows < vocab or rows % grid.tp:
        facts = {"padded_vocab_size": rows, "vocab_size": vocab, "tp": grid.tp}
        raise BadRequest("the rows of the vocabulary do not divide among the ranks, or are too few", facts)
    return rows


def _dtype(entry: Entry, fields: Config, dtypes: Mapping[str, str]) -> str:
    asked = next((dtype for pattern, dtype in dtypes.items() if fnmatchcase(entry.name, pattern)), None)
    return asked or entry.dtype or str(value(fields, "dtype"))


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a running model goes."""

    dialect: Dialect
    units: Sequence[Unit] | None  # None where every rank has all of it
    placement: Placement
    ranks: Sequence[int]
    said: Mapping[str, Value]  # fields that the request does not tell

    def holders(self, file: str) -> Sequence[int]:
        """Return the ranks that a file of the plan stands for."""
        if self.units is None:
            return self.ranks
        before, after = self.dialect.kind.file.split("{unit}")
        return self.placement.units[file.removeprefix(before).removesuffix(after)][1]


def aim(source: Source, request: Request, grid: Grid, ranks: Sequence[int], padded: int | None) -> Destination:
    """Return what the ranks of the target are to hold; raise CarnetError where they cannot."""
    plain = dialect_of(source.inventory.family, request.to)
    modules = plain.kind.arguments  # a program that trains is given its running modules
    if modules and request.dtype is not None:
        raise BadRequest("a running module keeps the types of its weights", remedy="leave out dtype")
    if not modules and padded is not None:
        raise BadRequest("only Megatron's modules pad the vocabulary", remedy="leave out target_padded_vocab_size")
    if request.parallel_embedding is not None and request.parallel_embedding not in plain.kind.embeddings:
        facts = {"to": request.to, "found": request.parallel_embedding, "known": ", ".join(plain.kind.embeddings) or "none"}
        raise BadRequest("the embedding cannot be shared in this way", facts, remedy="leave out parallel_embedding")
    fields = source.inventory.config
    places = seats(grid if modules else replace(grid, ep=1, etp=None), ranks)
    if modules:
        rows = _padded({**fields, "padded_vocab": None}, {}, grid, padded)
        said: dict[str, Value] = {"padded_vocab": rows, "halves": value(fields, "halves")}
        held = megatron_units(grid, {**fields, **said}, places)
        return Destination(MODULES, [unit for unit, _ in held.values()], Placement(places, held), ranks, said)
    if grid.vp > 1 or grid.cp > 1 or grid.etp is not None or grid.layers is not None:
        what = "no chunks, no context parallel, no ranks of an expert and no stages of its own"
        raise BadRequest(f"a target of the kind {request.to!r} has {what}")
    if (grid.tp, grid.pp, grid.ep) == (1, 1, 1) and not plain.ranked:
        return Destination(plain, None, Placement(places, {}), ranks, {})
    dialect = plain if plain.ranked else shared(plain)
    made = units(dialect, {**fields, "tp": grid.tp, "pp": grid.pp, "ep": grid.ep})
    if not plain.ranked:
        # the last rank of an engine has the embedding of a tied model too: vllm/model_executor/models/llama.py
        tied = ("embed",) if value(fields, "tied") else ()
        made = [replace(unit, base=0, expert_base=0, also=tied if unit.last else ()) for unit in made]
    of = {
        unit.name: [rank for rank, seat in places.items() if seat.pp * grid.tp + seat.tp == at] for at, unit in enumerate(made)
    }
    return Destination(dialect, made, Placement(places, {unit.name: (unit, of[unit.name]) for unit in made}), ranks, {})
