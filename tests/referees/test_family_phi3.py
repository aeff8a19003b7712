"""Phi-3: transformers runs what carnet wrote; joined projections keep their order."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3Config

import carnet
from carnet.errors import BadCheckpoint, NotSupported
from tests.referees.sizes import DENSE

pytestmark = pytest.mark.referee

SIZES = {**DENSE, "hidden_size": 48}
WIDE = {"head_dim": 20}  # the class has no such key, the model reads it


def stretched(frequencies, original=16, **more):
    """Return what a config says of each frequency stretched by a factor of its own, in texts longer than ``original`` by others."""
    short, long = ([1.0 + step * each for each in range(frequencies)] for step in (0.125, 1.0800000429153442))
    lists = {"rope_type": "longrope", "type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    return {"rope_parameters": {**lists, **more}, "original_max_position_embeddings": original}


MODELS = {
    "plain": Phi3Config(**SIZES),
    "every head its own keys, tied": Phi3Config(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "a window": Phi3Config(**SIZES, sliding_window=8),
    "heads wider than the width's share": Phi3Config(**SIZES, **WIDE),
    "a head rotated in part": Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    ),
    # a text of 32 tokens is a longer one than those of 16, and none than those of 40
    "stretched, longer texts": Phi3Config(**SIZES, **stretched(6)),
    "stretched, short texts": Phi3Config(**SIZES, **stretched(6, original=40)),
    "stretched, another factor": Phi3Config(**SIZES, **stretched(6, attention_factor=0.75)),
    "stretched, as much as is said": Phi3Config(**SIZES, **stretched(6, factor=4.0)),
    "a part of a head stretched, tied": Phi3Config(
        **{**SIZES, "hidden_size": 64}, **stretched(6, partial_rotary_factor=0.75), tie_word_embeddings=True
    ),
}
OTHERWISE = {
    # this key, read, becomes one of rope_parameters, which stays
    "a head rotated in part": {"partial_rotary_factor"},
    "a part of a head stretched, tied": {"partial_rotary_factor"},
    "stretched, as much as is said": {"rope_parameters"},  # as what that makes of cosines and sines
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, dtype, there_and_again):
    there_and_again(MODELS[which], dtype=dtype, spelled_otherwise=OTHERWISE.get(which, ()))


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


STRETCHED = [which for which in MODELS if "stretched" in which]


@pytest.mark.parametrize("which", STRETCHED)
def test_a_model_comes_back_from_megatron_whose_arguments_do_not_say_how_it_is_stretched(which, there_and_again):
    there_and_again(
        MODELS[which], {"to": "megatron", "tp": 2, "pp": 2, "accept": ["needs"]}, spelled_otherwise=OTHERWISE.get(which, ())
    )


LISTS = {"short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25], "long_factor": [1.08, 1.11, 1.14, 1.34, 1.59, 1.6]}
# as the hub has them: Phi-3.5-mini, a revision of Phi-3-mini-128k, Phi-4-mini
PUBLISHED = {
    "Phi-3.5": {"rope_scaling": {**LISTS, "type": "longrope"}},
    "Phi-3": {"rope_scaling": {**LISTS, "type": "su"}},
    "Phi-4": {
        "rope_scaling": {**LISTS, "type": "longrope"},
        "partial_rotary_factor": 0.75,
        "lm_head_bias": False,
        "mlp_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
}


@pytest.mark.parametrize("which", PUBLISHED)
def test_a_config_as_the_hub_has_it_is_read_and_written_whole(which, saved, loaded, tmp_path):
    said = PUBLISHED[which]
    hidden = 64 if "partial_rotary_factor" in said else 48
    folder = saved(Phi3Config(**{**SIZES, "hidden_size": hidden}, original_max_position_embeddings=16))
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": None, "rope_theta": 10000.0, **said}
    (folder / "config.json").write_text(json.dumps(config))
    assert carnet.cross(folder, tmp_path / "again", to="hf").equal
    found = json.loads((tmp_path / "again/config.json").read_text())
    assert found["rope_scaling"] == {**said["rope_scaling"], "type": "longrope"}
    assert found["original_max_position_embeddings"] == 16
    assert found.get("partial_rotary_factor") == said.get("partial_rotary_factor")
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(5))
    # transformers 5 reads the older word no more
    config["rope_scaling"]["type"] = "longrope"
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        ours, theirs = (loaded(each)(tokens, use_cache=False).logits for each in (tmp_path / "again", folder))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("which", "right"), [("short_factor", True), ("long_factor", True), ("rope_theta", False)])
def test_frequencies_that_a_folder_holds_are_stretched_by_one_of_the_lists(which, right, saved, tmp_path):
    assert carnet.cross(saved(MODELS["stretched, longer texts"]), tmp_path / "again", to="hf").equal
    found, factor = load_file(tmp_path / "again/model.safetensors"), stretched(6)["rope_parameters"][which]
    plain = 10000.0 ** -(torch.arange(0, 12, 2).float() / 12)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = plain / torch.tensor(factor)
    save_file(found, tmp_path / "again/model.safetensors", {"format": "pt"})
    (tmp_path / "again/carnet.json").unlink()
    assert carnet.verify(tmp_path / "hf", tmp_path / "again").equal == right


SHORT = stretched(5)
REFUSED = [
    ({"lm_head_bias": True}, NotSupported, "lm_head_bias"),
    ({"attention_bias": True}, NotSupported, "attention_bias"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, NotSupported, "rope_type"),
    (SHORT, BadCheckpoint, "short_factor"),
    (
        {**SHORT, "rope_parameters": {**SHORT["rope_parameters"], "short_factor": [1.0] * 5 + [0]}},
        BadCheckpoint,
        "short_factor",
    ),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 6}}, BadCheckpoint, "long_factor"),
    # transformers takes the outer one, or 4096 where there is none
    (
        {"rope_parameters": {**stretched(6)["rope_parameters"], "original_max_position_embeddings": 16}},
        NotSupported,
        "original_max_position_embeddings",
    ),
]


@pytest.mark.parametrize(("values", "error", "named"), REFUSED)
def test_what_carnet_cannot_carry_over_is_refused(values, error, named, saved, tmp_path):
    folder = saved(MODELS["plain"])
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=named):
        carnet.cross(folder, tmp_path / "again", to="hf")
