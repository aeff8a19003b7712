"""What is varied where two programs are held against each other: every field that says what a model computes, away from its default.

A case is a change of a config of transformers, said in its own words. It does not say what carnet should make of them.
"""

from dataclasses import dataclass, field
from typing import Any

import transformers as hf

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
WIDE = {**SIZES, "head_dim": 16}
FEW = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
FALCON = {name: size for name, size in FEW.items() if name != "intermediate_size"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 97, "n_positions": 64}
HYBRID = {
    **SIZES,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 14,
    "ssm_state_size": 12,
    "conv_kernel": 4,
    "n_groups": 2,
    "layers_block_type": ["linear_attention", "mlp", "full_attention"],
}
del HYBRID["num_hidden_layers"], HYBRID["tie_word_embeddings"]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 64, "use_qk_norm": False}

GROWING = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 8}

GEMMA4 = {**WIDE, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "sliding_window": 64, "tie_word_embeddings": True}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 20}

# family -> transformers' config of a small model, and what it says
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, WIDE),
    "mistral": (hf.MistralConfig, {**WIDE, "sliding_window": None}),
    "qwen2": (hf.Qwen2Config, SIZES),
    "qwen3": (hf.Qwen3Config, WIDE),
    "phi3": (hf.Phi3Config, {**SIZES, "sliding_window": None, "pad_token_id": 0}),
    "nemotron": (hf.NemotronConfig, SIZES),
    "starcoder2": (hf.Starcoder2Config, {**SIZES, "sliding_window": None, "use_bias": True}),
    "gpt2": (hf.GPT2Config, GPT2),
    "gpt_neox": (hf.GPTNeoXConfig, {**FEW, "use_parallel_residual": False}),
    "falcon": (hf.FalconConfig, {**FALCON, "parallel_attn": False, "multi_query": False, "bias": True}),
    "granite": (hf.GraniteConfig, {**SIZES, "attention_multiplier": 8**-0.5}),
    "olmo2": (hf.Olmo2Config, SIZES),
    "gemma": (hf.GemmaConfig, WIDE),
    "gemma2": (hf.Gemma2Config, {**WIDE, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3": (hf.Gemma3TextConfig, {**WIDE, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma4": (hf.Gemma4TextConfig, GEMMA4),
    "mixtral": (hf.MixtralConfig, {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": (hf.Qwen2MoeConfig, {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 28, "norm_topk_prob": True}),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**WIDE, **EXPERTS, "norm_topk_prob": True}),
    "llama4": (hf.Llama4TextConfig, {**WIDE, **LLAMA4, "no_rope_layers": [1, 1], "attn_temperature_tuning": False}),
    "gpt_oss": (
        hf.GptOssConfig,
        {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64, "rope_parameters": PLAIN_ROPE},
    ),
    "deepseek_v2": (hf.DeepseekV2Config, LATENT),
    "deepseek_v3": (hf.DeepseekV3Config, LATENT),
    "nemotron_h": (hf.NemotronHConfig, HYBRID),
    "hunyuan_v1_dense": (hf.HunYuanDenseV1Config, WIDE),
    "ministral3": (hf.Ministral3Config, {**WIDE, "rope_parameters": {**GROWING, "llama_4_scaling_beta": 0.0}}),
    "smollm3": (hf.SmolLM3Config, {**SIZES, "no_rope_layers": [1, 1], "pad_token_id": 0}),
}

EITHER = None  # as the release of Megatron-LM that is asked for: what 0.19 computes no release before does


@dataclass(frozen=True)
class Case:
    """One model of transformers, and whether the real Megatron can be told of it."""

    base: str
    change: dict[str, Any] = field(default_factory=dict)
    equal: bool | None = True  # crosses, and computes the same; or is refused; or either
    named: str = ""  # what the refusal names where that is not the field itself
    moves: bool = True  # the logits of the base with the same weights are others


def reader(base: str, change: dict[str, Any]) -> dict[str, str]:
    """Return the option that names who loads the target: Megatron-LM has no flags for the numbers of yarn under latent attention."""
    stretched = change.get("rope_parameters", {}).get("rope_type") == "yarn"
    return {"read_by": "megatron-bridge"} if stretched and BASES[base][1] is LATENT else {}


def yarn(**more: object) -> dict[str, Any]:
    stretched = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 40.0, "original_max_position_embeddings": 512}
    return {"rope_parameters": {**stretched, **more}}


def llama3(**more: object) -> dict[str, Any]:
    known = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **known, **more}}


