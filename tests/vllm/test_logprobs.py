"""vLLM as referee: what comes back from ranks says the same of every token, to vLLM and to transformers.

A model of transformers, tiny and random, crosses to the ranks of another program and back. `make test-vllm` runs this in an
environment of its own, where a missing vLLM is an error and no reason to skip. All is float32, on a CPU; vLLM is not patched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import carnet

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:vllm")  # of what it calls in torch

CLOSE = 1e-4  # another order of sums costs up to 3e-5; a field or a tensor that is wrong, more than 1e-3
VOCAB = 97

# on a CPU vLLM wants mixtures whose width divides by 32, and heads no narrower than that
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 10}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # this and the next are the only ones that vLLM computes on a CPU
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
}
MIXTURE = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 40,
    "n_shared_experts": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# the kernels that vLLM prefers where a CPU has AMX know bf16 alone
ANY_CPU = {"attention_backend": "CPU_MLA"}


@dataclass(frozen=True)
class Case:
    """A model, and the ranks that it comes back from."""

    config: PreTrainedConfig
    ranks: Mapping[str, str | int]  # what carnet.cross is told
    settings: Mapping[str, object] = field(default_factory=dict)  # what vLLM is told beside the folder


CASES = {
    "llama": Case(
        LlamaConfig(**SIZES, **HEADS, rope_parameters=STRETCHED, tie_word_embeddings=False), {"to": "megatron", "tp": 2}
    ),
    "qwen3": Case(Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=True), {"to": "megatron", "tp": 2, "pp": 3}),
    "mixtral": Case(MixtralConfig(**SIZES, **HEADS, num_local_experts=6), {"to": "megatron", "tp": 2, "ep": 2}),
    # Megatron's arguments cannot say its activation
    "gemma2": Case(Gemma2Config(**SIZES, **HEADS, **CAPS, sliding_window=8), {"to": "trtllm", "tp": 2}),
    "deepseek_v3": Case(
        DeepseekV3Config(**SIZES, **LATENT, **MIXTURE, q_lora_rank=20, n_group=3, topk_group=2, rope_parameters=YARN),
        {"to": "megatron", "ep": 2, "read_by": "megatron-bridge"},  # Megatron-LM has no flag for the length before stretching
        ANY_CPU,
    ),
    # As Moonlight is. vLLM 0.32's CPU kernel for plain rotary angles turns queries of the shape (token, head, dim) otherwise
    # than the same numbers in the shape (token, head x dim), which other models hand over. So vLLM is told to do it in PyTorch,
    # as it does in any case for the angles of the model above.
    "deepseek_v3, queries not compressed, plain angles": Case(
        DeepseekV3Config(**SIZES, **LATENT, **MIXTURE, q_lora_rank=None, n_group=1, topk_group=1),
        {"to": "megatron", "tp": 2},
        {**ANY_CPU, "compilation_config": {"custom_ops": ["-rotary_embedding"]}},
    ),
}


def save(config, folder):
    """Save a model of random weights, the bias that chooses experts included, wide enough that attention is not a mere average."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in name:
            torch.nn.init.normal_(tensor, mean=1, std=0.2)
        elif name.endswith(("weight", "_proj", "e_score_correction_bias")):
            torch.nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("which", CASES)
def test_vllm_gives_a_model_back_from_ranks_the_log_probabilities_of_the_original(which, by_transformers, by_vllm, tmp_path):
    case = CASES[which]
    save(case.config, tmp_path / "original")
    assert carnet.cross(tmp_path / "original", tmp_path / "ranks", **case.ranks).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    expected = by_transformers(tmp_path / "original")
    assert expected.std() > 0.3
    assert torch.equal(by_transformers(tmp_path / "back"), expected)
    torch.testing.assert_close(by_vllm(tmp_path / "back", case.settings), expected, atol=CLOSE, rtol=0)
