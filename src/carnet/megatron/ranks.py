"""How the ranks of a running Megatron job share a model: what ``carnet.live`` asks for, read from megatron-core's own state."""

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from carnet.errors import BadRequest
from carnet.live.grid import ORDER, Grid, Seat, seats


def grid(config: TransformerConfig, order: str = ORDER) -> Grid:
    """Return the grid of a job whose ``parallel_state`` is initialized, with the layers that megatron-core gives each stage.

    ``order`` is that of ``initialize_model_parallel``, which does not keep it. Raises BadRequest where this rank has another place
    than the order says.
    """
    stages, chunks = parallel_state.get_pipeline_model_parallel_world_size(), config.virtual_pipeline_model_parallel_size or 1
    found = Grid(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=stages,
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
        cp=parallel_state.get_context_parallel_world_size(),
        vp=chunks,
        layers=[[_layers(config, stage, chunk, chunks) for chunk in range(chunks)] for stage in range(stages)],
        order=order,
    )
    place = Seat(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    said = seats(found, range(dist.get_world_size()))[dist.get_rank()]
    if said != place:
        facts = {"rank": dist.get_rank(), "order": order, "place in this order": str(said), "place in Megatron": str(place)}
        raise BadRequest("the ranks are in another order", facts, remedy='name it: grid(config, order="tp-cp-ep-pp-dp")')
    return found


def _layers(config: TransformerConfig, stage: int, chunk: int, chunks: int) -> int:
    count: int = get_num_layers_to_build(config, vp_stage=chunk if chunks > 1 else None, pp_rank=stage)
    return count
