"""A program for tests: two ranks train models under ModelOpt's quantizers and save them; one rank has ModelOpt export what they saved.

    python trained_by_modelopt.py train FOLDER RANK     FOLDER/NAME for each of JOBS, with its modelopt_state
    python trained_by_modelopt.py export FOLDER         FOLDER/NAME.modelopt from FOLDER/NAME and the config in FOLDER/NAME.hf

Beside those there are a model with a head of EAGLE-3, and the student of a distillation before it and as it is saved from one.
The dense model and the one with a head lie in tests/goldens/modelopt, too, as does the GPT of pruned_by_modelopt.py.

The second needs the newest megatron-core: ModelOpt's exporter asks for a class that 0.16 does not have. Processes of their own, because
ModelOpt changes what it is imported beside; and guarded, because megatron-core starts one of its own that imports this again.
"""

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass, replace
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
    off: str = "-"  # the modules whose quantizers are off


JOBS = {
    "dense": Job({}, 2, 1, "fp8", "*layers.1.mlp*"),
    "mixture": Job(
        {
            "num_experts": 4,
            "moe_ffn_hidden_size": 96,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "qk_layernorm": True,
        },
        *(2, 2, "nvfp4"),
    ),
}
TEACHER = {"hidden_size": 96, "num_attention_heads": 6}


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

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
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

    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1}
    plain = {"perform_initialization": False, "use_cpu_initialization": True, "gradient_accumulation_fusion": False}
    config = config_of(said, **sizes, **plain)
    model = GPTModel(config, get_gpt_modelopt_spec(config, remap_te_layernorm=True), **keywords_of(said, hybrid=False))
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        alike = "norm" in name or "router" in name or "embedding" in name  # what ranks have copies of
        weight.data = torch.ones(weight.shape) if alike else torch.empty(weight.shape).normal_(std=0.2, generator=random)
        if "router" in name or "embedding" in name:
            weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.to(torch.bfloat16).eval()  # a mixture whose ranks share layers wants them to share tokens, too, else


class Whole(torch.nn.Linear):
    """Transformer Engine's linear layer that every rank has whole, which has no build for a CPU."""

    def __init__(self, inputs, outputs, *, config, **more):
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)

    def forward(self, x):
        """Return what it computes, and no bias."""
        return super().forward(x), None


def with_head(said, seed):
    """Return a model with a head of EAGLE-3, with random weights."""
    import modelopt.torch.speculative as mtsp
    from modelopt.torch.speculative.plugins import megatron_eagle

    from carnet.megatron.modules import Norm
    from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    for name, own in {"TELinear": Whole, "TENorm": Norm, "get_gpt_modelopt_spec": get_gpt_modelopt_spec}.items():
        setattr(megatron_eagle, name, own)
    sizes = {
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "draft_vocab_size": 32,
    }
    more = {"torch_dtype": "bfloat16", "rope_theta": 5000.0}
    tp = torch.distributed.get_world_size()
    model = built(said, seed, tp)
    made = {**mtsp.config.eagle3_default_config, **sizes, **more}
    mtsp.convert(model, [("eagle", {"eagle_architecture_config": made})])
    random, alike = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    for name, weight in model.eagle_module.named_parameters():
        whole = "norm" in name or "fc.weight" in name  # what ranks have copies of
        weight.data = torch.empty(weight.shape).normal_(0.5 if "norm" in name else 0, 0.2, generator=alike if whole else random)
    model.eagle_module.d2t.copy_(torch.arange(32) * 3)
    return model.to(torch.bfloat16)