def longrope(original: int = 16, **more: object) -> dict[str, Any]:
    known = {"short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    stretched = {"rope_type": "longrope", "rope_theta": 1e4, **known, **more}
    return {"rope_parameters": stretched, "original_max_position_embeddings": original}


LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
ALPHA = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
PROPORTIONAL = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    "sliding_attention": PLAIN_ROPE,
}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
ALTERNATE = ["full_attention", "sliding_attention"]
CHUNKED = {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]}
SHARP = {"attn_temperature_tuning": True, "no_rope_layers": [1, 0], "floor_scale": 4, "attn_scale": 0.3}


def v3(equal: bool | None = True, named: str = "", **change: object) -> Case:
    return Case("deepseek_v3", change, equal, named)


@dataclass(frozen=True)
class Told:
    """Arguments of Megatron that are others than a crossing wrote."""

    base: str
    arguments: dict[str, Any]
    equal: bool = True
    named: str = ""  # what the refusal names where that is not an argument
    change: dict[str, Any] = field(default_factory=dict)  # of the base, before it crosses
    moves: bool = True


CASES: dict[str, tuple[Case, ...]] = {
    "norm": (Case("starcoder2"), Case("llama")),
    "norm_eps": (
        Case("llama", {"rms_norm_eps": 0.01}),
        Case("gpt2", {"layer_norm_epsilon": 0.01}),
        Case("starcoder2", {"norm_epsilon": 0.01}),
        Case("nemotron", {"norm_eps": 0.01}),
        Case("qwen3", {"rms_norm_eps": 0.01}),
        v3(False, "latent_norm_eps", rms_norm_eps=0.01),
    ),
    "latent_norm_eps": (v3(), Case("deepseek_v2"), Case("deepseek_v2", {"rms_norm_eps": 1e-5}, False, moves=False)),
    "activation": (
        Case("llama"),
        Case("nemotron"),
        Case("gpt2"),
        Case("gpt2", {"activation_function": "gelu_pytorch_tanh"}, moves=False),
        Case("starcoder2", {"hidden_act": "silu"}, False),
        Case("llama", {"hidden_act": "gelu_pytorch_tanh"}, False),
        Case("gpt_oss"),
    ),
    "gated": (Case("llama"), Case("gpt_oss"), Case("gemma", {}, False)),
    "position": (Case("gpt2"), Case("llama"), Case("falcon", {"alibi": True}, False)),
    "rope_theta": (
        Case("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        v3(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ),
    "rope_type": (
        Case("llama", LINEAR, EITHER),
        Case("llama", DYNAMIC, False, moves=False),
        Case("phi3", longrope(), False),
        Case("llama", llama3()),
        Case("qwen2", yarn(), EITHER),
        Case("gpt_oss", yarn(truncate=False), EITHER),
        v3(**yarn()),
        Case("deepseek_v2", yarn()),
    ),
    "rope_factor": (
        Case("llama", llama3()),
        Case("gpt_oss", yarn(factor=None), EITHER),
        Case("gpt_oss", yarn(factor=16.0), EITHER),
        v3(**yarn(factor=8.0)),
    ),
    "rope_beta_fast": (v3(**yarn(beta_fast=8.0)), Case("gpt_oss", yarn(beta_fast=8.0), EITHER)),
    "rope_beta_slow": (v3(**yarn(beta_slow=8.0)), Case("gpt_oss", yarn(beta_slow=0.25), EITHER)),
    "rope_attention": (
        v3(**yarn(mscale=0.707)),
        v3(**yarn(mscale=0.707, mscale_all_dim=0.0)),
        v3(**yarn(mscale=0.0, mscale_all_dim=1.0)),
        v3(**yarn(mscale=0.8, mscale_all_dim=0.6)),
        v3(**yarn(attention_factor=0.5)),
        v3(**yarn(attention_factor=1.25, mscale_all_dim=0.7)),
        v3(**yarn(attention_factor=1.0, mscale=0.7, mscale_all_dim=0.7)),
        Case("deepseek_v2", yarn(mscale=0.707)),
        Case("deepseek_v2", yarn(attention_factor=1.5)),
        Case("gpt_oss", yarn(attention_factor=0.5), EITHER),
        Case("gpt_oss", yarn(mscale=0.7), EITHER),
        Case("qwen3", yarn(attention_factor=1.5), EITHER),
        Case("llama", yarn(mscale=0.7, mscale_all_dim=1.0), EITHER),
        Case("phi3", longrope(attention_factor=1.5), False, "rope_type"),
        Case("phi3", longrope(factor=16.0), False, "rope_type"),
    ),
    "rope_mscale_all": (v3(**yarn(mscale_all_dim=1.0)), Case("deepseek_v2", yarn(mscale=0.707, mscale_all_dim=0.707))),
    "rope_short": (Case("phi3", longrope(original=32), False, "rope_type"),),
    "rope_long": (Case("phi3", longrope(), False, "rope_type"),),
    "rope_truncated": (v3(False, **yarn(truncate=False)), Case("gpt_oss", yarn(truncate=False), EITHER)),
    "rope_low": (Case("llama", llama3(low_freq_factor=2.0), False),),
    "rope_high": (Case("llama", llama3(high_freq_factor=8.0), False),),
    "rope_original": (
        Case("llama", llama3(original_max_position_embeddings=16), False),
        v3(**yarn(factor=2.0)),
        Case("phi3", longrope(), False, "rope_type"),
    ),
    "rope_percent": (
        Case("phi3", {"partial_rotary_factor": 0.5}),
        Case("nemotron", {"partial_rotary_factor": 0.75}),
        Case("gpt_neox", {"rotary_pct": 0.5}),
        Case("gemma4", {"rope_parameters": PROPORTIONAL}, False, "gated"),
    ),
    "qkv_bias": (Case("qwen2"), Case("llama", {"attention_bias": True, "mlp_bias": True}, moves=False)),
    "out_bias": (
        Case("llama", {"attention_bias": True, "mlp_bias": True}, moves=False),
        Case("llama", {"attention_bias": True}, False, moves=False),
    ),
    "mlp_bias": (
        Case("llama", {"attention_bias": True, "mlp_bias": True}, moves=False),
        Case("llama", {"mlp_bias": True}, False, moves=False),
    ),
    "qk_norm": (Case("qwen3"), Case("olmo2", {}, False), Case("llama4", {"use_qk_norm": True}, False)),
    "window": (
        Case("mistral", {"sliding_window": 5}),
        Case("mistral", {"sliding_window": 1}),
        Case("mixtral", {"sliding_window": 5}),
        Case("starcoder2", {"sliding_window": 5}),
        Case("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ),
    "window_layers": (
        Case("gpt_oss", {"sliding_window": 5, "layer_types": ALTERNATE}),
        Case("gpt_oss", {"sliding_window": 5}),
        Case("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        Case("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATE[::-1]}),
    ),
    "rope_local_theta": (
        Case("gemma3", {"rope_local_base_freq": 500.0, "layer_types": ALTERNATE}, False, "gated", moves=False),
    ),
    "v_norm": (Case("gemma4", {}, False, "gated"),),
    "value_layers": (Case("gemma4", {"attention_k_eq_v": True, "layer_types": ALTERNATE[::-1]}, False, "gated", moves=False),),
    "layer_scale": (Case("gemma4", {}, False, "gated"),),
    "shared_norms": (Case("gemma4", GEMMA4_EXPERTS, False, "gated", moves=False),),
    "router_norm": (Case("gemma4", GEMMA4_EXPERTS, False, "gated", moves=False),),
    "expert_scale": (Case("gemma4", GEMMA4_EXPERTS, False, "gated", moves=False),),
    "norm_before": (Case("olmo2", {}, False, "qk_norm"),),
    "norm_after": (Case("olmo2", {}, False, "qk_norm"),),
    "qk_norm_rotated": (Case("hunyuan_v1_dense", {}, False),),
    "rope_alpha": (Case("hunyuan_v1_dense", ALPHA, False, "qk_norm_rotated"),),
    "embed_root": (Case("gemma", {}, False, "gated"),),
    "embed_scale": (Case("granite", {"embedding_multiplier": 4.0}, False),),
    "residual_scale": (Case("granite", {"residual_multiplier": 0.5}, False),),
    "logits_divisor": (Case("granite", {"logits_scaling": 4.0}, False),),
    "attention_scale": (Case("granite", {"attention_multiplier": 0.1}, False),),
    "attention_root": (Case("gemma2", {"query_pre_attn_scalar": 64}, False, "gated"),),
    "softcap_attention": (
        Case("gemma2", {"attn_logit_softcapping": 0.5}, False, "gated"),
        Case("gemma2", {"attn_logit_softcapping": None}, False, "gated"),
    ),
    "softcap_logits": (
        Case("gemma2", {"final_logit_softcapping": 0.5}, False, "gated"),
        Case("gemma2", {"final_logit_softcapping": None}, False, "gated"),
        Case("gemma4", {"final_logit_softcapping": 0.5}, False, "gated"),
    ),
    "parallel_residual": (
        Case("gpt_neox", {"use_parallel_residual": True}, False),
        Case("falcon", {"parallel_attn": True}, False, moves=False),
    ),
    "one_norm": (Case("falcon", {"parallel_attn": True}, False, "parallel_residual", moves=False),),
    "topk": (Case("qwen3_moe", {"num_experts_per_tok": 3}), Case("mixtral", {"num_experts_per_tok": 3})),
    "router_score": (v3(),),
    "router_bias": (v3(),),
    "router_normed": (
        Case("qwen3_moe", {"norm_topk_prob": False}),
        Case("qwen2_moe", {"norm_topk_prob": False}),
        Case("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
        Case("deepseek_v2"),
        v3(False, norm_topk_prob=False),
        v3(norm_topk_prob=False, num_experts_per_tok=1),
        v3(False, norm_topk_prob=None),
    ),
    "router_scale": (
        v3(routed_scaling_factor=2.5),
        v3(False, routed_scaling_factor=0.0),
        Case("deepseek_v2", {"routed_scaling_factor": 2.5}),
    ),
    "router_groups": (
        v3(n_group=4, topk_group=2),
        Case("deepseek_v3", {"n_group": 2, "topk_group": 2}, moves=False),
        Case("deepseek_v2", {**LIMITED, "num_experts_per_tok": 2}),
    ),
    "router_group_topk": (
        v3(n_group=4, topk_group=2),
        Case("deepseek_v2", {**LIMITED, "topk_group": 3, "num_experts_per_tok": 3}),
    ),
    "router_group_best": (
        v3(n_group=4, topk_group=2),
        v3(False, n_group=4, topk_group=2, num_experts_per_tok=2),
        v3(False, n_group=2, topk_group=1),
        Case("deepseek_v2", LIMITED, False),
        Case("deepseek_v2", {**LIMITED, "num_experts_per_tok": 2}),
    ),
    "shared_gate": (Case("qwen2_moe"),),
    "router_shift": (Case("gpt_oss"),),
    "moe_bias": (Case("gpt_oss"),),
    "glu_offset": (Case("gpt_oss"),),
    "glu_limit": (Case("gpt_oss"), Case("gpt_oss", {"swiglu_limit": 0.125})),
    "sinks": (Case("gpt_oss"),),
    "router_on_input": (Case("llama4", {}, False, "rope_interleaved"),),
    "rope_interleaved": (
        Case("llama4", {}, False),
        v3(False, "rope_interleave", rope_interleave=False),
        v3(False, "rope_interleave", rope_interleave=None),
    ),
    "rope_layers": (
        Case("smollm3", {"no_rope_layers": [1, 0]}),
        Case("llama4", {"no_rope_layers": [1, 0]}, False, "rope_interleaved"),
    ),
    "chunk": (Case("llama4", {"attention_chunk_size": 8}, False, "rope_interleaved"),),
    "chunk_layers": (Case("llama4", CHUNKED, False, "rope_interleaved"),),
    "temperature": (Case("llama4", SHARP, False, "rope_interleaved"),),
    "temperature_floor": (Case("llama4", SHARP, False, "rope_interleaved"),),
    "temperature_scale": (Case("llama4", SHARP, False, "rope_interleaved"),),
    "query_growth": (Case("ministral3", {"rope_parameters": {**GROWING, "llama_4_scaling_beta": 0.5}}, False),),
    "latent": (v3(), Case("deepseek_v2"), Case("deepseek_v2", {"q_lora_rank": None}, moves=False)),
    "ssm_conv_bias": (Case("nemotron_h", {"use_conv_bias": False}, False, moves=False),),
    "ssm_norm_eps": (Case("nemotron_h", {"layer_norm_epsilon": 0.01}, False),),
    "tied": (Case("llama", {"tie_word_embeddings": True}, moves=False), Case("gpt2")),
}

# what no case varies, and why none has to
A_SIZE = "a size: the shapes of the tensors say it too, or a crossing stops"
UNVARIED = {
    **dict.fromkeys(
        "layers hidden heads kv_heads head_dim ffn vocab positions experts moe_ffn moe_latent shared_ffn kv_lora q_lora nope_dim "
        "rope_dim v_dim ssm_channels ssm_dt_rank ssm_heads ssm_head_dim ssm_groups ssm_state ssm_conv "
        "gdn_keys gdn_values gdn_key_dim gdn_value_dim gdn_conv layer_kv_heads layer_head_dim layer_ffn".split(),
        A_SIZE,
    ),
    "blocks": "what a layer is: its tensors say it too",
    "hybrid": "one block a layer: its tensors say it too",
    "attention_gate": "a projection more, and beside layers that run on a GPU alone: the golden in test_logits.py",
    "adapters": "what stands beside the weights: tests/referees/test_adapters.py, test_adapters_families.py",
    "new_decoder": "a word of Falcon's for what other fields say",
    "ssm_norm_groups": "transformers' two classes have one value each: test_family_hybrids.py",
    "mtp": "transformers has no class for the layer, and the other logits do not depend on it: test_megatron_core.py",
    "mtp_blocks": "layers for further tokens, of which transformers has none: tests/megatron/test_further_by_pattern.py",
    "rope_sections": "three positions that are one for a text: test_family_qwen3_5.py, and on an image test_towers.py",
    "wrapper": "nothing of the text model: test_towers.py",
    **dict.fromkeys(
        "index_heads index_dim index_topk index_norm_eps index_interleaved index_layers".split(),
        "an indexer's, which the newest megatron-core alone computes as transformers does: tests/megatron/test_sparse_attention.py",
    ),
    **dict.fromkeys(
        "aux aux_layers draft_vocab".split(),
        "a head's that guesses tokens, of which transformers has no class: tests/megatron/test_post_training.py",
    ),
    "router_wide": "the type in which it is computed: the same in f32",
}

ONE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5}
# what changes nothing that a model computes, in the words of a config: a base, and a change of it
NEUTRAL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2", {**WINDOWED, "max_window_layers": 2}),
    ("qwen2", {**WINDOWED, "max_window_layers": 28}),
    ("qwen2", {**WINDOWED, "sliding_window": None, "max_window_layers": 0}),
    ("qwen3", {**WINDOWED, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}),
    ("mistral", {"sliding_window": 64}),
    ("llama", {"rope_parameters": ONE}),
    ("llama", {"rope_parameters": {**ONE, "factor": 1}}),
    ("llama", llama3(factor=1.0, rope_theta=1e4)),
    ("qwen2", yarn(factor=1.0, rope_theta=1e4)),
    ("gpt_oss", yarn(factor=1.0, rope_theta=1e4)),
    ("deepseek_v3", yarn(factor=1.0, rope_theta=1e4, mscale=0.707, mscale_all_dim=0.5)),
    ("falcon", {"multi_query": None, "parallel_attn": None}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 1}),
    ("phi3", {"partial_rotary_factor": 1.0}),
)

# what changes what transformers computes, and carnet has no word for
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nemotron_h", {"time_step_min": 0.5}),
    ("deepseek_v3", {"head_dim": 2}),
    ("deepseek_v3", {"rope_interleave": None}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt_oss", {"swiglu_alpha": 1.0}),
    ("gemma3", {"use_bidirectional_attention": True}),
)

STRETCHED = yarn(mscale=0.8, mscale_all_dim=0.6)


def latent(equal: bool = True, named: str = "", *, moves: bool = True, **arguments: object) -> Told:
    return Told("deepseek_v3", arguments, equal, named, STRETCHED, moves)


TOLD = (
    latent(mscale=0.7),
    latent(mscale=0.0),
    latent(mscale_all_dim=0.0),
    latent(mscale=0.7, mscale_all_dim=0.0),
    latent(mscale=0.0, mscale_all_dim=1.0),
    latent(rotary_scaling_factor=8.0),
    latent(rotary_scaling_factor=1.0),
    latent(beta_fast=8.0),
    latent(beta_slow=8.0),
    latent(original_max_position_embeddings=256),
    latent(rope_type="rope", mscale_all_dim=0.0),
    latent(False, "mscale_all_dim", rope_type="rope"),
    latent(False, "rope_percent", rope_type="rope", mscale_all_dim=0.0, rotary_percent=0.5),
    latent(rotary_percent=0.5, moves=False),
    latent(rotary_base=500),
    latent(False, "latent_norm_eps", layernorm_epsilon=0.01),
    latent(moe_router_topk_scaling_factor=2.5),
    latent(moe_router_topk_scaling_factor=0.0, moves=False),
    latent(moe_router_topk=1),
    latent(moe_router_num_groups=4, moe_router_group_topk=2),
    latent(False, "router_group_best", moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk=2),
    latent(moe_router_dtype="fp32", moves=False),
    latent(False, "moe_router_topk", moe_apply_probs_on_input=True),
    Told("llama", {"layernorm_epsilon": 0.01}),
    Told("llama", {"rotary_base": 500}),
    Told("llama", {"rotary_percent": 0.5}),
    Told("llama", {"window_size": [4, 0]}),
    Told("llama", {"window_size": [4, 4]}, False),
    Told("llama", {"softmax_type": "off-by-one"}, False),
    Told("llama", {"no_rope_freq": 2}),
    Told("llama", {"rotary_interleaved": True}),
    Told("llama", {"use_rope_scaling": True}),
    Told("gpt2", {"bias_gelu_fusion": False}),
    Told("mixtral", {"moe_router_topk": 3}),
    Told("mixtral", {"moe_router_topk": 1}, False, "moe_router_pre_softmax"),
    Told("mixtral", {"moe_router_topk_scaling_factor": 2.5}, False, "router_scale"),
    Told("mixtral", {"moe_router_num_groups": 2, "moe_router_group_topk": 1}, False, "router_group"),
    Told("mixtral", {"moe_router_score_function": "sigmoid"}, False, "router_score"),
    Told("qwen3_moe", {"moe_router_pre_softmax": True}),
    Told("qwen3_moe", {"moe_router_pre_softmax": True, "moe_router_topk": 1}),
    Told("gpt_oss", {"activation_func_clamp_value": 0.125}),
    Told("gpt_oss", {"glu_linear_offset": 0.5}, False, "glu_offset"),
    Told("gpt_oss", {"window_size": [4, 0], "window_attn_skip_freq": 2}),
)
