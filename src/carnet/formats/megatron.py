"""A Megatron checkpoint: a root with a tracker file, one iteration's folder, or NeMo's folder of weights and context.

What lies in the folder decides how it is read, and where the arguments are::

    mp_rank_*/                         a file a rank             args in each rank's file
    .metadata, metadata.json           torch_dist                args in the common state; run_config.yaml (Megatron-Bridge)
    .metadata                          torch_dcp, fsdp_dtensor   an object args; run_config.yaml
    weights/.metadata, context/        torch_dist of NeMo 2      context/model.yaml

The training arguments, which megatron pickles as a Namespace, become plain values: numbers, texts, lists and tables. Torch
types read ``torch.bfloat16``, members of the program's own enums ``ModelType(1)``. Where there are none, the config is empty.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.errors import BadCheckpoint, BadRequest, shown
from carnet.formats.adapters import BASE, with_run_config
from carnet.formats.adapters import BRIDGE as PEFT
from carnet.formats.files import Sighting, check_inside, read_whole, sum_up
from carnet.formats.fsdp_dtensor import OBJECTS, by_plane, common_of
from carnet.formats.jsons import is_text
from carnet.formats.legacy import READ, rank_folders, read_ranks
from carnet.formats.modelopt_state import NAME as MODELOPT
from carnet.formats.modelopt_state import Modes, modes_of, read_modes
from carnet.formats.stored import Checkpoint
from carnet.formats.torch_dist import COMMON_FILE, COMMON_ITEM, Store, read_common, read_object, read_plain_store, read_store
from carnet.formats.torch_dist_files import TRACKER
from carnet.formats.torch_pickles import Inert, Namespace, PickledTensor
from carnet.formats.torch_zip import Archive, number_of
from carnet.formats.training import COMMON, OPTIMIZER, Training, is_apart, training_of
from carnet.formats.wrapped import MEANT_FOR, NEMO_CONTEXT, NEMO_WEIGHTS, RUN_CONFIG, program_of, read_bridge, read_nemo
from carnet.storage.protocol import FOLDER, Folder, names_in

STORE, PER_RANK = "torch_dist", "torch (per rank)"  # the forms that megatron-core loads by itself
_FOLDER = re.compile(r"iter_\d{7,}|release")
_NODES = 1_000_000  # values in the training arguments: a thousand times what Megatron writes
_DEPTH = 64


@dataclass(frozen=True, slots=True)
class _Arguments:
    """What a checkpoint says beside its tensors."""

    config: Mapping[str, object]
    writer: str  # who wrote it so, for people
    facts: Mapping[str, object]  # iteration and version, if known
    seen: Sequence[Sighting]
    inner: bytes = b""  # the pickle that was read, where it is inside a data file
    program: str = ""  # the program that means the arguments, where that is known
    era: str = ""  # what the store's form says of the release of Megatron-LM
    training: Training | None = None


def find_iteration(root: Folder) -> Folder | None:
    """Return the folder of the iteration that a path means, or None where it is not a Megatron checkpoint.

    Raises BadCheckpoint where the tracker file points nowhere, BadRequest where there is a choice.
    """
    names = names_in(root)
    if ".metadata" in names or "metadata.json" in names or rank_folders(names) or _is_nemo(root, names):
        return root
    folders = [name for name in names if _FOLDER.fullmatch(name) and root.kind(name) == FOLDER]
    if TRACKER in names:
        return root / _tracked(root, folders)
    if len(folders) > 1:
        facts = {"where": root, "found": ", ".join(folders[:20]), "missing": TRACKER}
        raise BadRequest("the folder holds several iterations and no tracker file", facts, remedy="name one of the iterations")
    return root / folders[0] if folders else None


def read_megatron(root: Folder, locate: Callable[[str], bool]) -> Checkpoint:
    """Return the checkpoint of one iteration's folder."""
    names = names_in(root)
    if rank_folders(names):
        return _read_legacy(root, locate)
    if _is_nemo(root, names):
        check_inside(root, NEMO_WEIGHTS, "the folder's listing")
        kind, store = _read_store(root / NEMO_WEIGHTS, locate)
        store = _below(NEMO_WEIGHTS, store)
        config, seen = read_nemo(root)
        writer = "NeMo 2 (context/model.yaml)" if seen else "NeMo 2 (no context/model.yaml)"
        said = _Arguments(config, writer, {}, seen, program="nemo")
    else:
        kind, store = _read_store(root, locate)
        said = _read_arguments(root, store, names, plain=kind == "torch_dcp", trained=locate(f"{OPTIMIZER}.state"))
    tensors = {("", name): tensor for name, tensor in sorted(by_plane(store.tensors).items())}
    section, seen = with_run_config(root, tensors)
    said = replace(
        said, config={**said.config, **section}, seen=(*said.seen, *(each for each in seen if each not in said.seen))
    )
    modes = read_modes(root, f"{NEMO_WEIGHTS}/{MODELOPT}" if said.program == "nemo" else MODELOPT)
    stamps, digest = sum_up((*store.sightings, *said.seen, *(modes.sightings if modes else ())), said.inner)
    objects = {name: nbytes for name, nbytes in store.objects.items() if kind != "torch_dcp" or name not in READ}
    base = section[PEFT].get(BASE) if section else None
    notes = {**_notes(said, modes), **({"base": base} if isinstance(base, str) else {})}
    found = Checkpoint(
        *(root, "megatron", kind, said.config, tensors, objects, stamps, digest, notes),
        program=said.program or program_of(said.config),
        era=said.era,
        training=said.training,
    )
    return _done(found, modes)


