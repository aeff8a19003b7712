"""The Megatron dialect: one table for all families, because Megatron has one configurable GPT model.

Names and shapes as ``megatron.core`` writes them with ``dist_checkpointing`` (0.16 to 0.19): global tensors, the vocabulary padded,
query, key and value rows grouped by KV head, the gate's rows before the up projection's. A homogeneous model stores each tensor once
for all layers. Norms are named after the linear layer they are fused with, by Transformer Engine's spec and by the local one alike;
``input_layernorm`` and ``pre_mlp_layernorm`` are the module names of the local spec.
"""

from carnet.families.fields import ANY, SET, Choice, Flagged, Table, place
from carnet.families.model import number
from carnet.families.rows import Dialect, fuse, row

LAYER = "decoder.layers.{layer}."

QKV = {"attention.q": "rep dim", "attention.k": "dim", "attention.v": "dim"}
QKV_BIAS = {f"{name}_bias": axes for name, axes in QKV.items()}
GATE_UP = {"mlp.gate": "ffn", "mlp.up": "ffn"}
GATE_UP_BIAS = {f"{name}_bias": axes for name, axes in GATE_UP.items()}

ROWS = (
    row("embedding.word_embeddings.weight", "vocab hidden", "embed", cut="vocab"),
    row("embedding.position_embeddings.weight", "position hidden", "position"),
    row(LAYER + "self_attention.linear_qkv.layer_norm_weight", "hidden", "attention_norm", spelling="te"),
    row(LAYER + "self_attention.linear_qkv.layer_norm_bias", "hidden", "attention_norm_bias", spelling="te"),
    row(LAYER + "input_layernorm.weight", "hidden", "attention_norm", spelling="local"),
    row(LAYER + "input_layernorm.bias", "hidden", "attention_norm_bias", spelling="local"),
    fuse(LAYER + "self_attention.linear_qkv.weight", "(kv *) hidden", QKV, cut="kv"),
    fuse(LAYER + "self_attention.linear_qkv.bias", "(kv *)", QKV_BIAS, cut="kv"),
    row(LAYER + "self_attention.linear_proj.weight", "hidden (kv rep dim)", "attention.o", cut="kv"),
    row(LAYER + "self_attention.linear_proj.bias", "hidden", "attention.o_bias"),
    row(LAYER + "mlp.linear_fc1.layer_norm_weight", "hidden", "mlp_norm", spelling="te"),
    row(LAYER + "mlp.linear_fc1.layer_norm_bias", "hidden", "mlp_norm_bias", spelling="te"),
    row(LAYER + "pre_mlp_layernorm.weight", "hidden", "mlp_norm", spelling="local"),
    row(LAYER + "pre_mlp_layernorm.bias", "hidden", "mlp_norm_bias", spelling="local"),
    fuse(LAYER + "mlp.linear_fc1.weight", "* hidden", GATE_UP, cut="ffn"),
    fuse(LAYER + "mlp.linear_fc1.bias", "*", GATE_UP_BIAS, cut="ffn"),
    row(LAYER + "mlp.linear_fc1.weight", "ffn hidden", "mlp.up", cut="ffn"),
    row(LAYER + "mlp.linear_fc1.bias", "ffn", "mlp.up_bias", cut="ffn"),
    row(LAYER + "mlp.linear_fc2.weight", "hidden ffn", "mlp.down", cut="ffn"),
    row(LAYER + "mlp.linear_fc2.bias", "hidden", "mlp.down_bias"),
    row("decoder.final_layernorm.weight", "hidden", "final_norm"),
    row("decoder.final_layernorm.bias", "hidden", "final_norm_bias"),
    row("output_layer.weight", "vocab hidden", "head", cut="vocab"),
)

DROPPED = {
    "optimizer.*": "optimizer state",
    "chained_*.optimizer.*": "optimizer state",
    "opt_param_scheduler*": "learning-rate schedule",
    "rng_state*": "random state",
    "rerun_state_machine_state*": "rerun state",
    "*_extra_state*": "module extra state",
    "common_state*": "training arguments (read)",
}

# Names in the saved arguments: megatron/training/arguments.py; what they do: megatron/core/transformer/transformer_config.py,
# megatron/training/arguments.py core_transformer_config_from_args.
FIELDS = (
    place("layers", "num_layers"),
    place("hidden", "hidden_size"),
    place("heads", "num_attention_heads"),
    # without group_query_attention num_query_groups is 1 and means nothing
    Flagged("kv_heads", "num_query_groups", "group_query_attention", "heads"),
    place("head_dim", "kv_channels", default=lambda c: number(c, "hidden") // number(c, "heads")),
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
    ),
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
    place("tied", "untie_embeddings_and_output_weights", default=True, words=((True, False), (False, True))),
    place("dtype", "params_dtype", words=(("bf16", "torch.bfloat16"), ("f16", "torch.float16"), ("f32", "torch.float32"))),
)

# arguments that change what the weights mean, with the values that carnet carries over
GUARDS: dict[str, tuple[object, ...]] = {
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "multi_latent_attention": (False,),
    "num_experts": (0,),
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
    table=Table(FIELDS, guards=GUARDS, closed=False),
    dropped=DROPPED,
)
