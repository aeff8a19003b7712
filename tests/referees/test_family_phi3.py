"""Phi-3: transformers runs what carnet wrote; joined projections keep their order."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3Config

import carnet
from carnet.errors import NotSupported
from tests.referees.sizes import DENSE

pytestmark = pytest.mark.referee

SIZES = {**DENSE, "hidden_size": 48}
WIDE = {"head_dim": 20}  # the class has no such key, the model reads it
MODELS = {
    "plain": Phi3Config(**SIZES),
    "every head its own keys, tied": Phi3Config(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "a window": Phi3Config(**SIZES, sliding_window=8),
    "heads wider than the width's share": Phi3Config(**SIZES, **WIDE),
    "a head rotated in part": Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, dtype, there_and_again):
    # this key, read, becomes one of rope_parameters, which stays
    otherwise = {"partial_rotary_factor"} if which == "a head rotated in part" else set()
    there_and_again(MODELS[which], dtype=dtype, spelled_otherwise=otherwise)


def test_the_parts_of_a_joined_projection_are_exchanged_no_part_unseen(saved, tmp_path):
    """The examiner knows the order: query, key, value; gate, up."""
    assert carnet.cross(saved(MODELS["plain"]), tmp_path / "again", to="hf").equal
    found = load_file(tmp_path / "again/model.safetensors")
    name = "model.layers.3.mlp.gate_up_proj.weight"
    found[name] = torch.cat([*found[name].chunk(2)][::-1]).contiguous()
    save_file(found, tmp_path / "again/model.safetensors", {"format": "pt"})
    findings = carnet.verify(tmp_path / "hf", tmp_path / "again").findings
    assert {(finding.where, finding.what) for finding in findings} == {
        ("layers.3.mlp.gate", "holds layers.3.mlp.up"),
        ("layers.3.mlp.up", "holds layers.3.mlp.gate"),
    }


LONG = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
REFUSED = ({"rope_parameters": None, "rope_scaling": LONG}, {"lm_head_bias": True}, {"attention_bias": True})


@pytest.mark.parametrize("values", REFUSED, ids=["longrope", "lm_head_bias", "attention_bias"])
def test_what_carnet_cannot_carry_over_is_refused(values, saved, tmp_path):
    folder = saved(MODELS["plain"])
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotSupported):
        carnet.cross(folder, tmp_path / "again", to="hf")
