"""GLM-4, and GLM-4.5 to 5.3: mixtures of small experts behind dense layers, with grouped queries, or in the Flash models latent ones.

From 5 on an indexer chooses what latent attention sees, from 5.2 on for several layers at once. transformers: modeling_glm4.py,
modeling_glm4_moe.py, modeling_glm4_moe_lite.py, modeling_glm_moe_dsa.py. Half of each head is rotated in the first two.
"""

from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import fine_grained, hf, indexer, latent, vllm
from carnet.dialects.configs import place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.model.fields import MIXED, Config

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

# norms before and after, and neighbouring dimensions rotated together: modeling_glm4.py
GLM4 = Family(
    name="glm4",
    vllm=vllm.LLAMA,
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
    vllm=vllm.GLM,
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
    vllm=replace(vllm.GLM, aliases={**vllm.GLM.aliases, **vllm.TWICE}),
    needs=MIXED,
    traits={**TRAITS, "latent": True},
    hf=hf.dialect(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        (hf.EMBED, *hf.NORMS, *latent.ATTENTION, *ROWS),
        (
            *(*latent.FIELDS, *fine_grained.SIZES),
            fine_grained.listed_mlps(1),
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

GLM_MOE_DSA = Family(
    name="glm_moe_dsa",
    needs={**MIXED, **indexer.NEEDS},
    traits={**TRAITS, "latent": True, "index_interleaved": True},
    hf=hf.dialect(
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        (hf.EMBED, *hf.NORMS, *latent.ATTENTION, *indexer.ROWS, *ROWS),
        (
            *(*latent.FIELDS, *indexer.FIELDS, indexer.SHARED, *fine_grained.SIZES, fine_grained.listed_mlps(3)),
            *MIXTURE,
        ),
        absent={**indexer.ABSENT, **ABSENT, "num_key_value_heads": 64, "q_lora_rank": 2048, "index_n_heads": 32},
        # what vLLM and Megatron-Bridge look for
        fixed={**indexer.FIXED, "indexer_rope_interleave": True, "rope_interleave": True},
        guards={**WHOLE, "moe_router_dtype": ("float32",)},
        ignored=f"{fine_grained.IGNORED} {indexer.IGNORED}",
        pads=fine_grained.PADS,
    ),
    trtllm=None,
)
