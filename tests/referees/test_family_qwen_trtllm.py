"""Qwen in TensorRT-LLM's ranks: they come back as they went, and hold what NVIDIA's converter puts there, rank by rank.

The expected rows are torch's own slices, written from tensorrt_llm/models/qwen/model.py and layers/moe.py; the configs from config.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GraniteConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

import carnet
from carnet.errors import CarnetError, NotSupported

pytestmark = pytest.mark.referee

# 97 tokens and 5 layers divide by nothing; no size of a matrix equals another
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# transformers' grouped product wants rows of whole 16 bytes: 20 floats
MIXTURE = {**SIZES, "intermediate_size": 56, "moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 28}
WIDE = {"head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DENSE = {
    "qwen2": Qwen2Config(**SIZES, intermediate_size=56),
    "qwen2, tied, angles stretched": Qwen2Config(
        **{**SIZES, "tie_word_embeddings": True}, intermediate_size=56, rope_parameters=LLAMA3
    ),
    "qwen3": Qwen3Config(**SIZES, **WIDE, intermediate_size=56),
}
MIXED = {
    "qwen2_moe": Qwen2MoeConfig(**MIXTURE, **SHARED),
    "qwen2_moe, no bias, weights that sum to one": Qwen2MoeConfig(**MIXTURE, **SHARED, qkv_bias=False, norm_topk_prob=True),
    "qwen3_moe": Qwen3MoeConfig(**MIXTURE, **WIDE),
    "qwen3_moe, weights that sum to one": Qwen3MoeConfig(**MIXTURE, **WIDE, norm_topk_prob=True),
}
MODELS = {**DENSE, **MIXED}
PLACES = {
    "one rank": {},
    "two ranks": {"tp": 2},
    "four, two stages": {"tp": 2, "pp": 2},
    "four, a KV head on two": {"tp": 4},
}
EXPERTS = {"experts on two ranks": {"tp": 2, "ep": 2}, "experts on two and cut in two": {"tp": 4, "ep": 2}}
WAYS = [
    *((which, place) for which in MODELS for place in PLACES.values()),
    *((which, place) for which in MIXED for place in EXPERTS.values()),
]
# the class has no such key: what it writes is one over the other
OTHERWISE = {name: {"head_dim"} for name in MODELS if name.startswith("qwen2")}


@pytest.mark.parametrize(("which", "place"), WAYS, ids=str)
def test_a_model_comes_back_from_tensorrt_s_ranks_as_it_went(which, place, there_and_again):
    there_and_again(MODELS[which], {"to": "trtllm", **place}, spelled_otherwise=OTHERWISE.get(which, ()))


def crossed(saved, tmp_path, which, **place):
    """Return the tensors of a model as transformers saved them, and what each rank holds."""
    source = load_file(saved(MODELS[which], torch.bfloat16) / "model.safetensors")
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", **place).equal
    files = sorted((tmp_path / "ranks").glob("rank*.safetensors"))
    return source, [load_file(file) for file in files]


def same(ours, *parts):
    expected = torch.cat(parts)
    return ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize(("tp", "sharing"), [(2, 1), (4, 2)], ids=["a KV head a rank", "two ranks a KV head"])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_rank_of_qwen2_holds_its_queries_then_its_keys_then_its_values(what, tp, sharing, saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "qwen2", tp=tp)
    for rank, held in enumerate(ranks):
        q, k, v = (source[f"model.layers.3.self_attn.{name}_proj.{what}"] for name in "qkv")
        head = rank // sharing  # of the two KV heads
        expected = q.chunk(tp)[rank], k.chunk(2)[head], v.chunk(2)[head]
        assert same(held[f"transformer.layers.3.attention.qkv.{what}"], *expected)


def test_a_rank_of_qwen2_holds_its_part_of_every_other_tensor(saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "qwen2", tp=2, pp=2)
    pad = torch.zeros(1, 48, dtype=torch.bfloat16)
    for rank, held in enumerate(ranks):
        place, stage = rank % 2, rank // 2
        layer = (0, 3)[stage]  # the first of each stage: five layers are three and two
        here, there = "transformer.layers.0", f"model.layers.{layer}"
        assert same(held[f"{here}.input_layernorm.weight"], source[f"{there}.input_layernorm.weight"])
        assert same(held[f"{here}.post_layernorm.weight"], source[f"{there}.post_attention_layernorm.weight"])
        dense, down = (source[f"{there}.{name}.weight"].chunk(2, 1)[place] for name in ("self_attn.o_proj", "mlp.down_proj"))
        assert same(held[f"{here}.attention.dense.weight"], dense)
        assert same(held[f"{here}.mlp.proj.weight"], down)
        assert same(held[f"{here}.mlp.fc.weight"], source[f"{there}.mlp.gate_proj.weight"].chunk(2)[place])
        assert same(held[f"{here}.mlp.gate.weight"], source[f"{there}.mlp.up_proj.weight"].chunk(2)[place])
        assert {name.split(".")[2] for name in held if ".layers." in name} == {*"012"[: 3 - stage]}
        if stage == 0:
            assert same(held["transformer.vocab_embedding.weight"], source["model.embed_tokens.weight"])
        else:
            assert same(held["transformer.ln_f.weight"], source["model.norm.weight"])
            assert same(held["lm_head.weight"], torch.cat((source["lm_head.weight"], pad)).chunk(2)[place])


def test_the_head_of_a_tied_qwen2_is_its_embedding_once_more(saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "qwen2, tied, angles stretched", pp=2)
    assert same(ranks[1]["lm_head.weight"], source["model.embed_tokens.weight"])


@pytest.mark.parametrize("which", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_a_rank_of_a_mixture_holds_its_experts_up_rows_before_gate_rows(which, tp, ep, saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, which, tp=tp, ep=ep)
    there, here = "model.layers.2.mlp", "transformer.layers.2.mlp"
    for rank, held in enumerate(ranks):
        part, first = rank // ep, rank % ep * (4 // ep)  # of the ranks that share an expert; of the rank's experts
        fc, proj = held[f"{here}.fc.weight"], held[f"{here}.proj.weight"]
        assert len(fc) == len(proj) == 4 // ep
        for place in range(4 // ep):
            at = f"{there}.experts.{first + place}"
            gate, up, down = (source[f"{at}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            assert same(fc[place], up.chunk(tp // ep)[part], gate.chunk(tp // ep)[part])
            assert same(proj[place], down.chunk(tp // ep, 1)[part])
        assert same(held[f"{here}.router.weight"], source[f"{there}.gate.weight"].float())


def test_every_rank_shares_the_shared_expert_whatever_the_experts_do(saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "qwen2_moe", tp=4, ep=2)
    there, here = "model.layers.4.mlp", "transformer.layers.4.mlp"
    gate, up, down = (source[f"{there}.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    for rank, held in enumerate(ranks):
        assert same(held[f"{here}.shared_expert.fc.weight"], up.chunk(4)[rank], gate.chunk(4)[rank])
        assert same(held[f"{here}.shared_expert.proj.weight"], down.chunk(4, 1)[rank])
        assert same(held[f"{here}.shared_expert_gate.weight"], source[f"{there}.shared_expert_gate.weight"])


def test_every_rank_of_qwen3_has_the_norms_of_queries_and_keys(saved, tmp_path):
    source, ranks = crossed(saved, tmp_path, "qwen3", tp=2)
    for held in ranks:
        for name in ("q", "k"):
            norm = source[f"model.layers.1.self_attn.{name}_norm.weight"]
            assert same(held[f"transformer.layers.1.attention.{name}_layernorm.weight"], norm)


QUANTIZATION = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}
MOE = {
    "num_experts": 0,
    "shared_expert_intermediate_size": 0,
    "top_k": 0,
    "normalization_mode": 0,
    "sparse_mixer_epsilon": 0.01,
    "tp_mode": 0,
    "topk_method": 0,
    "device_limited_n_group": 0,
    "device_limited_topk_group": 0,
    "device_limited_routed_scaling_factor": 1.0,
}
CONFIG = {
    "architecture": "Qwen2ForCausalLM",
    "dtype": "float32",
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "logits_dtype": "float32",
    "norm_epsilon": 1e-06,
    "runtime_defaults": None,
    "position_embedding_type": "rope_gpt_neox",
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "mapping": {
        "world_size": 4,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": 2,
        "pp_size": 2,
        "moe_tp_size": 2,
        "moe_ep_size": 1,
    },
    "quantization": QUANTIZATION,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "head_size": 12,
    "qk_layernorm": False,
    "rotary_embedding_dim": 12,
    "mlp_bias": False,
    "attn_bias": True,
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "disable_weight_only_quant_plugin": False,
    "num_labels": 1,
    "use_logn_attn": False,
    "moe": MOE,
    "seq_length": 8192,
    "qwen_type": "qwen2",
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "tie_word_embeddings": False,
}
# what differs from Qwen2's; NVIDIA's layer writes the shared expert's width into the config of the experts too
CONFIGS = {
    "qwen2": {},
    "qwen2_moe": {
        "architecture": "Qwen2MoeForCausalLM",
        "qwen_type": "qwen2_moe",
        "hidden_act": "swiglu",
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 28,
        "moe": {**MOE, "num_experts": 4, "top_k": 2, "shared_expert_intermediate_size": 28},
    },
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "qwen_type": "qwen3",
        "attn_bias": False,
        "head_size": 16,
        "rotary_embedding_dim": 16,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "qwen_type": "qwen3_moe",
        "hidden_act": "swiglu",
        "attn_bias": False,
        "head_size": 16,
        "rotary_embedding_dim": 16,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 20,
        "moe": {**MOE, "num_experts": 4, "top_k": 2},
    },
}


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("which", CONFIGS)
def test_every_config_field_is_the_one_that_nvidia_s_class_writes(which, saved, tmp_path):
    saved(MODELS[which])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2, pp=2).equal
    assert config(tmp_path / "ranks") == {**CONFIG, **CONFIGS[which]}


def test_what_later_classes_say_beside_is_read_over(saved, tmp_path):
    saved(MODELS["qwen2"])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm").equal
    later = config(tmp_path / "ranks") | {"mlp_only_layers": [], "decoder_sparse_step": 1}
    (tmp_path / "ranks/config.json").write_text(json.dumps(later))
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal


CHANGES = ({"use_logn_attn": True}, {"mlp_only_layers": [1]}, {"qk_layernorm": True}, {"qwen_type": "qwen"}, {"strange": 1})


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_config_that_means_another_model_is_refused(change, saved, tmp_path):
    saved(MODELS["qwen2"])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm").equal
    (tmp_path / "ranks/config.json").write_text(json.dumps(config(tmp_path / "ranks") | change))
    with pytest.raises(CarnetError) as caught:
        carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf")
    assert next(iter(change)) in str(caught.value)


NO_WORD = {
    "qwen2_moe, a dense layer": Qwen2MoeConfig(**MIXTURE, **SHARED, mlp_only_layers=[1]),
    "qwen3_moe, a dense layer": Qwen3MoeConfig(**MIXTURE, **WIDE, mlp_only_layers=[1]),
    "qwen3, the output with a bias": Qwen3Config(**SIZES, **WIDE, intermediate_size=56, attention_bias=True),
}


@pytest.mark.parametrize("which", NO_WORD)
def test_what_nvidia_s_class_has_no_word_for_is_refused(which, saved, tmp_path):
    saved(NO_WORD[which])
    with pytest.raises(CarnetError):
        carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm")


def test_a_family_without_ranks_says_why(saved, tmp_path):
    saved(GraniteConfig(**SIZES, intermediate_size=56))
    with pytest.raises(NotSupported) as caught:
        carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm")
    assert "in a form that carnet does not write" in str(caught.value)
