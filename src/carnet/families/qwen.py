"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE: Llama with a bias on query, key and value, or with normed queries and keys.

transformers: modeling_qwen2.py, modeling_qwen3.py, modeling_qwen3_moe.py.
"""

from carnet.families import hf
from carnet.families.family import Family
from carnet.families.fields import Spread, place
from carnet.families.llama import TIED, TRAITS
from carnet.families.model import marks, number

NO_WINDOW: dict[str, tuple[object, ...]] = {"use_sliding_window": (False,)}
WINDOW_KEYS = "sliding_window max_window_layers layer_types"  # mean nothing without use_sliding_window
BIASES = (place("qkv_bias", "attention_bias", default=False), place("out_bias", "attention_bias", default=False))

QWEN2 = Family(
    name="qwen2",
    traits={**TRAITS, "qkv_bias": True},
    hf=hf.dialect("Qwen2ForCausalLM", "qwen2", hf.LLAMA_ROWS, (*hf.LLAMA_FIELDS, TIED), guards=NO_WINDOW, ignored=WINDOW_KEYS),
    trtllm=None,
)

QWEN3 = Family(
    name="qwen3",
    traits={**TRAITS, "qk_norm": "head"},
    hf=hf.dialect(
        "Qwen3ForCausalLM",
        "qwen3",
        (*hf.LLAMA_ROWS, *hf.QK_NORMS),
        (*hf.LLAMA_FIELDS, *BIASES, TIED),
        guards=NO_WINDOW,
        ignored=WINDOW_KEYS,
    ),
    trtllm=None,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    traits={**TRAITS, "qk_norm": "head"},
    hf=hf.dialect(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (*hf.LLAMA_ROWS, *hf.QK_NORMS, *hf.experts("mlp", "gate_proj", "up_proj", "down_proj", "gate")),
        (
            *hf.LLAMA_FIELDS,
            *BIASES,
            TIED,
            place("experts", "num_experts", "num_local_experts"),
            place("topk", "num_experts_per_tok"),
            place("moe_ffn", "moe_intermediate_size"),
            place("router_normed", "norm_topk_prob", default=False),
            Spread(
                "moe_layers",
                "mlp_only_layers",
                [],
                lambda dense, c: tuple(int(layer not in dense) for layer in range(number(c, "layers"))),
                lambda c: ([layer for layer, mixed in enumerate(marks(c)) if not mixed],),
            ),
        ),
        guards={**NO_WINDOW, "decoder_sparse_step": (1,)},
        ignored=f"{WINDOW_KEYS} output_router_logits router_aux_loss_coef",
    ),
    trtllm=None,
)
