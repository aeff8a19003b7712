"""Granite: transformers runs what carnet wrote, factors and all."""

import json

import pytest
import torch
from transformers import GraniteConfig

import carnet
from carnet.errors import CarnetError
from tests.referees.sizes import DENSE

pytestmark = pytest.mark.referee

FACTORS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 0.5}
WIDE = {"head_dim": 24}  # the class has no such key, the model reads it
MODELS = {
    "plain": GraniteConfig(**DENSE),
    "every factor": GraniteConfig(**DENSE, **FACTORS),
    "factors, wide heads, biases, tied": GraniteConfig(
        **DENSE, **FACTORS, **WIDE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, dtype, there_and_again):
    there_and_again(MODELS[which], dtype=dtype)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_that_differs_is_found(factor, saved, tmp_path):
    assert carnet.cross(saved(MODELS["every factor"]), tmp_path / "again", to="hf").equal
    config = json.loads((tmp_path / "again/config.json").read_text())
    (tmp_path / "again/config.json").write_text(json.dumps(config | {factor: 3.0}))
    (finding,) = carnet.verify(tmp_path / "hf", tmp_path / "again").findings
    assert finding.what == "config field differs"


@pytest.mark.parametrize("to", ["trtllm", "megatron"])
def test_a_program_that_has_no_such_factors_is_no_target(to, saved, tmp_path):
    folder = saved(MODELS["every factor"])
    with pytest.raises(CarnetError):
        carnet.cross(folder, tmp_path / "out", to=to)
