"""What vLLM's model holds after loading and before kernels pack it: its own digests of every parameter of a rank, without an engine.

A program that every rank runs: ``python held.py SAID OUT RANK``, where SAID is JSON of ``folders``, ``tp``, ``pp``, ``ep``, ``port``.
vLLM builds and loads the model as a worker does; when it would begin to pack, its digests are taken and the model is let go.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import base_loader, get_model
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests


class Loaded(Exception):
    """The model is loaded: what it holds."""


def stop(model, *_):
    """Stand where vLLM begins to pack."""
    raise Loaded(compute_tensor_digests(model))


def main(said, out, rank):
    """Write the digests of every folder."""
    base_loader.process_weights_after_loading = stop
    torch.accelerator.empty_cache = lambda: None  # as v1/worker/cpu_model_runner.py has it where there is no accelerator
    found = []
    for at, folder in enumerate(said["folders"]):
        config = EngineArgs(
            model=folder,
            tensor_parallel_size=said["tp"],
            pipeline_parallel_size=said["pp"],
            enable_expert_parallel=said["ep"],
            dtype="bfloat16",
            max_model_len=64,
            enforce_eager=True,
            skip_tokenizer_init=True,
        ).create_engine_config()
        config.parallel_config.rank = rank
        with set_current_vllm_config(config):
            if at == 0:
                os.environ["VLLM_DIST_IDENT"] = (
                    f"held-{said['port']}"  # of the memory that ranks share, as v1/worker/cpu_worker.py sets it
                )
                place = f"tcp://127.0.0.1:{said['port']}"
                init_distributed_environment(said["tp"] * said["pp"], rank, place, rank, "gloo")
                ensure_model_parallel_initialized(said["tp"], said["pp"])
            try:
                get_model(vllm_config=config)
            except Loaded as loaded:
                pp, tp = divmod(rank, said["tp"])
                found.append({f"dp0:pp{pp}:pcp0:tp{tp}:{name}": digest for name, digest in loaded.args[0].items()})
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
