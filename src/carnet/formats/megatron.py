"""A Megatron checkpoint: a root with a tracker file, or one iteration's folder, in ``torch_dist`` format.

The training arguments, which megatron pickles as a Namespace, become plain values: numbers, texts, lists and tables. Torch
types read ``torch.bfloat16``, members of the program's own enums ``ModelType(1)``.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.files import Sighting, digest_of, list_names, open_file, read_whole, shown, sum_up
from carnet.formats.stored import Checkpoint
from carnet.formats.torch_dist import Store, read_object, read_store
from carnet.formats.torch_pickles import Inert, Namespace, PickledTensor
from carnet.formats.torch_zip import object_item

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_ITEM = "common_state/shard_0_1"  # since megatron-core 0.19: dist_checkpointing/strategies/common.py
_FOLDER = re.compile(r"iter_\d{7,}|release")
_NODES = 1_000_000  # values in the training arguments: a thousand times what Megatron writes
_DEPTH = 64


def find_iteration(root: Path) -> Path | None:
    """Return the folder of the iteration that a path means, or None where it is no Megatron checkpoint.

    Raises BadCheckpoint where the tracker file points nowhere, BadRequest where there is a choice.
    """
    names = list_names(root)
    if ".metadata" in names or "metadata.json" in names or _legacy(names):
        return root
    folders = [name for name in names if _FOLDER.fullmatch(name) and os.path.isdir(root / name)]
    if TRACKER in names:
        return root / _tracked(root, folders)
    if len(folders) > 1:
        facts = {"where": root, "found": ", ".join(folders[:20]), "missing": TRACKER}
        raise BadRequest("the folder holds several iterations and no tracker file", facts, remedy="name one of the iterations")
    return root / folders[0] if folders else None


def read_megatron(root: Path, locate: Callable[[str], bool]) -> Checkpoint:
    """Return the checkpoint of one iteration's folder."""
    legacy = _legacy(list_names(root))
    if legacy:
        facts = {"where": root, "found": ", ".join(legacy[:8])}
        remedy = "load it with Megatron and save it with --ckpt-format torch_dist"
        raise NotSupported("the legacy per-rank format (mp_rank_*) is not read yet", facts, remedy=remedy)
    store = read_store(root, locate)
    common, writer, seen, inner = _read_common(root, store)
    arguments = common.get("args")
    if not isinstance(arguments, Namespace):
        raise BadCheckpoint("the training arguments are missing", {"where": root, "expected": "args in the common state"})
    config = _Plain(root).table(arguments.fields)
    stamps, digest = sum_up((*store.sightings, *seen), inner)
    tensors = {("", name): tensor for name, tensor in sorted(store.tensors.items())}
    return Checkpoint(root, "megatron", "torch_dist", config, tensors, store.objects, stamps, digest, _notes(common, writer))


def _legacy(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith("mp_rank_")]


def _tracked(root: Path, folders: Sequence[str]) -> str:
    """Return the folder that the tracker file names."""
    content = read_whole(root, TRACKER, 4096)[0].decode("ascii", "replace").strip()
    plain = content.isascii() and content.isdigit() and len(content) < 20
    folder = f"iter_{int(content):07d}" if plain else content
    if folder in folders:
        return folder
    expected = shown(folder) if plain else "a number or 'release'"
    facts = {"where": root, "expected": expected, "found": ", ".join(folders[:20]) or "-"}
    remedy = "name the iteration's folder itself"
    raise BadCheckpoint(f"{TRACKER} says {shown(content)!r}, which is not here", facts, remedy=remedy)


def _read_common(root: Path, store: Store) -> tuple[dict[object, object], str, list[Sighting], bytes]:
    """Return the common state, who wrote it so, the file that holds it, or the pickle where it is inside a data file."""
    if COMMON_ITEM in store.places:
        value, pickled = read_object(root, store.places[COMMON_ITEM])
        common = value[0] if isinstance(value, list) and len(value) == 1 else value
        return _common_table(common, root), "megatron-core >= 0.19 (common_state)", [], pickled
    with open_file(root, "common.pt") as file:
        common, pickled = object_item(file, 0, file.stamp.nbytes)
        return _common_table(common, root), "megatron-core < 0.19 (common.pt)", [Sighting(file.stamp, digest_of(pickled))], b""


def _common_table(common: object, root: Path) -> dict[object, object]:
    if not isinstance(common, dict):
        raise BadCheckpoint("the common state is no table", {"where": root, "found": type(common).__name__})
    return common


def _notes(common: Mapping[object, object], writer: str) -> dict[str, str]:
    notes = {"writer": writer}
    for key in ("iteration", "checkpoint_version"):
        if isinstance(common.get(key), (int, float)):
            notes[key] = str(common[key])
    return notes


class _Plain:
    """Turn what a pickle built into plain values, within a budget.

    A pickle may share one value in many places: written out, a few hundred bytes can become terabytes.
    """

    def __init__(self, where: Path) -> None:
        self._where = where
        self._left = _NODES

    def table(self, fields: Mapping[object, object], depth: int = 0) -> dict[str, object]:
        """Return a table with its keys as texts."""
        return {str(self.value(key, depth + 1)): self.value(item, depth + 1) for key, item in fields.items()}

    def value(self, value: object, depth: int) -> object:
        """Return one value."""
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise BadCheckpoint("the training arguments are too large or nested too deeply", {"where": self._where})
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, dict):
            return self.table(value, depth)
        if isinstance(value, Namespace):
            return self.table(value.fields, depth)
        if isinstance(value, tuple):
            return tuple(self.value(item, depth + 1) for item in value)
        if isinstance(value, (list, set, frozenset)):
            items = [self.value(item, depth + 1) for item in value]
            return items if isinstance(value, list) else sorted(items, key=str)
        if isinstance(value, PickledTensor):
            return f"tensor {value.dtype} {value.shape}"
        if isinstance(value, type) and issubclass(value, Inert):
            return value.name
        return str(value) if isinstance(value, Inert) else f"<{type(value).__name__}>"
