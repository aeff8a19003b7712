"""Mixtral: Mistral whose MLP is a mixture of experts.

transformers: modeling_mixtral.py. TensorRT-LLM: tensorrt_llm/models/llama/config.py, which builds Mixtral from Llama's class.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, trtllm, vllm
from carnet.dialects.configs import place
from carnet.model.fields import MIXED

MIXTRAL = Family(
    name="mixtral",
    vllm=vllm.EVERYWHERE,
    needs=MIXED,
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "MixtralForCausalLM",
        "mixtral",
        (*hf.LLAMA_ROWS, *hf.experts("block_sparse_moe", "w1", "w3", "w2", "gate")),
        (
            *hf.LLAMA_FIELDS,
            hf.TIED,
            place("window", "sliding_window", default=None),
            place("experts", "num_local_experts"),
            place("topk", "num_experts_per_tok"),
            place("moe_ffn", "intermediate_size"),
            place("router_normed", default=True),
        ),
        absent={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
        ignored="output_router_logits router_aux_loss_coef router_jitter_noise",
    ),
    trtllm=trtllm.dialect(
        "MixtralForCausalLM",
        trtllm.MIXTURE,
        (
            *(field for field in trtllm.LLAMA_FIELDS if field is not trtllm.ACTIVATION),
            place("activation", "hidden_act", words=trtllm.GATED),
            place("experts", "moe.num_experts"),
            place("topk", "moe.top_k"),
            place("moe_ffn", "intermediate_size"),
            place("router_normed", "moe.normalization_mode", words=((True, 1), (False, 0))),
        ),
        fixed={**trtllm.LLAMA_FIXED, "moe.shared_expert_intermediate_size": 0},
        written={**trtllm.LLAMA_WRITTEN, **trtllm.MOE_NONE},
    ),
)
