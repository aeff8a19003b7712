"""What TensorRT-LLM dialects share: per-rank files of ``config.json`` + ``rank{r}.safetensors``, as read up to TensorRT-LLM 1.2.

The rows serve every decoder that NVIDIA's classes build from the same layers: query, key and value rows of a rank one after the
other; ``mlp.fc`` is the gate where there is one and ``mlp.gate`` then the up projection; biases after a row-parallel product are
whole on every rank; layer numbers start at 0 on every pipeline stage.
"""

from collections.abc import Mapping

from carnet.dialects.configs import ANY, Choice, Table, place
from carnet.dialects.configs import Row as Field
from carnet.dialects.hf import ACTIVATIONS, DTYPES, rope
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect, Row, biased, fuse, row
from carnet.model.model import head_share, number

LAYER = "layers.{layer}."

QKV = {"attention.q": "kv rep dim", "attention.k": "kv dim", "attention.v": "kv dim"}
QKV_BIAS = {f"{name}_bias": axes for name, axes in QKV.items()}

COMMON = (
    row("vocab_embedding.weight", "vocab hidden", "embed", cut="embedding"),
    row("position_embedding.weight", "position hidden", "position"),
    *biased(LAYER + "input_layernorm", "hidden", "attention_norm"),
    fuse(LAYER + "attention.qkv.weight", "* hidden", QKV, cut="kv"),
    fuse(LAYER + "attention.qkv.bias", "*", QKV_BIAS, cut="kv"),
    row(LAYER + "attention.dense.weight", "hidden (kv rep dim)", "attention.o", cut="kv"),
    row(LAYER + "attention.dense.bias", "hidden", "attention.o_bias"),
    *biased(LAYER + "post_layernorm", "hidden", "mlp_norm", when={"parallel_residual": False}),
    row(LAYER + "mlp.proj.weight", "hidden ffn", "mlp.down", cut="ffn"),
    row(LAYER + "mlp.proj.bias", "hidden", "mlp.down_bias"),
    *biased("ln_f", "hidden", "final_norm"),
    row("/lm_head.weight", "vocab hidden", "head", cut="vocab"),
)
WITHOUT_POST_NORM = tuple(row for row in COMMON if "post_layernorm" not in row.name)
GATED_MLP = (
    row(LAYER + "mlp.fc.weight", "ffn hidden", "mlp.gate", cut="ffn"),
    row(LAYER + "mlp.fc.bias", "ffn", "mlp.gate_bias", cut="ffn"),
    row(LAYER + "mlp.gate.weight", "ffn hidden", "mlp.up", cut="ffn"),
    row(LAYER + "mlp.gate.bias", "ffn", "mlp.up_bias", cut="ffn"),
)
PLAIN_MLP = (
    row(LAYER + "mlp.fc.weight", "ffn hidden", "mlp.up", cut="ffn"),
    row(LAYER + "mlp.fc.bias", "ffn", "mlp.up_bias", cut="ffn"),
)

# an expert's up rows stand before its gate rows, and NVIDIA keeps the router in f32
MIXTURE = (
    row(LAYER + "mlp.router.weight", "expert hidden", "moe.router", dtype="f32"),
    fuse(LAYER + "mlp.fc.weight", "expert * moe_hidden", {"moe.up": "moe_ffn", "moe.gate": "moe_ffn"}, cut="expert"),
    row(LAYER + "mlp.proj.weight", "expert moe_hidden moe_ffn", "moe.down", cut="expert"),
)

