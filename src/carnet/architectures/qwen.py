"""Qwen2, Qwen2.5, Qwen2-MoE, Qwen3 and Qwen3-MoE: Llama with a bias on query, key and value, or with normed queries and keys.

transformers: modeling_qwen2.py, modeling_qwen2_moe.py, modeling_qwen3.py, modeling_qwen3_moe.py. TensorRT-LLM:
tensorrt_llm/models/qwen/config.py, model.py (Qwen3 from 1.0 on).
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, trtllm, vllm, windows
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import Dialect, Row, fuse, row
from carnet.model.fields import MIXED
from carnet.model.model import mixtures

# of mixtures transformers' releases make different layers of them
NO_WINDOW: dict[str, tuple[object, ...]] = {"use_sliding_window": (False,)}

MIXTURES = Spread(
    "blocks",
    "mlp_only_layers",
    (list[int], 1),
    lambda said, config: mixtures(hf.mixed(said[0], said[1], config)),
    lambda c: ((hf.dense(c), 1),),
    more=("decoder_sparse_step",),
)

# NVIDIA's class serves every Qwen: query, key and value may have a bias, no other layer has one
TRTLLM_FIELDS: tuple[Field, ...] = (
    *trtllm.SIZES,
    *trtllm.ROPE,
    place("qkv_bias", "attn_bias", default=True),
    trtllm.TIED,
)
TRTLLM_MIXED: tuple[Field, ...] = (
    place("activation", "hidden_act", words=trtllm.GATED),
    place("experts", "moe.num_experts"),
    place("topk", "moe.top_k"),
    place("moe_ffn", "moe_intermediate_size"),
    # its converter says 0 of every model, which is not what a model with norm_topk_prob computes
    place("router_normed", "moe.normalization_mode", words=((True, 1), (False, 0))),
)
NOT_MIXED: dict[str, object] = {**trtllm.NO_EXPERTS, "moe_intermediate_size": 0, "moe_shared_expert_intermediate_size": 0}
# what 1.x says beside: every layer of a mixture is one
ALL_MIXED: dict[str, object] = {"mlp_only_layers": [], "decoder_sparse_step": 1}
# a dense layer has rows, but no word in the config: it is refused by its name
TRTLLM_MLPS = (*trtllm.GATED_MLP, *trtllm.MIXTURE)
TRTLLM_QK_NORMS = (
    row(LAYER + "attention.q_layernorm.weight", "dim", "attention.q_norm"),
    row(LAYER + "attention.k_layernorm.weight", "dim", "attention.k_norm"),
)


def _trtllm(
    architecture: str, qwen_type: str, blocks: tuple[Row, ...], fields: tuple[Field, ...], fixed: dict[str, object]
) -> Dialect:
    return trtllm.dialect(
        architecture,
        blocks,
        (*TRTLLM_FIELDS, *fields),
        fixed={
            "position_embedding_type": "rope_gpt_neox",
            "qwen_type": qwen_type,
            "mlp_bias": False,
            "use_logn_attn": False,
            **fixed,
        },
        written={
            **trtllm.MOE_NONE,
            "moe.normalization_mode": 0,
            "rotary_scaling": None,
            "disable_weight_only_quant_plugin": False,
            "num_labels": 1,
            "seq_length": 8192,  # read by the first Qwen only
        },
        guards={key: (value,) for key, value in ALL_MIXED.items()},
    )


QWEN2 = Family(
    name="qwen2",
    traits={**LLAMA_TRAITS, "qkv_bias": True},
    vllm=vllm.LLAMA,
    hf=hf.dialect(
        "Qwen2ForCausalLM",
        "qwen2",
        hf.LLAMA_ROWS,
        (*hf.LLAMA_FIELDS, hf.TIED, *windows.USED),
        absent={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    trtllm=_trtllm("Qwen2ForCausalLM", "qwen2", trtllm.GATED_MLP, (trtllm.ACTIVATION,), NOT_MIXED),
)

QWEN3 = Family(
    name="qwen3",
    vllm=vllm.LLAMA,
    traits={**LLAMA_TRAITS, "qk_norm": "head"},
    hf=hf.dialect(
        "Qwen3ForCausalLM",
        "qwen3",
        (*hf.LLAMA_ROWS, *hf.QK_NORMS),
        (*hf.LLAMA_FIELDS, *hf.ATTENTION_BIASES, hf.TIED, *windows.USED),
        absent={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    trtllm=_trtllm(
        "Qwen3ForCausalLM",
        "qwen3",
        (*trtllm.GATED_MLP, *TRTLLM_QK_NORMS),
        (trtllm.ACTIVATION,),
        {**NOT_MIXED, **ALL_MIXED},
    ),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    vllm=vllm.MIXED,
    needs=MIXED,
    traits={**LLAMA_TRAITS, "qk_norm": "head"},
    hf=hf.dialect(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (*hf.LLAMA_ROWS, *hf.QK_NORMS, *hf.experts()),
        (
            *hf.LLAMA_FIELDS,
            *hf.ATTENTION_BIASES,
            hf.TIED,
            place("experts", "num_experts", "num_local_experts"),
            place("topk", "num_experts_per_tok"),
            place("moe_ffn", "moe_intermediate_size"),
            place("router_normed", "norm_topk_prob", default=False),
            MIXTURES,
        ),
        absent={"num_key_value_heads": 4},
        guards={**NO_WINDOW, "use_qk_norm": (True,)},  # as Qwen3-Coder says of all models of the class
        ignored=f"{' '.join(windows.KEYS)} output_router_logits router_aux_loss_coef",
    ),
    trtllm=_trtllm(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (*TRTLLM_MLPS, *TRTLLM_QK_NORMS),
        TRTLLM_MIXED,
        {"moe_shared_expert_intermediate_size": 0, "moe.shared_expert_intermediate_size": 0, **ALL_MIXED},
    ),
)

# a shared expert beside the others, weighed by the sigmoid of a gate of its own
# vllm 0.32 model_executor/models/qwen2_moe.py: what weighs the shared expert is a module of it, too
ENGINE = vllm.Spelling(
    everywhere=vllm.AROUND,
    aliases=vllm.WEIGHED,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    vllm=ENGINE,
    needs=MIXED,
    traits={**LLAMA_TRAITS, "shared_gate": True},
    hf=hf.dialect(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        (
            *(*hf.LLAMA_ROWS, *hf.experts()),
            *hf.gated("mlp.shared_expert", "shared", "shared_ffn"),
            row(LAYER + "mlp.shared_expert_gate.weight", "1 hidden", "shared.weigh"),
        ),
        (
            *hf.LLAMA_FIELDS,
            place("qkv_bias", "qkv_bias", default=True),
            hf.TIED,
            place("experts", "num_experts"),
            place("topk", "num_experts_per_tok", default=4),
            place("moe_ffn", "moe_intermediate_size"),
            place("shared_ffn", "shared_expert_intermediate_size"),
            place("router_normed", "norm_topk_prob", default=False),
            MIXTURES,
        ),
        absent={"num_key_value_heads": 16},
        guards=NO_WINDOW,
        ignored=f"{' '.join(windows.KEYS)} output_router_logits router_aux_loss_coef",
    ),
    trtllm=_trtllm(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        (
            *TRTLLM_MLPS,
            fuse(
                LAYER + "mlp.shared_expert.fc.weight",
                "* hidden",
                {"shared.up": "shared_ffn", "shared.gate": "shared_ffn"},
                cut="shared_ffn",
            ),
            row(LAYER + "mlp.shared_expert.proj.weight", "hidden shared_ffn", "shared.down", cut="shared_ffn"),
            row(LAYER + "mlp.shared_expert_gate.weight", "1 hidden", "shared.weigh"),
        ),
        (
            *TRTLLM_MIXED,
            place("shared_ffn", "moe_shared_expert_intermediate_size"),
            place("shared_ffn", "moe.shared_expert_intermediate_size", default=lambda c: c["shared_ffn"]),
        ),
        {},
    ),
)
