"""OLMo 2: transformers runs what carnet wrote."""

import pytest
import torch
from transformers import Olmo2Config

import carnet
from carnet.errors import CarnetError

pytestmark = pytest.mark.referee

SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDE = {"head_dim": 24}  # the class has no such key, the model reads it
MODELS = {
    "plain": Olmo2Config(**SIZES),
    "wide heads, biases, tied": Olmo2Config(**SIZES, **WIDE, attention_bias=True, tie_word_embeddings=True),
    "angles stretched": Olmo2Config(**SIZES, rope_parameters=ROPE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, dtype, there_and_again):
    there_and_again(MODELS[which], dtype=dtype)


@pytest.mark.parametrize("to", ["trtllm", "megatron"])
def test_a_program_that_does_not_norm_what_comes_out_is_no_target(to, saved, tmp_path):
    folder = saved(MODELS["plain"])
    with pytest.raises(CarnetError):
        carnet.cross(folder, tmp_path / "out", to=to)
