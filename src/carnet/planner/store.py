"""How a new Megatron checkpoint is cut: which rank's file holds which box of which tensor.

A ``torch_dist`` store has global tensors in chunks. Chunks are cut as Megatron's ranks would write them: a layer each, an
expert each, and along the axis that tensor parallelism cuts; a rank writes what lies in its stage, and what all ranks hold is
written by the first.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from carnet.algebra.box import Box
from carnet.algebra.layout import JOIN, cut_evenly, cut_unevenly
from carnet.dialects.entry import Entry, Reading
from carnet.formats.torch_dist_files import StoreChunk
from carnet.model.fields import Config
from carnet.model.model import further, number, sizes
from carnet.model.tensors import AXES, CARRIED
from carnet.plans.request import Request

Cut = tuple[int, int, str, int]  # first index, number of indices, the axis that is cut ("" for none), the rank along it

Held = tuple[Entry, StoreChunk]


def chunks(
    wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], config: Config, request: Request
) -> dict[str, list[Held]]:
    """Return the chunks of each file, the files in the order of their ranks: rank = tp + TP x (ep + EP x stage)."""
    stages = _stages(config, request.pp)
    files: dict[int, list[Held]] = defaultdict(list)
    for entry in wanted:
        for box, ranks in _boxes(entry, request):
            name = entry.reading.tensors[ranks.get("layer", 0)][0]
            stage = stages[name.tensor.stage if name.layer is None else name.layer]
            rank = ranks.get("tp", 0) + request.tp * (ranks.get("ep", 0) + request.ep * stage)
            files[rank].append((entry, StoreChunk(entry.name, dtypes[entry.unit, entry.name], entry.shape, box)))
    return {f"__{rank}_0.distcp": files[rank] for rank in sorted(files)}


def _stages(config: Config, pp: int) -> dict[int | str, int]:
    """Return the stage of each layer, of what is first in the model and of what is last; layers for further tokens are on the last."""
    count = number(config, "layers")
    shares = [cut_unevenly(count, pp, stage) for stage in range(pp)]
    found: dict[int | str, int] = {
        layer: stage for stage, share in enumerate(shares) for layer in range(share.start, share.stop)
    }
    return found | {"first": 0, "last": pp - 1} | dict.fromkeys(further(config), pp - 1)


def _boxes(entry: Entry, request: Request) -> Iterator[tuple[Box, dict[str, int]]]:
    """Yield the boxes of a stored tensor that one rank writes in one chunk, with its place along each kind of parallelism."""
    per_dim = [_cuts(entry.reading, dim, entry.shape[dim], request) for dim in range(len(entry.shape))]
    for choice in product(*per_dim):
        box = Box(tuple(cut[0] for cut in choice), tuple(cut[1] for cut in choice))
        yield box, {kind: rank for _, _, kind, rank in choice if kind}


def _cuts(reading: Reading, dim: int, length: int, request: Request) -> list[Cut]:
    """Cut one stored dimension along its outermost axis."""
    axes = reading.pattern.dims[dim]
    if not axes:
        return [(0, length, "", 0)]
    size = {axis: share.stop - share.start for axis, share in reading.shares.items()}
    if axes[0] == "layer":
        return [(layer, 1, "layer", layer) for layer in range(length)]
    if axes[0] == "expert":
        each = size["expert"] // request.ep or 1
        return [(expert, 1, "ep", expert // each) for expert in range(length)]
    axis = AXES.get(reading.cut)
    if axis is not None and axis.among == "expert":
        axis = AXES[axis.inner] if request.ep == 1 else None
    if axis is None or request.tp == 1:
        return [(0, length, "", 0)]
    cut = axis.name
    if axes[0] == cut and axis.cut == "repeated" and size[cut] % request.tp and size[cut] * size[axis.inner] % request.tp == 0:
        # fewer KV heads than ranks: Megatron cuts the rows where they fall, megatron/core/transformer/attention.py SelfAttention
        return list(_shards("rows", length, 1, 0, request.tp))
    if axes[0] == cut:
        return list(_shards(cut, size[cut], length // size[cut], 0, request.tp))
    if axes[0] == JOIN and all(inner[:1] == (cut,) for _, inner in reading.pattern.parts):
        wide = length // len(reading.pattern.parts)
        return [
            shard
            for part in range(len(reading.pattern.parts))
            for shard in _shards(cut, size[cut], wide // size[cut], part * wide, request.tp)
        ]
    return [(0, length, "", 0)]


def _shards(axis: str, size: int, inner: int, start: int, tp: int) -> Iterator[Cut]:
    for rank in range(tp):
        share = cut_evenly(axis, size, tp, rank)
        yield start + share.start * inner, (share.stop - share.start) * inner, "tp", rank


def states(wanted: Sequence[Entry], config: Config, spelling: str) -> list[str]:
    """Return the names of the empty states that Megatron's modules look for beside their weights.

    Linear modules have one in both specs, norms of their own only with Transformer Engine; one for each layer and expert.
    """
    found = []
    for entry in wanted:
        module, last = entry.name.rsplit(".", 1)
        linear = ".linear_" in module or module.endswith(("eh_proj", ".self_attention", ".mlp"))
        norm = spelling == "te" and module.rsplit(".", 1)[-1].endswith(("norm", "layernorm"))
        first = entry.names[0]
        if last != "weight" or not (linear or norm) or first.plane or first.tensor.role == CARRIED:
            continue
        axes = [dim[0] for dim in entry.reading.pattern.dims if dim and dim[0] in ("layer", "expert")]
        counts = [len(entry.reading.tensors) if axis == "layer" else sizes(config)["expert"] for axis in axes] or [1]
        for place in product(*map(range, counts)):
            found.append(f"{module}._extra_state/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, counts))}")
        if module.startswith("mtp.") and module.endswith("linear_proj") and spelling == "te":
            # megatron-core 0.16 looks for it here and in no other layer
            found.append(f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_0_1")
    return found
