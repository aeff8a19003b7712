"""A program for tests: two ranks train models under ModelOpt's quantizers and save them; one rank has ModelOpt export what they saved.

    python trained_by_modelopt.py train FOLDER RANK     FOLDER/NAME for each of JOBS, with its modelopt_state
    python trained_by_modelopt.py export FOLDER         FOLDER/NAME.modelopt from FOLDER/NAME and the config in FOLDER/NAME.hf

The second needs the newest megatron-core: ModelOpt's exporter asks for a class that 0.16 does not have. Processes of their own, because
ModelOpt changes what it is imported beside; and guarded, because megatron-core starts one of its own that imports this again.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

RATE = 0.5  # of a step so large that weights leave the range that calibration saw


@dataclass(frozen=True, slots=True)
class Job:
    """A model, how two ranks share it, and how its weights are quantized."""

    more: dict  # training arguments beside those of all
    tp: int
    ep: int
    scheme: str


JOBS = {
    "dense": Job({}, 2, 1, "fp8"),
    "mixture": Job(
        {
            "num_experts": 4,
            "moe_ffn_hidden_size": 96,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "qk_layernorm": True,
        },
        *(1, 2, "nvfp4"),
    ),
}


def arguments(job):
    """Return the training arguments of a job."""
    from tests.megatron.conftest import BASE

    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "vocab_size": 128,
        "padded_vocab_size": 128,
    }
    return {**BASE, **sizes, "params_dtype": "torch.bfloat16", "bf16": True, **job.more}


@contextlib.contextmanager
def shared(tp=1, ep=1):
    """Share a model among the ranks; what megatron-core asks of CUDA for no purpose here, a CPU says."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, expert_model_parallel_size=ep)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[return-value]
    torch.cuda.synchronize = lambda *_: None
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    yield
    parallel_state.destroy_model_parallel()


def built(said, seed, tp=1, ep=1):
    """Return the part of a model that a rank has, with random weights."""
    from megatron.core.models.gpt import GPTModel

    from carnet.megatron.models import config_of, keywords_of
    from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep}
    plain = {"perform_initialization": False, "use_cpu_initialization": True, "gradient_accumulation_fusion": False}
    config = config_of(said, **sizes, **plain)
    model = GPTModel(config, get_gpt_modelopt_spec(config, remap_te_layernorm=True), **keywords_of(said, hybrid=False))
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        alike = "norm" in name or "router" in name or "embedding" in name  # what ranks have copies of
        weight.data = torch.ones(weight.shape) if alike else torch.empty(weight.shape).normal_(std=0.2, generator=random)
        if "router" in name or "embedding" in name:
            weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.to(torch.bfloat16)


def forward(model):
    """Run some tokens through a model."""
    from tests.megatron.conftest import OnCpu

    tokens = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(5))
    future = torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), 1)
    with OnCpu(), torch.compiler.set_stance("force_eager"):
        return model(tokens, torch.arange(16)[None].expand(2, -1), future)


def train(folder, rank):
    """Calibrate, train a step, save."""
    import modelopt.torch.quantization as mtq
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

    wishes = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, job in JOBS.items():
        with shared(job.tp, job.ep):
            said = arguments(job)
            model = built(said, 17 + rank, job.tp, job.ep)
            with torch.no_grad():
                mtq.quantize(model, wishes[job.scheme], forward)
            if job.scheme == "nvfp4":  # whose simulation is a kernel for GPUs
                mtq.disable_quantizer(model, "*")
            forward(model).float().square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=RATE).step()
            if job.scheme == "nvfp4":
                for wish in ("*weight_quantizer", "*input_quantizer"):
                    mtq.enable_quantizer(model, wish)
                for plain in ("*output_layer*", "*router*"):
                    mtq.disable_quantizer(model, plain)
            place = folder / name / "iter_0000001"
            place.mkdir(parents=True, exist_ok=True)
            torch.distributed.barrier()
            state = {"args": argparse.Namespace(**said), "iteration": 1, "checkpoint_version": 3.0}
            dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, str(place))
            save_sharded_modelopt_state([model], place, ("torch_dist", 1))
    torch.distributed.destroy_process_group()


def export(folder):
    """Load each model in one piece, quantizers and all, and have ModelOpt write it."""
    from megatron.core import dist_checkpointing
    from modelopt.torch.export import export_mcore_gpt_to_hf
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting of one", rank=0, world_size=1)
    with shared():
        for name, job in JOBS.items():
            model = built(arguments(job), 1)
            place = folder / name / "iter_0000001"
            restore_sharded_modelopt_state([model], place)
            model.to(torch.bfloat16)
            model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(place))["model"])
            export_mcore_gpt_to_hf(
                model, str(folder / f"{name}.hf"), dtype=torch.bfloat16, export_dir=str(folder / f"{name}.modelopt")
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        from tests.megatron import newest  # noqa: F401  # before any module of Megatron's

        export(Path(sys.argv[2]))
