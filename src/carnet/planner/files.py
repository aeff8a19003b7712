"""The files of a target: which tensors lie in which file, and the small text files beside them."""

import json
from collections.abc import Mapping, Sequence

from carnet.dtypes import BY_NAME
from carnet.families.entries import Entry
from carnet.families.family import Family
from carnet.families.fields import write
from carnet.families.known import padded
from carnet.families.model import Config
from carnet.families.rows import Dialect
from carnet.formats.safetensors import layout_file
from carnet.planner.request import Request
from carnet.steps import TargetFile, TextFile

PT = {"format": "pt"}  # transformers refuses a file without it


def target_files(
    target: Dialect, wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], request: Request
) -> tuple[TargetFile, ...]:
    """Return the tensor files of a target, with every tensor's offset, in the order of the entries."""
    tensors = [(entry.unit, entry.name, dtypes[entry.unit, entry.name], entry.shape) for entry in wanted]
    if target.ranked:
        units = list(dict.fromkeys(unit for unit, *_ in tensors))
        return tuple(
            layout_file(f"{unit}.safetensors", [(n, d, s) for u, n, d, s in tensors if u == unit], {}) for unit in units
        )
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for _, name, dtype, shape in tensors:
        nbytes = BY_NAME[dtype].nbytes
        for length in shape:
            nbytes *= length
        if filled and filled + nbytes > request.shard:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += nbytes
    return tuple(layout_file(_shard_name(i, len(shards)), shard, PT) for i, shard in enumerate(shards))


def target_texts(family: Family, target: Dialect, config: Config, files: Sequence[TargetFile]) -> tuple[TextFile, ...]:
    """Return config.json, and the index that transformers wants beside more than one file."""
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
