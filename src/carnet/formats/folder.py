"""Folders of safetensors files: Hugging Face's (named shards, one namespace) and TensorRT-LLM's (one file a rank).

Names come from listing the folder, so a file may be a symlink, as every file of the Hugging Face cache is; a name that a
shard index gives must be one of the folder's own plain names.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product

from carnet.errors import BadCheckpoint, NotSupported, shown
from carnet.formats import jsons
from carnet.formats.files import TABLE_LIMIT, Sighting, check_plain, read_whole, sum_up
from carnet.formats.jsons import parse_object
from carnet.formats.safetensors import Header, read_header
from carnet.formats.stored import Checkpoint, Stored
from carnet.storage.protocol import Folder, asked, names_in

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BESIDE = "hf_quant_config.json"  # what modelopt says about quantized weights, in a file of its own
_SHARD = re.compile(r"model-(\d{5})(?:-of-(\d{5}))?\.safetensors")
_PART = re.compile(r"model-(rank-\d+|pp-\d+-tp-\d+)-part-\d+\.safetensors")
_RANK = re.compile(r"rank(\d+)\.safetensors")
_OTHER_WEIGHTS = re.compile(r"(pytorch_model|tf_model|flax_model|model).*\.(bin|pt|pth|h5|msgpack|ckpt)(\.index\.json)?")
_RANKS = 1 << 16  # no machine has more
# every layer of vLLM's that attends has these buffers: model_executor/layers/attention/attention.py; Mamba-2 alone has none, and an A
_OF_VLLM = ("._k_scale", ".mixer.A")


def read_folder(root: Folder) -> Checkpoint:
    """Return the checkpoint of a folder with a config.json; what the config says decides which kind it is."""
    raw, seen = read_whole(root, CONFIG)
    config = parse_object(raw, CONFIG, root, jsons.CONFIG, jsons.infinity)
    if "mapping" in config and "architecture" in config:
        return _read_ranks(root, config, seen)
    names = names_in(root)
    parts = {name: found for name in names if (found := _PART.fullmatch(name))}
    if parts and SINGLE not in names and INDEX not in names:
        return _read_parts(root, config, seen, parts)
    return _read_shards(root, config, seen)


def _read_parts(root: Folder, config: Mapping[str, object], seen: Sighting, parts: Mapping[str, re.Match[str]]) -> Checkpoint:
    """Return what the workers of an engine load: files of ranks, or of ranks of stages, each in one part or several."""
    places = sorted({tuple(map(int, re.findall(r"\d+", found[1]))) for found in parts.values()})
    if len({len(place) for place in places}) > 1:
        raise BadCheckpoint(
            "files of stages and files without them are in one folder", {"where": root, "found": ", ".join(parts)[:240]}
        )
    sizes = [max(place[axis] for place in places) + 1 for axis in range(len(places[0]))]
    if math.prod(sizes) > _RANKS:
        raise BadCheckpoint("no machine has so many ranks", {"where": root, "found": " x ".join(map(str, sizes))})
    form = "model-rank-{}-" if len(sizes) == 1 else "model-pp-{}-tp-{}-"
    lacking = [form.format(*place) for place in product(*map(range, sizes)) if place not in set(places)]
    if lacking:
        facts = {"where": root, "missing": ", ".join(lacking[:8])}
        raise BadCheckpoint("the files of ranks are not all here", facts, remedy="copy the checkpoint again")
    headers = [*asked(root, lambda name: read_header(root, name, parts[name][1]), sorted(parts))]
    tensors: dict[tuple[str, str], Stored] = {}
    for header in headers:
        for stored in header.tensors:
            if tensors.setdefault((stored.unit, stored.name), stored) is not stored:
                facts = {"where": root, "files": f"{tensors[stored.unit, stored.name].chunks[0].file}, {stored.chunks[0].file}"}
                raise BadCheckpoint(f"the tensor {shown(stored.name)!r} is in two files", facts)
    config, beside = _with_beside(root, config)
    stamps, digest = sum_up((seen, *beside, *(header.seen for header in headers)))
    notes = {"ranks": str(len(places)), **_written_by(headers)}
    engine = "vllm" if any(name.endswith(_OF_VLLM) for _, name in tensors) else "sglang"
    return Checkpoint(root, engine, "safetensors", config, tensors, {}, stamps, digest, notes)


def _with_beside(root: Folder, config: Mapping[str, object]) -> tuple[Mapping[str, object], list[Sighting]]:
    """Return a config with what modelopt says about quantized weights in a file of its own."""
    if BESIDE not in names_in(root):
        return config, []
    raw, beside = read_whole(root, BESIDE)
    return {**config, BESIDE: parse_object(raw, BESIDE, root, jsons.CONFIG)}, [beside]


def _read_ranks(root: Folder, config: Mapping[str, object], seen: Sighting) -> Checkpoint:
    """Return a TensorRT-LLM checkpoint: rank0.safetensors up to the world's size."""
    mapping = config["mapping"]
    world = mapping.get("world_size") if isinstance(mapping, dict) else None
    if type(world) is not int or not 0 < world < _RANKS:
        raise BadCheckpoint("config.json has no usable mapping.world_size", {"where": root, "found": shown(str(world))})
    expected = [f"rank{rank}.safetensors" for rank in range(world)]
    _compare(expected, [name for name in names_in(root) if _RANK.fullmatch(name)], "files of ranks", root)
    headers = [*asked(root, lambda each: read_header(root, each[1], f"rank{each[0]}"), enumerate(expected))]
    tensors = {(stored.unit, stored.name): stored for header in headers for stored in header.tensors}
    stamps, digest = sum_up((seen, *(header.seen for header in headers)))
    notes = {"ranks": str(world), **_written_by(headers)}
    return Checkpoint(root, "trtllm", "safetensors", config, tensors, {}, stamps, digest, notes)


