"""Granite: transformers runs what carnet wrote, factors and all."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig

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
FACTORS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 8.0}
WIDE = {"head_dim": 24}  # the class has no such key, the model reads it
MODELS = {
    "plain": GraniteConfig(**SIZES),
    "every factor": GraniteConfig(**SIZES, **FACTORS),
    "factors, wide heads, biases, tied": GraniteConfig(
        **SIZES, **FACTORS, **WIDE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
}
# which program wrote a config and where it lies
VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype"}


def loaded(folder):
    """Return the model that transformers makes of a folder, in float32, after asking it whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, said = asked
    assert {what: list(names) for what, names in said.items() if names} == {}
    return model.eval()


def logits(model):
    tokens = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def meaning(folder) -> dict[str, object]:
    """Return what transformers understands a folder's config to say."""
    return {key: value for key, value in AutoConfig.from_pretrained(folder).to_dict().items() if key not in VOLATILE}


def saved(config, folder, dtype=torch.float32):
    """Save a model with every parameter random, norms too, and return it as it was saved."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return loaded(folder)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_folder_comes_back_with_the_same_tensors_fields_and_logits(which, dtype, tmp_path):
    before = saved(MODELS[which], tmp_path / "hf", dtype)
    assert carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf").equal
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "hf")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(before))
    assert meaning(tmp_path / "again") == meaning(tmp_path / "hf")


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_that_differs_is_found(factor, tmp_path):
    saved(MODELS["every factor"], tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf").equal
    config = json.loads((tmp_path / "again/config.json").read_text())
    (tmp_path / "again/config.json").write_text(json.dumps(config | {factor: 3.0}))
    (finding,) = carnet.verify(tmp_path / "hf", tmp_path / "again").findings
    assert finding.what == "config field differs"


@pytest.mark.parametrize("to", ["trtllm", "megatron"])
def test_a_program_that_has_no_such_factors_is_no_target(to, tmp_path):
    saved(MODELS["every factor"], tmp_path / "hf")
    with pytest.raises(CarnetError):
        carnet.cross(tmp_path / "hf", tmp_path / "out", to=to)
