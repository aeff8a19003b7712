"""OLMo 2: Llama that norms what comes out of the attention and the MLP, not what goes in, and its queries and keys over all heads.

transformers: modeling_olmo2.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row

OLMO2 = Family(
    name="olmo2",
    traits={**LLAMA_TRAITS, "norm_before": False, "norm_after": True, "qk_norm": "whole"},
    hf=hf.dialect(
        "Olmo2ForCausalLM",
        "olmo2",
        (
            *(hf.EMBED, *hf.ATTENTION),
            *hf.WHOLE_QK_NORMS,
            row(LAYER + "post_attention_layernorm.weight", "hidden", "attention_out_norm"),
            *hf.GATED_MLP,
            row(LAYER + "post_feedforward_layernorm.weight", "hidden", "mlp_out_norm"),
            *(hf.FINAL_NORM, hf.HEAD),
        ),
        (
            *hf.SIZES_WITHOUT_HEAD,
            place("norm_eps", "rms_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            *hf.ROPE,
            *hf.ATTENTION_BIASES,
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
    ),
    trtllm=None,
)
