"""Megatron's training arguments: what each says about a model, and which of them carnet cannot carry over.

Names in the saved arguments: megatron/training/arguments.py; what they do: megatron/core/transformer/transformer_config.py and
core_transformer_config_from_args in the former.
"""

from itertools import permutations

from carnet.dialects import indexer, yarn
from carnet.dialects.configs import ANY, Choice, Flagged, Spread, place
from carnet.dialects.configs import Row as Field
from carnet.dialects.heterogeneous import read_text, spelled_text, spread
from carnet.dialects.hf import TOKENS
from carnet.dialects.megatron.layers import (
    DESCRIBED,
    FURTHER_KEYS,
    HYBRID_KEYS,
    MARKS,
    NO_FURTHER,
    NO_HYBRID,
    blocks_of,
    frequencies,
    further_blocks_of,
    further_said,
    further_spelled,
    hybrid,
    letters,
    listed,
    rotated,
    window,
    window_said,
    windowed,
)
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, SET, Condition, Config
from carnet.model.model import head_share, number, value

LATENT: Condition = {"latent": True}
HEADS: Condition = {"latent": False}
PLAIN: Condition = {"rope_type": "default"}
LINEAR: Condition = {"rope_type": "linear"}
LLAMA3: Condition = {"rope_type": "llama3"}
YARN: Condition = {"latent": True, "rope_type": "yarn"}
OUTER_YARN: Condition = {"latent": False, "rope_type": "yarn"}
POSITIONS = (("rope", "rope"), ("learned", "learned_absolute"), ("none", "none"))
HYBRID: Condition = {"hybrid": True}
VARIANTS = (("gdn", "gated_delta_net"), ("gdn", "gdn"), ("dsa", "dsa"))  # the second since 0.20
SPARSE: Condition = {"variant": "dsa"}
DELTA_SIZES = (
    ("gdn_conv", "conv_kernel_dim", 4),
    ("gdn_key_dim", "key_head_dim", 128),
    ("gdn_value_dim", "value_head_dim", 128),
    ("gdn_keys", "num_key_heads", 16),
    ("gdn_values", "num_value_heads", 32),
)
UNLIKE: Condition = {"layer_ffn": SET}  # a description of the layers says their sizes, whatever the other arguments say


def both(said: tuple[bool, bool], _: Config) -> bool:
    """Return what two arguments say that go together."""
    expect(said[0] == said[1], "both, or neither")
    return bool(said[0])


def _scale(said: float | None, _: Config) -> float:
    return said or 1.0


