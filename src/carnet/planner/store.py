"""How a new Megatron checkpoint is cut: which rank's file holds which box of which tensor.

A ``torch_dist`` store has global tensors in chunks. Chunks are cut as Megatron's ranks would write them: a layer each, an
expert each, and along the axis that tensor parallelism cuts; a rank writes what lies in its stage, and what all ranks hold is
written by the first.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product

from carnet.dialects.entry import Entry
from carnet.dialects.megatron.ranks import Ranks, boxes, stages_of
from carnet.formats.torch_dist_files import StoreChunk
from carnet.model.fields import Config
from carnet.model.model import sizes
from carnet.model.tensors import CARRIED
from carnet.plans.request import Request

Held = tuple[Entry, StoreChunk]


def chunks(
    wanted: Sequence[Entry], dtypes: Mapping[tuple[str, str], str], config: Config, request: Request
) -> dict[str, list[Held]]:
    """Return the chunks of each file, the files in the order of their ranks: rank = tp + TP x (ep + EP x stage)."""
    ranked = Ranks(request.tp, request.pp, request.ep, 1 if request.ep > 1 else request.tp)
    stages = stages_of(config, request.pp)
    files: dict[int, list[Held]] = defaultdict(list)
    for entry in wanted:
        for box, ranks in boxes(entry, ranked):
            name = entry.reading.tensors[ranks.get("layer", 0)][0]
            stage = stages[name.tensor.stage if name.layer is None else name.layer]
            rank = ranks.get("tp", 0) + request.tp * (ranks.get("ep", 0) + request.ep * stage)
            files[rank].append((entry, StoreChunk(entry.name, dtypes[entry.unit, entry.name], entry.shape, box)))
    return {f"__{rank}_0.distcp": files[rank] for rank in sorted(files)}


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
