"""DeepSeek-V2, V2-Lite and V3: what transformers saved comes back tensor by tensor, and computes the same bits."""

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

pytestmark = pytest.mark.referee

SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
MODELS = {
    "v2": DeepseekV2Config(**SIZES, **LIMITED, q_lora_rank=20, rope_parameters=YARN),
    "v2-lite": DeepseekV2Config(**SIZES, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1),
    "v3": DeepseekV3Config(**SIZES, q_lora_rank=20, n_group=3, topk_group=2, rope_parameters=YARN),
    "v3, queries not compressed": DeepseekV3Config(**SIZES, q_lora_rank=None, n_group=1, topk_group=1),
}
# vLLM reads these, and transformers does not write them
FOR_VLLM = {"v2": {"scoring_func", "moe_layer_freq"}, "v3": {"scoring_func", "moe_layer_freq", "topk_method"}}


@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, there_and_again):
    # transformers leaves the layer that predicts a further token out, and its number in the config
    further = {"num_nextn_predict_layers"} if which.startswith("v3") else set()
    there_and_again(MODELS[which], spelled_otherwise=FOR_VLLM[which[:2]] | further)
