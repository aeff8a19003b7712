"""ERNIE-4.5, the dense models: Llama that rotates neighbouring dimensions of a head together, and has all biases or none.

transformers: modeling_ernie4_5.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import place

ERNIE4_5 = Family(
    name="ernie4_5",
    traits={**LLAMA_TRAITS, "rope_interleaved": True},
    hf=hf.dialect(
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            *(place(name, "use_bias", default=False) for name in ("qkv_bias", "out_bias", "mlp_bias")),
            hf.TIED,
        ),
        absent={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
    ),
    trtllm=None,
)
