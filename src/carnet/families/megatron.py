"""The Megatron dialect: one table for all families, because Megatron has one configurable GPT model.

Names and shapes as ``megatron.core`` writes them with ``dist_checkpointing`` (0.16 to 0.19): global tensors, the vocabulary padded,
query, key and value rows grouped by KV head, the gate's rows before the up projection's. A homogeneous model stores each tensor once
for all layers. Norms are named after the linear layer they are fused with, by Transformer Engine's spec and by the local one alike;
``input_layernorm`` and ``pre_mlp_layernorm`` are the module names of the local spec.
"""

from carnet.families.fields import ANY, SET, Choice, Flagged, Only, Spread, Table, place
from carnet.families.model import Config, marks, number
from carnet.families.rows import Dialect, fuse, row

LAYER = "decoder.layers.{layer}."
MODULE = "module"  # a name inside the running module: read where a checkpoint has it, never written
MTP = "mtp.layers.{layer}."

QKV = {"attention.q": "rep dim", "attention.k": "dim", "attention.v": "dim"}
QKV_BIAS = {f"{name}_bias": axes for name, axes in QKV.items()}
GATE_UP = {"mlp.gate": "ffn", "mlp.up": "ffn"}
GATE_UP_BIAS = {f"{name}_bias": axes for name, axes in GATE_UP.items()}
EXPERT_GATE_UP = {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}
SHARED_GATE_UP = {"shared.gate": "shared_ffn", "shared.up": "shared_ffn"}

