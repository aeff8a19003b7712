"""Ling 2 and Ring 2 (Bailing MoE v2): the attention of Qwen3 in one projection, a part of each head rotated, mixtures as DeepSeek-V3's.

transformers has no class. The hub's modeling_bailing_moe_v2.py stands in Megatron-Bridge, too (models/bailing); vLLM's
models/bailing_moe.py reads other keys of the same config, and takes one that is not there for another model. Both are written.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import fine_grained, hf
from carnet.dialects.configs import Spread, place
from carnet.dialects.further import EMBED_FIRST
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import number, real

QKV = {"attention.q": "kv rep dim", "attention.k": "kv dim", "attention.v": "kv dim"}
ROWS = (
    row("word_embeddings.weight", "vocab hidden", "embed"),
    *hf.NORMS,
    fuse(LAYER + "attention.query_key_value.weight", "* hidden", QKV),
    fuse(LAYER + "attention.query_key_value.bias", "*", {f"{name}_bias": axes for name, axes in QKV.items()}),
    row(LAYER + "attention.dense.weight", "hidden (kv rep dim)", "attention.o"),
    row(LAYER + "attention.query_layernorm.weight", "dim", "attention.q_norm"),
    row(LAYER + "attention.key_layernorm.weight", "dim", "attention.k_norm"),
    *(*hf.GATED_MLP, *fine_grained.ROWS),
    row(LAYER + "mlp.gate.expert_bias", "expert", "moe.router_bias", dtype="f32"),
    row(LAYER + "enorm.weight", "hidden", "mtp.embed_norm"),
    row(LAYER + "hnorm.weight", "hidden", "mtp.hidden_norm"),
    fuse(LAYER + "eh_proj.weight", "hidden *", EMBED_FIRST),
    row(LAYER + "final_layernorm.weight", "hidden", "mtp.final_norm"),
    *(hf.FINAL_NORM, hf.HEAD),
)


def _dims(part: float, config: Config) -> int:
    return int(number(config, "head_dim") * part)


def _rotated(said: tuple[float, int | None], config: Config) -> float:
    """Return the part of a head that is rotated: the hub's class reads the part, vLLM the dimensions."""
    part, dims = said
    expect(dims in (None, _dims(part, config)), "as many dimensions as are a part of a head")
    return part


BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    needs=MIXED,
    traits={**LLAMA_TRAITS, "router_score": "sigmoid", "router_bias": True},
    hf=hf.dialect(
        "BailingMoeV2ForCausalLM",
        "bailing_moe_v2",
        ROWS,
        (
            *(*hf.LLAMA_FIELDS, hf.TIED),
            Spread(
                *("rope_percent", "partial_rotary_factor", (1.0, int), _rotated),
                lambda c: ((real(c, "rope_percent"), _dims(real(c, "rope_percent"), c)),),
                more=("rotary_dim",),
            ),
            place("qkv_bias", "use_qkv_bias", default=False),
            place("qk_norm", "use_qk_norm", default="head", words=(("head", True), ("none", False))),
            *fine_grained.sizes("num_shared_experts", "num_experts"),
            place("moe_ffn", "moe_shared_expert_intermediate_size", default=lambda c: c["moe_ffn"]),  # of each that is shared
            *(fine_grained.DENSE_FIRST, *fine_grained.ROUTER, fine_grained.GROUPED),
            place("router_normed", "norm_topk_prob", default=True, words=((True, True),)),
            place("mtp", "num_nextn_predict_layers", default=0),
        ),
        absent={
            "num_key_value_heads": 4,
            "head_dim": 128,
            "rope_theta": 600000.0,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 8,
            "topk_group": 4,
            "pad_token_id": 156892,
            "eos_token_id": 156892,
        },
        fixed={
            "moe_router_enable_expert_bias": True,
            "score_function": "sigmoid",
            "router_dtype": "fp32",
            "use_rmsnorm": True,
            "use_bias": False,
        },
        written={"embedding_dropout": 0.0},
        # what published models call themselves, and say beside
        guards={
            "model_type": ("bailing_moe_v2", "bailing_moe"),
            "norm_head": (False,),
            "use_sliding_window": (False,),
        },
        ignored=f"{fine_grained.IGNORED} max_window_layers sliding_window output_dropout mtp_loss_scaling_factor",
        pads=fine_grained.PADS,
    ),
    trtllm=None,
)
