"""GLM-4, and GLM-4.5 to 4.7: mixtures of small experts behind dense layers, with grouped queries, or in the Flash models latent ones.

transformers: modeling_glm4.py, modeling_glm4_moe.py, modeling_glm4_moe_lite.py. Half of each head is rotated in the first two.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import fine_grained, hf, latent
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config, Value
from carnet.model.model import marks, mixtures, number

MLPS = ("dense", "sparse")
ROWS = (*hf.GATED_MLP, *fine_grained.ROWS, fine_grained.BIAS, *fine_grained.FURTHER, hf.FINAL_NORM, hf.HEAD)
TRAITS: Config = {**LLAMA_TRAITS, "router_score": "sigmoid", "router_bias": True}
MIXTURE = (
    *(*fine_grained.ROUTER, fine_grained.GROUPED),
    place("router_normed", "norm_topk_prob", default=False),
    place("mtp", "num_nextn_predict_layers", default=0),
    *(hf.TIED, hf.DTYPE, *hf.TOKENS),
)
ABSENT: dict[str, object] = {"n_shared_experts": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-5}
SIGMOID: dict[str, tuple[object, ...]] = {"scoring_func": ("sigmoid",), "moe_layer_freq": (1,)}
WHOLE: dict[str, tuple[object, ...]] = {"partial_rotary_factor": (1.0,), "rope_parameters.partial_rotary_factor": (1.0,)}


def _listed(said: tuple[list[str] | None, int | None], config: Config) -> str | None:
    """Return the blocks: each layer by its word, or mixtures behind so many dense layers; without a word behind one."""
    kinds, dense = said
    counted = tuple(int(layer >= (1 if dense is None else dense)) for layer in range(number(config, "layers")))
    found = counted if kinds is None else hf.marks_of(kinds, config, MLPS)
    expect(dense is None or (dense >= 0 and found == counted), "as many dense layers as are listed")
    return mixtures([bool(mark) for mark in found])


def _spelled(config: Config) -> list[tuple[list[str], Value]]:
    """Return the list, and the number where that says the same: transformers reads the one, vLLM the other."""
    found = marks(config)
    dense = len(found) - sum(found)
    return [([MLPS[mark] for mark in found], dense if not any(found[:dense]) else None)]


# norms before and after, and neighbouring dimensions rotated together: modeling_glm4.py
GLM4 = Family(
    name="glm4",
    traits={**LLAMA_TRAITS, "norm_after": True, "rope_interleaved": True},
    hf=hf.dialect(
        "Glm4ForCausalLM",
        "glm4",
        (
            *(hf.EMBED, *hf.NORMS, *hf.ATTENTION),
            row(LAYER + "post_self_attn_layernorm.weight", "hidden", "attention_out_norm"),
            *hf.JOINED_MLP,
            row(LAYER + "post_mlp_layernorm.weight", "hidden", "mlp_out_norm"),
            *(hf.FINAL_NORM, hf.HEAD),
        ),
        (
            *hf.LLAMA_FIELDS,
            hf.rope_percent(0.5),
            place("qkv_bias", "attention_bias", default=False),
            hf.TIED,
        ),
        absent={"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07, "attention_bias": True},
        written=hf.NO_PADDING,
    ),
    trtllm=None,
)

GLM4_MOE = Family(
    name="glm4_moe",
    needs=MIXED,
    traits=TRAITS,
    hf=hf.dialect(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        (hf.EMBED, *hf.NORMS, *hf.ATTENTION, *hf.QK_NORMS, *ROWS),
        (
            *(field for field in hf.LLAMA_FIELDS if field not in (hf.DTYPE, *hf.TOKENS)),
            hf.rope_percent(0.5),
            place("qkv_bias", "attention_bias", default=False),
            place("qk_norm", "use_qk_norm", default="none", words=(("head", True), ("none", False))),
            *(*fine_grained.SIZES, fine_grained.DENSE_FIRST),
            *MIXTURE,
        ),
        absent={**ABSENT, "num_key_value_heads": 8, "first_k_dense_replace": 1},
        guards={**SIGMOID, "topk_method": ("noaux_tc",)},
        ignored=fine_grained.IGNORED,
        pads=fine_grained.PADS,
    ),
    trtllm=None,
)

GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    needs=MIXED,
    traits={**TRAITS, "latent": True},
    hf=hf.dialect(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        (hf.EMBED, *hf.NORMS, *latent.ATTENTION, *ROWS),
        (
            *(*latent.FIELDS, *fine_grained.SIZES),
            Spread(
                *("blocks", "mlp_layer_types", (list[str], int), _listed, _spelled),
                more=("first_k_dense_replace",),
            ),
            *MIXTURE,
        ),
        absent={**ABSENT, "num_key_value_heads": 20, "q_lora_rank": 768, "routed_scaling_factor": 1.8},
        # vLLM looks for the method
        fixed={"topk_method": "noaux_tc", "attention_bias": False},
        guards={**SIGMOID, **WHOLE, "rope_interleave": (True,)},
        ignored=f"{fine_grained.IGNORED} head_dim",
        pads=fine_grained.PADS,
    ),
    trtllm=None,
)
