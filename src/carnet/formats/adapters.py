"""Folders of Hugging Face's PEFT, and what says beside a store of Megatron-Bridge's how its adapters were made.

::

    adapter_config.json         rank, alpha, modules, the base model's name     adapter_model.safetensors   A and B
    config.json                 the base model's, where whoever wrote the folder put it there; else a person names it

The base model's config says of which shapes and of whose family the weights are: without it nothing of the tensors is known.
"""

from collections.abc import Mapping
from dataclasses import replace

from carnet.errors import BadCheckpoint, BadRequest, NotSupported, shown
from carnet.formats import jsons
from carnet.formats.files import Sighting, read_whole, sum_up
from carnet.formats.folder import CONFIG
from carnet.formats.jsons import parse_object
from carnet.formats.safetensors import read_header
from carnet.formats.stored import Checkpoint, Stored
from carnet.formats.wrapped import RUN_CONFIG, YAML_LIMIT, parse_yaml
from carnet.storage.protocol import FILE, Folder, names_in

SAID, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the first is a key of a checkpoint's config, too
BRIDGE = "peft"  # the section of run_config.yaml, and so a key of a checkpoint's config
BASE = "base_model_name_or_path"
MARKS = (".adapter.", ".lora_A.")  # in the names of Megatron's adapters: of Megatron-Bridge's, of ms-swift's


def read_adapters(root: Folder) -> Checkpoint:
    """Return the checkpoint of a folder that holds adapters alone; its config is the base model's, with what is said of them."""
    names = names_in(root)
    raw, seen = read_whole(root, SAID)
    said = parse_object(raw, SAID, root, jsons.CONFIG)
    if WEIGHTS not in names:
        other = [name for name in names if name.startswith("adapter_model")]
        facts = {"where": root, "expected": WEIGHTS, **({"found": ", ".join(other)} if other else {})}
        remedy = "load it with peft and call save_pretrained, which writes safetensors"
        raise NotSupported("the folder of adapters holds no weights that are read", facts, remedy=remedy)
    header = read_header(root, WEIGHTS)
    tensors = {("", stored.name): stored for stored in header.tensors}
    base, sightings = _base(root) if CONFIG in names else ({}, [])
    stamps, digest = sum_up((seen, *sightings, header.seen))
    notes = {"base": shown(str(said[BASE]))} if said.get(BASE) else {}
    return Checkpoint(root, "peft", "safetensors", {**base, SAID: said}, tensors, {}, stamps, digest, notes)


def _base(root: Folder) -> tuple[dict[str, object], list[Sighting]]:
    """Return the base model's config that stands beside its adapters; where these say that it is elsewhere nobody looks."""
    raw, seen = read_whole(root, CONFIG)
    return parse_object(raw, CONFIG, root, jsons.CONFIG, jsons.infinity), [seen]


def with_run_config(
    root: Folder, tensors: Mapping[tuple[str, str], Stored]
) -> tuple[dict[str, dict[str, object]], list[Sighting]]:
    """Return what run_config.yaml says of the adapters of a store, as a section of its arguments; nothing where there are none."""
    if not any(mark in name for _, name in tensors for mark in MARKS) or root.kind(RUN_CONFIG) != FILE:
        return {}, []
    data, seen = read_whole(root, RUN_CONFIG, YAML_LIMIT)
    said = parse_yaml(data, RUN_CONFIG, root)
    section, above = said.get(BRIDGE), said.get("checkpoint")
    if section is None:
        return {}, []
    if not isinstance(section, dict):
        raise BadCheckpoint(f"{RUN_CONFIG} has a section {BRIDGE!r} that is not a table", {"where": root})
    base = above.get("pretrained_checkpoint") if isinstance(above, dict) else None
    return {BRIDGE: {**section, **({BASE: base} if isinstance(base, str) else {})}}, [seen]


def with_alpha(checkpoint: Checkpoint, alpha: float | None) -> Checkpoint:
    """Return a checkpoint with the alpha that a person says of its adapters; raise BadRequest where another is said beside them."""
    if alpha is None:
        return checkpoint
    section, key = (SAID, "lora_alpha") if SAID in checkpoint.config else (BRIDGE, "alpha")
    found = checkpoint.config.get(section)
    said = found if isinstance(found, dict) else {}
    if said.get(key) not in (None, alpha):
        facts = {"where": checkpoint.root, "found": f"{key} {said[key]!r}"[:80], "--adapter-alpha": alpha}
        remedy = "leave it out; --adapter-scale takes what is added more often or less"
        raise BadRequest("another alpha is said beside the adapters", facts, remedy=remedy)
    return replace(checkpoint, config={**checkpoint.config, section: {**said, key: alpha}})
