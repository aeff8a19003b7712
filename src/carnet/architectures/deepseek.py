"""DeepSeek-V2 and V3: latent attention, dense layers before mixtures, shared experts.

V3 has a bias that chooses experts, and layers that predict further tokens; from V3.2 on an indexer chooses what a token sees.
transformers: modeling_deepseek_v2.py, modeling_deepseek_v3.py, modeling_deepseek_v32.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import fine_grained, hf, indexer, latent, trtllm_latent, vllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import number

ROWS = (*(hf.EMBED, *hf.NORMS, *latent.ATTENTION, *hf.GATED_MLP), *fine_grained.ROWS, hf.FINAL_NORM, hf.HEAD)
FIELDS: tuple[Field, ...] = (
    *(*latent.FIELDS, *fine_grained.SIZES, fine_grained.DENSE_FIRST, *fine_grained.ROUTER),
    *(hf.TIED, hf.DTYPE, *hf.TOKENS),
)


def _groups(said: tuple[str, int], _: Config) -> int:
    """Return how many groups experts are chosen from: without a limit there is one, whatever the number says."""
    method, groups = said
    expect(method in {"greedy", "group_limited_greedy"} and groups > 0, "greedy, or group_limited_greedy in some groups")
    return groups if method != "greedy" else 1


# what tensorrt_llm/models/deepseek_v2/config.py makes of the two methods: its name, TopKMethod, ExpertScaleNormalizationMode
METHODS = ("greedy", 0, 0), ("group_limited_greedy", 1, 3)


def _limited(said: tuple[str, int, int, int], _: Config) -> int:
    """Return how many groups experts are chosen from; NVIDIA's ranks say the number without a limit, too."""
    *method, groups = said
    expect(tuple(method) in METHODS and groups > 0, "greedy, or group_limited_greedy in some groups")
    return groups if method[0] != "greedy" else 1


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    vllm=vllm.DEEPSEEK,
    needs=MIXED,
    traits={**LLAMA_TRAITS, "latent": True, "router_score": "sigmoid", "router_bias": True},
    hf=hf.dialect(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        (*ROWS, fine_grained.BIAS, *fine_grained.FURTHER),
        (
            *FIELDS,
            fine_grained.GROUPED,
            place("router_normed", "norm_topk_prob", default=False),
            # transformers' rotary embedding reads this one, and sets it to the other where it is not there
            place("rope_dim", "head_dim", default=lambda c: c["rope_dim"], omit=True),
            place("mtp", "num_nextn_predict_layers", default=0),
        ),
        absent={
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        fixed={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "attention_bias": False},
        # as Kimi-K2 calls itself: the same class under a name that transformers does not know
        guards={"model_type": ("deepseek_v3", "kimi_k2"), "rope_interleave": (True,)},
        ignored=fine_grained.IGNORED,
        pads=fine_grained.PADS,
    ),
    # its kernels norm the weights of the chosen whatever is said: config.py
    trtllm=trtllm_latent.dialect(
        "DeepseekV3ForCausalLM",
        (
            place("router_groups", "moe.device_limited_n_group", default=1),
            fine_grained.GROUPED,
            place("router_normed", default=True),
        ),
        fixed={"topk_method": "noaux_tc", "moe.topk_method": 2, "moe.normalization_mode": 3, "coring_func": "sigmoid"},
        bias=True,
    ),
)

DEEPSEEK_V32 = Family(
    name="deepseek_v32",
    needs={**MIXED, **indexer.NEEDS},
    traits=DEEPSEEK_V3.traits,
    hf=hf.dialect(
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        (*ROWS, *indexer.ROWS, fine_grained.BIAS, *fine_grained.FURTHER),
        (
            *(*latent.FIELDS, *indexer.FIELDS, *fine_grained.SIZES, fine_grained.listed_mlps(3), *fine_grained.ROUTER),
            *(fine_grained.GROUPED, hf.TIED, hf.DTYPE, *hf.TOKENS),
            place("router_normed", "norm_topk_prob", default=False),
            place("mtp", "num_nextn_predict_layers", default=0),
        ),
        absent={
            **indexer.ABSENT,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "index_n_heads": 64,
            "n_group": 8,
            "topk_group": 4,
        },
        fixed={**indexer.FIXED, "indexer_rope_interleave": False},
        guards={"rope_interleave": (True,)},
        ignored=f"{fine_grained.IGNORED} {indexer.IGNORED}",
        pads=fine_grained.PADS,
    ),
    trtllm=None,
)

# transformers/models/deepseek_v2/modeling_deepseek_v2.py; the Lite models do not compress queries, and know no groups. The released
# code scales the weights of the experts or norms them, never both: normed ones are refused. A group counts as its best expert.
DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    vllm=vllm.DEEPSEEK,
    needs=MIXED,
    traits={**LLAMA_TRAITS, "latent": True},
    hf=hf.dialect(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        ROWS,
        (
            *FIELDS,
            Spread(
                "router_groups",
                "topk_method",
                ("greedy", 1),
                _groups,
                lambda c: (("greedy", 1), ("group_limited_greedy", number(c, "router_groups"))),
                more=("n_group",),
            ),
            Spread(
                *("router_group_topk", "topk_group", 1, lambda said, c: said if number(c, "router_groups") > 1 else 1),
                lambda c: (number(c, "router_group_topk"),),
            ),
            place("router_group_best", default=lambda c: 1 if number(c, "router_groups") > 1 else None),
            place("router_normed", "norm_topk_prob", default=False, words=((False, False),)),
        ),
        absent={"q_lora_rank": 1536, "n_shared_experts": 2},
        fixed={"scoring_func": "softmax", "moe_layer_freq": 1, "attention_bias": False, "mlp_bias": False},
        ignored=f"{fine_grained.IGNORED} head_dim",  # which its class takes from qk_rope_head_dim, whatever is said
        pads=fine_grained.PADS,
    ),
    trtllm=trtllm_latent.dialect(
        "DeepseekV2ForCausalLM",
        (
            Spread(
                "router_groups",
                "topk_method",
                (str, int, int, int),
                _limited,
                lambda c: [(*each, number(c, "router_groups")) for each in METHODS],
                more=("moe.topk_method", "moe.normalization_mode", "moe.device_limited_n_group"),
            ),
            place("router_group_best", default=lambda c: 1 if number(c, "router_groups") > 1 else None),
            place("router_normed", default=False),
        ),
        fixed={"coring_func": "softmax"},
        bias=False,
    ),
)
