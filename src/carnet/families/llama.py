"""Llama 1, 2 and 3: RMSNorm, grouped-query attention, gated MLP, rotary positions; and what differs from it by a field.

transformers: modeling_llama.py, configuration_llama.py and their neighbours. TensorRT-LLM: tensorrt_llm/models/llama/config.py.
"""

from carnet.families import hf, trtllm
from carnet.families.family import Family
from carnet.families.fields import place
from carnet.families.words import Value

TRAITS: dict[str, Value] = {"norm": "rms", "gated": True, "position": "rope"}
TIED = place("tied", "tie_word_embeddings", default=False)
TRTLLM_MOE = {**trtllm.MOE_NONE, "moe.normalization_mode": None}

LLAMA = Family(
    name="llama",
    traits=TRAITS,
    hf=hf.dialect(
        "LlamaForCausalLM",
        "llama",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            # transformers' attention_bias gives all four projections a bias
            place("qkv_bias", "attention_bias", default=False),
            place("out_bias", "attention_bias", default=False),
            place("mlp_bias", "mlp_bias", default=False),
            TIED,
        ),
    ),
    trtllm=trtllm.dialect(
        "LlamaForCausalLM",
        trtllm.GATED_MLP,
        trtllm.LLAMA_FIELDS,
        fixed={**trtllm.LLAMA_FIXED, **trtllm.NO_EXPERTS},
        written={**trtllm.LLAMA_WRITTEN, **TRTLLM_MOE},
    ),
)

MISTRAL = Family(
    name="mistral",
    traits=TRAITS,
    hf=hf.dialect(
        "MistralForCausalLM",
        "mistral",
        hf.LLAMA_ROWS,
        (*hf.LLAMA_FIELDS, place("window", "sliding_window", default=None), TIED),
        absent={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    trtllm=trtllm.dialect(
        "MistralForCausalLM",
        trtllm.GATED_MLP,
        trtllm.LLAMA_FIELDS,
        fixed={**trtllm.LLAMA_FIXED, **trtllm.NO_EXPERTS},
        written={**trtllm.LLAMA_WRITTEN, **TRTLLM_MOE},
    ),
)
