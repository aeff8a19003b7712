"""NVIDIA's ranks of latent attention, which hold what their kernels multiply with: queries as they meet the compressed keys.

tensorrt_llm 0.17 to 0.19, models/deepseek_v2: convert.py, load_weights_from_hf_model, and config.py, which serve DeepSeek-V2 and V3.
``fused_q_proj`` has for each head its queries through its keys' part of ``kv_b_proj``, made in the type of the weights,
and behind them those that are rotated; ``kv_b_proj`` has the keys of all heads of a rank before the values.
"""

from collections.abc import Mapping

from carnet.dialects import fine_grained, hf, latent, trtllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.rows import Dialect, fuse, row
from carnet.dialects.yarn import YARN
from carnet.model.model import number

ATTENTION, MLP = trtllm.LAYER + "attention.", trtllm.LAYER + "mlp."
COMPRESSED = {"mla.kv_a": "kv_lora", "mla.k_rope": "rope"}
ROWS = (
    fuse(ATTENTION + "fused_a.weight", "* hidden", {"mla.q_a": "q_lora", **COMPRESSED}),
    fuse(ATTENTION + "fused_a.weight", "* hidden", COMPRESSED, when={"q_compressed": False}),
    row(ATTENTION + "q_a_layernorm.weight", "q_lora", "mla.q_a_norm"),
    row(ATTENTION + "kv_a_layernorm.weight", "kv_lora", "mla.kv_a_norm"),
    fuse(ATTENTION + "fused_q_proj", "(kv *) q_lora", {"mla.q_b_absorbed": "kv_lora", "mla.q_b_rope": "rope"}, cut="kv"),
    fuse(ATTENTION + "fused_q_proj", "(kv *) hidden", {"mla.q_absorbed": "kv_lora", "mla.q_rope": "rope"}, cut="kv"),
    row(ATTENTION + "q_b_proj", "(kv qk) q_lora", "mla.q_b", cut="kv"),
    row(ATTENTION + "q_b_proj", "(kv qk) hidden", "mla.q", cut="kv"),
    fuse(ATTENTION + "kv_b_proj", "* kv_lora", {"mla.k_b": "kv nope", "mla.v_b": "kv v"}, cut="kv"),
    row(ATTENTION + "dense.weight", "hidden (kv v)", "mla.o", cut="kv"),
    *trtllm.GATED_MLP,
    *trtllm.MIXTURE,
    fuse(
        MLP + "shared_expert.fc.weight", "* hidden", {"shared.up": "shared_ffn", "shared.gate": "shared_ffn"}, cut="shared_ffn"
    ),
    row(MLP + "shared_expert.proj.weight", "hidden shared_ffn", "shared.down", cut="shared_ffn"),
)
BIAS = row(MLP + "e_score_correction_bias", "expert", "moe.router_bias", dtype="f32")
OTHERWISE = {"heads", "kv_heads", "head_dim"}
FIELDS: tuple[Field, ...] = (
    *(each for each in trtllm.SIZES if getattr(each, "field", "") not in OTHERWISE),
    place("heads", "num_attention_heads"),
    place("kv_heads", default=lambda c: c["heads"]),
    Spread("q_lora", "q_lora_rank", int, latent.compressed, lambda c: (number(c, "q_lora") or None,)),
    place("kv_lora", "kv_lora_rank"),
    place("nope_dim", "qk_nope_head_dim"),
    place("rope_dim", "qk_rope_head_dim"),
    *(
        Spread(
            "rope_dim",
            key,
            int,
            lambda wide, c: wide - number(c, "kv_lora"),
            lambda c: (number(c, "kv_lora") + number(c, "rope_dim"),),
        )
        for key in ("head_size", "rotary_embedding_dim")
    ),
    place("v_dim", "v_head_dim"),
    place("head_dim", default=lambda c: number(c, "nope_dim") + number(c, "rope_dim")),
    place("activation", "hidden_act", words=trtllm.GATED),
    place("rope_theta", "rotary_base", default=10000.0),
    *hf.rope("rotary_scaling", types=("default", "yarn")),
    place("rope_mscale_all", "rotary_scaling.mscale_all_dim", default=0.0, only=YARN),
    place("latent_norm_eps", default=1e-6),
    place("experts", "moe.num_experts"),
    place("topk", "moe.top_k"),
    place("moe_ffn", "moe_inter_size"),
    place("shared_ffn", "moe.shared_expert_intermediate_size"),
    fine_grained.DENSE_FIRST,
    place("router_group_topk", "moe.device_limited_topk_group", default=1),
    place("router_scale", "moe.device_limited_routed_scaling_factor", default=1.0),
    place("router_wide", default=True),
    place("tied", "tie_word_embeddings", default=False),  # NVIDIA's config has no such field
)


def dialect(architecture: str, fields: tuple[Field, ...], *, fixed: Mapping[str, object], bias: bool) -> Dialect:
    """Write the ranks of a class, whose own fields say how experts are chosen, by a bias or without."""
    return trtllm.dialect(
        architecture,
        (*ROWS, *([BIAS] if bias else [])),
        (*FIELDS, *fields),
        fixed={
            **trtllm.LLAMA_FIXED,
            "num_key_value_heads": 1,
            "mlp_bias": False,
            "attn_bias": False,
            "moe_layer_freq": 1,
            "fp8_format": False,
            **fixed,
        },
        written={**trtllm.LLAMA_WRITTEN, "moe.sparse_mixer_epsilon": 0.01, "moe.tp_mode": 0},
        plain=True,
    )
