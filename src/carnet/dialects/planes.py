"""The *planes* of a model's weights: what an optimizer keeps of each, in the weight's own shape, named after it.

A stored tensor of a plane is the row of its weight once more: another name, other canonical tensors, everything else as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from carnet.dialects.entry import Entry
from carnet.dialects.units import Present
from carnet.model.fields import Config
from carnet.model.model import planes
from carnet.model.tensors import Canonical

# megatron/core/dist_checkpointing/optimizer.py optim_state_to_sharding_state, and distrib_optimizer.py
STATE = "optimizer.state."
OPTIMIZER = "optimizer state"  # why what is not asked for is left behind
MASTER = "param"  # as fully_reshardable has it
ALIKE = {"fp32_param": MASTER}  # of Float16OptimizerWithFloat16Params, megatron/core/optimizer/optimizer.py
ORDER = (MASTER, "exp_avg", "exp_avg_sq")


def is_of_plane(name: str) -> bool:
    """Say whether a stored tensor is of a plane.

    >>> is_of_plane("optimizer.state.exp_avg.output_layer.weight"), is_of_plane("optimizer.distributed.dp_group_idx_0.x")
    (True, False)
    """
    return name.startswith(STATE)


def told_of(names: Iterable[str]) -> str:
    """Return the planes that stored tensors are of, as the field that says them.

    >>> told_of(["optimizer.state.exp_avg.output_layer.weight", "optimizer.state.fp32_param.output_layer.weight", "x"])
    'param exp_avg'
    """
    found = {name.removeprefix(STATE).partition(".")[0] for name in names if is_of_plane(name)}
    words = {ALIKE.get(word, word) for word in found}
    return " ".join(sorted(words, key=lambda word: (ORDER.index(word) if word in ORDER else len(ORDER), word)))


def in_planes(entries: Sequence[Entry], config: Config, present: Present) -> Iterator[Entry]:
    """Yield what a checkpoint stores of each plane of some entries: of a source what is there, of a target all."""
    for plane in planes(config):
        spelled = [plane, *(word for word, other in ALIKE.items() if other == plane)]
        names = dict[int, tuple[tuple[Canonical, ...], ...]]()  # the experts of a layer share them
        for entry in entries:
            if not entry.names[0].trained:
                continue
            if (tensors := names.get(id(entry.tensors))) is None:
                tensors = names[id(entry.tensors)] = tuple(tuple(name.on(plane) for name in each) for each in entry.tensors)
            for word in spelled if present is not None else spelled[:1]:
                name = f"{STATE}{word}.{entry.name}"
                if present is None or (entry.unit, name) in present:
                    yield replace(entry, name=name, tensors=tensors)
                    break
