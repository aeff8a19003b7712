"""Mixtures of experts: what transformers saved comes back tensor by tensor, and computes the same bits."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    HunYuanMoEV1Config,
    Llama4TextConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import carnet
from carnet.errors import BadCheckpoint
from tests.referees.sizes import HEADS, TOKENS

pytestmark = pytest.mark.referee

PLAIN = {name: value for name, value in HEADS.items() if name != "head_dim"}
# transformers' grouped product wants rows of whole 16 bytes: 20 floats
QWEN = {"intermediate_size": 56, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
FINE = {
    "num_nextn_predict_layers": 0,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
}
ERNIE = {"intermediate_size": 56, "moe_intermediate_size": 20, "moe_num_experts": 5, "moe_k": 2}
DOTS = {**{name: value for name, value in FINE.items() if name != "num_nextn_predict_layers"}, "n_shared_experts": 1}
EXPERTS = {"intermediate_size": 20, "num_local_experts": 5}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0}
ROTATED: dict[str, Any] = {"rotary_dim": 4}
MODELS = {
    "mixtral": MixtralConfig(**HEADS, **TOKENS, **EXPERTS, sliding_window=None),
    "mixtral, a window": MixtralConfig(**HEADS, **TOKENS, **EXPERTS, sliding_window=8),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, **TOKENS, **QWEN),
    "qwen3_moe, a dense layer": Qwen3MoeConfig(**HEADS, **TOKENS, **QWEN, mlp_only_layers=[1], norm_topk_prob=True),
    "qwen2_moe": Qwen2MoeConfig(**PLAIN, **TOKENS, **QWEN, shared_expert_intermediate_size=28),
    "qwen2_moe, no bias, a dense layer": Qwen2MoeConfig(
        **PLAIN, **TOKENS, **QWEN, shared_expert_intermediate_size=28, qkv_bias=False, mlp_only_layers=[3], norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(**PLAIN, **TOKENS, intermediate_size=20, num_experts=5, num_experts_per_tok=2),
    "olmoe, biases": OlmoeConfig(
        **PLAIN, **TOKENS, intermediate_size=20, num_experts=5, num_experts_per_tok=2, attention_bias=True, norm_topk_prob=True
    ),
    "minimax_m2": MiniMaxM2Config(**HEADS, **TOKENS, **EXPERTS, num_experts_per_tok=2),
    "minimax_m2, a part of a head rotated": MiniMaxM2Config(**HEADS, **TOKENS, **EXPERTS, num_experts_per_tok=2, **ROTATED),
    "glm4_moe": Glm4MoeConfig(**PLAIN, **TOKENS, **FINE),
    "glm4_moe, norms, biases, heads of their own": Glm4MoeConfig(
        **HEADS, **TOKENS, **FINE, use_qk_norm=True, attention_bias=True
    ),
    "ernie4_5_moe": Ernie4_5_MoeConfig(**PLAIN, **TOKENS, **ERNIE),
    "ernie4_5_moe, every second, but for the last": Ernie4_5_MoeConfig(
        **PLAIN, **TOKENS, **ERNIE, moe_layer_interval=2, moe_layer_start_index=0, moe_layer_end_index=2
    ),
    "hunyuan_v1_moe": HunYuanMoEV1Config(**HEADS, **TOKENS, intermediate_size=20, num_experts=5, moe_topk=[2] * 5),
    "dots1, no layer of which is a mixture": Dots1Config(
        **HEADS, **TOKENS, **DOTS, first_k_dense_replace=5, sliding_window=None
    ),
    "dots1": Dots1Config(**HEADS, **TOKENS, **DOTS, first_k_dense_replace=1, sliding_window=None),
    "dots1, windows": Dots1Config(**HEADS, **TOKENS, **DOTS, attention_bias=True, sliding_window=8, max_window_layers=3),
    "llama4": Llama4TextConfig(**HEADS, **TOKENS, **EXPERTS, intermediate_size_mlp=56, attention_chunk_size=8),
    "llama4, dense layers, all rotated, no chunks nor norms": Llama4TextConfig(
        **HEADS,
        **TOKENS,
        **EXPERTS,
        intermediate_size_mlp=56,
        attention_chunk_size=16,
        interleave_moe_layer_step=2,
        num_experts_per_tok=2,
        no_rope_layers=[1, 1, 1, 1, 1],
        layer_types=["full_attention"] * 5,
        use_qk_norm=False,
        attn_temperature_tuning=False,
    ),
    "llama4, late tokens sharpened": Llama4TextConfig(
        **HEADS, **TOKENS, **EXPERTS, intermediate_size_mlp=56, attention_chunk_size=8, floor_scale=4, attn_scale=0.3
    ),
    "gpt_oss": GptOssConfig(**HEADS, **TOKENS, **EXPERTS, num_experts_per_tok=2, sliding_window=8),
    "gpt_oss, other windows, limit and rope": GptOssConfig(
        **HEADS,
        **TOKENS,
        **EXPERTS,
        num_experts_per_tok=2,
        sliding_window=8,
        swiglu_limit=0.5,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={**YARN, "original_max_position_embeddings": 32},
    ),
}
MODELS["gpt_oss, plain rope"] = GptOssConfig(
    **HEADS, **TOKENS, **EXPERTS, num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
)
STEPS = ("start_index", "end_index", "interval")
# what vLLM asks for, and a number for each layer where all are one
HUNYUAN = {"moe_topk", "moe_intermediate_size", "num_shared_expert", "use_mixed_mlp_moe", "use_qk_norm"}
PUBLISHED = {
    "scoring_func",
    "use_routing_bias",
}  # the first of which vLLM's class reads without a default, and transformers' leaves out
OTHERWISE = {
    "dots1, no layer of which is a mixture": {"n_shared_experts"},
    "ernie4_5_moe": {"head_dim"},
    "ernie4_5_moe, every second, but for the last": {"head_dim", *(f"moe_layer_{word}" for word in STEPS)},
    "hunyuan_v1_moe": HUNYUAN,
    "glm4_moe": {"head_dim"},
    "minimax_m2": PUBLISHED,
    "minimax_m2, a part of a head rotated": PUBLISHED,
    "qwen2_moe": {"head_dim"},
    "qwen2_moe, no bias, a dense layer": {"head_dim"},
}


@pytest.mark.parametrize("which", MODELS)
def test_a_mixture_comes_back_as_it_went(which, there_and_again):
    there_and_again(MODELS[which], spelled_otherwise=OTHERWISE.get(which, ()))


def test_every_second_layer_of_qwen_s_may_be_dense_and_the_list_then_says_which(there_and_again):
    config = Qwen3MoeConfig(**HEADS, **TOKENS, **QWEN, decoder_sparse_step=2, mlp_only_layers=[1])
    there_and_again(config, spelled_otherwise={"decoder_sparse_step", "mlp_only_layers"})


def test_ernie_s_layers_for_further_tokens_are_left_out_as_by_transformers(saved, loaded, tmp_path):
    source = saved(MODELS["ernie4_5_moe"])
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**said, "num_nextn_predict_layers": 1}))
    before = load_file(source / "model.safetensors")
    names = ("mtp_emb_norm.0.weight", "mtp_hidden_norm.0.weight", "mtp_block.0.input_layernorm.weight")
    further = {f"model.{name}": torch.ones(40) for name in names} | {"model.mtp_linear_proj.0.weight": torch.ones(40, 80)}
    save_file({**before, **further}, source / "model.safetensors", {"format": "pt"})
    assert carnet.cross(source, tmp_path / "out", to="hf").equal
    assert load_file(tmp_path / "out/model.safetensors").keys() == before.keys()
    dropped = json.loads((tmp_path / "out/carnet.json").read_text())["dropped"]
    assert dropped
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, expected = (loaded(at)(tokens, use_cache=False).logits for at in (tmp_path / "out", source))
    assert torch.equal(found, expected)


RANKS = {
    "experts among two ranks": {"tp": 2, "ep": 2},
    "experts cut in two, two stages": {"tp": 2, "pp": 2},
    "both": {"tp": 4, "ep": 2},
}


@pytest.mark.parametrize("which", RANKS)
def test_mixtral_comes_back_from_tensorrt_ranks(which, there_and_again):
    config = MixtralConfig(
        **{**HEADS, "num_key_value_heads": 4, "num_attention_heads": 8, "num_local_experts": 4}, intermediate_size=40
    )
    there_and_again(config, {"to": "trtllm", **RANKS[which]})


@pytest.mark.parametrize("expert", range(4))
def test_a_rank_of_mixtral_holds_its_experts_up_rows_before_gate_rows(expert, saved, tmp_path):
    config = MixtralConfig(**{**HEADS, "num_local_experts": 4}, intermediate_size=40)
    source = load_file(saved(config) / "model.safetensors")
    assert carnet.cross(tmp_path / "hf", tmp_path / "ep", to="trtllm", tp=2, ep=2).equal
    assert carnet.cross(tmp_path / "hf", tmp_path / "tp", to="trtllm", tp=2, pp=2).equal
    w1, w2, w3 = (source[f"model.layers.3.block_sparse_moe.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
    router = source["model.layers.3.block_sparse_moe.gate.weight"]
    held = load_file(tmp_path / f"ep/rank{expert // 2}.safetensors")
    assert torch.equal(held["transformer.layers.3.mlp.fc.weight"][expert % 2], torch.cat((w3, w1)))
    assert torch.equal(held["transformer.layers.3.mlp.proj.weight"][expert % 2], w2)
    assert torch.equal(held["transformer.layers.3.mlp.router.weight"], router)
    for rank, rows in ((2, slice(0, 20)), (3, slice(20, 40))):  # layer 3 is the second stage's first
        held = load_file(tmp_path / f"tp/rank{rank}.safetensors")
        assert torch.equal(held["transformer.layers.0.mlp.fc.weight"][expert], torch.cat((w3[rows], w1[rows])))
        assert torch.equal(held["transformer.layers.0.mlp.proj.weight"][expert], w2[:, rows])
        assert torch.equal(held["transformer.layers.0.mlp.router.weight"], router)


def test_mixtures_of_no_experts_are_refused(saved):
    source = saved(MODELS["dots1"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "n_routed_experts": 0}))
    with pytest.raises(BadCheckpoint, match="layers are mixtures, and there are no experts"):
        carnet.plan(source, to="hf")
