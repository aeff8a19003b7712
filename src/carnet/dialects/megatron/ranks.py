"""How Megatron's ranks share the tensors of a store: which box of each a rank holds.

A layer each, an expert each, and along the axis that tensor parallelism cuts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from carnet.algebra.box import Box
from carnet.algebra.layout import JOIN, cut_evenly, cut_unevenly
from carnet.dialects.entry import Entry, Reading
from carnet.model.fields import Config
from carnet.model.model import further, number
from carnet.model.tensors import AXES

Cut = tuple[int, int, str, int]  # first index, number of indices, the axis that is cut ("" for none), the rank along it


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks share what."""

    tp: int  # every layer
    pp: int  # the layers
    ep: int  # the experts
    etp: int  # each expert


def stages_of(config: Config, pp: int) -> dict[int | str, int]:
    """Return the stage of each layer, of what is first in the model and of what is last; layers for further tokens are on the last."""
    count = number(config, "layers")
    shares = [cut_unevenly(count, pp, stage) for stage in range(pp)]
    found: dict[int | str, int] = {
        layer: stage for stage, share in enumerate(shares) for layer in range(share.start, share.stop)
    }
    return found | {"first": 0, "last": pp - 1} | dict.fromkeys(further(config), pp - 1)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How a run shares the layers among stages, as its arguments say."""

    ranks: int
    virtual: int  # stages that each rank has, which take turns: 0, 1, 0, 1
    first: int | None  # layers of the first rank, where that is said
    last: int | None
    embedding: bool  # whether what is first in the model counts as a layer
    loss: bool  # and what is last
    layout: str = ""  # a letter for each layer and a stroke between stages, where that is said: "Et*3|(tt|)*29,m|L"


def placed(config: Config, pipeline: Pipeline) -> dict[int | str, tuple[int, int]]:
    """Return the rank and the virtual stage of each layer, of what is first and of what is last; {} where layers do not divide.

    get_num_layers_to_build in megatron/core/transformer/transformer_block.py
    """
    count, ranks, virtual = number(config, "layers"), pipeline.ranks, pipeline.virtual
    if pipeline.layout:
        return _laid_out(config, pipeline)
    said = {rank: layers for rank, layers in ((0, pipeline.first), (ranks - 1, pipeline.last)) if layers is not None}
    others = count - sum(said.values()) + pipeline.embedding + pipeline.loss
    each = others // (ranks - len(said)) if len(said) < ranks else 0
    stages = [(rank, turn) for turn in range(virtual) for rank in range(ranks)]
    layers = [said.get(rank, each) // virtual for rank, _ in stages]
    layers[0] -= pipeline.embedding
    layers[-1] -= pipeline.loss
    if sum(layers) != count or min(layers) < 0:
        return {}
    found = dict[int | str, tuple[int, int]](
        enumerate(stage for stage, many in zip(stages, layers, strict=True) for _ in range(many))
    )
    return found | {"first": stages[0], "last": stages[-1]} | dict.fromkeys(further(config), stages[-1])


def _laid_out(config: Config, pipeline: Pipeline) -> dict[int | str, tuple[int, int]]:
    """Return the same of a layout: PipelineParallelLayerLayout in megatron/core/transformer/pipeline_parallel_layer_layout.py."""
    text = pipeline.layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, lambda found: found[1] * int(found[2]), text)
    known = {"E": ["first"], "t": [*range(number(config, "layers"))], "m": [*further(config)], "L": ["last"]}
    letters = [
        (letter, (at % pipeline.ranks, at // pipeline.ranks)) for at, each in enumerate(text.split("|")) for letter in each
    ]
    if sorted(letter for letter, _ in letters) != sorted(letter for letter, each in known.items() for _ in each):
        return {}
    names = {letter: iter(each) for letter, each in known.items()}
    return {next(names[letter]): stage for letter, stage in letters}


def boxes(entry: Entry, ranks: Ranks) -> Iterator[tuple[Box, dict[str, int]]]:
    """Yield the boxes of a stored tensor that one rank writes in one chunk, with its place along each kind of parallelism."""
    per_dim = [_cuts(entry.reading, dim, entry.shape[dim], ranks) for dim in range(len(entry.shape))]
    for choice in product(*per_dim):
        box = Box(tuple(cut[0] for cut in choice), tuple(cut[1] for cut in choice))
        yield box, {kind: rank for _, _, kind, rank in choice if kind}


def _cuts(reading: Reading, dim: int, length: int, ranks: Ranks) -> list[Cut]:
    """Cut one stored dimension along its outermost axis."""
    axes = reading.pattern.dims[dim]
    if not axes:
        return [(0, length, "", 0)]
    size = {axis: share.stop - share.start for axis, share in reading.shares.items()}
    if axes[0] == "layer":
        return [(layer, 1, "layer", layer) for layer in range(length)]
    if axes[0] == "expert":
        each = size["expert"] // ranks.ep or 1
        return [(expert, 1, "ep", expert // each) for expert in range(length)]
    axis, world = AXES.get(reading.cut), ranks.tp
    if axis is not None and axis.among == "expert":
        axis, world = AXES[axis.inner], ranks.etp
    if axis is None or world == 1:
        return [(0, length, "", 0)]
    cut = axis.name
    if axes[0] == cut and axis.cut == "repeated" and size[cut] % world and size[cut] * size[axis.inner] % world == 0:
        # fewer KV heads than ranks: Megatron cuts the rows where they fall, megatron/core/transformer/attention.py SelfAttention
        return list(_shards("rows", length, 1, 0, world))
    if axes[0] == cut:
        return list(_shards(cut, size[cut], length // size[cut], 0, world))
    if axes[0] == JOIN and all(inner[:1] == (cut,) for _, inner in reading.pattern.parts):
        wide = length // len(reading.pattern.parts)
        return [
            shard
            for part in range(len(reading.pattern.parts))
            for shard in _shards(cut, size[cut], wide // size[cut], part * wide, world)
        ]
    return [(0, length, "", 0)]


def _shards(axis: str, size: int, inner: int, start: int, tp: int) -> Iterator[Cut]:
    for rank in range(tp):
        share = cut_evenly(axis, size, tp, rank)
        yield start + share.start * inner, (share.stop - share.start) * inner, "tp", rank