def _best_of_a_group(config: Config) -> int | None:
    """Return how many of a group's best experts count when groups are chosen."""
    groups = number(config, "router_groups")
    return max(1, number(config, "topk") // number(config, "router_group_topk")) if groups > 1 else None


FIELDS: tuple[Field, ...] = (
    place("layers", "num_layers"),
    place("hidden", "hidden_size"),
    # where there are none Megatron wants no number, and stops at 0: TransformerConfig.__post_init__
    place("experts", "num_experts", "num_moe_experts", default=0, omit=True),
    Spread(
        "hybrid",
        HYBRID_KEYS[0],
        NO_HYBRID,
        lambda said, _: letters(said) is not None,
        lambda c: (hybrid(c),),
        more=HYBRID_KEYS[1:],
    ),
    spread("layer_ffn", DESCRIBED, read_text, spelled_text),
    place("variant", "experimental_attention_variant", default="none", words=VARIANTS, omit=True),
    Spread(
        *("blocks", "linear_attention_freq", (MARKS, MARKS, *NO_HYBRID, str, str, False), blocks_of, frequencies),
        more=("moe_layer_freq", *HYBRID_KEYS, *DESCRIBED, "multi_latent_attention"),
    ),
    # they have values in all arguments, and a meaning where there is such a layer
    *(
        place(field, f"linear_{key}", default=default, only=only)
        for only in (HYBRID, {"variant": "gdn"})
        for field, key, default in DELTA_SIZES
    ),
    place("ssm_state", "mamba_state_dim", default=128, only=HYBRID),
    place("ssm_head_dim", "mamba_head_dim", default=64, only=HYBRID),
    place("ssm_groups", "mamba_num_groups", default=8, only=HYBRID),
    place("ssm_heads", "mamba_num_heads", default=lambda c: 2 * number(c, "hidden") // number(c, "ssm_head_dim"), only=HYBRID),
    # what MambaMixer fixes: megatron/core/ssm/mamba_mixer.py
    place("ssm_conv", default=4, only=HYBRID),
    place("ssm_conv_bias", default=True, only=HYBRID),
    place("ssm_norm_groups", default=lambda c: c["ssm_groups"], only=HYBRID),
    place("ssm_norm_eps", default=1e-5, only=HYBRID),
    place("heads", "num_attention_heads"),
    # without group_query_attention num_query_groups is 1 and means nothing
    Flagged("kv_heads", "num_query_groups", "group_query_attention", "heads"),
    spread("layer_kv_heads", DESCRIBED, read_text, spelled_text),
    spread("kv_heads", DESCRIBED, read_text, spelled_text, UNLIKE),
    place("latent", "multi_latent_attention", default=False),
    place("kv_lora", "kv_lora_rank", only=LATENT),
    Spread("q_lora", "q_lora_rank", int, lambda said, _: said or 0, lambda c: (number(c, "q_lora") or None,), LATENT),
    place("nope_dim", "qk_head_dim", only=LATENT),
    place("rope_dim", "qk_pos_emb_head_dim", only=LATENT),
    place("v_dim", "v_head_dim", only=LATENT),
    place("head_dim", default=lambda c: number(c, "nope_dim") + number(c, "rope_dim"), only=LATENT),
    Spread("index_heads", "dsa_indexer_n_heads", int, indexer.heads, indexer.heads_said, SPARSE),
    place("index_dim", "dsa_indexer_head_dim", only=SPARSE),
    place("index_topk", "dsa_indexer_topk", only=SPARSE),
    place("index_interleaved", "dsa_indexer_rope_interleaved", default=False, only=SPARSE),
    Choice(("variant",), (("dsa_indexer_scoring_relu", True),), ((("dsa",), (True,)),), SPARSE),
    # as in Hugging Face's configs, but that of no first layers one is taken: dsa.py is_dsa_skip_topk_layer
    Spread(
        *("index_layers", "dsa_indexer_topk_freq", (1, 0), lambda said, c: indexer.own(said[0], max(said[1], 1), c)),
        *(indexer.steps, SPARSE, ("dsa_indexer_skip_topk_offset",)),
    ),
    place("head_dim", "kv_channels", default=head_share, only=HEADS),
    place("ffn", "ffn_hidden_size", default=lambda c: 4 * number(c, "hidden")),
    spread("ffn", DESCRIBED, read_text, spelled_text, UNLIKE),
    place("vocab", "vocab_size"),
    place("padded_vocab", "padded_vocab_size", default=None),
    # no argument of Megatron's, which asks its tokenizer: kept so that they come back on the way out
    *TOKENS,
    place("positions", "max_position_embeddings"),
    place("norm", "normalization", default="layer", words=(("rms", "RMSNorm"), ("layer", "LayerNorm"))),
    place("norm_eps", "layernorm_epsilon", "norm_epsilon", default=1e-5),
    place("latent_norm_eps", default=lambda c: c["norm_eps"], only=LATENT),
    place("index_norm_eps", "dsa_indexer_k_norm_epsilon", default=lambda c: c["norm_eps"], only=SPARSE),
    # the fused GELU kernel is the tanh form, the plain one is exact: megatron/core/fusions/fused_bias_gelu.py. openai_gelu changes
    # nothing in megatron-core, so that it may only be where all read the tanh form: beside the kernel, or in words of Megatron-Bridge,
    # which says no fusion there. Other activations run without the kernel alone.
    Choice(
        ("activation", "gated"),
        (
            ("swiglu", False),
            ("squared_relu", False),
            ("quick_geglu", False),
            ("openai_gelu", False),
            ("bias_gelu_fusion", None),
        ),
        (
            (("silu", True), (True, False, False, False, ANY)),
            (("relu2", False), (False, True, False, False, False)),
            (("relu2", False), (False, True, False, False, ANY)),
            (("gelu_quick", True), (False, False, True, False, False)),
            (("gelu_quick", True), (False, False, True, False, ANY)),
            (("gelu_tanh", False), (False, False, False, False, True)),
            (("gelu_tanh", False), (False, False, False, True, True)),
            (("gelu_tanh", False), (False, False, False, True, None)),
            (("gelu", False), (False, False, False, False, False)),
            (("gelu", False), (False, False, False, False, None)),
        ),
    ),
    # megatron/core/transformer/mlp.py; the kernel of another gate has no place for them, so that GUARDS refuses them there
    place("glu_offset", "glu_linear_offset", default=0.0, only={"activation": "gelu_quick"}),
    place("glu_limit", "activation_func_clamp_value", default=None, only={"activation": "gelu_quick"}),
    Choice(
        ("rope_type",),
        (("position_embedding_type", None), ("use_rope_scaling", False), ("rotary_seq_len_interpolation_factor", None)),
        (
            (("yarn",), ("yarn", False, None)),
            (("llama3",), (ANY, True, None)),
            (("linear",), (ANY, False, SET)),
            (("default",), (ANY, False, None)),
        ),
        HEADS,
    ),
    # MLATransformerConfig: rope_type None means yarn, original_max_position_embeddings 4096 is not among the arguments
    place("rope_type", "rope_type", default="yarn", words=(("yarn", "yarn"), ("default", "rope")), only=LATENT),
    *(place("position", "position_embedding_type", words=POSITIONS, only=kind) for kind in (LATENT, PLAIN, LINEAR, LLAMA3)),
    place("position", "position_embedding_type", words=(("rope", "yarn"),), only=OUTER_YARN),
    place("rope_theta", "rotary_base", default=10000.0, only={"position": "rope"}),
    place("rope_percent", "rotary_percent", default=1.0, only={"position": "rope"}),
    # the constants of the llama3 form: RotaryEmbedding._apply_scaling
    place("rope_low", default=1.0, only=LLAMA3),
    place("rope_high", default=4.0, only=LLAMA3),
    place("rope_original", default=8192, only=LLAMA3),
    place("rope_factor", "rotary_scaling_factor", default=40.0, only=YARN),
    place("rope_original", "original_max_position_embeddings", default=4096, only=YARN),
    place("rope_beta_fast", "beta_fast", default=32.0, only=YARN),
    place("rope_beta_slow", "beta_slow", default=1.0, only=YARN),
    place("rope_mscale_all", "mscale_all_dim", default=0.0, only=YARN),
    yarn.megatron(YARN),
    # latent attention scales its scores by these two whatever the rope: multi_latent_attention.py
    Choice(
        ("rope_mscale_all",),
        (("mscale_all_dim", 0.0), ("rotary_scaling_factor", 40.0)),
        (((0.0,), (0.0, ANY)), ((0.0,), (ANY, 1.0))),
        {**LATENT, **PLAIN},
    ),
    # since 0.18, and under these names: megatron/training/argument_utils.py _apply_yarn_config_from_args; Megatron-Bridge says yarn_
    # before all of them
    place("rope_factor", "rotary_scaling_factor", "yarn_rotary_scaling_factor", default=1.0, only=OUTER_YARN),
    place("rope_original", "yarn_original_max_position_embeddings", default=4096, only=OUTER_YARN),
    place("rope_beta_fast", "yarn_beta_fast", default=32.0, only=OUTER_YARN),
    place("rope_beta_slow", "yarn_beta_slow", default=1.0, only=OUTER_YARN),
    yarn.megatron(OUTER_YARN, ("yarn_mscale", "yarn_mscale_all_dim")),
    place("rope_truncated", "yarn_correction_range_round_to_int", default=True, only=OUTER_YARN),
    # YarnRotaryEmbedding rotates whole heads whatever this says
    Choice(("rope_percent",), (("rotary_percent", 1.0),), (((1.0,), (1.0,)),), OUTER_YARN),
    Choice(("rope_percent",), (("rotary_percent", 1.0),), (((1.0,), (1.0,)), ((1.0,), (ANY,))), YARN),
    place("rope_factor", "rope_scaling_factor", default=8.0, only=LLAMA3),
    place("rope_factor", "rotary_seq_len_interpolation_factor", only=LINEAR),
    # a window of so many tokens before this one: get_sliding_window_causal_mask in megatron/core/transformer/utils.py
    Spread("window", "window_size", list[int], window, lambda c: (window_said(c),)),
    Spread("window_layers", "window_attn_skip_freq", MARKS, windowed, lambda c: (listed(c, "window_layers"),), {"window": SET}),
    Spread(
        "rope_layers",
        "no_rope_freq",
        MARKS,
        rotated,
        lambda c: (listed(c, "rope_layers", turned=True),),
        {"position": "rope"},
    ),
    place("sinks", "softmax_type", default=False, words=((False, "vanilla"), (True, "learnable"))),
    # one flag gives the router and the experts a bias too: megatron/core/transformer/moe/router.py
    Choice(
        ("moe_bias", "router_shift"), (("add_bias_linear", True),), (((True, True), (True,)), ((False, False), (False,))), MIXED
    ),
    Choice(("qkv_bias", "out_bias"), (("add_bias_linear", True),), (((True, True), (True,)),), {"moe_bias": True}),
    # the QKV projection has a bias where either flag is set: megatron/core/transformer/attention.py
    Choice(
        ("qkv_bias", "out_bias", "mlp_bias"),
        (("add_bias_linear", True), ("add_qkv_bias", False)),
        (
            ((True, True, True), (True, ANY)),
            ((True, False, False), (False, True)),
            ((False, False, False), (False, False)),
        ),
        {"moe_bias": False},
    ),
    # Megatron leaves the kernel out where there is no bias, and then has the exact form: validate_args
    Choice(
        ("mlp_bias",),
        (("add_bias_linear", True),),
        (((True,), (True,)),),
        {"activation": "gelu_tanh", "gated": False, "moe_bias": False},
    ),
    place("attention_gate", "attention_output_gate", default=False, omit=True),
    # of slime's Megatron; read, and written as what no argument says
    Spread(
        *(
            "norm_after",
            "post_self_attn_layernorm",
            (False, False),
            both,
            lambda c: [(None, None)][: not value(c, "norm_after")],
        ),
        more=("post_mlp_layernorm",),
    ),
    Spread(
        *("rope_interleaved", "rotary_interleaved", False, lambda said, _: bool(said)),
        lambda c: [None][: not value(c, "rope_interleaved")],
        {"position": "rope", "latent": False},
    ),
    place("zero_centred", "layernorm_zero_centered_gamma", "apply_layernorm_1p", default=False),
    # the same flag has latent attention norm its compressed parts: gpt_layer_specs.py; no known family goes without
    Choice(("latent",), (("qk_layernorm", True),), (((True,), (True,)),), LATENT),
    place("qk_norm", "qk_layernorm", default="none", words=(("none", False), ("head", True)), only=HEADS),
    place("moe_ffn", "moe_ffn_hidden_size", default=lambda c: c["ffn"], only=MIXED),
    place("moe_latent", "moe_latent_size", default=0, only=MIXED, omit=True),
    place("topk", "moe_router_topk", default=2, only=MIXED),
    place("shared_ffn", "moe_shared_expert_intermediate_size", default=0, only=MIXED, omit=True),
    place("shared_gate", "moe_shared_expert_gate", default=False, only=MIXED),
    place("router_bias", "moe_router_enable_expert_bias", default=False, only=MIXED),
    # softmax over the chosen experts alone makes their weights sum to one; so does normalising sigmoid scores, which Megatron does for
    # more than one expert: megatron/core/transformer/moe/moe_utils.py topk_routing_with_score_function
    place(
        "router_score",
        "moe_router_score_function",
        default="softmax",
        words=(("softmax", "softmax"), ("sigmoid", "sigmoid")),
        only=MIXED,
    ),
    place(
        "router_normed",
        "moe_router_pre_softmax",
        default=True,
        words=((True, False), (False, True)),
        only={**MIXED, "router_score": "softmax"},
    ),
    place("router_normed", default=lambda c: number(c, "topk") > 1, only={**MIXED, "router_score": "sigmoid"}),
    # of one expert it would be one, and Megatron stops: TransformerConfig.__post_init__
    Choice(
        ("router_normed",),
        (("moe_router_pre_softmax", False),),
        (((False,), (True,)),),
        {**MIXED, "router_score": "softmax", "topk": 1},
    ),
    # of one expert alone: megatron/core/transformer/moe/experts.py
    place("router_on_input", "moe_apply_probs_on_input", default=False, only=MIXED),
    Choice(("topk",), (("moe_router_topk", 2),), (((1,), (1,)),), {"router_on_input": True}),
    place("router_wide", "moe_router_dtype", default=None, words=((True, "fp32"), (True, "fp64")), only=MIXED),
    # none and 0 are 1: moe_utils.py topk_routing_with_score_function
    Spread("router_scale", "moe_router_topk_scaling_factor", float, _scale, lambda c: (value(c, "router_scale"),), MIXED),
    place("router_groups", "moe_router_num_groups", default=1, only=MIXED, omit=True),
    # without it all groups may be used: moe_utils.py topk_routing_with_score_function
    place("router_group_topk", "moe_router_group_topk", default=lambda c: number(c, "router_groups"), only=MIXED, omit=True),
    # megatron/core/transformer/moe/moe_utils.py group_limited_topk
    place("router_group_best", default=_best_of_a_group, only=MIXED),
    Spread(
        *("mtp", FURTHER_KEYS[0], NO_FURTHER, lambda said, _: further_said(said)[0], lambda c: (further_spelled(c),)),
        more=FURTHER_KEYS[1:],
    ),
    Spread(
        *("mtp_blocks", FURTHER_KEYS[0], (*NO_FURTHER, False), further_blocks_of),
        lambda c: ((*further_spelled(c), (value(c, "hybrid") and value(c, "latent")) or None),),
        {"mtp": SET},
        more=(*FURTHER_KEYS[1:], "multi_latent_attention"),
    ),
    place("tied", "untie_embeddings_and_output_weights", default=True, words=((True, False), (False, True))),
    place("dtype", "params_dtype", words=(("bf16", "torch.bfloat16"), ("f16", "torch.float16"), ("f32", "torch.float32"))),
)

LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")

# arguments that change what the weights mean, with the values that carnet carries over
GUARDS: dict[str, tuple[object, ...]] = {
    "qk_l2_norm": (False,),
    "rotary_interleaved": (False,),
    "mrope_section": (),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    # tokens go to other experts: releases.py ACCEPTABLE
    "moe_expert_capacity_factor": (),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (),
    # from 0.17 on: megatron/core/transformer/transformer_config.py
    "use_mup": (False,),
    # parameters that are joined, under names of their own
    "mla_down_proj_fusion": (False,),
    "moe_single_grouped_weight": (False,),
    "moe_single_grouped_bias": (False,),
    "gdp_num_householder": (3,),
    "enable_mhc_connections": (False,),
    # blocks of the gate's rows between blocks of the up projection's
    "moe_mlp_glu_interleave_size": (),
    "moe_shared_expert_glu_interleave_size": (),
    # fields of TransformerConfig that no argument sets: a config of Megatron-Bridge, or of a script of one's own
    "gated_linear_unit": (False,),
    "activation_func": (),
    "softmax_scale": (),
    # of Megatron-Bridge's and NeMo's Gemma and Falcon-H1, which build other classes than megatron-core's
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "interleaved_attn_pattern": (),
    "embedding_multiplier": (1.0,),
    # experts are chosen otherwise: megatron/core/transformer/moe/router.py
    "moe_router_topk_limited_devices": (),
    "moe_router_load_balancing_type": (*LOSSES, *([*some] for n in (1, 2, 3) for some in permutations(LOSSES, n))),
}
