"""dots.llm1: the attention of Qwen3 and the mixtures of DeepSeek-V3, windows from some layer on.

transformers: modeling_dots1.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import fine_grained, hf, windows
from carnet.dialects.configs import place
from carnet.model.fields import MIXED

DOTS1 = Family(
    name="dots1",
    needs=MIXED,
    traits={**LLAMA_TRAITS, "qk_norm": "head", "router_score": "sigmoid", "router_bias": True},
    hf=hf.dialect(
        "Dots1ForCausalLM",
        "dots1",
        (*hf.LLAMA_ROWS, *hf.QK_NORMS, *fine_grained.ROWS, fine_grained.BIAS),
        (
            *(*hf.LLAMA_FIELDS, *hf.ATTENTION_BIASES, hf.TIED, *windows.UNASKED),
            *(*fine_grained.SIZES, fine_grained.DENSE_FIRST, *fine_grained.ROUTER, fine_grained.GROUPED),
            place("router_normed", "norm_topk_prob", default=False),
        ),
        absent={"num_key_value_heads": 32, "sliding_window": 4096},
        # what the published models say of all of the class
        guards={"scoring_func": ("noaux_tc", "sigmoid"), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
        ignored=fine_grained.IGNORED,
        pads=fine_grained.PADS,
    ),
    trtllm=None,
)
