"""MiniMax-M2: a mixture in every layer whose experts a sigmoid scores and a bias chooses; queries and keys normed over all heads.

transformers: modeling_minimax_m2.py, whose files have Mixtral's names. A part of each head is rotated, in whole dimensions.
"""

from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, vllm
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config, Value
from carnet.model.model import number, value


def _rotated(said: tuple[int | None, float | None], config: Config) -> float:
    """Return the part of a head that is rotated: so many dimensions, or a part, or all of it."""
    dims, part = said
    whole = number(config, "head_dim")
    if dims is None:
        return 1.0 if part is None else part
    expect(1 <= dims <= whole and part in (None, dims / whole), "dimensions of a head")
    return dims / whole


def _spelled(config: Config) -> tuple[tuple[Value, None]]:
    part = value(config, "rope_percent")
    assert isinstance(part, float)
    return ((None if part == 1.0 else round(number(config, "head_dim") * part), None),)


# vllm 0.32 model_executor/models/minimax_m2.py: the router is in f32, and ranks cut the norms of all heads
ENGINE = vllm.Spelling(
    rows=(
        row(LAYER + "block_sparse_moe.gate.weight", "expert hidden", "moe.router", dtype="f32"),
        *(replace(each, cut="kv") for each in hf.WHOLE_QK_NORMS),
    ),
)

MINIMAX_M2 = Family(
    name="minimax_m2",
    vllm=ENGINE,
    needs=MIXED,
    traits={**LLAMA_TRAITS, "qk_norm": "whole", "router_score": "sigmoid", "router_bias": True},
    hf=hf.dialect(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        (
            *(*hf.LLAMA_ROWS, *hf.WHOLE_QK_NORMS),
            *hf.experts("block_sparse_moe", "w1", "w3", "w2", "gate"),
            row(LAYER + "block_sparse_moe.e_score_correction_bias", "expert", "moe.router_bias", dtype="f32"),
        ),
        (
            *hf.LLAMA_FIELDS,
            hf.TIED,
            place("experts", "num_local_experts", "num_experts"),
            place("topk", "num_experts_per_tok"),
            place("moe_ffn", "intermediate_size"),
            place("router_normed", default=True),
            Spread(
                *("rope_percent", "rotary_dim", (int, float), _rotated, _spelled),
                more=("rope_parameters.partial_rotary_factor",),
                others=(("rotary_dim", "partial_rotary_factor"),),
            ),
        ),
        # which published configs say, too, and vLLM's class asks for
        written={"use_routing_bias": True, "scoring_func": "sigmoid"},
        absent={"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5000000.0},
        # what its published configs say beside; its class reads none of them
        guards={
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
            "use_routing_bias": (True,),
            "scoring_func": ("sigmoid",),
            "shared_intermediate_size": (0,),
        },
        ignored="output_router_logits router_aux_loss_coef router_jitter_noise use_mtp num_mtp_modules mtp_transformer_layers "
        "attn_type_list layernorm_full_attention_alpha layernorm_full_attention_beta layernorm_linear_attention_alpha "
        "layernorm_linear_attention_beta layernorm_mlp_alpha layernorm_mlp_beta",
    ),
    trtllm=None,
)
