"""One rank of several that save models with megatron-core's torch_dist.

Arguments: rank, number of ranks, rendezvous file, models, folder. The layers are shared as pipeline ranks share them; tensors and
states are those of all layers, as a homogeneous model has them.
"""

import os
import sys

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor


def save(rank: int, world: int, meeting: str, given: str, folder: str) -> None:
    """Save each model (name -> common state, tensors, states) together with the other ranks."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[return-value]  # what megatron-core asks of CUDA without need
    torch.cuda.synchronize = lambda: None
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for name, (common, tensors, states) in torch.load(given, weights_only=False).items():
        state = dict(common)
        for key, tensor in tensors.items():
            if key.startswith("decoder.layers."):
                count = len(tensor) // world
                mine = tensor[rank * count : (rank + 1) * count].clone()
                state[key] = ShardedTensor.from_rank_offsets(key, mine, (0, rank, world))
            else:
                state[key] = ShardedTensor.from_rank_offsets(key, tensor.clone(), replica_id=rank)
        for number, (key, offset, shape, value) in enumerate(states):
            if offset[0] * world // shape[0] == rank:
                state[f"state {number}"] = ShardedObject(key, value, shape, offset)
        target = f"{folder}/{name}"
        if rank == 0:
            os.makedirs(target)
        dist.barrier()
        dist_checkpointing.save(state, target)
    dist.destroy_process_group()


if __name__ == "__main__":
    save(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
