"""Qwen2, Qwen2.5, Qwen2-MoE, Qwen3 and Qwen3-MoE: Llama with a bias on query, key and value, or with normed queries and keys.

transformers: modeling_qwen2.py, modeling_qwen2_moe.py, modeling_qwen3.py, modeling_qwen3_moe.py.
"""

from carnet.families import hf
from carnet.families.family import Family
from carnet.families.fields import Spread, place
from carnet.families.hf import LAYER
from carnet.families.llama import TIED, TRAITS
from carnet.families.model import Config, marks, number
from carnet.families.rows import row

NO_WINDOW: dict[str, tuple[object, ...]] = {"use_sliding_window": (False,)}
WINDOW_KEYS = "sliding_window max_window_layers layer_types"  # mean nothing without use_sliding_window
BIASES = (place("qkv_bias", "attention_bias", default=False), place("out_bias", "attention_bias", default=False))


def _mixtures(said: tuple[list[int], int], config: Config) -> tuple[int, ...]:
    """Return a mark a layer: every step-th is a mixture, but for those that are listed."""
    dense, step = said
    if not all(type(layer) is int for layer in (*dense, step)) or step < 1:
        raise ValueError("numbers of layers and a step")
    return tuple(int(layer not in dense and (layer + 1) % step == 0) for layer in range(number(config, "layers")))


MIXTURES = Spread(
    "moe_layers",
    "mlp_only_layers",
    ([], 1),
    _mixtures,
    lambda c: (([layer for layer, mixed in enumerate(marks(c)) if not mixed], 1),),
    more=("decoder_sparse_step",),
)

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
            MIXTURES,
        ),
        guards=NO_WINDOW,
        ignored=f"{WINDOW_KEYS} output_router_logits router_aux_loss_coef",
    ),
    trtllm=None,
)

# a shared expert beside the others, weighed by the sigmoid of a gate of its own
QWEN2_MOE = Family(
    name="qwen2_moe",
    traits={**TRAITS, "shared_gate": True},
    hf=hf.dialect(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        (
            *(*hf.LLAMA_ROWS, *hf.experts("mlp", "gate_proj", "up_proj", "down_proj", "gate")),
            row(LAYER + "mlp.shared_expert.gate_proj.weight", "shared_ffn hidden", "shared.gate"),
            row(LAYER + "mlp.shared_expert.up_proj.weight", "shared_ffn hidden", "shared.up"),
            row(LAYER + "mlp.shared_expert.down_proj.weight", "hidden shared_ffn", "shared.down"),
            row(LAYER + "mlp.shared_expert_gate.weight", "1 hidden", "shared.weigh"),
        ),
        (
            *hf.LLAMA_FIELDS,
            place("qkv_bias", "qkv_bias", default=True),
            TIED,
            place("experts", "num_experts"),
            place("topk", "num_experts_per_tok", default=4),
            place("moe_ffn", "moe_intermediate_size"),
            place("shared_ffn", "shared_expert_intermediate_size"),
            place("router_normed", "norm_topk_prob", default=False),
            MIXTURES,
        ),
        guards=NO_WINDOW,
        ignored=f"{WINDOW_KEYS} output_router_logits router_aux_loss_coef",
    ),
    trtllm=None,
)
