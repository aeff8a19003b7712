"""What a person reads of a verdict: a few findings of each kind and how many there are, in words that need no manual."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import carnet
from carnet.cli import main
from carnet.errors import BadCheckpoint, BadRequest, CarnetError

GOLDENS = Path(__file__).parent / "goldens/megatron"
LLAMA = GOLDENS / "llama_te_pp2_vpp"


@pytest.fixture
def target(tmp_path):
    assert carnet.cross(LLAMA, tmp_path / "target", to="hf").equal
    (tmp_path / "target/carnet.json").unlink()
    return tmp_path / "target"


def said(*words):
    result = CliRunner().invoke(main, ["verify", *map(str, words)])
    assert result.exit_code == 3, result.output
    return result.stdout.splitlines()


def test_of_many_findings_a_person_reads_the_kinds_and_a_few_and_a_machine_all(target):
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(target / "model.safetensors").items()}
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    lines = said(LLAMA, target)
    findings = json.loads("\n".join(said(LLAMA, target, "--json")))["findings"]
    assert len(findings) > 30
    assert lines[0].split() == ["different", str(target), "is", "not", str(LLAMA)]
    assert lines[1] == f"findings           {len(findings)}: {len(findings) - 1} elements differ, 1 missing"
    assert "39 of 39 tensors differ: it is not a copy of this source" in lines[2]
    assert lines[-1] == f"and {len(findings) - 10} more: --json lists them all"
    assert len(lines) == 3 + 2 + 10 + 1
    assert all(any(kind in line for line in lines[5:15]) for kind in ("missing", "elements differ"))


def test_one_damage_is_no_other_model_and_is_told_whole(target):
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][0] = 9
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    lines = said(LLAMA, target)
    assert not any("another model" in line or "findings" in line or "--json" in line for line in lines)
    assert len(lines) == 4


def test_a_target_without_its_document_is_told_in_plain_words(target):
    with pytest.raises(BadRequest) as caught:
        carnet.verify(target)
    assert str(caught.value).splitlines()[0] == ("carnet.json is missing, so a target alone has nothing to be compared with")
    assert "carnet verify CKPT OUT" in caught.value.remedy
    made = carnet.plan(LLAMA, to="hf")
    carnet.run(made, target.parent / "unproven")
    with pytest.raises(BadRequest, match="nobody has compared the folder with its source"):
        carnet.verify(target.parent / "unproven")


def refusal(folder):
    with pytest.raises(CarnetError) as caught:
        carnet.plan(folder, to="megatron")
    return caught.value


def renamed(target, name):
    tensors = load_file(target / "model.safetensors")
    save_file(
        {name(old): tensor for old, tensor in tensors.items() if name(old)}, target / "model.safetensors", {"format": "pt"}
    )


def test_a_head_that_is_not_there_is_looked_for_under_its_name(target):
    renamed(target, lambda name: "" if name == "lm_head.weight" else name)
    assert refusal(target).facts["looked for"] == "lm_head.weight"


def test_the_text_model_of_a_larger_one_is_called_so(target):
    renamed(target, lambda name: f"language_model.{name}")
    error = refusal(target)
    assert error.facts["looks like"] == "the text model inside one that also sees or hears"
    assert "language_model.save_pretrained" in error.remedy


def test_tensors_of_which_only_some_are_norms_are_not_called_norms(target):
    renamed(target, lambda name: f"strange.{name}")
    assert "looks like" not in refusal(target).facts


@pytest.mark.parametrize("names", ["text", {"a": 1}, 7])
def test_architectures_that_are_no_list_are_called_so(target, names):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "architectures": names}))
    error = refusal(target)
    assert isinstance(error, BadCheckpoint)
    assert error.what == "the config's 'architectures' is not a list"
    assert Path(error.facts["where"]) == target


@pytest.mark.parametrize("name", ["llama_te_pp2_vpp", "mixtral_ep2"])
@pytest.mark.parametrize("spelling", ["te", "local"])
def test_whose_modules_a_target_has_is_read_off_it_and_need_not_be_said(tmp_path, name, spelling):
    assert carnet.cross(GOLDENS / name, tmp_path / "hf", to="hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "out", to="megatron", spelling=spelling)
    verdict = carnet.verify(tmp_path / "hf", tmp_path / "out")
    assert verdict, verdict.findings
    assert ("--transformer-impl local" in verdict.needs["say"]) == (spelling == "local")
