"""The recut of a checkpoint with its optimizer's state, master weights and two moments in f32, next to `cp -r` of it.

The model is that of bench.machine as carnet stores it for Megatron; torch.distributed.checkpoint saves it once more with three planes
beside each weight. Preparation and ratios are those of bench.cross. `run` carries out a plan that was
made before; `cross` plans, writes and proves.
"""

import os
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bench.cross import COPY, Contender, prepare, report, take_turns
from bench.machine import CARNET, write
from bench.measure import nbytes, run, size_and_place

PLANES = ("param", "exp_avg", "exp_avg_sq")
GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "lr": 1e-4, "step": 1000}


def trained(weights: Path, root: Path) -> Path:
    """Write a store of a Megatron checkpoint once more, with an optimizer's state."""
    [folder] = weights.glob("iter_*")
    said = torch.load(folder / "common.pt", weights_only=False)
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(tuple(each.size), dtype=torch.bfloat16) for name, each in metadata.items() if hasattr(each, "size")
    }
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    planes = {f"optimizer.state.{plane}.{name}": held.float() for name, held in state.items() for plane in PLANES}
    target = root / folder.name
    target.mkdir(parents=True)
    save({**state, **planes}, storage_writer=FileSystemWriter(target, thread_count=2), no_dist=True)
    said |= {"optimizer": {"optimizer": {"param_groups": [GROUP]}}, "opt_param_scheduler": {"num_steps": 1000}, "iteration": 1}
    torch.save(said, target / "common.pt")
    shutil.copy(folder / "metadata.json", target)
    shutil.copy(weights / "latest_checkpointed_iteration.txt", root)
    return root


def main() -> None:
    """Measure all contenders and show them side by side."""
    asked = size_and_place(__doc__, 1, "size of the weights; the optimizer's state is six times that")
    first, output, made = write(asked.at, asked.gb), asked.at / "output", [asked.at / "weights", asked.at / "trained"]
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    run([*CARNET, "cross", str(first), str(made[0]), "--to", "megatron"])
    source = trained(*made)
    shutil.rmtree(made[0])
    words = ("--to", "megatron", "--tp", "2", "--pp", "2", "--with", "optimizer")
    plan = asked.at / "optimizer.plan"
    plan.unlink(missing_ok=True)
    run([*CARNET, "plan", str(source), *words, "-o", str(plan)])
    contenders = [
        Contender(COPY, ("cp", "-r", str(source), str(output))),
        Contender("carnet run", (*CARNET, "run", str(plan), str(output))),
        Contender("carnet cross --with optimizer", (*CARNET, "cross", str(source), str(output), *words)),
    ]
    prepare(source, output)
    measured, written = take_turns(contenders, asked.rounds, source, output)
    size = nbytes(source)
    print(
        f"\n{asked.at}, {len(os.sched_getaffinity(0))} cores; weights and optimizer's state of {size / 1e9:.2f} GB", flush=True
    )
    report("optimizer", measured, written, size)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
