"""Megatron-LM's arguments by release: which reach the model that is computed, and which a run that loads a checkpoint is told again.

Of core_v0.15.3, 0.16.1, 0.17.1, 0.18.2, 0.19.0 and the 0.20 of August 2026 (d98e8a64): their own parsers, load_args_from_checkpoint,
core_transformer_config_from_args and builders (gpt_builders.py; from 0.19 on gpt_config_from_args) ran, but for those of hybrids and of
0.15.3, which were read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Arguments = Mapping[str, object]

RELEASES = ("0.15", "0.16", "0.17", "0.18", "0.19", "0.20")  # the first stands for those before it, too
NEVER = "never"  # no release has it: a word of Megatron-Bridge's or of NeMo's
STOPS = object()  # in place of a value: the release builds nothing, or what no other program computes

# what --use-checkpoint-args does about an argument, from a release on: megatron/training/checkpointing.py load_args_from_checkpoint
Carried = tuple[tuple[str, str], ...]
ALWAYS: Carried = (("0.15", "always"),)
UNLESS_GIVEN: Carried = (("0.15", "unless given"),)
NOT: Carried = (("0.15", "no"),)
UNTIL_0_16: Carried = (("0.15", "always"), ("0.17", "no"))
FROM_0_17: Carried = (("0.15", "no"), ("0.17", "always"))
FROM_0_18: Carried = (("0.15", "no"), ("0.18", "always"))
FROM_0_20: Carried = (("0.15", "no"), ("0.20", "always"))
FROM_0_17_UNLESS_GIVEN: Carried = (("0.15", "no"), ("0.17", "unless given"))

FREQUENCY = "frequency"  # an integer, or a list of Python's


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of Megatron-LM's."""

    name: str  # in the saved arguments
    kind: object  # what its flag takes: int, float, str, bool (nothing), list, tuple, FREQUENCY; None where there is no flag
    flag: str  # on the command line; of a bool, what makes it other than its default
    default: object  # what the command line has where nobody says it
    since: str  # the first release that has it; a saved argument of a later one proves that a release wrote it
    until: str  # the last
    carried: Carried
    where: str  # what hands it on; a number is a line of megatron/core/transformer/transformer_config.py of 0.16.1


def _row(
    name: str,
    kind: object,
    *,
    flag: str = "",
    default: object = None,
    since: str = RELEASES[0],
    until: str = RELEASES[-1],
    carried: Carried = NOT,
    where: str = "nowhere",
) -> Argument:
    said = flag or f"--{name.replace('_', '-')}"
    return Argument(name, kind, said if kind is not None else "", default, since, until, carried, where)


