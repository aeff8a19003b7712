"""Ranks that convert their share of real models, with our converter and with Megatron's; and that share vocabularies.

Arguments: folder, "cpu" or "cuda" (two GPUs, by hand). Writes ``cases{rank}.pt``, case -> what the rank held and what came out of both,
and ``tables{rank}.pt``.
"""

import multiprocessing
import sys
import warnings
import zlib
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from carnet.megatron.export.trtllm.trtllm_helper import TRTLLMHelper
from carnet.megatron.export.trtllm.trtllm_weights_converter.distributed_trtllm_model_weights_converter import (
    DistributedTRTLLMModelWeightsConverter,
)
from carnet.megatron.export.trtllm.vocabulary import reshare
from carnet.megatron.models import arguments
from tests.megatron.export_models import distributed
from tests.te_states import second_form, table

HIDDEN, PADDED, LAYERS = 16, 24, 4
LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
}
GPT = {"add_qkv_bias": True, "persist_layer_norm": False}
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def build(cut, said, kv, tied):
    """Return this rank's part of a model; what all ranks of a stage hold is the same on all of them."""
    tp, pp = cut
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=kv,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **said,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization),
        vocab_size=PADDED,
        max_sequence_length=8,
        position_embedding_type="learned_absolute" if config.normalization == "LayerNorm" else "rope",
        share_embeddings_and_output_weights=tied,
        pre_process=stage == 0,
        post_process=stage == pp - 1,
    )
    config.layernorm_zero_centered_gamma = config.normalization == "LayerNorm"  # torch's norms cannot; the weights are as if
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "tensor_model_parallel", False)
        place = (stage, parallel_state.get_tensor_model_parallel_rank() if own else -1, name)
        parameter.data.normal_(generator=torch.Generator().manual_seed(zlib.crc32(repr(place).encode())))
    return model


def state_of(model):
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return {name: value.to(where) for name, value in model.state_dict().items() if value is not None}


@contextmanager
def parallel(tp, pp):
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def megatrons(config, state, vocab, activation, scales=None):
    """Return what Megatron's converter makes, on a machine without a GPU too."""
    empty, device = torch.empty, torch.cuda.current_device

    def unpinned(*shape, pin_memory, **given):
        return empty(*shape, **given)

    if dist.get_backend() == "gloo":
        torch.empty = unpinned
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[return-value]
    try:
        made = distributed.DistributedTRTLLMModelWeightsConverter(
            config, DataType.bfloat16, activation=activation, scales=scales
        )
        made.convert(dict(state), distributed_names(), vocab)
    finally:
        torch.empty, torch.cuda.current_device = empty, device
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # which it leaves to others
    return dict(made.trtllm_model_weights)


def distributed_names():
    return {name: distributed.TRTLLMLayers[layer.name] for name, layer in DEFAULT_CONVERSION_DICT.items()}


def case(cut, said, kv, tied, vocab, activation="gelu", *, compare=True):
    with parallel(*cut):
        model = build(cut, said, kv, tied)
        state = state_of(model)
        ours = DistributedTRTLLMModelWeightsConverter(model.config, DataType.bfloat16, activation=activation)
        ours.convert(state, DEFAULT_CONVERSION_DICT, vocab)
        first = {name: tensor.data_ptr() for name, tensor in ours.trtllm_model_weights.items()}
        ours.convert(state, DEFAULT_CONVERSION_DICT, vocab)  # again, as after more training
        places = ("inference_tp_size", "inference_pp_size", "tp_rank", "pp_rank", "num_kv_heads", "storage_type")
        return {
            "config": {key: getattr(model.config, key) for key in ("gated_linear_unit", "layernorm_zero_centered_gamma")},
            "state": {name: value.cpu() for name, value in state.items()},
            "ours": dict(ours.trtllm_model_weights),
            "theirs": megatrons(model.config, state, vocab, activation) if compare else None,
            "same place": first == {name: tensor.data_ptr() for name, tensor in ours.trtllm_model_weights.items()},
            "said": {place: getattr(ours, place) for place in places},
        }


def filed(cut, vocab, folder):
    """Save a model as Megatron's per-rank format has it, and return what its ranks are converted to."""
    with parallel(*cut):
        model = build(cut, LLAMA, 2, tied=False).bfloat16()
        path = Path(folder) / "megatron" / f"mp_rank_{dist.get_rank():02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        sizes = {"tensor_model_parallel_size": cut[0], "pipeline_model_parallel_size": cut[1], "expert_model_parallel_size": 1}
        args = Namespace(**{**arguments(model), **sizes, "vocab_size": vocab, "params_dtype": torch.bfloat16})
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model.state_dict()}, path)
        ours = DistributedTRTLLMModelWeightsConverter(model.config, DataType.bfloat16)
        ours.convert(state_of(model), DEFAULT_CONVERSION_DICT, vocab)
        return ours.trtllm_model_weights


