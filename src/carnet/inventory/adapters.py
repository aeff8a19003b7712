"""The adapters of a checkpoint: which weights have one, how wide, is told by names and shapes; the alpha by what stands beside.

Megatron's names say too whether weights that it joins have one A. In a folder of PEFT's every module has its own: where all copies of a
group that Megatron joins are equal, byte for byte, they are read as one.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from carnet.architectures.family import Family
from carnet.architectures.known import dialect_of
from carnet.dialects.adapters import SWIFT, adapted
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.kinds import KINDS, Kind
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import Dialect
from carnet.dtypes import FLOATS
from carnet.errors import BadCheckpoint, NotSupported
from carnet.formats.adapters import MARKS
from carnet.formats.stored import Checkpoint, Key, Stored, label_of
from carnet.inventory.adapter_configs import Words, words_of
from carnet.model.adapters import ALONE, DORA, FIELD, ONE, TARGETS, Adapter, Group, bare, described, groups, together
from carnet.model.fields import Config, Value
from carnet.model.model import holds, layers, tensors
from carnet.model.tensors import ADAPTERS, MAGNITUDE, RANK, A
from carnet.storage.protocol import read_at

IN_PARTS = {"mlp.gate", "shared.gate", "mamba.z"}
DELTA = {"gdn.q", "gdn.k", "gdn.v", "gdn.z", "gdn.b", "gdn.a"}
# what peft trains and Megatron does not: embeddings, heads, biases, whole modules; or another model's
STRANGE = (
    "look whether it is of this model; peft's merge_and_unload makes a model of all that it can add, which crosses as any other"
)
LEFT = "the base model, which is another folder's"
ALL = json.dumps({TARGETS: {part: [1, 1.0] for part in ADAPTERS}, DORA: True})  # beside every weight


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of adapters."""

    fields: Mapping[str, Value]
    keys: Collection[Key]  # their stored tensors


Reading = tuple[Dialect, dict[str, tuple[str, ...]], dict[Key, Stored]]  # how names are read, what is left behind, what is read


def with_adapters(
    checkpoint: Checkpoint, family: Family, reading: Reading, config: dict[str, Value], like: Config | None, *, alone: bool
) -> Reading:
    """Tell of the adapters of a checkpoint, if any, in the fields of its model; return how it is read then.

    ``like`` and ``alone`` are as for ``survey``: the base model's tensors are left behind where adapters are wanted alone.
    """
    dialect, dropped, kept = reading
    told = _tell(checkpoint, family, config, kept, like, alone=alone)
    if told is None:
        return reading
    base = {(entry.unit, entry.name) for entry in entries(dialect, config, kept)} if told.fields[ALONE] else set[Key]()
    left = {LEFT: tuple(sorted(map(label_of, base)))} if base else {}
    config |= told.fields
    spelled = dialect_of(family, dialect.name, config, {name for _, name in checkpoint.tensors})
    return spelled, {**dropped, **left}, {key: stored for key, stored in kept.items() if key not in base}


def _tell(
    checkpoint: Checkpoint, family: Family, config: Config, kept: Mapping[Key, Stored], like: Config | None, *, alone: bool
) -> Told | None:
    """Return what a checkpoint tells of adapters, None where it has none; ``like`` and ``alone`` are as for ``survey``."""
    kind, where = KINDS[checkpoint.dialect], str(checkpoint.root)
    if not kind.adapters or not (kind.alone or any(mark in name for _, name in kept for mark in MARKS)):
        return None
    trial: Config = {**bare(config), FIELD: ALL, ALONE: True}
    named = [*entries(dialect_of(family, kind.name, trial), trial, kept)]
    reads = [entry for entry in named if entry.names[0].tensor.part.endswith(f".{A}")]
    if not reads:
        if kind.alone and kept:
            raise NotSupported(
                "nothing in the folder is an adapter that carnet knows",
                {"where": where, "first": label_of(min(kept))},
                remedy=STRANGE,
            )
        return None
    coded = next((entry for entry in named if kept[entry.unit, entry.name].dtype not in FLOATS), None)
    if coded is not None:
        facts = {
            "where": where,
            "tensor": coded.name,
            "found": kept[coded.unit, coded.name].dtype,
            "expected": ", ".join(FLOATS),
        }
        raise NotSupported("an adapter is stored in a type that carnet does not add", facts)
    said = words_of(checkpoint.config, kind, where)
    said.check_parameters([entry.name for entry in reads], where)
    found = _adapters(reads, kept, said, where)
    swift = any(entry.name.endswith(SWIFT.a) for entry in reads)
    check_in_order(kind, {part for part, _ in found}, checkpoint.config.get("tensor_model_parallel_size"), swift=swift)
    joined = {entry.like.joined for entry in reads} - {()}
    if kind.alone:
        joined |= {*groups(like)} if like is not None else {*_equal(checkpoint, bare(config), reads, kept, found)}
        joined = {group for group in joined if not any({*group} < {*other} for other in joined)}
    keys = {(entry.unit, entry.name) for entry in named}
    dora = any(entry.names[0].tensor.part.endswith(MAGNITUDE) for entry in named)
    if said.dora is not None and said.dora != dora:
        what = (
            "the config says DoRA, and no magnitudes are here"
            if said.dora
            else "magnitudes are here, and the config says no DoRA"
        )
        raise BadCheckpoint(what, {"where": where})
    fields: dict[str, Value] = {
        FIELD: described(found, _weights(bare(config)), dora=dora),
        ONE: together(joined),
        ALONE: alone or not kept.keys() - keys,
    }
    first = next(kept[key].dtype for key in kept if key in keys)
    return Told({**fields, **({"dtype": first} if fields[ALONE] else {})}, keys)


