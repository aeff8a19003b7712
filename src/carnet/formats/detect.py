"""Open a checkpoint of any kind: the kind is read off the content, never off the path's name."""

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from carnet.errors import BadRequest, NotSupported
from carnet.formats.adapters import SAID, read_adapters
from carnet.formats.files import digest_of
from carnet.formats.folder import CONFIG, INDEX, read_folder
from carnet.formats.megatron import find_iteration, read_megatron
from carnet.formats.stored import Checkpoint
from carnet.formats.torch_dist_files import TRACKER
from carnet.storage.protocol import FILE, FOLDER, Folder, names_in
from carnet.storage.schemes import PathLike, folder_at

# what is not a model, or none that is read, by a file of it: what that is, and what to do
OTHERS = {
    "*.gguf": ("a GGUF file, llama.cpp's format", "name the Hugging Face folder that it was made from"),
}
ADAPTER = "adapter_model*"  # holds no model


def open_checkpoint(path: PathLike | Folder, locate: Callable[[str], bool] | None = None) -> Checkpoint:
    """Return what the headers of a checkpoint say, of whatever kind it is; no tensor is read.

    ``locate`` tells for which tensors of a Megatron checkpoint the bytes are wanted; None means all but the optimizer's.
    Raises BadRequest where the path is not a checkpoint, BadCheckpoint where it is a damaged one, NotSupported, MachineFailed.
    """
    root = folder_at(path)
    kind = root.kind()
    if kind not in ("", FOLDER):
        _refuse_others(root, [root.name])
    if kind != FOLDER:
        fault = "is not a folder" if kind else "does not exist"
        raise BadRequest(f"{path} {fault}", {"expected": "the folder of a checkpoint"})
    names = names_in(root)
    _refuse_others(root, names)
    if SAID in names and not any(name.endswith(".safetensors") and not fnmatchcase(name, ADAPTER) for name in names):
        return read_adapters(root)
    shards = any(name.endswith(".safetensors") for name in names)
    # a Megatron folder may carry a config.json for other programs; it has no safetensors
    iteration = None if CONFIG in names and shards else find_iteration(root)
    if iteration is not None:
        return read_megatron(iteration, is_model if locate is None else locate)
    if CONFIG in names:
        return read_folder(root)
    facts = {
        "where": root,
        "Megatron's": f"would have {TRACKER}, iter_* folders or .metadata",
        "any other": f"would have {CONFIG}{' beside its safetensors' if shards else ''}",
    }
    remedy = "name the folder in which one of these lies"
    if INDEX in names and CONFIG not in names:
        remedy += "; of a delta: carnet apply BASE DELTA OUT, or carnet verify BASE DELTA --against B"
    if inside := [name for name in names if any((root / name).kind(mark) == FILE for mark in (TRACKER, CONFIG))]:
        facts["inside"] = ", ".join(inside[:5]) + (f" and {len(inside) - 5} more" if len(inside) > 5 else "")
        remedy = f"name a checkpoint: {root / inside[0]}"
    raise BadRequest("no checkpoint of a known kind is here", facts, remedy=remedy)


def _refuse_others(root: Folder, names: Sequence[str]) -> None:
    """Refuse by its name what is of another kind, where nothing beside it is a model."""
    if any(name.endswith(".safetensors") and not fnmatchcase(name, ADAPTER) for name in names):
        return
    for name in names:
        for pattern, (what, remedy) in OTHERS.items():
            if fnmatchcase(name, pattern):
                raise NotSupported(f"{name!r} is {what}", {"where": root}, remedy=remedy)


def is_model(name: str) -> bool:
    """Say whether a tensor is the model's own and not the optimizer's or a random generator's.

    >>> is_model("decoder.layers.mlp.linear_fc1.weight"), is_model("chained_0.optimizer.state.param.x")
    (True, False)
    """
    return not name.startswith(("optimizer.", "chained_", "rng_state"))


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return one hex digest of all headers, sizes and versions: a plan that was made for another state of the files is refused."""
    stamps = [[stamp.file, stamp.nbytes, stamp.version] for stamp in checkpoint.stamps]
    return digest_of(json.dumps([checkpoint.digest, stamps]).encode())
