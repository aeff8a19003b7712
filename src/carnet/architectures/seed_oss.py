"""Seed-OSS: Llama with biases that are said apart for what goes into the attention, what comes out of it, and the MLP.

transformers: modeling_seed_oss.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import place

SEED_OSS = Family(
    name="seed_oss",
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "SeedOssForCausalLM",
        "seed_oss",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            place("qkv_bias", "attention_bias", default=False),
            place("out_bias", "attention_out_bias", default=False),
            place("mlp_bias", "mlp_bias", default=False),
            hf.TIED,
        ),
        absent={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
        ignored="residual_dropout",
    ),
    trtllm=None,
)
