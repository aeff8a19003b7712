"""What Megatron-FSDP saves of a training, ``fsdp_dtensor``, in the words that the other forms have.

::

    model.module.decoder...fc2.weight                               f32: the optimizer's own, whatever the ranks compute in
    optimizer.state.module.module.module.decoder...fc2.weight.exp_avg  ->  optimizer.state.exp_avg.model.module.decoder...fc2.weight
    optimizer.param_to_group_meta.module.module.module.decoder...fc2.weight.lr      an object for each word of a parameter's group

The wrappers around a model are ``module.`` each: DistributedOptimizer.sharded_param_state_fsdp_dtensor in megatron/core/optimizer.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from carnet.formats.stored import Stored
from carnet.formats.training import OPERATIONS, OPTIMIZER, SCHEDULER

_STATE = re.compile(r"optimizer\.state\.(?:module\.)+(?P<weight>.+)\.(?P<plane>[a-z_]+)")
_WRAPPED = re.compile(r"model\.(?:module\.)*(?P<weight>.+)")
GROUPS = "optimizer.param_to_group_meta."
OBJECTS = (GROUPS, f"{SCHEDULER}.", OPERATIONS, "iteration")  # what begins the names of objects that say how far a training is


def by_plane(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a store, what an optimizer keeps under its plane and the name of its weight."""
    weights = {found["weight"]: name for name in tensors if (found := _WRAPPED.fullmatch(name))}

    def named(name: str) -> str:
        found = _STATE.fullmatch(name)
        known = weights.get(found["weight"]) if found else None
        return f"optimizer.state.{found['plane']}.{known}" if found and known else name

    return {named(name): replace(stored, name=named(name)) for name, stored in tensors.items()}


def common_of(objects: Mapping[str, object]) -> dict[str, object]:
    """Return the common state that objects of their own say, name -> value."""
    groups = defaultdict[str, dict[str, object]](dict)
    for name, value in objects.items():
        if name.startswith(GROUPS):
            parameter, _, word = name.removeprefix(GROUPS).rpartition(".")
            groups[parameter][word] = value
    scheduler = {name.partition(".")[2]: value for name, value in objects.items() if name.startswith(f"{SCHEDULER}.")}
    said = {name: objects[name] for name in (OPERATIONS, "iteration") if name in objects}
    return {**said, SCHEDULER: scheduler, **({OPTIMIZER: {"param_groups": [*_distinct(groups)]}} if groups else {})}


def _distinct(groups: Mapping[str, dict[str, object]]) -> Iterator[dict[str, object]]:
    """Yield each group once: one is told again for each of its parameters."""
    seen = list[dict[str, object]]()
    for group in groups.values():
        if group not in seen:
            seen.append(group)
            yield group