def check_in_order(kind: Kind, weights: Collection[str], ranks: object, *, swift: bool = False) -> None:
    """Refuse what is stored rank behind rank: B of a weight of several parts, of which each rank has a share of every part.

    Megatron-Bridge splits all but that of Gated DeltaNet (src/megatron/bridge/peft/adapter_wrapper.py), ms-swift none
    (LoraParallelLinear.sharded_state_dict).
    """
    ordered = {part for part in weights if part in DELTA or (swift and part in IN_PARTS)}
    if kind.arguments and ranks not in (None, 1) and ordered:
        facts = {"found": f"tensor_model_parallel_size {ranks}", "beside": ", ".join(sorted(ordered))}
        what = "adapters are stored in an order that depends on the ranks"
        raise NotSupported(what, facts, remedy="store them from one rank that shares each layer")


def _weights(config: Config) -> dict[str, list[int]]:
    """Return the layers that have each weight that can have an adapter."""
    found = defaultdict[str, list[int]](list)
    for layer, what in enumerate(layers(config)):
        for part in tensors(config, what).keys() & ADAPTERS.keys():
            found[part].append(layer)
    return found


def _adapters(reads: Sequence[Entry], kept: Mapping[Key, Stored], said: Words, where: str) -> dict[tuple[str, int], Adapter]:
    """Return the adapter of each weight of each layer."""
    found: dict[tuple[str, int], Adapter] = {}
    for entry in reads:
        key = entry.unit, entry.name
        shape, dims = kept[key].shape, entry.like.pattern.dims
        at = next(dim for dim, axes in enumerate(dims) if RANK in axes)
        others = prod(entry.like.shares[axis].size for axis in dims[at] if axis != RANK)
        if len(shape) != len(dims) or shape[at] % others:
            facts = {"where": where, "tensor": label_of(key), "found": f"{list(shape)}"}
            raise BadCheckpoint(f"{label_of(key)!r} is no A of an adapter", facts)
        made = said.adapter(entry.name, shape[at] // others, where, gated=bool(entry.like.joined))
        for (name,) in entry.tensors:
            for weight in entry.like.joined or (name.tensor.of,):
                if found.setdefault((weight, name.layer or 0), made) != made:
                    other = found[weight, name.layer or 0]
                    differ = {"where": where, "tensor": label_of(key), "found": f"{made}", "others": f"{other}"}
                    raise NotSupported("the adapters of experts of one layer differ in rank or alpha", differ)
    return found


def _equal(
    checkpoint: Checkpoint,
    config: Config,
    reads: Sequence[Entry],
    kept: Mapping[Key, Stored],
    found: Mapping[tuple[str, int], Adapter],
) -> Iterator[Group]:
    """Yield the weights that Megatron joins and whose adapters have the same A in every layer, and the same rank and alpha."""
    stored = defaultdict[tuple[str, int], list[Stored]](list)
    for entry in reads:
        for (name,), weight in product(entry.tensors, entry.like.joined or (entry.names[0].tensor.of,)):
            stored[weight, name.layer or 0].append(kept[entry.unit, entry.name])
    rows = adapted(MEGATRON, MEGATRON).rows
    kinds = {id(layer): layer for layer in layers(config)}.values()
    candidates = {
        row.joined
        for row in rows
        if row.written.get("joined") and "spelling" not in row.written and any(holds(row.when, kind) for kind in kinds)
    }
    for group in sorted(candidates):
        places = [sorted(layer for part, layer in found if part == weight) for weight in group]
        if not places[0] or any(each != places[0] for each in places):
            continue
        pairs = [[(weight, layer) for weight in group] for layer in places[0]]
        if all(
            len({found[pair] for pair in each}) == 1 and _alike(checkpoint, [stored[pair] for pair in each]) for each in pairs
        ):
            yield group


def _alike(checkpoint: Checkpoint, copies: Sequence[Sequence[Stored]]) -> bool:
    """Say whether all hold the same bytes."""
    first, *others = copies
    for at, one in enumerate(first):
        data = _bytes(checkpoint, one)
        for other in others:
            if (other[at].dtype, other[at].shape) != (one.dtype, one.shape) or _bytes(checkpoint, other[at]) != data:
                return False
    return bool(first)


def _bytes(checkpoint: Checkpoint, stored: Stored) -> bytes:
    (chunk,) = stored.chunks
    return read_at(checkpoint.root.open(chunk.file), chunk.offset, stored.nbytes)
