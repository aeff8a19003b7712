"""Families whose ranks no golden shows: the config that NVIDIA's class writes, and where rows lie, stated once more.

From tensorrt_llm/models/*/config.py (from_hugging_face, to_dict), gptneox/model.py and phi3/convert.py, and the converters in examples.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    NemotronConfig,
    Phi3Config,
    Starcoder2Config,
)

import carnet
from carnet.errors import NotSupported

pytestmark = pytest.mark.referee

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 56}
PHI = {**GQA, "vocab_size": 32064}  # the class's own padding token is the 32000th
PARTLY = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.75}
LONG = {
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
MODELS = {
    "nemotron": NemotronConfig(**GQA),
    "starcoder2": Starcoder2Config(**GQA),
    "falcon 7b": FalconConfig(**SIZES),
    "falcon rw": FalconConfig(**SIZES, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "gemma2": Gemma2Config(**GQA, head_dim=16),
    "gemma2, a window of its own": Gemma2Config(**GQA, head_dim=16, sliding_window=8),
    "phi3": Phi3Config(**PHI),
    "phi3, heads rotated in part, tied": Phi3Config(**PHI, rope_parameters=PARTLY, tie_word_embeddings=True),
    "phi3, stretched by lists of factors": Phi3Config(
        **PHI, rope_parameters={**PARTLY, "partial_rotary_factor": 1.0, **LONG}, original_max_position_embeddings=32
    ),
    "phi3, every head its own keys": Phi3Config(**{**PHI, "num_key_value_heads": 4}),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=192),
    "gpt_neox, rotated whole": GPTNeoXConfig(
        **SIZES, intermediate_size=192, rope_parameters={**PARTLY, "partial_rotary_factor": 1.0}
    ),
}
COMMON = {
    "dtype": "float32",
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "logits_dtype": "float32",
    "norm_epsilon": 1e-05,
    "runtime_defaults": None,
    "position_embedding_type": "rope_gpt_neox",
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "mapping": {
        "world_size": 2,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": 2,
        "pp_size": 1,
        "moe_tp_size": 2,
        "moe_ep_size": 1,
    },
    "quantization": {
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "group_size": 128,
        "smoothquant_val": 0.5,
        "clamp_val": None,
        "use_meta_recipe": False,
        "has_zero_point": False,
        "pre_quant_scale": False,
        "exclude_modules": None,
    },
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "head_size": 12,
    "qk_layernorm": False,
    "rotary_embedding_dim": 12,
    "rotary_base": 10000.0,
}
GPT = {
    **COMMON,
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "rotary_scaling": None,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
    "moe": {
        "num_experts": 0,
        "shared_expert_intermediate_size": 0,
        "top_k": 0,
        "normalization_mode": 1,
        "sparse_mixer_epsilon": 0.01,
        "tp_mode": 0,
        "topk_method": 0,
        "device_limited_n_group": 0,
        "device_limited_topk_group": 0,
        "device_limited_routed_scaling_factor": 1.0,
    },
}
FALCON = {
    **COMMON,
    "architecture": "FalconForCausalLM",
    "hidden_act": "gelu",
    "intermediate_size": 192,
    "num_ln_in_parallel_attn": None,
    "new_decoder_architecture": False,
}
GEMMA2 = {
    **COMMON,
    "architecture": "Gemma2ForCausalLM",
    "hidden_act": "gelu_pytorch_tanh",
    "norm_epsilon": 1e-06,
    "head_size": 16,
    "rotary_embedding_dim": 16,
    "use_parallel_embedding": True,
    "rotary_scaling": None,
    "attn_bias": False,
    "mlp_bias": False,
    "inter_layernorms": True,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
PHI3 = {**COMMON, "vocab_size": 32064, "architecture": "Phi3ForCausalLM", "hidden_act": "swiglu", "rotary_scaling": None}
CONFIGS = {
    # a part of a head is rotated, and the class says the whole of it all the same
    "nemotron": {
        **GPT,
        "architecture": "NemotronForCausalLM",
        "gpt_variant": "nemotron",
        "hidden_act": "squared-relu",
        "bias": False,
        "rotary_pct": 0.5,
    },
    "starcoder2": {
        **GPT,
        "architecture": "Starcoder2ForCausalLM",
        "gpt_variant": "starcoder2",
        "hidden_act": "gelu",
        "bias": True,
        "rotary_pct": 1.0,
    },
    "falcon 7b": {**FALCON, "num_key_value_heads": 1, "bias": False, "parallel_attention": True},
    "falcon rw": {
        **FALCON,
        "num_key_value_heads": 4,
        "bias": True,
        "parallel_attention": False,
        "position_embedding_type": "alibi_with_scale",
    },
    "gemma2": GEMMA2,
    "gemma2, a window of its own": {**GEMMA2, "sliding_window": 8},
    "phi3": PHI3,
    "phi3, heads rotated in part, tied": {
        **PHI3,
        "rotary_base": 5000.0,
        "rotary_pct": 0.75,
        "rotary_embedding_dim": 9,
        "tie_word_embeddings": True,
    },
    "phi3, stretched by lists of factors": {
        **PHI3,
        "rotary_base": 5000.0,
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": 32,
        "longrope_scaling_short_factors": LONG["short_factor"],
        "longrope_scaling_long_factors": LONG["long_factor"],
    },
    # written by the converter, which knows little
    "gpt_neox": {
        "architecture": "GPTNeoXForCausalLM",
        "dtype": "float32",
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "hidden_size": 48,
        "vocab_size": 97,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 128,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "hidden_act": "gelu",
        "quantization": {"quant_algo": None},
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
    },
}


@pytest.mark.parametrize("which", CONFIGS)
def test_every_config_field_is_the_one_that_nvidia_s_class_writes(which, saved, tmp_path):
    saved(MODELS[which])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2).equal
    assert json.loads((tmp_path / "ranks/config.json").read_text()) == CONFIGS[which]


# the ranks have no place for tokens, and the classes have some of their own
TOKENS = {"bos_token_id", "eos_token_id"}
OTHERWISE = {
    "phi3": TOKENS,
    "phi3, stretched by lists of factors": TOKENS,
    "phi3, every head its own keys": TOKENS,
    # read, it becomes one of rope_parameters, which stays
    "phi3, heads rotated in part, tied": {*TOKENS, "partial_rotary_factor"},
    "gpt_neox": TOKENS,
    "gpt_neox, rotated whole": TOKENS,
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("which", OTHERWISE)
def test_a_model_comes_back_from_tensorrt_s_ranks_as_it_went(which, tp, there_and_again):
    there_and_again(MODELS[which], {"to": "trtllm", "tp": tp}, spelled_otherwise=OTHERWISE[which])


def crossed(saved, tmp_path, which):
    """Return the tensors of a model as transformers saved them, and what each of two ranks holds."""
    source = load_file(saved(MODELS[which], torch.bfloat16) / "model.safetensors")
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2).equal
    return source, [load_file(tmp_path / f"ranks/rank{rank}.safetensors") for rank in range(2)]


def same(ours, *parts):
    expected = torch.cat(parts)
    return ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_a_rank_of_phi3_holds_its_up_rows_and_then_its_gate_rows(saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "phi3")
    gate, up = source["model.layers.3.mlp.gate_up_proj.weight"].chunk(2)
    q, k, v = source["model.layers.3.self_attn.qkv_proj.weight"].split([48, 24, 24])
    for rank, held in enumerate(ranks):
        assert same(held["transformer.layers.3.mlp.fc.weight"], up.chunk(2)[rank], gate.chunk(2)[rank])
        assert same(held["transformer.layers.3.attention.qkv.weight"], *(part.chunk(2)[rank] for part in (q, k, v)))
        assert "transformer.layers.3.mlp.gate.weight" not in held


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_rank_of_gpt_neox_holds_the_queries_of_its_heads_then_their_keys_then_their_values(what, saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "gpt_neox")
    heads = source[f"gpt_neox.layers.2.attention.query_key_value.{what}"].unflatten(0, (4, 3, 12))
    for rank, held in enumerate(ranks):
        mine = heads[2 * rank : 2 * rank + 2].transpose(0, 1)
        assert same(held[f"transformer.layers.2.attention.qkv.{what}"], mine.flatten(0, 2))


def test_a_rank_of_gpt_neox_keeps_the_second_norm_s_name_and_whole_biases(saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "gpt_neox")
    there, here = "gpt_neox.layers.2", "transformer.layers.2"
    for rank, held in enumerate(ranks):
        for what in ("weight", "bias"):
            assert same(held[f"{here}.post_attention_layernorm.{what}"], source[f"{there}.post_attention_layernorm.{what}"])
            fc = source[f"{there}.mlp.dense_h_to_4h.{what}"]
            assert same(held[f"{here}.mlp.fc.{what}"], fc.chunk(2)[rank])
        assert same(held[f"{here}.mlp.proj.weight"], source[f"{there}.mlp.dense_4h_to_h.weight"].chunk(2, 1)[rank])
        assert same(held[f"{here}.mlp.proj.bias"], source[f"{there}.mlp.dense_4h_to_h.bias"])
        assert same(held["transformer.vocab_embedding.weight"], source["gpt_neox.embed_in.weight"])


NO_WORD = {
    "stages": (GPTNeoXConfig(**SIZES, intermediate_size=192), {"pp": 2}, "pp"),
    "stages of phi3": (Phi3Config(**GQA), {"pp": 2}, "pp"),
    # the class has it by its rule alone
    "another factor of phi3's angles": (
        Phi3Config(**PHI, rope_parameters={**PARTLY, **LONG, "partial_rotary_factor": 1.0, "attention_factor": 0.5}),
        {},
        "rope_attention",
    ),
    "another width": (GPTNeoXConfig(**SIZES, intermediate_size=56), {}, "ffn"),
    "one after the other": (
        GPTNeoXConfig(**SIZES, intermediate_size=192, use_parallel_residual=False),
        {},
        "parallel_residual",
    ),
    "another epsilon": (GPTNeoXConfig(**SIZES, intermediate_size=192, layer_norm_eps=1e-6), {}, "norm_eps"),
    "no bias": (GPTNeoXConfig(**SIZES, intermediate_size=192, attention_bias=False), {}, "qkv_bias"),
}


@pytest.mark.parametrize("which", NO_WORD)
def test_what_nvidia_s_class_builds_otherwise_is_refused_by_its_name(which, saved, tmp_path):
    model, asked, lacking = NO_WORD[which]
    saved(model)
    with pytest.raises(NotSupported) as caught:
        carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", **asked)
    assert lacking in str(caught.value)


def test_gemma2_s_ranks_without_a_word_of_the_window_have_the_published_one(saved, tmp_path):
    saved(MODELS["gemma2"])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    said = json.loads((tmp_path / "back/config.json").read_text())
    assert said["sliding_window"] == 4096
    assert said["layer_types"] == ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
