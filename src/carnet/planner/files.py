"""The files of a target: which tensors lie in which file, and the small text files beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from carnet.box import Box, whole
from carnet.dtypes import BY_NAME
from carnet.families.entries import Entry
from carnet.families.family import Family
from carnet.families.fields import write
from carnet.families.known import padded
from carnet.families.rows import Dialect
from carnet.families.words import Config
from carnet.formats.safetensors import layout_file
from carnet.formats.torch_dist_files import common_pt, folder_of, layout_store, store_texts, torch_type
from carnet.formats.torch_opcodes import Value
from carnet.planner.request import Request
from carnet.planner.store import chunks, states
from carnet.steps import RawFile, TargetFile, TargetTensor, TextFile

ITERATION = 1  # of a checkpoint that begins a run; Megatron counts from there
PT = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class Made:
    """The files of a target."""

    files: tuple[TargetFile, ...]
    places: tuple[tuple[Entry, Box, str, TargetTensor], ...]  # entry, the box of it, and where that lies
    raws: tuple[RawFile, ...]


def target_files(
    target: Dialect, wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], config: Config, request: Request
) -> Made:
    """Return the tensor files of a target, with every tensor's offset, in the order of the entries."""
    if target.name == "megatron":
        return _store(target, wanted, dtypes, config, request)
    files = _ranks(wanted, dtypes, request.tp * request.pp) if target.ranked else _shards(wanted, dtypes, request.shard)
    laid = [(file.name, tensor) for file in files for tensor in file.tensors]
    places = tuple((entry, whole(entry.shape), file, tensor) for entry, (file, tensor) in zip(wanted, laid, strict=True))
    return Made(files, places, ())


def _ranks(wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], world: int) -> tuple[TargetFile, ...]:
    """Return a file for every rank, one whose layers all do nothing included."""
    held: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {f"rank{rank}": [] for rank in range(world)}
    for entry in wanted:
        held[entry.unit].append((entry.name, dtypes[entry.unit, entry.name], entry.shape))
    return tuple(layout_file(f"{unit}.safetensors", tensors, {}) for unit, tensors in held.items())


def _shards(wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], most: int) -> tuple[TargetFile, ...]:
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for entry in wanted:
        dtype = dtypes[entry.unit, entry.name]
        nbytes = BY_NAME[dtype].nbytes * prod(entry.shape)
        if filled and filled + nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append((entry.name, dtype, entry.shape))
        filled += nbytes
    return tuple(layout_file(_shard_name(i, len(shards)), shard, PT) for i, shard in enumerate(shards))


def _store(
    target: Dialect, wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], config: Config, request: Request
) -> Made:
    folder = folder_of(ITERATION)
    cut = chunks(wanted, dtypes, config, request)
    empty = [("__0_1.distcp", states(wanted, config, request.spelling))]
    store = layout_store(folder, [(file, [chunk for _, chunk in held]) for file, held in cut.items()], empty)
    places = []
    for file, held in zip(store.files, cut.values(), strict=True):
        places += [(entry, chunk.box, file.name, t) for (entry, chunk), t in zip(held, file.tensors, strict=True)]
    said = write(target.table, config, {}, "Megatron's arguments")
    kinds = {
        name: torch_type(str(config["dtype"])) if name == "params_dtype" else _plain(value) for name, value in said.items()
    }
    common = RawFile(f"{folder}/common.pt", common_pt(kinds, ITERATION))
    return Made(store.files, tuple(places), (*store.raws, common))


def _plain(value: object) -> Value:
    assert value is None or isinstance(value, str | int | float | bool | list), f"no argument can be {value!r}"
    return value


def target_texts(family: Family, target: Dialect, config: Config, files: Sequence[TargetFile]) -> tuple[TextFile, ...]:
    """Return config.json, and the index that transformers wants beside more than one file."""
    if target.name == "megatron":
        return store_texts(ITERATION)
    said = write(target.table, padded(target, config), family.traits, f"{target.name} config.json")
    texts = [TextFile("config.json", _json(said))]
    if not target.ranked and len(files) > 1:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        total = sum(file.nbytes - file.tensors[0].offset for file in files)
        texts.append(
            TextFile("model.safetensors.index.json", _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
        )
    return tuple(texts)


def _shard_name(at: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{at + 1:05}-of-{count:05}.safetensors"


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=2) + "\n"