ARGUMENTS = (
    _row("num_layers", int, carried=UNLESS_GIVEN, where="45"),
    _row("hidden_size", int, carried=UNLESS_GIVEN, where="104"),
    _row("num_experts", int, carried=ALWAYS, where="188"),
    _row("moe_layer_freq", FREQUENCY, default=1, carried=ALWAYS, where="556"),
    _row("is_hybrid_model", bool, default=False, carried=UNTIL_0_16, where="843; of the initial weights alone"),
    _row("hybrid_override_pattern", str, carried=UNTIL_0_16, where="mamba_builders.py; checkpointing.py has the next from it"),
    _row("hybrid_layer_pattern", str, since="0.17", carried=FROM_0_17_UNLESS_GIVEN, where="hybrid_builders.py"),
    _row("hybrid_attention_ratio", float, default=0.0, until="0.16", carried=UNTIL_0_16, where="mamba_builders.py"),
    _row("hybrid_mlp_ratio", float, default=0.0, until="0.16", carried=UNTIL_0_16, where="mamba_builders.py"),
    _row("spec", list, carried=ALWAYS, where="gpt_builders.py"),
    _row("heterogeneous_layers_config_path", str, carried=ALWAYS, where="arguments.py:1314"),
    _row("heterogeneous_layers_config_encoded_json", str, carried=ALWAYS, where="arguments.py:1314"),
    _row("mamba_state_dim", int, default=128, carried=ALWAYS, where="846"),
    _row("mamba_head_dim", int, default=64, carried=ALWAYS, where="849"),
    _row("mamba_num_groups", int, default=8, carried=ALWAYS, where="852"),
    _row("mamba_num_heads", int, carried=ALWAYS, where="855"),
    _row("num_attention_heads", int, carried=UNLESS_GIVEN, where="107"),
    _row("num_query_groups", int, default=1, carried=ALWAYS, where="124"),
    _row("group_query_attention", bool, default=False, carried=ALWAYS, where="arguments.py:1348"),
    _row("multi_latent_attention", bool, default=False, where="237"),
    _row("kv_lora_rank", int, default=32, where="2019"),
    _row("q_lora_rank", int, where="2016"),
    _row("qk_head_dim", int, default=128, where="2022"),
    _row("qk_pos_emb_head_dim", int, default=64, where="2025"),
    _row("v_head_dim", int, default=128, where="2028"),
    _row("kv_channels", int, carried=UNLESS_GIVEN, where="133"),
    _row("ffn_hidden_size", int, carried=UNLESS_GIVEN, where="129"),
    _row("vocab_size", int, where="nowhere: the tokenizer may read it"),
    _row("padded_vocab_size", int, carried=UNLESS_GIVEN, where="gpt_builders.py:98"),
    _row("max_position_embeddings", int, carried=UNLESS_GIVEN, where="gpt_builders.py:99"),
    _row("normalization", str, default="LayerNorm", carried=ALWAYS, where="205"),
    _row("layernorm_epsilon", float, flag="--norm-epsilon", since="0.16", default=1e-05, where="150"),
    _row("norm_epsilon", None, default=1e-5, until="0.15", where="arguments.py:1250 (0.15.3)"),
    _row("layernorm_zero_centered_gamma", bool, flag="--apply-layernorm-1p", since="0.16", default=False, where="155"),
    _row("apply_layernorm_1p", None, default=False, until="0.15", carried=ALWAYS, where="arguments.py:1249 (0.15.3)"),
    _row("swiglu", bool, default=False, carried=ALWAYS, where="arguments.py:1332"),
    _row("squared_relu", bool, default=False, carried=ALWAYS, where="arguments.py:1338"),
    _row("quick_geglu", bool, default=False, where="arguments.py:1341"),
    _row("openai_gelu", bool, default=False, where="nowhere"),
    _row("bias_gelu_fusion", bool, flag="--no-bias-gelu-fusion", default=True, where="arguments.py:1337"),
    _row("bias_swiglu_fusion", bool, flag="--no-bias-swiglu-fusion", default=True, where="arguments.py:1335"),
    _row("glu_linear_offset", float, default=0.0, where="180"),
    _row("activation_func_clamp_value", float, where="184"),
    _row("position_embedding_type", str, default="learned_absolute", carried=ALWAYS, where="gpt_builders.py:105"),
    _row("use_rope_scaling", bool, default=False, where="gpt_builders.py:108"),
    _row("rope_scaling_factor", float, default=8.0, where="nowhere"),
    _row("rotary_seq_len_interpolation_factor", int, where="argument_utils.py:466 (0.19.0)"),
    _row("rotary_base", int, default=10000, carried=ALWAYS, where="gpt_builders.py:107"),
    _row("rotary_percent", float, default=1.0, carried=ALWAYS, where="gpt_builders.py:106"),
    _row("rotary_interleaved", bool, default=False, carried=ALWAYS, where="192"),
    _row("rope_type", str, where="2034"),
    _row("rotary_scaling_factor", float, default=1.0, where="2043"),
    _row("original_max_position_embeddings", None, default=4096, where="2046"),
    _row("beta_fast", None, default=32.0, where="2049"),
    _row("beta_slow", None, default=1.0, where="2052"),
    _row("mscale", float, default=1.0, where="2055"),
    _row("mscale_all_dim", float, default=0.0, where="2058"),
    _row("yarn_original_max_position_embeddings", int, since="0.19", where="argument_utils.py:408 (0.19.0)"),
    _row("yarn_beta_fast", float, since="0.19", where="argument_utils.py:409 (0.19.0)"),
    _row("yarn_beta_slow", float, since="0.19", where="argument_utils.py:410 (0.19.0)"),
    _row(
        "yarn_correction_range_round_to_int",
        bool,
        flag="--no-yarn-correction-range-round-to-int",
        default=True,
        since="0.19",
        where="argument_utils.py:413 (0.19.0)",
    ),
    _row("yarn_rotary_scaling_factor", None, since=NEVER),
    _row("yarn_mscale", None, since=NEVER),
    _row("yarn_mscale_all_dim", None, since=NEVER),
    _row("window_size", tuple, where="196"),
    _row("window_attn_skip_freq", FREQUENCY, where="200"),
    _row("softmax_type", str, default="vanilla", where="119"),
    _row("add_bias_linear", bool, flag="--disable-bias-linear", default=True, carried=ALWAYS, where="161"),
    _row("add_qkv_bias", bool, default=False, carried=ALWAYS, where="167"),
    _row("qk_layernorm", bool, default=False, where="208"),
    _row("qk_l2_norm", bool, default=False, where="211"),
    _row("moe_ffn_hidden_size", int, carried=ALWAYS, where="561"),
    _row("moe_router_topk", int, default=2, carried=ALWAYS, where="578"),
    _row("moe_shared_expert_intermediate_size", int, carried=ALWAYS, where="534"),
    _row("moe_shared_expert_gate", bool, since="0.16", default=False, where="546"),
    _row("moe_router_enable_expert_bias", bool, default=False, carried=ALWAYS, where="634"),
    _row("moe_router_score_function", str, default="softmax", carried=ALWAYS, where="626"),
    _row("moe_router_pre_softmax", bool, default=False, carried=ALWAYS, where="617"),
    _row("moe_apply_probs_on_input", bool, default=False, where="716"),
    _row("moe_router_topk_scaling_factor", float, carried=ALWAYS, where="622"),
    _row("moe_router_num_groups", int, where="598"),
    _row("moe_router_group_topk", int, where="614"),
    _row("moe_router_topk_limited_devices", None, where="584"),
    _row("moe_router_load_balancing_type", list, default="aux_loss", where="564"),
    _row("mtp_num_layers", int, carried=FROM_0_17, where="48"),
    _row("untie_embeddings_and_output_weights", bool, default=False, carried=ALWAYS, where="gpt_builders.py:104"),
    _row("params_dtype", None, where="arguments.py validate_args"),
    _row("apply_residual_connection_post_layernorm", bool, default=False, where="147"),
    _row("attention_output_gate", bool, since="0.16", default=False, where="227"),
    _row("no_rope_freq", FREQUENCY, where="240"),
    _row("mrope_section", list, where="839"),
    _row("experimental_attention_variant", str, where="250"),
    _row("linear_attention_freq", FREQUENCY, where="275"),
    _row("linear_conv_kernel_dim", int, default=4, where="282"),
    _row("linear_key_head_dim", int, default=128, where="285"),
    _row("linear_value_head_dim", int, default=128, where="288"),
    _row("linear_num_key_heads", int, default=16, where="291"),
    _row("linear_num_value_heads", int, default=32, where="294"),
    _row("dsa_indexer_n_heads", int, since="0.16", where="256"),
    _row("dsa_indexer_head_dim", int, since="0.16", where="259"),
    _row("dsa_indexer_topk", int, since="0.16", where="262"),
    _row("dsa_indexer_topk_freq", int, default=1, since="0.19", where="312 (0.19.2)"),
    _row("dsa_indexer_skip_topk_offset", int, default=0, since="0.19", where="316 (0.19.2)"),
    _row("dsa_indexer_rope_interleaved", bool, default=False, since="0.19", where="331 (0.19.2)"),
    _row("dsa_indexer_k_norm_epsilon", float, since="0.19", where="340 (0.19.2)"),
    _row(
        *("dsa_indexer_scoring_relu", bool),
        flag="--no-dsa-indexer-scoring-relu",
        default=True,
        since="0.19",
        where="337 (0.19.2)",
    ),
    _row("use_mup", bool, default=False, since="0.17", where="355 (0.17.1)"),
    _row("moe_latent_size", int, since="0.16", carried=ALWAYS, where="719"),
    _row("mtp_use_repeated_layer", bool, default=False, since="0.17", carried=FROM_0_17, where="68 (0.17.1)"),
    _row("mtp_hybrid_override_pattern", str, since="0.17", carried=FROM_0_17, where="71 (0.17.1)"),
    _row("enable_mhc_connections", bool, default=False, since="0.20", where="1142 (0.20)"),
    _row("moe_mlp_glu_interleave_size", int, since="0.18", where="868 (0.18.2)"),
    _row("moe_shared_expert_glu_interleave_size", int, since="0.19", where="708 (0.19.0)"),
    _row("gated_linear_unit", None, where="170"),
    _row("activation_func", None, where="173"),
    _row("softmax_scale", None, where="116"),
    _row("attn_logit_softcapping", None, since=NEVER),
    _row("final_logit_softcapping", None, since=NEVER),
    _row("query_pre_attn_scalar", None, since=NEVER),
    _row("interleaved_attn_pattern", None, since=NEVER),
    _row("embedding_multiplier", None, since=NEVER),
    _row("moe_expert_capacity_factor", float, where="690"),
    _row("moe_token_drop_policy", str, default="probs", where="699"),
    _row("attention_softmax_in_fp32", bool, default=False, where="343"),
    _row("apply_query_key_layer_scaling", bool, default=False, carried=ALWAYS, where="339"),
    _row("moe_router_dtype", str, where="629"),
    _row("fp32_residual_connection", bool, default=False, where="143"),
    _row("moe_router_force_load_balancing", bool, default=False, where="645"),
    _row("use_rotary_position_embeddings", bool, default=False, carried=ALWAYS, where="arguments.py validate_args"),
    _row("mla_down_proj_fusion", bool, default=False, since="0.17", where="gpt_layer_specs.py (0.17.1)"),
    _row("moe_router_force_biased", float, since="0.17", where="moe/router.py:701 (0.17.1)"),
    _row("moe_single_grouped_weight", bool, default=False, since="0.18", carried=FROM_0_18, where="864 (0.20)"),
    _row("moe_single_grouped_bias", bool, default=False, since="0.18", carried=FROM_0_18, where="864 (0.20)"),
    _row("moe_router_quantile_balancing_ema", float, default=0.0, since="0.19", where="827 (0.20)"),
    _row("gdp_num_householder", int, default=3, since="0.20", carried=FROM_0_20, where="1272 (0.20)"),
)
PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")  # the latter since 0.17
BY_NAME = {row.name: row for row in ARGUMENTS}