def distilled(said, folder):
    """Return the student of a distillation from a wider teacher; save it before."""
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron

    student, teacher = built(said, 31 + torch.distributed.get_rank(), 2), built({**said, **TEACHER}, 41, 2)
    save(student, said, folder / "student.before")
    layers = [("decoder.layers.0", "decoder.layers.1")]
    config = megatron.DistillationConfig(intermediate_layer_pairs=layers)
    config = megatron.setup_distillation_config(config, student.config, teacher.config)
    words = {"teacher_model": teacher, "criterion": config.criterion, "loss_balancer": config.loss_balancer}
    model = mtd.convert(student, mode=[("kd_loss", words)])
    megatron.adjust_distillation_model_for_mcore(model, config)
    return model


def save(model, said, folder):
    """Save a model as Megatron-LM does, with what ModelOpt says of it."""
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

    place = folder / "iter_0000001"
    place.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = {"args": argparse.Namespace(**said), "iteration": 1, "checkpoint_version": 3.0}
    sharded = model.sharded_state_dict()
    for name, held in sharded.items():
        if "local_experts" in name and name.endswith("_amax"):  # ModelOpt counts the rank of TP, so that nobody would save them
            held.replica_id = (0, 0, 0)
    dist_checkpointing.save({**state, "model": sharded}, str(place))
    save_sharded_modelopt_state([model], place, ("torch_dist", 1))


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
    from megatron.core.transformer.moe.experts import SequentialMLP

    wishes = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, job in JOBS.items():
        with shared(job.tp, job.ep):
            said = arguments(job)
            model = built(said, 17 + rank, job.tp, job.ep)
            for module in model.modules():
                if isinstance(
                    module, SequentialMLP
                ):  # ModelOpt refuses TP beside EP by its config, also where no rank shares an expert
                    module.config = replace(module.config, tensor_model_parallel_size=1)
            with torch.no_grad():
                mtq.quantize(model, wishes[job.scheme], forward)
            mtq.disable_quantizer(model, job.off)
            if job.scheme == "nvfp4":  # whose simulation is a kernel for GPUs
                mtq.disable_quantizer(model, "*")
            forward(model).float().square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=RATE).step()
            if job.scheme == "nvfp4":
                for wish in ("*weight_quantizer", "*input_quantizer"):
                    mtq.enable_quantizer(model, wish)
                for plain in ("*output_layer*", "*router*"):
                    mtq.disable_quantizer(model, plain)
            save(model, said, folder / name)
    said = arguments(Job({}, 2, 1, ""))
    with shared(2):
        save(with_head(said, 51 + rank), said, folder / "eagle")
        save(distilled(said, folder), said, folder / "student")
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
        guess(folder)
    torch.distributed.destroy_process_group()


def guess(folder):
    """Have ModelOpt write the head of EAGLE, and keep what it computes."""
    from megatron.core import dist_checkpointing
    from modelopt.torch.export import export_mcore_gpt_to_hf

    said, place = arguments(Job({}, 1, 1, "")), folder / "eagle/iter_0000001"
    model = with_head(said, 1)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(place))["model"])
    os.chdir(folder)  # the exporter takes the config of a Llama of this name for its own
    Path("nvidia/Llama-3.1-8B-Instruct-FP8").mkdir(parents=True)
    Path("nvidia/Llama-3.1-8B-Instruct-FP8/config.json").write_text(json.dumps({"model_type": "llama"}))
    words = {"export_extra_modules": True, "dtype": torch.bfloat16, "export_dir": str(folder / "eagle.modelopt")}
    export_mcore_gpt_to_hf(model, str(folder / "eagle.hf"), **words)
    head, random = model.eagle_module.float(), torch.Generator().manual_seed(3)
    future = torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), 1)
    token, states = (torch.empty(16, 1, wide).normal_(generator=random) for wide in (64, head.fc.in_features))
    with torch.no_grad():
        normed, following = head(token, head.fc(states)[0], future)
        logits = head.eagle_output_layer(normed)[0]
    torch.save({"token": token, "states": states, "following": following, "logits": logits}, folder / "eagle.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        from tests.megatron import newest  # noqa: F401  # before any module of Megatron's

        export(Path(sys.argv[2]))