ROWS = (
    row("embedding.word_embeddings.weight", "vocab hidden", "embed", cut="vocab"),
    row("embedding.position_embeddings.weight", "position hidden", "position"),
    row(LAYER + "self_attention.linear_qkv.layer_norm_weight", "hidden", "attention_norm", when={"mixer": "attention"}),
    row(LAYER + "self_attention.linear_qkv.layer_norm_bias", "hidden", "attention_norm_bias"),
    row(LAYER + "input_layernorm.weight", "hidden", "attention_norm", when={"mixer": "mla"}),
    row(LAYER + "input_layernorm.bias", "hidden", "attention_norm_bias", spelling=MODULE),
    fuse(LAYER + "self_attention.linear_qkv.weight", "(kv *) hidden", QKV, cut="kv"),
    fuse(LAYER + "self_attention.linear_qkv.bias", "(kv *)", QKV_BIAS, cut="kv"),
    row(LAYER + "self_attention.linear_proj.weight", "hidden (kv rep dim)", "attention.o", cut="kv"),
    row(LAYER + "self_attention.linear_proj.bias", "hidden", "attention.o_bias"),
    row(LAYER + "mlp.linear_fc1.layer_norm_weight", "hidden", "mlp_norm", when={"mlp": "dense"}),
    row(LAYER + "mlp.linear_fc1.layer_norm_weight", "hidden", "mlp_norm", spelling="local", when={"mlp": "moe"}),
    row(LAYER + "mlp.linear_fc1.layer_norm_bias", "hidden", "mlp_norm_bias"),
    row(LAYER + "pre_mlp_layernorm.weight", "hidden", "mlp_norm", spelling="te", when={"mlp": "moe"}),
    row(LAYER + "pre_mlp_layernorm.bias", "hidden", "mlp_norm_bias", spelling=MODULE),
    row(LAYER + "self_attention.q_layernorm.weight", "dim", "attention.q_norm"),
    row(LAYER + "self_attention.k_layernorm.weight", "dim", "attention.k_norm"),
    row(LAYER + "self_attention.linear_q_proj.weight", "(kv qk) hidden", "mla.q", cut="kv"),
    row(LAYER + "self_attention.linear_q_down_proj.weight", "q_lora hidden", "mla.q_a"),
    row(LAYER + "self_attention.linear_q_up_proj.layer_norm_weight", "q_lora", "mla.q_a_norm"),
    row(LAYER + "self_attention.q_layernorm.weight", "q_lora", "mla.q_a_norm", spelling=MODULE),
    row(LAYER + "self_attention.linear_q_up_proj.weight", "(kv qk) q_lora", "mla.q_b", cut="kv"),
    fuse(LAYER + "self_attention.linear_kv_down_proj.weight", "* hidden", {"mla.kv_a": "kv_lora", "mla.k_rope": "rope"}),
    row(LAYER + "self_attention.linear_kv_up_proj.layer_norm_weight", "kv_lora", "mla.kv_a_norm"),
    row(LAYER + "self_attention.kv_layernorm.weight", "kv_lora", "mla.kv_a_norm", spelling=MODULE),
    fuse(LAYER + "self_attention.linear_kv_up_proj.weight", "(kv *) kv_lora", {"mla.k_b": "nope", "mla.v_b": "v"}, cut="kv"),
    row(LAYER + "self_attention.linear_proj.weight", "hidden (kv v)", "mla.o", cut="kv"),
    fuse(LAYER + "mlp.linear_fc1.weight", "* hidden", GATE_UP, cut="ffn"),
    fuse(LAYER + "mlp.linear_fc1.bias", "*", GATE_UP_BIAS, cut="ffn"),
    row(LAYER + "mlp.linear_fc1.weight", "ffn hidden", "mlp.up", cut="ffn"),
    row(LAYER + "mlp.linear_fc1.bias", "ffn", "mlp.up_bias", cut="ffn"),
    row(LAYER + "mlp.linear_fc2.weight", "hidden ffn", "mlp.down", cut="ffn"),
    row(LAYER + "mlp.linear_fc2.bias", "hidden", "mlp.down_bias"),
    row(LAYER + "mlp.router.weight", "expert hidden", "moe.router"),
    row(LAYER + "mlp.router.expert_bias", "expert", "moe.router_bias", dtype="f32"),
    fuse(LAYER + "mlp.experts.experts.linear_fc1.weight", "expert * hidden", EXPERT_GATE_UP, cut="expert"),
    row(LAYER + "mlp.experts.experts.linear_fc2.weight", "expert hidden moe_ffn", "moe.down", cut="expert"),
    fuse(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "* hidden",
        EXPERT_GATE_UP,
        cut="expert",
        spelling=MODULE,
    ),
    row(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        "hidden moe_ffn",
        "moe.down",
        cut="expert",
        spelling=MODULE,
    ),
    fuse(LAYER + "mlp.experts.linear_fc1.weight{expert}", "* hidden", EXPERT_GATE_UP, cut="expert", spelling=MODULE),
    row(LAYER + "mlp.experts.linear_fc2.weight{expert}", "hidden moe_ffn", "moe.down", cut="expert", spelling=MODULE),
    fuse(LAYER + "mlp.shared_experts.linear_fc1.weight", "* hidden", SHARED_GATE_UP, cut="shared_ffn"),
    row(LAYER + "mlp.shared_experts.linear_fc2.weight", "hidden shared_ffn", "shared.down", cut="shared_ffn"),
    row(LAYER + "mlp.shared_experts.gate_weight", "1 hidden", "shared.weigh"),
    row(MTP + "enorm.weight", "hidden", "mtp.embed_norm"),
    row(MTP + "hnorm.weight", "hidden", "mtp.hidden_norm"),
    row(MTP + "eh_proj.weight", "hidden (two hidden_in)", "mtp.project"),
    row(MTP + "final_layernorm.weight", "hidden", "mtp.final_norm"),
    row("decoder.final_layernorm.weight", "hidden", "final_norm"),
    row("decoder.final_layernorm.bias", "hidden", "final_norm_bias"),
    row("output_layer.weight", "vocab hidden", "head", cut="vocab"),
)

DROPPED = {
    "optimizer.*": "optimizer state",
    "chained_*.optimizer.*": "optimizer state",
    "opt_param_scheduler*": "learning-rate schedule",
    "optimizer/*": "optimizer state",
    "distrib_optim.pt/*": "optimizer state",
    "num_floating_point_operations_so_far*": "training statistics",
    "rng_state*": "random state",
    "rerun_state_machine_state*": "rerun state",
    "*_extra_state*": "module extra state",
    "common_state*": "training arguments (read)",
}