# arguments that say nothing about the model, and when they were saved
MARKS = (
    _row("legacy_tokenizer", bool, until="0.16"),
    _row("moe_use_legacy_grouped_gemm", bool, until="0.16"),
    _row("use_legacy_models", bool, until="0.17"),
    _row("rl_parallel_generation_tasks", int, until="0.18"),
)


@dataclass(frozen=True, slots=True)
class Idle:
    """Where what an argument says does not reach the model that is computed."""

    name: str  # of the argument
    instead: object  # what the model has; STOPS where there is no model
    when: Callable[[Arguments], bool]  # of the other arguments
    since: str = RELEASES[0]  # the first release of which this is true
    until: str = RELEASES[-1]  # the last release of which this is true
    core: bool = (
        False  # megatron-core does not look at it, whatever program builds the model; else only Megatron-LM's builders do not
    )


def _mixture(said: Arguments) -> bool:
    return bool(said.get("num_experts"))


def _latent(said: Arguments) -> bool:
    return bool(said.get("multi_latent_attention"))


def _latent_alone(said: Arguments) -> bool:
    return _latent(said) and not _sparse(said) and not said.get("q_lora_rank")


def _sparse(said: Arguments) -> bool:
    return said.get("experimental_attention_variant") == "dsa"


def _yarn(said: Arguments) -> bool:
    return said.get("position_embedding_type") == "yarn" and not _latent(said)


