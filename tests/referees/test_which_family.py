"""Megatron's arguments name no family: each that carnet says a store could be computes the same, and no other is said."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import carnet
from carnet.cli import main
from carnet.errors import BadOption, BadRequest, NotSupported

pytestmark = pytest.mark.referee

GOLDENS = Path(__file__).parents[1] / "goldens"
LLAMA = GOLDENS / "megatron/llama_te_pp2_vpp"
TOKENS = torch.randint(250, (1, 16), generator=torch.Generator().manual_seed(2))
ARCHITECTURES = {
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS).logits


def test_every_family_that_is_named_computes_the_same(tmp_path):
    found = carnet.inspect(LLAMA).inventory
    assert (found.family.name, found.others) == (
        "llama",
        {"mistral": True, "granite": True, "phi3": False, "seed_oss": True, "smollm3": True},
    )
    for family, architecture in ARCHITECTURES.items():
        assert carnet.cross(LLAMA, tmp_path / family, to="hf", dtype="f32", family=family).equal
        assert json.loads((tmp_path / family / "config.json").read_text())["architectures"] == [architecture]
    first = logits(tmp_path / "llama")
    for family in found.others:
        torch.testing.assert_close(logits(tmp_path / family), first, rtol=0, atol=2e-5)


def test_the_same_tensors_are_the_same_files(tmp_path):
    for family in ARCHITECTURES:
        carnet.cross(LLAMA, tmp_path / family, to="hf", family=family)
    files = {family: (tmp_path / family / "model.safetensors").read_bytes() for family in ARCHITECTURES}
    assert {family for family, data in files.items() if data == files["llama"]} == files.keys() - {"phi3"}


def test_the_choice_is_said_by_inspect_plan_and_document(tmp_path):
    assert "could be" in CliRunner().invoke(main, ["inspect", str(LLAMA)]).output
    assert (
        carnet.plan(LLAMA, to="hf")
        .notes["could be"]
        .startswith("mistral, granite, seed_oss, smollm3 (the same tensors), phi3 (other tensors)")
    )
    assert "could be" not in carnet.plan(LLAMA, to="hf", family="llama").notes
    carnet.cross(LLAMA, tmp_path / "out", to="hf")
    said = json.loads((tmp_path / "out/carnet.json").read_text())
    assert (said["family"], said["families"]) == (
        "llama",
        {"mistral": True, "granite": True, "phi3": False, "seed_oss": True, "smollm3": True},
    )


def test_a_target_of_a_named_family_is_verified_as_that(tmp_path):
    out = tmp_path / "out"
    assert CliRunner().invoke(main, ["cross", str(LLAMA), str(out), "--to", "hf", "--as", "mistral"]).exit_code == 0
    assert CliRunner().invoke(main, ["verify", str(LLAMA), str(out), "--as", "mistral"]).exit_code == 0
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "llama4", "gpt_oss", "qwen2", "gemma"]
)
def test_a_family_that_it_cannot_be_is_refused(family):
    with pytest.raises(NotSupported, match=f"no model of the family '{family}'"):
        carnet.plan(LLAMA, to="hf", family=family)


def test_a_config_that_names_its_family_is_not_argued_with():
    with pytest.raises(BadRequest, match="names another family"):
        carnet.plan(GOLDENS / "trtllm/llama/hf", to="hf", family="mistral")
    assert carnet.plan(GOLDENS / "trtllm/llama/hf", to="hf", family="llama").family == "llama"


def test_a_family_that_there_is_not_is_a_wrong_option():
    with pytest.raises(BadOption, match="did you mean 'llama'"):
        carnet.plan(LLAMA, to="hf", family="lama")
