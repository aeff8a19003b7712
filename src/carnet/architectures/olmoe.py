"""OLMoE: a mixture in every layer, queries and keys normed over the width of all heads at once.

transformers: modeling_olmoe.py, where the width of a head follows from the norms' width.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, vllm
from carnet.dialects.configs import place
from carnet.model.fields import MIXED
from carnet.model.model import head_share

OLMOE = Family(
    name="olmoe",
    vllm=vllm.Spelling(ties=False, everywhere=vllm.AROUND),
    needs=MIXED,
    traits={**LLAMA_TRAITS, "qk_norm": "whole"},
    hf=hf.dialect(
        "OlmoeForCausalLM",
        "olmoe",
        (*hf.LLAMA_ROWS, *hf.WHOLE_QK_NORMS, *hf.experts()),
        (
            *(field for field in hf.SIZES if field.field != "head_dim"),
            place("head_dim", default=head_share),
            place("norm_eps", "rms_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            *hf.ROPE,
            hf.DTYPE,
            *hf.TOKENS,
            *hf.ATTENTION_BIASES,
            hf.TIED,
            place("experts", "num_experts", "num_local_experts"),
            place("topk", "num_experts_per_tok", default=8),
            place("moe_ffn", "intermediate_size"),
            place("router_normed", "norm_topk_prob", default=False),
        ),
        guards={"clip_qkv": ()},
        ignored="output_router_logits router_aux_loss_coef",
    ),
    trtllm=None,
)
