"""OLMo 2: transformers runs what carnet wrote."""

import pytest
import torch
from transformers import Olmo2Config

import carnet
from carnet.errors import CarnetError
from tests.referees.sizes import DENSE, LLAMA3

pytestmark = pytest.mark.referee

WIDE = {"head_dim": 24}  # the class has no such key, the model reads it
MODELS = {
    "plain": Olmo2Config(**DENSE),
    "wide heads, biases, tied": Olmo2Config(**DENSE, **WIDE, attention_bias=True, tie_word_embeddings=True),
    "angles stretched": Olmo2Config(**DENSE, rope_parameters=LLAMA3),
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