def in_fp8(cut, vocab):
    """Return what the helper makes of a model trained in FP8, for all four ways to quantize."""
    with parallel(*cut):
        model = build(cut, LLAMA, 2, tied=False)
        state = state_of(model)
        for layer in range(LAYERS):
            for number, module in enumerate(LINEAR):
                scales = torch.tensor([3.0 + layer, 2.0 ** (number + layer), 1.0])
                state[f"decoder.layers.{layer}.{module}._extra_state"] = second_form(table(scales, recipe=True))
        found = {}
        for weights in (True, False):
            for cache in (True, False):
                helper = TRTLLMHelper(
                    transformer_config=model.config,
                    model_type=ModelType.llama,
                    position_embedding_type="rope",
                    activation="swiglu",
                )
                made, configs = helper.get_trtllm_pretrained_config_and_model_weights(
                    model_state_dict=state,
                    dtype=DataType.bfloat16,
                    on_device_distributed_conversion=True,
                    vocab_size=vocab,
                    gpus_per_node=2,
                    fp8_quantized=weights,
                    fp8_kvcache=cache,
                )
                plain = {name: value for name, value in state.items() if "extra_state" not in name}
                theirs = megatrons(model.config, plain, vocab, "swiglu", helper.weights_converter.scales)
                found[weights, cache] = {
                    "ours": made,
                    "configs": [c.to_dict() | {"rank": c.mapping.rank} for c in configs],
                    "theirs": theirs,
                }
        return found


def refusals(cut):
    """Return how the converters refuse what no rank can convert."""
    said = {}
    with parallel(*cut):
        config = {"num_query_groups": 4, "num_attention_heads": 4, "hidden_size": HIDDEN, "kv_channels": 4}
        config |= {
            "virtual_pipeline_model_parallel_size": None,
            "layernorm_zero_centered_gamma": False,
            "normalization": "RMSNorm",
        }
        config |= {"gated_linear_unit": False}
        expert = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
        asked = {
            "chunks": ({"virtual_pipeline_model_parallel_size": 2}, {}),
            "groups": ({"num_query_groups": 3}, {"decoder.layers.0.self_attention.linear_qkv.weight": torch.zeros(12, HIDDEN)}),
            "experts": ({}, {expert: torch.zeros(2, 4, HIDDEN)}),
            "vocabulary": ({}, {"output_layer.weight": torch.zeros(8, HIDDEN)}),
            "no tensor": ({}, {"decoder.layers.0.mlp.linear_fc2.weight": [1.0]}),
            "no number": ({}, {"decoder.layers.mlp.linear_fc2.weight": torch.zeros(8, HIDDEN)}),
        }
        for name, (changed, state) in asked.items():
            try:
                made = DistributedTRTLLMModelWeightsConverter(SimpleNamespace(**config | changed), DataType.bfloat16)
                made.convert(state, DEFAULT_CONVERSION_DICT, 18)
            except Exception as refusal:  # noqa: BLE001
                kinds = [kind.__name__ for kind in type(refusal).__mro__]
                said[name] = (kinds, str(refusal))
    return said


def cases(folder):
    return {
        "filed": filed((2, 1), 17, folder),
        "gpt": case((2, 1), GPT, 4, tied=False, vocab=18),
        "llama": case((2, 1), LLAMA, 2, tied=True, vocab=18, activation="swiglu"),
        "stages": case((1, 2), GPT, 4, tied=False, vocab=17),
        "odd": case((2, 1), LLAMA, 2, tied=False, vocab=17, compare=False),
        "fp8": in_fp8((2, 1), 18),
        "refusals": refusals((2, 1)),
    }


TABLES = [(3, 12), (3, 11), (3, 9), (3, 5), (3, 2), (5, 6)]  # rows of each rank and of the vocabulary


def tables(_):
    """Return this rank's rows of vocabularies, each row its own number."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for rows, size in (each for each in TABLES if each[0] * world >= each[1]):
        held = torch.arange(1.0, 1 + rows * world, device=where)[rank * rows :][:rows, None].expand(rows, 2)
        found[rows, size] = reshare(held, size, world=world, rank=rank, group=dist.group.WORLD).cpu()
    return found


def work(rank, world, what, folder, device):
    if device == "cuda":
        torch.cuda.set_device(rank)
    meeting = f"file://{folder}/meeting of {what.__name__}"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world)
    torch.save(what(folder), f"{folder}/{what.__name__}{rank}.pt")
    dist.destroy_process_group()


def main(folder, device):
    """Fork the ranks, so that megatron-core is imported once; a process that looked at a GPU cannot be forked."""
    fork = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    for what, world in ((cases, 2), (tables, 4 if device == "cpu" else 2)):
        ranks = [fork.Process(target=work, args=(rank, world, what, folder, device)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