def _read_legacy(root: Folder, locate: Callable[[str], bool]) -> Checkpoint:
    """Return the checkpoint of a folder with a file a rank."""
    ranks = read_ranks(root, locate)
    arguments = ranks.common.get("args")
    config = _Plain(root).table(arguments.fields) if isinstance(arguments, Namespace) else {}
    stamps, digest = sum_up(ranks.sightings)
    modes = modes_of(ranks.common[MODELOPT]) if MODELOPT in ranks.common else None
    notes = _notes(_Arguments(config, "Megatron-LM (mp_rank_*)", ranks.common, []), modes)
    notes["ranks"] = ", ".join(f"{axis} {size}" for axis, size in ranks.sizes.items())
    tensors = dict(sorted(ranks.tensors.items()))
    objects = dict(sorted(ranks.objects.items()))
    found = root, "megatron", PER_RANK, config, tensors, objects, stamps, digest, notes
    return _done(Checkpoint(*found, program=program_of(config)), modes)


def _done(checkpoint: Checkpoint, modes: Modes | None) -> Checkpoint:
    """Return a checkpoint with what ModelOpt did to its model."""
    if modes is None:
        return checkpoint
    return replace(checkpoint, trained_as=modes.schemes, pruned=modes.pruned, head=modes.head)


def _is_nemo(root: Folder, names: Sequence[str]) -> bool:
    return NEMO_WEIGHTS in names and NEMO_CONTEXT in names and root.kind(f"{NEMO_WEIGHTS}/.metadata") != ""


def _read_store(root: Folder, locate: Callable[[str], bool]) -> tuple[str, Store]:
    """Return what a folder's data files hold, and what the folder is: megatron-core's own form has a metadata.json."""
    if not any(root.kind(name) for name in ("metadata.json", COMMON_FILE)):
        store = read_plain_store(root, locate)
        if COMMON_ITEM not in store.places:
            return "torch_dcp", store
    return STORE, read_store(root, locate)


def _below(folder: str, store: Store) -> Store:
    """Return a store with its files named from the folder above."""
    tensors = {
        name: replace(tensor, chunks=tuple(replace(chunk, file=f"{folder}/{chunk.file}") for chunk in tensor.chunks))
        for name, tensor in store.tensors.items()
    }
    sightings = tuple(replace(seen, stamp=replace(seen.stamp, file=f"{folder}/{seen.stamp.file}")) for seen in store.sightings)
    return Store(tensors, store.objects, {}, sightings)


def _tracked(root: Folder, folders: Sequence[str]) -> str:
    """Return the folder that the tracker file names."""
    content = read_whole(root, TRACKER, 4096)[0].decode("ascii", "replace").strip()
    plain = content.isascii() and content.isdigit() and len(content) < 20
    folder = f"iter_{int(content):07d}" if plain else content
    if folder in folders:
        return folder
    expected = shown(folder) if plain or content == "release" else "a number or 'release'"
    facts = {"where": root, "expected": expected, "found": ", ".join(folders[:20]) or "-"}
    remedy = "name the iteration's folder itself"
    raise BadCheckpoint(f"{TRACKER} says {shown(content)!r}, which is not here", facts, remedy=remedy)


