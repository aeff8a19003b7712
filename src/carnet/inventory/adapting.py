"""Adapters that are added to their weights: those of the checkpoint itself, or of another folder, whose tensors are lent.

Either way they are tensors of one inventory then, and what they change is said beside it: the model is that of the weights alone.
"""

from dataclasses import replace

import numpy as np

from carnet.architectures.known import dialect_of, padded
from carnet.architectures.wrappers import rewrapped
from carnet.dialects.kinds import KINDS, OWN
from carnet.dialects.writing import write
from carnet.errors import BadRequest, NotSupported
from carnet.formats.adapters import BRIDGE, SAID
from carnet.formats.stored import Checkpoint, label_of
from carnet.inventory.changed import Change, Changes
from carnet.inventory.survey import Inventory, take
from carnet.model.adapters import ALONE, FIELD, bare, is_dora, parts_of, scale
from carnet.model.fields import Config
from carnet.model.model import canonical_shapes, number
from carnet.model.tensors import ADAPTER


def adapted(base: Inventory, adapter: str | None, factor: float | None) -> Inventory:
    """Return an inventory with what adapters change in its weights, so many times; as it is where no adapters are named.

    Raises BadRequest where there are none, or where they are of weights that the model does not have.
    """
    if adapter is None:
        if factor is not None:
            raise BadRequest("--adapter-scale is for adapters that are added", remedy="name them: --adapter DIRECTORY, or own")
        return base
    where = str(base.checkpoint.root)
    if adapter == OWN:
        _refuse_alone(base, where)
        if not base.config.get(FIELD):
            raise BadRequest("the checkpoint holds no adapters of its own", {"where": where}, remedy="--adapter DIRECTORY")
        return replace(base, config=bare(base.config), changes=_changes(base.config, base.config, factor, where))
    if base.config.get(FIELD):
        remedy = "--adapter own adds those; --drop '*.adapter.*' leaves them behind"
        raise BadRequest("the checkpoint holds adapters of its own", {"where": where}, remedy=remedy)
    lent = base.checkpoint.adapter
    assert lent is not None, "the folder was opened"
    other = _beside(base, lent)
    changes = _changes(other.config, base.config, factor, str(lent.root))
    twice = next(iter(base.entries.keys() & other.entries.keys()), None)
    if twice is not None:
        raise NotSupported("a tensor of the adapters has the name of one of the model", {"tensor": label_of(twice)})
    tensors = {**base.checkpoint.tensors, **{key: other.checkpoint.tensors[key] for key in other.entries}}
    return replace(
        base,
        checkpoint=replace(base.checkpoint, tensors=tensors),
        entries={**base.entries, **other.entries},
        dropped={**base.dropped, **other.dropped},
        changes=changes,
    )


def _refuse_alone(base: Inventory, where: str) -> None:
    if base.config.get(ALONE):
        remedy = "--adapter with this folder, and the base model as the checkpoint"
        raise BadRequest("the folder holds adapters without their model", {"where": where}, remedy=remedy)


def _beside(base: Inventory, lent: Checkpoint) -> Inventory:
    """Return the adapters of another folder; one without the config of their base is read by that of the model at hand."""
    kind = KINDS[lent.dialect]
    if kind.arguments:
        found = take(replace(lent, family=base.family.name), vocab=number(base.config, "vocab"), alone=True)
    else:
        if lent.config.keys() <= {SAID, BRIDGE}:
            hf = dialect_of(base.family, kind.spoken, base.config)
            said = rewrapped(write(hf.table, padded(hf, base.config), base.family.traits, "the config of the adapters' base"))
            lent = replace(lent, config={**said, **lent.config})
        found = take(lent, alone=True)
    if not found.config.get(FIELD):
        raise BadRequest("--adapter names a folder without adapters", {"where": str(lent.root)})
    return found


def _changes(config: Config, base: Config, factor: float | None, where: str) -> Changes:
    """Return what the adapters of a model change in a base; raise where these are not of one shape."""
    shapes, there = canonical_shapes(bare(config)), canonical_shapes(bare(base))
    found = dict[str, Change]()
    for name, shape in shapes.items():
        parts = parts_of(name, config)
        if not parts:
            continue
        if there.get(name) != shape:
            facts = {
                "where": where,
                "tensor": name,
                "expected": list(shape),
                "found": list(there.get(name, ())) or "no such weight",
            }
            raise BadRequest(f"the adapters are of another model: that of {name!r} does not fit", facts)
        times = float(np.float32(scale(config, name) * (1.0 if factor is None else factor)))
        found[name] = Change(parts[0], parts[1], times, parts[2] if is_dora(config) else None)
    factors = {name: shape for name, shape in canonical_shapes(config).items() if name.tensor.role == ADAPTER}
    return Changes({name: found[name] for name in shapes if name in found}, factors)