EMBEDDING = Choice(
    ("embedding",),
    (("use_parallel_embedding", False), ("embedding_sharding_dim", 0)),
    ((("none",), (False, 0)), (("none",), (False, ANY)), (("rows",), (True, 0)), (("columns",), (True, 1))),
)
ROTATED = place("head_dim", "rotary_embedding_dim", default=lambda c: c["head_dim"])
SIZES: tuple[Field, ...] = (
    place("layers", "num_hidden_layers"),
    place("hidden", "hidden_size"),
    place("heads", "num_attention_heads"),
    place("kv_heads", "num_key_value_heads", default=lambda c: c["heads"]),
    place("head_dim", "head_size", default=head_share),
    ROTATED,
    place("ffn", "intermediate_size", default=lambda c: 4 * number(c, "hidden")),
    place("vocab", "vocab_size"),
    place("positions", "max_position_embeddings"),
    place("norm_eps", "norm_epsilon", default=1e-5),
    place("dtype", "dtype", words=DTYPES),
    place("tp", "mapping.tp_size", "tp_size", default=1),
    place("ep", "mapping.moe_ep_size", default=1),
    place("moe_tp", default=lambda c: number(c, "tp") // number(c, "ep")),
    place("moe_tp", "mapping.moe_tp_size", default=lambda c: c["moe_tp"]),
    place("pp", "mapping.pp_size", "pp_size", default=1),
    place("world", default=lambda c: number(c, "tp") * number(c, "pp")),
    place("world", "mapping.world_size", default=lambda c: c["world"]),
    EMBEDDING,
)
# of classes that know no pipelines
ONE_STAGE: tuple[Field, ...] = (place("pp", "mapping.pp_size", "pp_size", default=1, words=((1, 1),)),)
# and that know no ranks at all
ONE_RANK: tuple[Field, ...] = (
    *ONE_STAGE,
    place("tp", "mapping.tp_size", "tp_size", default=1, words=((1, 1),)),
    place("world", "mapping.world_size", default=1, words=((1, 1),)),
)
SHARED = (
    "share_embedding_table"  # where it is set the classes take the embedding for the head, whatever else is said and stored
)
TIED = Choice(
    ("tied",),
    (("tie_word_embeddings", False), (SHARED, False)),
    (((True,), (True, ANY)), ((True,), (ANY, True)), ((False,), (False, ANY))),
)
ROPE = (place("rope_theta", "rotary_base", default=10000.0), *rope("rotary_scaling", types=("default", "linear", "llama3")))

# what tensorrt_llm's PretrainedConfig.to_dict and QuantConfig write for an unquantized model
FIXED: dict[str, object] = {
    "quantization.quant_algo": None,
    "quantization.kv_cache_quant_algo": None,
    "mapping.cp_size": 1,
    "qk_layernorm": False,
}
WRITTEN: dict[str, object] = {
    "logits_dtype": "float32",
    "mapping.gpus_per_node": 8,
    "runtime_defaults": None,
    "quantization.group_size": 128,
    "quantization.smoothquant_val": 0.5,
    "quantization.clamp_val": None,
    "quantization.use_meta_recipe": False,
    "quantization.has_zero_point": False,
    "quantization.pre_quant_scale": False,
    "quantization.exclude_modules": None,
}
NO_EXPERTS: dict[str, object] = {"moe.num_experts": 0}
MOE_NONE: dict[str, object] = {
    "moe.shared_expert_intermediate_size": 0,
    "moe.top_k": 0,
    "moe.sparse_mixer_epsilon": 0.01,
    "moe.tp_mode": 0,
    "moe.topk_method": 0,
    "moe.device_limited_n_group": 0,
    "moe.device_limited_topk_group": 0,
    "moe.device_limited_routed_scaling_factor": 1.0,
}
# what tensorrt_llm's GPTConfig writes beside
GPT_FIXED: dict[str, object] = {
    **NO_EXPERTS,
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
}
GPT_WRITTEN: dict[str, object] = {**MOE_NONE, "moe.normalization_mode": 1, "rotary_scaling": None}
# other producers of the format add these (ModelOpt), and they say nothing about plain weights
IGNORED = frozenset("producer rank decoder".split())
DROPPED = {
    "embed_positions": "table of positions",
    "embed_positions_for_gpt_attention": "table of positions",
    "rotary_inv_freq": "rotary buffer",
    "long_rope_embed_positions": "table of positions",
    "long_rope_embed_positions_for_gpt_attention": "table of positions",
    "long_rope_rotary_inv_freq": "rotary buffer",
}


GATED = (("silu", "swiglu"),)  # NVIDIA's mixtures say the gate in the activation's name
ACTIVATION = place("activation", "hidden_act", words=ACTIVATIONS)
LLAMA_FIELDS: tuple[Field, ...] = (
    *SIZES,
    *ROPE,
    ACTIVATION,
    place("qkv_bias", "attn_bias", default=False),
    place("out_bias", "attn_bias", default=False),
    place("mlp_bias", "mlp_bias", default=False),
    TIED,
)
# what tensorrt_llm's LLaMAConfig writes beside
LLAMA_FIXED: dict[str, object] = {
    "position_embedding_type": "rope_gpt_neox",
    "residual_mlp": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
    "remove_duplicated_kv_heads": False,
}
LLAMA_WRITTEN: dict[str, object] = {"rotary_scaling": None, "disable_weight_only_quant_plugin": False}


def dialect(
    architecture: str,
    blocks: tuple[Row, ...],
    fields: tuple[Field, ...],
    *,
    fixed: Mapping[str, object] | None = None,
    written: Mapping[str, object] | None = None,
    guards: Mapping[str, tuple[object, ...]] | None = None,
    ignored: str = "",
    embedding: str = "none",
    common: tuple[Row, ...] = COMMON,
    plain: bool = False,
) -> Dialect:
    """Write the TensorRT-LLM dialect of a family: the common rows, its own blocks, its class's config."""
    return Dialect(
        kind=KINDS["trtllm"],
        architecture=architecture,
        prefixes=("transformer.",),
        rows=(*common, *blocks),
        stacked=False,
        writes_tied=True,
        further=("", ""),
        zero_centred=False,
        embedding=embedding,
        table=Table(
            fields,
            fixed={**FIXED, "architecture": architecture, **(fixed or {})},
            written={**WRITTEN, **(written or {})},
            guards={SHARED: (False,), **(guards or {})},
            ignored=IGNORED | frozenset(ignored.split()),
        ),
        dropped=DROPPED,
        optional={},
        pads={},
        plain=plain,
    )
