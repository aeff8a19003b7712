"""Phi-3: transformers runs what carnet wrote; joined projections keep their order."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

import carnet
from carnet.errors import NotSupported

pytestmark = pytest.mark.referee

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
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
# which program wrote a config and where it lies
VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype"}
# of positions that are stretched; this key, read, becomes one of rope_parameters, which stays
MEANS_NOTHING = {"original_max_position_embeddings", "partial_rotary_factor"}


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
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in VOLATILE | MEANS_NOTHING}


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


def test_the_parts_of_a_joined_projection_are_exchanged_no_part_unseen(tmp_path):
    """The examiner knows the order: query, key, value; gate, up."""
    saved(MODELS["plain"], tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf").equal
    from safetensors.torch import save_file

    found = weights(tmp_path / "again")
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
def test_what_carnet_cannot_carry_over_is_refused(values, tmp_path):
    saved(MODELS["plain"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | values
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(NotSupported):
        carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf")