def _read_shards(root: Folder, config: Mapping[str, object], seen: Sighting) -> Checkpoint:
    """Return a Hugging Face checkpoint: one file, or shards with or without an index."""
    names = names_in(root)
    files, index, sightings = _shards(root, names)
    headers = dict(zip(files, asked(root, lambda name: read_header(root, name), files), strict=True))
    tensors: dict[tuple[str, str], Stored] = {}
    for name, header in headers.items():
        for stored in header.tensors:
            if tensors.setdefault(("", stored.name), stored) is not stored:
                facts = {"where": root, "files": f"{tensors['', stored.name].chunks[0].file}, {name}"}
                raise BadCheckpoint(f"the tensor {shown(stored.name)!r} is in two files", facts)
    if index is not None:
        _check_index(index, tensors, root)
    config, beside = _with_beside(root, config)
    stamps, digest = sum_up((seen, *sightings, *beside, *(header.seen for header in headers.values())))
    others = [name for name in names if name.endswith(".safetensors") and name not in headers]
    notes = {"shards": str(len(files)), **_written_by(list(headers.values()))}
    if others:
        notes["not part of the model"] = ", ".join(others[:8])
    return Checkpoint(root, "hf", "safetensors", config, tensors, {}, stamps, digest, notes)


def _shards(root: Folder, names: Sequence[str]) -> tuple[list[str], dict[str, str] | None, list[Sighting]]:
    """Return the model's files, the index (tensor -> file) where there is one, and what was read for it."""
    numbered = [name for name in names if _SHARD.fullmatch(name)]
    present = [name for name in names if name == SINGLE] + numbered
    if INDEX in names:
        raw, seen = read_whole(root, INDEX, TABLE_LIMIT)
        index = _index(parse_object(raw, INDEX, root), root)
        files = sorted(set(index.values()))
        _compare(files, sorted({*present, *(name for name in files if name in names)}), f"shards that {INDEX} names", root)
        return files, index, [seen]
    if SINGLE in names and numbered:
        facts = {"where": root, "found": f"{SINGLE}, {numbered[0]}", "missing": INDEX}
        raise BadCheckpoint("it is not clear which files are the model", facts, remedy="remove those that are not")
    if not present:
        other = [name for name in names if _OTHER_WEIGHTS.fullmatch(name)]
        if other:
            facts = {"where": root, "found": ", ".join(other[:4])}
            remedy = "load it with transformers and call save_pretrained, which writes safetensors"
            raise NotSupported(f"weights in {other[0]} are not read: only safetensors are", facts, remedy=remedy)
        facts = {"where": root, "expected": f"{SINGLE}, or {INDEX} and its shards"}
        other = [name for name in names if name.endswith(".safetensors")]
        if other:  # Mistral's own, consolidated.safetensors, has other names of tensors
            found = {"found": shown(", ".join(other[:4]))}
            raise BadCheckpoint("no file here has a name that weights of transformers have", facts | found)
        raise BadCheckpoint("the folder holds no weights", facts)
    _check_numbers(numbered, root)
    return present, None, []


def _check_numbers(numbered: Sequence[str], root: Folder) -> None:
    """Raise BadCheckpoint where numbered shards without an index are not a complete set."""
    totals = {match[2] for name in numbered if (match := _SHARD.fullmatch(name))}
    if not numbered:
        return
    total = totals.pop() if len(totals) == 1 else "-"
    if total is None:  # model-00001.safetensors says nothing of how many there are
        first = int(numbered[0][6:11])
        expected = [f"model-{first + number:05d}.safetensors" for number in range(len(numbered))]
    elif total.isdigit():
        expected = [f"model-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    else:
        raise BadCheckpoint("shards of several sets are in one folder", {"where": root, "found": ", ".join(numbered[:4])})
    _compare(expected, numbered, "shards", root)


def _index(parsed: Mapping[str, object], root: Folder) -> dict[str, str]:
    """Return the weight map of an index whose every file name is plain."""
    weights = parsed.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise BadCheckpoint(f"{INDEX} has no weight_map of names", {"where": root})
    for name in set(weights.values()):
        check_plain(root, name, INDEX)
    return weights


def _check_index(index: Mapping[str, str], tensors: Mapping[tuple[str, str], Stored], root: Folder) -> None:
    """Raise BadCheckpoint unless the index and the files say the same of every tensor."""
    found = {name: tensor.chunks[0].file for (_, name), tensor in tensors.items()}
    if index != found:
        name = min(name for name in index.keys() | found.keys() if index.get(name) != found.get(name))
        facts = {"where": root, "expected": index.get(name, "not in the index"), "found": found.get(name, "in no file")}
        raise BadCheckpoint(f"{INDEX} and the files disagree on {shown(name)!r}", facts)


def _compare(expected: Sequence[str], found: Sequence[str], what: str, root: Folder) -> None:
    """Raise BadCheckpoint where files are missing or too many."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    facts: dict[str, object] = {"where": root}
    facts |= {"missing": shown(", ".join(missing[:8]))} if missing else {}
    facts |= {"too many": shown(", ".join(extra[:8]))} if extra else {}
    if missing:
        raise BadCheckpoint(f"the {what} are not all here", facts, remedy="copy the checkpoint again")
    if extra:
        remedy = "move them out of the folder, where they are left from another save; else copy the checkpoint again"
        raise BadCheckpoint(f"other weights lie beside the {what}", facts, remedy=remedy)


def _written_by(headers: Sequence[Header]) -> dict[str, str]:
    """Return what the files' own metadata says of who wrote them."""
    said = {header.metadata.get("format") for header in headers} - {None}
    return {"written by": shown(", ".join(sorted(str(word) for word in said)))} if said else {}
