"""HunYuan, dense and of mixtures (A13B): queries and keys are normed head by head once they are rotated.

transformers: modeling_hunyuan_v1_dense.py, modeling_hunyuan_v1_moe.py. Its rotary base grows with a fixed ``alpha``, which configs
call dynamic. vLLM's models/hunyuan_v1.py reads more keys than transformers, and takes some that are not there for another model.
"""

from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import Dialect, Row, row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import number, value

TRAITS: Config = {**LLAMA_TRAITS, "qk_norm": "head", "qk_norm_rotated": True}
QK_NORMS = (
    row(LAYER + "self_attn.query_layernorm.weight", "dim", "attention.q_norm"),
    row(LAYER + "self_attn.key_layernorm.weight", "dim", "attention.k_norm"),
)
TOPS = ("rope_scaling", "rope_parameters")
TYPES = (("default", "default"), ("linear", "linear"), ("llama3", "llama3"), ("yarn", "yarn"), ("alpha", "dynamic"))
WORDS = (
    "alpha",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)  # the first is read, transformers wants the second


def _alpha(said: tuple[float | None, ...], _: Config) -> float:
    expect(said[0] is not None, "an alpha")
    return float(said[0] or 0.0)


ROPE: tuple[Field, ...] = (
    hf.ROPE[0],
    place(
        "rope_type",
        *(f"{top}.{key}" for top in TOPS for key in ("rope_type", "type")),
        default="default",
        words=TYPES,
        omit=True,
    ),
    *hf.rope(*TOPS)[1:],
    Spread(
        *("rope_alpha", "rope_scaling.alpha", (float,) * len(WORDS), _alpha),
        lambda c: ((value(c, "rope_alpha"), 1.0, None, None, None, None),),
        {"rope_type": "alpha"},
        tuple(f"rope_scaling.{word}" for word in WORDS[1:]),
        (tuple(f"rope_parameters.{word}" for word in WORDS),),
    ),
)


ROUTER, *EXPERTS = hf.experts(router="gate.wg")
MIXTURE = (replace(ROUTER, dtype="f32"), *EXPERTS)


def _one(said: int | list[int] | None, what: str) -> int | None:
    """Return a number that a config may list for each layer."""
    listed = said if isinstance(said, list) else [said]
    expect(len({*listed}) == 1, f"{what} for all layers")
    return listed[0]


def _topk(said: int | list[int] | None, _: Config) -> int:
    return _one(said, "as many experts") or 1


def _moe_ffn(said: tuple[int | list[int] | None, int | list[int] | None], config: Config) -> int:
    """Return how wide an expert is: transformers reads the width of the MLP, vLLM this one where it is there."""
    widths, count = said
    expect(_one(widths, "one width") in (None, number(config, "ffn")), "experts as wide as the MLP")
    expect(_one(count, "as many shared experts") in (None, 1), "one shared expert")
    return number(config, "ffn")


def _hf(
    architecture: str,
    model_type: str,
    rows: tuple[Row, ...],
    fields: tuple[Field, ...],
    idle: str = "",
    fixed: dict[str, object] | None = None,
) -> Dialect:
    return hf.dialect(
        architecture,
        model_type,
        (hf.EMBED, *hf.NORMS, *hf.ATTENTION, *QK_NORMS, *rows, hf.FINAL_NORM, hf.HEAD),
        (
            *(field for field in hf.LLAMA_FIELDS if field not in (*hf.ROPE, *hf.SIZES)),
            *(field for field in hf.SIZES if field.field != "head_dim"),
            replace(next(field for field in hf.SIZES if field.field == "head_dim"), keys=("head_dim", "attention_head_dim")),
            *(*ROPE, *hf.ATTENTION_BIASES, hf.TIED, *fields),
        ),
        absent={"rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        fixed={"use_qk_norm": True, **(fixed or {})},
        guards={
            "mlp_bias": (False,),
            "norm_type": ("rms", "hf_rms"),
            "use_rotary_pos_emb": (True,),
        },
        ignored="add_classification_head class_num pool_type cla_share_factor dense_list eod_token_id image_token_id im_start_id "
        "im_end_id im_newline_id mask_init_id org_vocab_size pad_id text_start_id text_end_id video_start_id video_end_id "
        + idle,
    )


HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    traits=TRAITS,
    hf=_hf("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", hf.gated("mlp", "mlp", "ffn"), ()),
    trtllm=None,
)

HUNYUAN_V1_MOE = Family(
    name="hunyuan_v1_moe",
    needs=MIXED,
    traits=TRAITS,
    hf=_hf(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        (*MIXTURE, *hf.gated("mlp.shared_mlp", "shared", "shared_ffn")),
        (
            place("experts", "num_experts", "num_local_experts"),
            Spread("topk", "moe_topk", int | list[int], _topk, lambda c: (value(c, "topk"),)),
            Spread(
                *("moe_ffn", "moe_intermediate_size", (int | list[int],) * 2, _moe_ffn),
                lambda c: ((value(c, "moe_ffn"), 1),),
                more=("num_shared_expert",),
            ),
            place("shared_ffn", default=lambda c: c["ffn"]),
            place("router_normed", default=True),
            place("router_wide", default=True),
        ),
        "capacity_factor moe_drop_tokens moe_random_routing_dropped_token moe_layer_num_skipped norm_topk_prob "
        "routed_scaling_factor n_group topk_group kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "output_router_logits sep_token_id",
        {"use_mixed_mlp_moe": True},
    ),
    trtllm=None,
)
