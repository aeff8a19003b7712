"""Llama 1, 2 and 3: RMSNorm, grouped-query attention, gated MLP, rotary positions; and what differs from it by a field.

transformers: modeling_llama.py, configuration_llama.py and their neighbours. TensorRT-LLM: tensorrt_llm/models/llama/config.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, trtllm, vllm
from carnet.dialects.configs import place

TRTLLM_MOE = {**trtllm.MOE_NONE, "moe.normalization_mode": None}

LLAMA = Family(
    name="llama",
    traits=LLAMA_TRAITS,
    vllm=vllm.LLAMA,
    hf=hf.dialect(
        "LlamaForCausalLM",
        "llama",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            # transformers' attention_bias gives all four projections a bias
            *hf.ATTENTION_BIASES,
            place("mlp_bias", "mlp_bias", default=False),
            hf.TIED,
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
    vllm=vllm.LLAMA,
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "MistralForCausalLM",
        "mistral",
        hf.LLAMA_ROWS,
        (*hf.LLAMA_FIELDS, place("window", "sliding_window", default=None), hf.TIED),
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
