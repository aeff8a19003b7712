"""A tiny transformers model, taken to Megatron, loaded strictly by the real megatron-core and run: the same logits.

The model that megatron-core builds follows from the arguments that carnet wrote, and from nothing else.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import carnet
from carnet.architectures.known import FAMILIES
from carnet.errors import NotSupported

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
}
WIDE = {**SIZES, "head_dim": 16}
LLAMA3: dict[str, Any] = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
LINEAR: dict[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
HALF: dict[str, Any] = {"partial_rotary_factor": 0.5}
# numbers of which none may be lost: each moves the bounds between frequencies that are stretched and those that are not
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 8.0,
    "beta_slow": 3.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    **{name: value for name, value in SIZES.items() if name != "rope_theta"},
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
}
LATENT_YARN = {
    **YARN,
    "original_max_position_embeddings": 512,
    "beta_fast": 2.0,
    "beta_slow": 0.125,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}

FINE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "num_nextn_predict_layers": 0,
}
FLASH: dict[str, Any] = {name: size for name, size in LATENT.items() if name != "first_k_dense_replace"}
FLASH |= {"q_lora_rank": 20, "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]}
MODELS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**WIDE),
    "llama, tied": hf.LlamaConfig(**WIDE | {"tie_word_embeddings": True}),
    "llama, rope stretched as Llama 3 does": hf.LlamaConfig(**WIDE, **LLAMA3),
    "llama, rope stretched evenly": hf.LlamaConfig(**WIDE, **LINEAR),
    "llama, biases everywhere": hf.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "gpt2": hf.GPT2Config(n_layer=5, n_embd=64, n_head=8, vocab_size=97, n_positions=64),
    "gpt2, exact gelu": hf.GPT2Config(
        n_layer=5, n_embd=64, n_head=8, vocab_size=97, n_positions=64, activation_function="gelu", tie_word_embeddings=False
    ),
    "mistral": hf.MistralConfig(**WIDE, sliding_window=None),
    "mistral, a window": hf.MistralConfig(**WIDE, sliding_window=5),
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen3": hf.Qwen3Config(**WIDE),
    "phi3": hf.Phi3Config(**SIZES, sliding_window=None, pad_token_id=0, **HALF),
    "nemotron": hf.NemotronConfig(**SIZES, **HALF),
    "starcoder2": hf.Starcoder2Config(**SIZES, sliding_window=None, use_bias=True),
    "gpt_neox, one after the other": hf.GPTNeoXConfig(
        **{name: value for name, value in SIZES.items() if name not in {"num_key_value_heads", "rope_theta"}},
        use_parallel_residual=False,
    ),
    "falcon, one after the other": hf.FalconConfig(
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=8,
        vocab_size=97,
        parallel_attn=False,
        multi_query=False,
        bias=True,
        new_decoder_architecture=False,
    ),
    "mixtral": hf.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": hf.Qwen3MoeConfig(**WIDE, **EXPERTS, norm_topk_prob=True),
    "qwen3_moe, dense layers, weights that do not sum to one": hf.Qwen3MoeConfig(
        **WIDE, **EXPERTS, norm_topk_prob=False, mlp_only_layers=[0, 3]
    ),
    "qwen2_moe": hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=80, norm_topk_prob=False),
    "gpt_oss": hf.GptOssConfig(
        **WIDE | {"intermediate_size": 48},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        swiglu_limit=1.5,
        rope_parameters={**YARN, "truncate": False},
    ),
    "gpt_oss, other windows, plain rope": hf.GptOssConfig(
        **WIDE | {"intermediate_size": 48},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=9,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    "deepseek_v2": hf.DeepseekV2Config(
        **LATENT,
        q_lora_rank=20,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=4,
        rope_parameters=LATENT_YARN,
    ),
    "deepseek_v2, plain rope, queries not compressed": hf.DeepseekV2Config(
        **LATENT, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1
    ),
    "deepseek_v3": hf.DeepseekV3Config(**LATENT, q_lora_rank=20, n_group=4, topk_group=2, rope_parameters=LATENT_YARN),
    "deepseek_v3, plain rope, queries not compressed": hf.DeepseekV3Config(**LATENT, q_lora_rank=None, n_group=1, topk_group=1),
    "seed_oss": hf.SeedOssConfig(**WIDE, attention_bias=True),
    "smollm3": hf.SmolLM3Config(**SIZES, pad_token_id=0),
    "smollm3, layers without positions as listed": hf.SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layers=[0, 1, 1, 0, 1]),
    "stablelm": hf.StableLmConfig(**SIZES, use_qkv_bias=True),
    "dots1": hf.Dots1Config(**WIDE, **FINE, n_shared_experts=1, first_k_dense_replace=2, norm_topk_prob=True),
    "glm4_moe": hf.Glm4MoeConfig(**WIDE, **FINE, attention_bias=True, first_k_dense_replace=2),
    "glm4_moe, norms of queries and keys, groups": hf.Glm4MoeConfig(
        **WIDE, **{**FINE, "num_experts_per_tok": 4}, use_qk_norm=True, n_group=4, topk_group=2, routed_scaling_factor=1.5
    ),
    # the norms of what is compressed have an epsilon of their own, which is that of the others in no published model
    "glm4_moe_lite": hf.Glm4MoeLiteConfig(**FLASH, rms_norm_eps=1e-6),
}
DENSE: tuple[dict[str, int], ...] = ({}, {"tp": 2, "pp": 2}, {"tp": 4, "pp": 3})
MIXTURES: tuple[dict[str, int], ...] = ({}, {"ep": 2, "pp": 2}, {"tp": 2, "ep": 4, "pp": 3})
NEEDS_0_19 = {"llama, rope stretched evenly"}  # releases before do not hand the factor on
# numbers that Megatron-LM has no flag for, and Megatron-Bridge's provider has: of yarn under latent attention
PROVIDED = {"deepseek_v2", "deepseek_v3"}
TABLE = [
    (name, cut) for name, config in MODELS.items() for cut in (MIXTURES if "experts_per_tok" in str(vars(config)) else DENSE)
]


@pytest.mark.parametrize(("name", "cut"), TABLE, ids=[f"{name}, {cut}" for name, cut in TABLE])
def test_megatron_core_computes_what_transformers_does(name, cut, saved, megatron_core, loaded, tmp_path):
    reader = {"read_by": "megatron-bridge"} if name in PROVIDED else {}
    assert carnet.cross(saved(MODELS[name]), tmp_path / "megatron", to="megatron", spelling="local", **cut, **reader).equal
    theirs = megatron_core(tmp_path / "megatron/iter_0000001", "0.19" if name in NEEDS_0_19 else "0.16")
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = theirs(tokens)[0], loaded(tmp_path / "hf")(tokens, use_cache=False).logits
    assert expected.std() > 0.1
    assert torch.allclose(found[..., :97], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral, a window", "gpt_oss"])
def test_windows_and_scores_that_go_to_no_token_come_back_from_megatron(name, there_and_again):
    there_and_again(MODELS[name], {"to": "megatron", "pp": 2, "tp": 2})


GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
TRAINED = {
    "deepseek_mtp_te_pp2": {"tp": 2, "pp": 3, "ep": 2},
    "gemma_te_tp2": {"pp": 3},
    "gpt_te_tp2": {"tp": 4},
    "llama_dist": {"tp": 2, "pp": 2},
    "mixtral_ep2": {"tp": 2, "ep": 4},
    "qwen2_tp2": {"pp": 2},
    "v019_deepseek_te_ep2": {"tp": 2, "pp": 2},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_of_megatron_s_computes_the_same_after_a_stay_with_hugging_face(name, megatron_core, tmp_path):
    assert carnet.cross(GOLDENS / name, tmp_path / "hf", to="hf", dtype="f32").equal
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", spelling="local", **TRAINED[name]).equal
    reference = load_file(GOLDENS / name / "reference.safetensors")
    found = megatron_core(tmp_path / "megatron/iter_0000001")(reference["tokens"].long())
    expected = [reference[key] for key in ("logits", "mtp_logits_1") if key in reference]
    assert len(found) == len(expected) == 1 + ("mtp" in name)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[..., :250], theirs[..., :250], rtol=0, atol=1e-4)


LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 8}
FALCON = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "vocab_size": 97}
UNTOLD = "megatron-lm computes another model than this one, whatever it is told"
SENSE = "the target's config cannot say what the model is"
OWN = {"hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_global_key_value_heads": 1}
GEMMA4 = {**{name: said for name, said in WIDE.items() if name != "rope_theta"}, **OWN}
# what megatron-core does not compute, or no argument of Megatron-LM says, up to 0.19
REFUSED: dict[str, Any] = {
    # a gated GELU and a scaled embedding are classes of Megatron-Bridge
    "gemma": (hf.GemmaConfig(**WIDE), SENSE, {"activation": "'gelu_tanh'", "gated": "True"}),
    "gemma2": (hf.Gemma2Config(**WIDE), SENSE, {"activation": "'gelu_tanh'", "gated": "True"}),
    "gemma3": (hf.Gemma3TextConfig(**WIDE), SENSE, {"activation": "'gelu_tanh'", "gated": "True"}),
    # layers whose heads differ are classes of Megatron-Bridge, too
    "gemma4": (
        hf.Gemma4TextConfig(**GEMMA4, attention_k_eq_v=True),
        "the target's config cannot say layer_kv_heads",
        {"layer_kv_heads": (4, 4, 4, 4, 1)},
    ),
    "gemma4, a mixture": (
        hf.Gemma4TextConfig(**GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=20),
        SENSE,
        {"activation": "'gelu_tanh'", "gated": "True"},
    ),
    "llama, a gated GELU": (hf.LlamaConfig(**WIDE, hidden_act="gelu"), SENSE, {"activation": "'gelu'", "gated": "True"}),
    # one flag for all biases but those of query, key and value
    "llama, biases of the attention": (hf.LlamaConfig(**WIDE, attention_bias=True), SENSE, {"mlp_bias": "False"}),
    # the tanh form is a kernel with a bias
    "starcoder2, no biases": (hf.Starcoder2Config(**SIZES, sliding_window=None, use_bias=False), SENSE, {"mlp_bias": "False"}),
    "olmo2": (
        hf.Olmo2Config(**SIZES),
        "the target's config cannot say norm_after",
        {"also": "the target's config cannot say qk_norm = 'whole'"},
    ),
    "minimax_m2": (
        hf.MiniMaxM2Config(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "the target's config cannot say qk_norm = 'whole'",
        {"known": "none, head"},
    ),
    # Megatron rotates neighbours in latent attention alone
    "ernie4_5": (hf.Ernie4_5Config(**WIDE), "the target's config cannot say rope_interleaved", {"rope_interleaved": True}),
    "ernie4_5_moe": (
        hf.Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=48),
        "the target's config cannot say rope_interleaved",
        {"rope_interleaved": True},
    ),
    "glm4": (
        hf.Glm4Config(**WIDE, pad_token_id=0),
        "the target's config cannot say norm_after",
        {"also": "the target's config cannot say rope_interleaved"},
    ),
    "olmo3": (
        hf.Olmo3Config(**SIZES),
        "the target's config cannot say norm_after",
        {"also": "the target's config cannot say qk_norm = 'whole'"},
    ),
    "exaone4": (
        hf.Exaone4Config(**WIDE),
        "the target's config cannot say norm_after",
        {"also": "the target's config has no place for 'norm_before': False"},
    ),
    # Megatron norms queries and keys before it rotates them
    "hunyuan_v1_dense": (
        hf.HunYuanDenseV1Config(**WIDE, pad_token_id=0),
        "the target's config has no place for 'qk_norm_rotated'",
        {"found": "True"},
    ),
    "hunyuan_v1_moe": (
        hf.HunYuanMoEV1Config(**WIDE, pad_token_id=0, num_experts=4, moe_topk=2),
        "the target's config has no place for 'qk_norm_rotated'",
        {"found": "True"},
    ),
    "cohere": (hf.CohereConfig(**SIZES), "the target's config cannot say norm = 'centred'", {"known": "rms, layer"}),
    "cohere, norms of each head's own": (
        hf.CohereConfig(**SIZES, use_qk_norm=True),
        "the target's config cannot say norm = 'centred'",
        {"known": "rms, layer"},
    ),
    "stablelm, norms of each head's own": (
        hf.StableLmConfig(**SIZES, qk_layernorm=True),
        "the target's config cannot say qk_norm = 'heads'",
        {"known": "none, head"},
    ),
    "cohere2": (hf.Cohere2Config(**SIZES), "the target's config cannot say norm = 'centred'", {"known": "rms, layer"}),
    "stablelm, MLP beside attention": (
        hf.StableLmConfig(**SIZES, use_parallel_residual=True),
        "the target's config has no place for 'parallel_residual'",
        {"found": "True"},
    ),
    # a class of Megatron-Bridge has it from the config.json alone
    "ministral3": (
        hf.Ministral3Config(
            **WIDE, rope_parameters={**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
        ),
        "the target's config has no place for 'query_growth'",
        {"found": "0.5"},
    ),
    "olmoe": (
        hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
        "the target's config cannot say qk_norm = 'whole'",
        {"known": "none, head"},
    ),
    # Megatron norms them in layers without positions too, and its attention knows no chunks
    "llama4": (
        hf.Llama4TextConfig(**WIDE, **LLAMA4),
        "the target's config cannot say rope_interleaved",
        {"also": "the target's config cannot say qk_norm = 'plain'"},
    ),
    "llama4, no norms": (
        hf.Llama4TextConfig(**WIDE, **LLAMA4, use_qk_norm=False),
        "the target's config cannot say rope_interleaved",
        {"rope_interleaved": True},
    ),
    "granite": (
        hf.GraniteConfig(**SIZES, embedding_multiplier=12.0),
        "the target's config has no place for 'embed_scale'",
        {"found": "12.0"},
    ),
    "granite, scores alone": (
        hf.GraniteConfig(**SIZES, attention_multiplier=0.1),
        "the target's config has no place for 'attention_scale'",
        {"found": "0.1"},
    ),
    "gpt_neox": (
        hf.GPTNeoXConfig(**{name: value for name, value in SIZES.items() if name not in {"num_key_value_heads", "rope_theta"}}),
        "the target's config has no place for 'parallel_residual'",
        {"found": "True"},
    ),
    "falcon": (hf.FalconConfig(**FALCON), "the target's config has no place for 'parallel_residual'", {"found": "True"}),
    # no builder of Megatron-LM's hands this factor on, and no flag says those numbers
    "llama, stretched by another factor": (
        hf.LlamaConfig(**{**WIDE, "rope_scaling": {**LLAMA3["rope_scaling"], "factor": 32.0}}),
        UNTOLD,
        {"rope_scaling_factor": "0.16, 0.17, 0.18, 0.19, 0.20: 32.0 is not handed to the model, which has 8.0"},
    ),
    "deepseek_v3, numbers of yarn": (
        MODELS["deepseek_v3"],
        UNTOLD,
        {"beta_fast": "0.16, 0.17, 0.18, 0.19, 0.20: no flag says 2.0"},
    ),
    "phi3, each frequency stretched for itself": (
        hf.Phi3Config(
            **SIZES,
            pad_token_id=0,
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 4.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
            original_max_position_embeddings=16,
        ),
        SENSE,
        {"rope_type": "'longrope'"},
    ),
    "falcon, alibi": (
        hf.FalconConfig(**FALCON, parallel_attn=False, alibi=True),
        "the target's config cannot say position = 'alibi'",
        {"key": "position_embedding_type"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_cannot_be_told_is_refused_by_name(name, saved, tmp_path):
    config, what, facts = REFUSED[name]
    with pytest.raises(NotSupported) as caught:
        carnet.cross(saved(config), tmp_path / "megatron", to="megatron")
    assert caught.value.what == what
    assert facts.items() <= caught.value.facts.items()
    assert not (tmp_path / "megatron").exists()


# of these Megatron needs kernels for an accelerator, or has none, transformers has no class; or releases before 0.19 compute another
ELSEWHERE = {
    "mamba",
    "mamba2",
    "nemotron_h",
    "nemotron_nas",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "deepseek_v32",
    "glm_moe_dsa",
    "mimo",
    "bailing_moe_v2",
    "eagle3",
}


def test_no_family_is_left_out():
    named = {name.split(",")[0] for name in (*MODELS, *REFUSED)}
    assert named | ELSEWHERE == {family.name for family in FAMILIES}
