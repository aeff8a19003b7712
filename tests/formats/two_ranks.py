"""One rank of two that save models without Megatron's torch_dist: argv is rank, rendezvous file, states (folder -> format, state).

``torch_dcp``: torch's own FSDP2 shares the rows of every weight evenly. ``fsdp_dtensor``: Megatron-FSDP cuts flat buffers, so the
ranks share rows unevenly; the first projection of a gated MLP is two, ``_w`` and ``_v``, as handle_swiglu_in_state_dict splits it. The
places of the uneven chunks are megatron-core's own reckoning.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def save(rank: int, meeting: str, states: str) -> None:
    """Save every state together with the other rank."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for folder, (kind, saved) in torch.load(states, weights_only=False).items():
        if kind == "torch_dcp":
            rows = {name: distribute_tensor(full, mesh, [Shard(0)]) for name, full in saved["model"].items()}
            dcp.save({**saved, "model": rows}, storage_writer=dcp.FileSystemWriter(folder))
            continue
        model: dict[str, DTensor] = {}
        for number, (plain, full) in enumerate(saved.pop("model").items()):
            name = f"module.{plain}"  # MegatronFSDP wraps the model
            cut, middle = (number * 7) % (len(full) + 1), len(full) // 2
            if ".linear_fc1.weight" in name:
                model[f"{name}_w"] = shared(full[:middle], min(cut, middle), rank, mesh)
                model[f"{name}_v"] = shared(full[middle:], max(cut - middle, 0), rank, mesh)
            else:
                model[name] = shared(full, cut, rank, mesh)
        moment = {
            "module.module.module.decoder.final_layernorm.weight": {"exp_avg": model["module.decoder.final_layernorm.weight"]}
        }
        optimizer = {"state": moment, "param_groups": [{"lr": 1.0}]}
        random = {"(0, 0)": [{"torch_rng_state": torch.get_rng_state()}]}
        state = {**saved, "model": model, "optimizer": optimizer, "rng_state": random}
        preprocess_state_dict_for_uneven_dtensor(state)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    dist.destroy_process_group()


def shared(full: torch.Tensor, cut: int, rank: int, mesh: DeviceMesh) -> DTensor:
    """Return a tensor whose rows up to ``cut`` are the first rank's; a tensor may be whole on one of the two."""
    mine = full[:cut] if rank == 0 else full[cut:]
    return DTensor.from_local(mine.clone(), mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


if __name__ == "__main__":
    save(int(sys.argv[1]), *sys.argv[2:])
