"""Which of an optimizer's state a checkpoint holds, and whether it can go along with the weights."""

from collections.abc import Mapping
from dataclasses import replace

from carnet.dialects.entries import entries
from carnet.dialects.kinds import KINDS
from carnet.dialects.planes import ALIKE, MASTER, STATE, is_of_plane, told_of
from carnet.dialects.rows import Dialect
from carnet.errors import BadRequest, NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.formats.stored import Checkpoint, Key, Stored
from carnet.inventory.buckets import LEAVE, REMEDY, in_buckets, unfolded
from carnet.inventory.flattened import FORM as FLATTENED
from carnet.inventory.flattened import are_flattened, as_weights_lie
from carnet.model.fields import Config, Value
from carnet.model.model import value
from carnet.storage.protocol import Folder
from carnet.storage.schemes import PathLike

FORMS = {  # a part of a name -> the form of which it is; DistributedOptimizer.sharded_state_dict in distrib_optimizer.py
    ".bucket_idx_": "dp_reshardable",  # which buckets.py reads
    ".param_state/": "dp_zero_gather_scatter",
    "distrib_optim.pt": "one file a rank",
    "model_optim_rng.pt": "one file a rank",
    "optimizer.": "tensors that name no weight",  # of torch's own FSDP, by number
}


def open_with(path: PathLike | Folder, also: str | None) -> Checkpoint:
    """Open a checkpoint, and locate the tensors of what shall go along with the weights."""
    return open_checkpoint(path, None if also is None else _all)


def _all(name: str) -> bool:
    return not name.startswith("rng_state")


def form_of(checkpoint: Checkpoint) -> str:
    """Return the form that a checkpoint has an optimizer's state in, "" where it has none."""
    names = [name for _, name in checkpoint.tensors]
    if told_of(names):
        return FLATTENED if are_flattened(checkpoint.tensors) else "tensors as the weights have"
    every = (*names, *checkpoint.objects)
    return next((form for part, form in FORMS.items() if any(part in name for name in every)), "")


def _told(checkpoint: Checkpoint) -> str:
    """Return the planes that a checkpoint has, in tensors as the weights have or in buckets."""
    names = [name for _, name in (*checkpoint.tensors, *_masters(checkpoint.tensors))]
    return told_of(names) or told_of(f"{STATE}{plane}." for name in names if (plane := in_buckets(name)))


def _masters(tensors: Mapping[Key, Stored]) -> dict[Key, Stored]:
    """Return the weights that an optimizer has no masters beside, as the plane that these are: it trains them themselves, in f32."""
    spelled = [f"{STATE}{word}." for word in (MASTER, *ALIKE)]
    return {
        (unit, f"{spelled[0]}{name}"): replace(stored, name=f"{spelled[0]}{name}")
        for (unit, name), stored in tensors.items()
        if stored.dtype == "f32" and (unit, f"{STATE}exp_avg.{name}") in tensors
        if not any((unit, f"{word}{name}") in tensors for word in spelled)
    }


def type_of_weights(tensors: Mapping[Key, Stored], config: Config) -> str | None:
    """Return the type in which a run computes all of whose weights are stored as their own masters; None of any other checkpoint."""
    if "planes" not in config:
        return None
    trained = [key for key in tensors if (key[0], f"{STATE}exp_avg.{key[1]}") in tensors]
    masters = ((tensors.get((unit, f"{STATE}{MASTER}.{name}")), tensors[unit, name]) for unit, name in trained)
    own = bool(trained) and all(master is not None and master.chunks == stored.chunks for master, stored in masters)
    return str(value(config, "dtype")) if own else None


def in_model_space(checkpoint: Checkpoint, dialect: Dialect, config: Config, kept: dict[Key, Stored]) -> dict[Key, Stored]:
    """Return what is kept of a checkpoint, each plane in tensors of its weights' shapes instead of buckets."""
    if "planes" not in config:
        return kept
    if not any(in_buckets(name) for _, name in kept):
        return as_weights_lie({**kept, **_masters(kept)})
    weights = {key: stored for key, stored in kept.items() if not in_buckets(key[1])}
    return {**weights, **unfolded(checkpoint, [*entries(dialect, {**config, "planes": ""}, weights)], config)}


def instead(tensors: Mapping[Key, Stored], kept: Mapping[Key, Stored]) -> Mapping[Key, Stored]:
    """Return the tensors of a checkpoint, where planes lay otherwise with these instead."""
    found = {key: stored for key, stored in kept.items() if is_of_plane(key[1]) and tensors.get(key) is not stored}
    return {**{key: stored for key, stored in tensors.items() if not in_buckets(key[1])}, **found} if found else tensors


def optimizer_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return in one line what a checkpoint has of an optimizer's state: subject -> a line; nothing where it has none."""
    form, found = form_of(checkpoint), _told(checkpoint)
    held = f"{', '.join(found.split())}, as {form}" if found else form
    return {"optimizer": f"{held}; --with optimizer brings it along" if found else held} if form else {}


def planes_of(checkpoint: Checkpoint, like: Config | None) -> dict[str, Value]:
    """Return the field that says which planes go along, if any: those asked for, or those of the model that this one should be.

    Refuses a source whose optimizer's state cannot go along.
    """
    if like is not None:
        said = value(like, "planes")
        return {"planes": said} if said else {}
    if checkpoint.also is None:
        return {}
    where, form = checkpoint.root, form_of(checkpoint)
    if not KINDS[checkpoint.dialect].arguments or not form or checkpoint.training is None:
        lacking = "tensors" if not form else "step and groups of parameters"
        facts = {"where": where, "kind": f"{checkpoint.dialect} ({checkpoint.format})", "lacking": lacking}
        raise BadRequest("no optimizer's state is here that could go along", facts, remedy=LEAVE)
    found = _told(checkpoint)
    if not found:
        raise NotSupported(f"an optimizer's state in the form {form!r} is not read", {"where": where}, remedy=REMEDY)
    if MASTER not in found.split():
        facts = {"where": where, "found": found.replace(" ", ", ")}
        raise NotSupported("the optimizer's state has no master weights", facts, remedy=LEAVE)
    return {"planes": found}