def names_hybrid(said: Arguments) -> bool:
    """Say whether arguments name the layers of a hybrid, or its spec."""
    spec = str(said.get("spec"))
    return any(said.get(name) is not None for name in PATTERNS) or "mamba" in spec or "hybrid" in spec


def _scaled(said: Arguments) -> bool:
    return bool(said.get("use_rope_scaling")) and not (_latent(said) or _yarn(said) or names_hybrid(said))


def _fused_swiglu(said: Arguments) -> bool:
    return bool(said.get("swiglu")) and said.get("bias_swiglu_fusion") is not False


def _local_dense(said: Arguments) -> bool:
    others = ("num_experts", "spec", "experimental_attention_variant", "multi_latent_attention")
    described = said.get("heterogeneous_layers_config_path") is not None
    return said.get("transformer_impl") == "local" and not described and not any(said.get(name) for name in others)


def _ungrouped(said: Arguments) -> bool:
    return not said.get("group_query_attention") and said.get("num_query_groups") != said.get("num_attention_heads")


def _unlimited(said: Arguments) -> bool:
    capacity = said.get("moe_expert_capacity_factor")
    return not _mixture(said) or (isinstance(capacity, int | float) and capacity < 0)


IDLE = (
    Idle("openai_gelu", False, lambda said: True),  # nothing in megatron/core reads it
    # GPTModel has the keyword, and no builder hands the argument on: gpt_builders.py:96, argument_utils.py:464 (0.19.0)
    Idle("rope_scaling_factor", 8.0, _scaled),
    # MambaModel and HybridModel have no such keyword; GPTModel makes no plain rotary positions where there are others
    Idle("use_rope_scaling", False, lambda said: _latent(said) or _yarn(said) or names_hybrid(said), core=True),
    Idle("rotary_seq_len_interpolation_factor", None, _yarn, core=True),
    Idle("rotary_seq_len_interpolation_factor", None, lambda said: True, until="0.18"),
    # YarnRotaryEmbedding rotates whole heads: yarn_rotary_pos_embedding.py; latent attention has it where rope_type is None, too
    Idle("rotary_percent", 1.0, lambda said: _yarn(said) or (_latent(said) and said.get("rope_type") != "rope"), core=True),
    # 0.18 has the word, and GPTModel does not find what belongs to it: AttributeError
    Idle("position_embedding_type", STOPS, _yarn, until="0.18"),
    # an indexer of these rotates the last dimensions of its heads, and reads queries before their norm: dsa.py
    Idle("experimental_attention_variant", STOPS, _sparse, until="0.18", core=True),
    # queries that are not compressed get a norm of their own, behind the layer's: mla_qk_norm_config.py _resolve_mla_qk_layernorm
    Idle("qk_layernorm", STOPS, _latent_alone, since="0.19"),
    Idle("num_query_groups", None, _ungrouped),
    Idle("heterogeneous_layers_config_encoded_json", None, lambda said: said.get("heterogeneous_layers_config_path") is None),
    # the fused kernel has no limit (mlp.py, experts.py); that of 0.20 has, for experts
    Idle("activation_func_clamp_value", None, _fused_swiglu, until="0.19", core=True),
    Idle("activation_func_clamp_value", STOPS, lambda said: _fused_swiglu(said) and not _mixture(said)),
    Idle("qk_l2_norm", False, _local_dense, core=True),  # gpt_layer_specs.py get_gpt_layer_local_spec is not told
    Idle("apply_residual_connection_post_layernorm", False, lambda said: True, core=True),
    Idle("softmax_scale", None, _latent, core=True),  # it has its own: multi_latent_attention.py
    Idle("mrope_section", None, lambda said: said.get("position_embedding_type") != "mrope", core=True),
    Idle("linear_attention_freq", None, lambda said: said.get("experimental_attention_variant") is None, core=True),
    Idle("moe_expert_capacity_factor", None, _unlimited, core=True),
    *(
        Idle(name, None, lambda said: not _mixture(said), core=True)
        for name in (
            "moe_router_force_load_balancing",
            "moe_router_force_biased",
            "moe_router_load_balancing_type",
            "moe_router_topk_limited_devices",
        )
    ),
)

# arguments of which another model follows, that a person may do without: what they do, said where they are refused
ACCEPTABLE = {
    "moe_expert_capacity_factor": "experts drop the tokens beyond a capacity, in evaluation too",
    "moe_router_force_load_balancing": "tokens go to random experts",
    "moe_router_force_biased": "the router's logits are random, with a bias",
}