LATENT: Only = {"latent": True}
HEADS: Only = {"latent": False}
YARN: Only = {"latent": True, "rope_type": "yarn"}
MIXED: Only = {"experts": SET}


def _mixtures(said: int | list[int], config: Config) -> tuple[int, ...]:
    """Return a mark a layer: every n-th is a mixture, or those with a 1 in the list."""
    if isinstance(said, int):
        return tuple(int(layer % said == 0) for layer in range(number(config, "layers")))
    if len(said) != number(config, "layers") or not all(type(mark) is int and mark in {0, 1} for mark in said):
        raise ValueError("one mark a layer")
    return tuple(said)


def _best_of_a_group(config: Config) -> int | None:
    """Return how many of a group's best experts count when groups are chosen."""
    groups = number(config, "router_groups")
    return max(1, number(config, "topk") // number(config, "router_group_topk")) if groups > 1 else None


# Names in the saved arguments: megatron/training/arguments.py; what they do: megatron/core/transformer/transformer_config.py,
# megatron/training/arguments.py core_transformer_config_from_args.
FIELDS = (
    place("layers", "num_layers"),
    place("hidden", "hidden_size"),
    place("heads", "num_attention_heads"),
    # without group_query_attention num_query_groups is 1 and means nothing
    Flagged("kv_heads", "num_query_groups", "group_query_attention", "heads"),
    place("latent", "multi_latent_attention", default=False),
    place("kv_lora", "kv_lora_rank", only=LATENT),
    place("q_lora", "q_lora_rank", default=0, only=LATENT),
    place("nope_dim", "qk_head_dim", only=LATENT),
    place("rope_dim", "qk_pos_emb_head_dim", only=LATENT),
    place("v_dim", "v_head_dim", only=LATENT),
    place("head_dim", default=lambda c: number(c, "nope_dim") + number(c, "rope_dim"), only=LATENT),
    place("head_dim", "kv_channels", default=lambda c: number(c, "hidden") // number(c, "heads"), only=HEADS),
    place("ffn", "ffn_hidden_size", default=lambda c: 4 * number(c, "hidden")),
    place("vocab", "vocab_size"),
    place("padded_vocab", "padded_vocab_size", default=None),
    place("positions", "max_position_embeddings"),
    place("norm", "normalization", default="layer", words=(("rms", "RMSNorm"), ("layer", "LayerNorm"))),
    place("norm_eps", "layernorm_epsilon", "norm_epsilon", default=1e-5),
    # the fused GELU kernel is the tanh form, the plain one is exact: megatron/core/fusions/fused_bias_gelu.py
    Choice(
        ("activation", "gated"),
        (
            ("swiglu", False),
            ("openai_gelu", False),
            ("bias_gelu_fusion", False),
            ("squared_relu", False),
            ("quick_geglu", False),
        ),
        (
            (("silu", True), (True, False, ANY, False, False)),
            (("gelu_tanh", False), (False, True, ANY, False, False)),
            (("relu2", False), (False, False, ANY, True, False)),
            (("gelu_tanh", False), (False, False, True, False, False)),
            (("gelu", False), (False, False, False, False, False)),
        ),
    ),
    place("position", "position_embedding_type", words=(("rope", "rope"), ("learned", "learned_absolute"))),
    place("rope_theta", "rotary_base", default=10000.0, only={"position": "rope"}),
    place("rope_percent", "rotary_percent", default=1.0, only={"position": "rope"}),
    # the constants of the llama3 form: RotaryEmbedding._apply_scaling
    Choice(
        ("rope_type", "rope_low", "rope_high", "rope_original"),
        (("use_rope_scaling", False), ("rotary_seq_len_interpolation_factor", None)),
        (
            (("llama3", 1.0, 4.0, 8192), (True, None)),
            (("linear", None, None, None), (False, SET)),
            (("default", None, None, None), (False, None)),
        ),
        HEADS,
    ),
    # MLATransformerConfig: rope_type None means yarn, original_max_position_embeddings 4096 is not among the arguments
    place("rope_type", "rope_type", default="yarn", words=(("yarn", "yarn"), ("default", "rope")), only=LATENT),
    place("rope_factor", "rotary_scaling_factor", default=40.0, only=YARN),
    place("rope_original", "original_max_position_embeddings", default=4096, only=YARN),
    place("rope_beta_fast", "beta_fast", default=32.0, only=YARN),
    place("rope_beta_slow", "beta_slow", default=1.0, only=YARN),
    place("rope_mscale", "mscale", default=1.0, only=YARN),
    place("rope_mscale_all", "mscale_all_dim", default=0.0, only=YARN),
    place("rope_factor", "rope_scaling_factor", default=8.0, only={"rope_type": "llama3"}),
    place("rope_factor", "rotary_seq_len_interpolation_factor", only={"rope_type": "linear"}),
    # the QKV projection has a bias where either flag is set: megatron/core/transformer/attention.py
    Choice(
        ("qkv_bias", "out_bias", "mlp_bias"),
        (("add_bias_linear", True), ("add_qkv_bias", False)),
        (
            ((True, True, True), (True, ANY)),
            ((True, False, False), (False, True)),
            ((False, False, False), (False, False)),
        ),
    ),
    place("zero_centred", "layernorm_zero_centered_gamma", "apply_layernorm_1p", default=False),
    # latent attention norms its compressed parts whatever the flag says
    place("qk_norm", "qk_layernorm", default="none", words=(("none", False), ("head", True)), only=HEADS),
    place("experts", "num_experts", "num_moe_experts", default=0),
    Spread("moe_layers", "moe_layer_freq", 1, _mixtures, lambda c: ([*marks(c)],), MIXED),
    place("moe_ffn", "moe_ffn_hidden_size", default=lambda c: c["ffn"], only=MIXED),
    place("topk", "moe_router_topk", default=2, only=MIXED),
    place("shared_ffn", "moe_shared_expert_intermediate_size", default=0, only=MIXED),
    place("shared_gate", "moe_shared_expert_gate", default=False, only=MIXED),
    place("router_bias", "moe_router_enable_expert_bias", default=False, only=MIXED),
    # softmax over the chosen experts alone makes their weights sum to one; so does normalising sigmoid scores, which Megatron does for
    # more than one expert: megatron/core/transformer/moe/moe_utils.py topk_routing_with_score_function
    Choice(
        ("router_score", "router_normed"),
        (("moe_router_pre_softmax", False), ("moe_router_score_function", "softmax")),
        (
            (("softmax", True), (False, "softmax")),
            (("softmax", False), (True, "softmax")),
            (("sigmoid", True), (ANY, "sigmoid")),
        ),
        MIXED,
    ),
    place("router_scale", "moe_router_topk_scaling_factor", default=1.0, only=MIXED),
    place("router_groups", "moe_router_num_groups", default=1, only=MIXED),
    place("router_group_topk", "moe_router_group_topk", default=1, only=MIXED),
    # megatron/core/transformer/moe/moe_utils.py group_limited_topk
    place("router_group_best", default=_best_of_a_group, only=MIXED),
    place("mtp", "mtp_num_layers", default=0),
    place("tied", "untie_embeddings_and_output_weights", default=True, words=((True, False), (False, True))),
    place("dtype", "params_dtype", words=(("bf16", "torch.bfloat16"), ("f16", "torch.float16"), ("f32", "torch.float32"))),
)

# arguments that change what the weights mean, with the values that carnet carries over
GUARDS: dict[str, tuple[object, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "rotary_interleaved": (False,),
    "window_size": (),
    "no_rope_freq": (0,),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "hybrid_override_pattern": (),
    "hybrid_layer_pattern": (),
    "is_hybrid_model": (False,),
    "mrope_section": (),
}

MEGATRON = Dialect(
    name="megatron",
    architecture="",
    prefixes=("", "model.", "module.", "model.module.", "model.module.module."),
    rows=ROWS,
    stacked=True,
    ranked=False,
    writes_tied=False,
    further=(LAYER, "mtp.layers.{layer}.transformer_layer."),
    zero_centred=None,
    embedding="none",
    table=Table(FIELDS, guards=GUARDS, closed=False),
    dropped=DROPPED,
    pads={},
)
