"""What the ranks of the tests' world do: build real models of megatron-core, and let them cross."""

import warnings
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

from carnet import live
from carnet.live import Grid
from carnet.megatron.models import arguments

AXES = {"tensor": "tp", "pipeline": "pp", "expert": "ep"}


@contextmanager
def parallel(tp=1, pp=1, ep=1, etp=None, vp=None):
    parallel_state.initialize_model_parallel(
        tp, pp, vp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def build(sizes, **cut):
    """Return a model of this rank, every weight of it drawn from its global name and place."""
    config = TransformerConfig(
        num_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        ffn_hidden_size=sizes["ffn"],
        num_attention_heads=sizes["heads"],
        num_query_groups=sizes["kv"],
        num_moe_experts=sizes.get("experts"),
        moe_ffn_hidden_size=sizes.get("moe_ffn"),
        moe_router_topk=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        tensor_model_parallel_size=cut.get("tp", 1),
        pipeline_model_parallel_size=cut.get("pp", 1),
        pipeline_dtype=torch.bfloat16,
        expert_model_parallel_size=cut.get("ep", 1),
        expert_tensor_parallel_size=cut.get("etp") or cut.get("tp", 1),
    )
    pp = cut.get("pp", 1)
    at = parallel_state.get_pipeline_model_parallel_rank()
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=sizes["padded"],
        max_sequence_length=64,
        share_embeddings_and_output_weights=sizes.get("tied", False),
        position_embedding_type="rope",
        pre_process=at == 0,
        post_process=at == pp - 1,
    )
    for name, parameter in model.named_parameters():
        ranks = [at]  # copies of what is not cut are the same on all ranks
        if getattr(parameter, "tensor_model_parallel", False):
            ranks.append(parallel_state.get_tensor_model_parallel_rank())
        if ".experts." in name:
            ranks.append(10 * parallel_state.get_expert_model_parallel_rank())
        seed = torch.Generator().manual_seed(crc32(f"{name} {ranks}".encode()))
        parameter.data = torch.empty(parameter.shape).normal_(generator=seed).bfloat16()
    return model


def save(model, cut, said, folder):
    """Save a rank's state as Megatron's per-rank format has it: what comes first of all copies."""
    tp, pp, ep = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(), 0)
    if cut.get("ep", 1) > 1:
        ep = parallel_state.get_expert_model_parallel_rank()
    name = f"mp_rank_{tp:02d}" + f"_{pp:03d}" * (cut.get("pp", 1) > 1) + f"_{ep:03d}" * (cut.get("ep", 1) > 1)
    path = Path(folder) / name / "model_optim_rng.pt"
    if (parallel_state.get_data_parallel_rank() and not ep) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {f"{axis}_model_parallel_size": cut.get(short, 1) for axis, short in AXES.items()}
    args = Namespace(**{**said, **sizes, "params_dtype": torch.bfloat16})
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model.state_dict()}, path)


def parts(found):
    """Return tensors as another process can have them: their bytes."""
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in found.items()
    }


def cross(sizes, cut, target, to, folder, options=None):
    """Let a model cross twice, save it, and return what arrived the second time."""
    with parallel(**cut):
        model = build(sizes, **cut)
        said = arguments(model) | {"vocab_size": sizes["vocab"], "params_dtype": torch.bfloat16}
        save(model, cut, said, folder)
        made = live.plan(said, source=Grid(**cut), target=Grid(**target), to=to, **(options or {}))
        first = made.run(model)
        kept = parts(first)
        for tensor in first.values():
            tensor.view(-1).view(torch.uint8).fill_(77)
        made.run(model, into=first)
        assert parts(first) == kept
        assert parts(dict(made.stream(model))) == kept
        dist.barrier()
        return kept, made.texts, dict(made.traffic())
