"""DeepSeek-V2 and V3: latent attention, dense layers before mixtures, shared experts.

V3 has a bias that chooses experts, and layers that predict further tokens.

transformers: modeling_deepseek_v3.py; vLLM wants topk_method and scoring_func beside what transformers writes. The width of the shared
experts is a number of them times the width of one: a model in between is padded with zeros, which changes nothing it computes.
"""

from carnet.algebra.layout import round_up
from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.dialects.yarn import YARN
from carnet.model.fields import MIXED, Config
from carnet.model.model import marks, mixtures, number, value

ATTENTION = (
    row(LAYER + "self_attn.q_proj.weight", "(kv qk) hidden", "mla.q"),
    row(LAYER + "self_attn.q_a_proj.weight", "q_lora hidden", "mla.q_a"),
    row(LAYER + "self_attn.q_a_layernorm.weight", "q_lora", "mla.q_a_norm"),
    row(LAYER + "self_attn.q_b_proj.weight", "(kv qk) q_lora", "mla.q_b"),
    fuse(LAYER + "self_attn.kv_a_proj_with_mqa.weight", "* hidden", {"mla.kv_a": "kv_lora", "mla.k_rope": "rope"}),
    row(LAYER + "self_attn.kv_a_layernorm.weight", "kv_lora", "mla.kv_a_norm"),
    fuse(LAYER + "self_attn.kv_b_proj.weight", "(kv *) kv_lora", {"mla.k_b": "nope", "mla.v_b": "v"}),
    row(LAYER + "self_attn.o_proj.weight", "hidden (kv v)", "mla.o"),
)
# layers that predict further tokens follow the others, each with the embedding and the head once more
FURTHER = (
    row(LAYER + "enorm.weight", "hidden", "mtp.embed_norm"),
    row(LAYER + "hnorm.weight", "hidden", "mtp.hidden_norm"),
    row(LAYER + "eh_proj.weight", "hidden (two hidden_in)", "mtp.project"),
    row(LAYER + "embed_tokens.weight", "vocab hidden", "embed", when={"is_mtp": True}),
    row(LAYER + "shared_head.norm.weight", "hidden", "mtp.final_norm"),
    row(LAYER + "shared_head.head.weight", "vocab hidden", "head", when={"is_mtp": True}),
)
BIAS = row(LAYER + "mlp.gate.e_score_correction_bias", "expert", "moe.router_bias", dtype="f32")


def _rank(said: int | None, _: Config) -> int:
    """Return the width of the compressed queries; null where they are not compressed, and transformers takes 0 for a width."""
    expect(said is None or said > 0, "a width")
    return said or 0


def _after_dense(dense: int, config: Config) -> str | None:
    """Return the blocks: mixtures follow so many dense layers."""
    expect(dense >= 0, "a number of layers")
    return mixtures([layer >= dense for layer in range(number(config, "layers"))])


def _groups(said: tuple[str, int], _: Config) -> int:
    """Return how many groups experts are chosen from: without a limit there is one, whatever the number says."""
    method, groups = said
    expect(method in {"greedy", "group_limited_greedy"} and groups > 0, "greedy, or group_limited_greedy in some groups")
    return groups if method != "greedy" else 1


def _whole_experts(config: Config) -> int:
    """Return the width of as many shared experts as the model's width needs."""
    return round_up(number(config, "shared_ffn"), number(config, "moe_ffn"))


ROWS = (
    *(hf.EMBED, *hf.NORMS, *ATTENTION, *hf.GATED_MLP),
    *hf.experts(),
    *(*hf.gated("mlp.shared_experts", "shared", "shared_ffn"), hf.FINAL_NORM, hf.HEAD),
)
FIELDS: tuple[Field, ...] = (
    place("layers", "num_hidden_layers"),
    place("hidden", "hidden_size"),
    place("heads", "num_attention_heads"),
    place("kv_heads", "num_key_value_heads", default=lambda c: c["heads"]),
    Spread("q_lora", "q_lora_rank", int, _rank, lambda c: (number(c, "q_lora") or None,)),
    place("kv_lora", "kv_lora_rank"),
    place("nope_dim", "qk_nope_head_dim"),
    place("rope_dim", "qk_rope_head_dim"),
    place("v_dim", "v_head_dim"),
    place("head_dim", default=lambda c: number(c, "nope_dim") + number(c, "rope_dim")),
    place("ffn", "intermediate_size"),
    place("vocab", "vocab_size"),
    place("positions", "max_position_embeddings"),
    place("norm_eps", "rms_norm_eps", default=1e-6),
    place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
    place("rope_theta", "rope_theta", "rope_parameters.rope_theta", default=10000.0),
    *hf.rope("rope_scaling", "rope_parameters", types=("default", "yarn")),
    # of the scores, and of no other attention
    place("rope_mscale_all", "rope_scaling.mscale_all_dim", "rope_parameters.mscale_all_dim", default=0.0, only=YARN),
    # their classes' own, whatever rms_norm_eps says
    place("latent_norm_eps", default=1e-6),
    place("experts", "n_routed_experts"),
    place("topk", "num_experts_per_tok"),
    place("moe_ffn", "moe_intermediate_size"),
    Spread(
        "shared_ffn",
        "n_shared_experts",
        0,
        lambda count, c: count * number(c, "moe_ffn"),
        lambda c: (number(c, "shared_ffn") // number(c, "moe_ffn") if value(c, "shared_ffn") else 0,),
    ),
    Spread(
        "blocks",
        "first_k_dense_replace",
        0,
        _after_dense,
        lambda c: (number(c, "layers") - sum(marks(c)),),
    ),
    place("router_groups", "n_group", default=1),
    place("router_group_topk", "topk_group", default=1),
    place("router_scale", "routed_scaling_factor", default=1.0),
    place("router_wide", default=True),
    hf.TIED,
    hf.DTYPE,
    *hf.TOKENS,
)
IGNORED = "aux_loss_alpha seq_aux ep_size qk_head_dim router_aux_loss_coef num_local_experts output_router_logits"

# tensorrt_llm/models/deepseek_v2/convert.py: attention.fused_q_proj
NO_RANKS = "NVIDIA's ranks hold a product of two of its weights, and carnet moves weights as they are"

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    needs=MIXED,
    traits={**LLAMA_TRAITS, "latent": True, "router_score": "sigmoid", "router_bias": True},
    hf=hf.dialect(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        (
            *ROWS,
            BIAS,
            *FURTHER,
        ),
        (
            *FIELDS,
            place("router_groups", "n_group", default=1),
            place("router_group_topk", "topk_group", default=1),
            place("router_group_best", default=lambda c: 2 if number(c, "router_groups") > 1 else None),
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
        ignored=IGNORED,
        pads={"shared_ffn": _whole_experts},
    ),
    trtllm=None,
    without=NO_RANKS,
)

# transformers/models/deepseek_v2/modeling_deepseek_v2.py; the Lite models do not compress queries, and know no groups. The released
# code scales the weights of the experts or norms them, never both: normed ones are refused. A group counts as its best expert.
DEEPSEEK_V2 = Family(
    name="deepseek_v2",
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
        ignored=f"{IGNORED} head_dim",  # which its class takes from qk_rope_head_dim, whatever is said
        pads={"shared_ffn": _whole_experts},
    ),
    trtllm=None,
    without=NO_RANKS,
)