def _read_arguments(root: Folder, store: Store, names: Sequence[str], *, plain: bool, trained: bool) -> _Arguments:
    """Return the arguments that a folder itself holds, or the wrapping program's config beside it; ``trained``: and its training."""
    said = _read_objects(root, store, trained=trained) if plain else _read_common(root, store, trained=trained)
    if said.config or RUN_CONFIG not in names:
        return said
    config, seen = read_bridge(root)
    writer = f"Megatron-Bridge ({RUN_CONFIG})"
    return replace(said, config=config, writer=writer, seen=(*said.seen, seen), program="megatron-bridge")


def _read_objects(root: Folder, store: Store, *, trained: bool) -> _Arguments:
    """Return the arguments of a plain torch.distributed.checkpoint, each an object of its own; ``trained``: and its training."""
    found, inner = {}, b""
    for name in sorted(READ):
        if name in store.places:
            found[name], pickled = _object(root, store, name)
            inner += pickled
    arguments = found.get("args")
    config = _Plain(root).table(arguments.fields) if isinstance(arguments, Namespace) else {}
    training = None
    if trained:
        held = {name: _object(root, store, name) for name in store.places if name.startswith(OBJECTS)}
        common = common_of({name: _Plain(root).value(value, 0) for name, (value, _) in held.items()})
        training = training_of(common, config, root) if OPTIMIZER in common else None
    return _Arguments(config, "torch.distributed.checkpoint", found, [], inner, training=training)


def _object(root: Folder, store: Store, name: str) -> tuple[object, bytes]:
    """Return an object of a store, which some wrap in a list, and the pickle that says so."""
    value, pickled, _ = read_object(root, store.places[name])
    return value[0] if isinstance(value, list) and len(value) == 1 else value, pickled


def _read_common(root: Folder, store: Store, *, trained: bool) -> _Arguments:
    """Return the arguments in megatron-core's common state, which a wrapping program leaves without any."""
    found = read_common(root, store)
    if found is None:
        return _Arguments({}, "megatron-core (no common state)", {}, [])
    common, seen, inner, era = found.value, found.sightings, found.inner, ">=0.19" if found.inner else "<0.19"
    if not isinstance(common, dict):
        raise BadCheckpoint("the common state is not a table", {"where": root, "found": type(common).__name__})
    arguments = common.get("args")
    config = _Plain(root).table(arguments.fields) if isinstance(arguments, Namespace) else {}
    place = COMMON_FILE if seen else "common_state"
    training = None
    if trained and OPTIMIZER in common:
        said = _Plain(root, found.archive).table({key: common.get(key) for key in COMMON})
        apart = [
            _Plain(root).value(read_object(root, store.places[name])[0], 0) for name in sorted(store.places) if is_apart(name)
        ]
        training = training_of({**said, OPTIMIZER: apart} if apart else said, config, root)
    if isinstance(common.get(MEANT_FOR), str):
        writer = f"carnet, for {shown(common[MEANT_FOR])}"
        return _Arguments(config, writer, common, seen, inner, common[MEANT_FOR], training=training)
    writer = f"megatron-core {era[:-4]} 0.19 ({place})"
    return _Arguments(config, writer, common, seen, inner, era=era, training=training)


def _notes(said: _Arguments, modes: Modes | None) -> dict[str, str]:
    notes = {"writer": said.writer}
    for key in ("iteration", "checkpoint_version"):
        if isinstance(said.facts.get(key), (int, float)):
            notes[key] = str(said.facts[key])
    return notes if modes is None else notes | {MODELOPT: modes.said}


class _Plain:
    """Turn what a pickle built into plain values, within a budget.

    A pickle may share one value in many places: written out, a few hundred bytes can become terabytes.
    """

    def __init__(self, where: Folder, archive: Archive | None = None) -> None:
        self._where, self._archive = where, archive
        self._left = _NODES

    def table(self, fields: Mapping[object, object], depth: int = 0) -> dict[str, object]:
        """Return a table with its keys as texts."""
        return {str(self.value(key, depth + 1)): self.value(item, depth + 1) for key, item in fields.items()}

    def value(self, value: object, depth: int) -> object:
        """Return one value."""
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise BadCheckpoint("the training arguments are too large or nested too deeply", {"where": self._where})
        if isinstance(value, str) and not is_text(value):
            raise BadCheckpoint(
                "the training arguments hold a text that is no Unicode", {"where": self._where, "found": shown(value)}
            )
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
            if self._archive is not None and value.shape in ((), (1,)):
                return number_of(self._archive, value)
            return f"tensor {value.dtype} {value.shape}"
        if isinstance(value, type) and issubclass(value, Inert):
            return value.name
        return str(value) if isinstance(value, Inert) else f"<{type(value).__name__}>"
