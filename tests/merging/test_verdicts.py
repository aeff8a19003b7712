"""What is wrong with a sum is found, and checkpoints that have none are refused by name."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import carnet
from carnet import merging
from carnet.cli import main
from tests.merging.conftest import WEIGHTS


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """A proven sum."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert merging.merge(runs.hf, out, WEIGHTS)
    return out


def changed(folder, tmp_path, change, name="out"):
    """Return a copy of a folder with other tensors."""
    out = tmp_path / name
    shutil.copytree(folder, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return out


def one_ulp(tensors):
    value = tensors["model.layers.1.mlp.up_proj.weight"]
    value.view(torch.int16)[3, 5] += 1


def exchanged(tensors):
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(2)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def rounded_twice(tensors):
    for name, value in tensors.items():
        tensors[name] = (value.float() * 1.0039).to(torch.bfloat16)


@pytest.mark.parametrize("damage", [one_ulp, exchanged, rounded_twice])
@pytest.mark.parametrize("alone", [True, False])
def test_a_weight_that_is_no_sum_is_found(runs, made, tmp_path, damage, alone):
    out = changed(made, tmp_path, damage)
    verdict = carnet.verify(out) if alone else merging.verify(runs.hf, out, WEIGHTS)
    assert not verdict
    assert any(finding.stored == "model.layers.1.mlp.up_proj.weight" for finding in verdict.findings)
    if damage is one_ulp:
        assert len({finding.stored for finding in verdict.findings}) == 1


def test_weights_sources_and_methods_are_not_exchanged_unseen(runs, made):
    a, b, c = runs.hf
    assert merging.verify(runs.hf, made, WEIGHTS)
    assert merging.verify([*runs.hf[:2], runs.other[2]], made, WEIGHTS, vocab_size=96)
    assert not merging.verify(runs.hf, made, (0.3, 0.5, 0.2))
    assert not merging.verify(runs.hf, made, (0.5, 0.3, 0.2000001))
    assert not merging.verify([a, c, b], made, WEIGHTS)
    assert not merging.verify([a, b, b], made, WEIGHTS)
    assert not merging.verify(runs.hf, made, WEIGHTS[1:], method="task_arithmetic")
    assert not merging.verify(runs.hf, made, WEIGHTS, keep="*norm*")
    assert not carnet.verify(a, made)


def test_a_sum_that_was_made_in_bf16_is_found(runs, tmp_path):
    """As who adds up tensors as they are stored does."""
    sides = [
        {name: value for path in each.glob("*.safetensors") for name, value in load_file(path).items()} for each in runs.hf
    ]

    def rough(tensors):
        for name in tensors:
            tensors[name] = sum(side[name] * weight for side, weight in zip(sides, WEIGHTS, strict=True))

    assert not merging.verify(runs.hf, changed(runs.hf[0], tmp_path, rough), WEIGHTS)


def test_a_document_that_tells_of_another_sum_is_found(runs, made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    merging.merge(runs.hf[::-1], tmp_path / "other", WEIGHTS[::-1])
    (out / "carnet.json").write_bytes((tmp_path / "other" / "carnet.json").read_bytes())
    assert {finding.where for finding in merging.verify(runs.hf, out, WEIGHTS).findings} >= {"merge.weights"}


def config(folder, **more):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **more}))


def lacking(runs, tmp_path):
    out = changed(runs.hf[0], tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "b")
    return [runs.hf[0], out], {}, "layers.1.mlp.up"


def another(runs, tmp_path):
    out = tmp_path / "b"
    shutil.copytree(runs.hf[0], out)
    config(out, rope_theta=50000.0, rope_parameters={"rope_theta": 50000.0, "rope_type": "default"})
    return [runs.hf[0], out], {}, "rope_theta differs"


def quantized(runs, tmp_path):
    carnet.cross(runs.hf[0], tmp_path / "b", to="hf", quantize="fp8-channel", style="compressed-tensors")
    return [runs.hf[1], tmp_path / "b"], {}, "codes"


def to_quantize(runs, tmp_path):
    return runs.hf[:2], {"quantize": "fp8"}, "merge first, then quantize"


def with_optimizer(runs, tmp_path):
    return runs.hf[:2], {"to": "megatron", "also": "optimizer"}, "a sum is of weights"


def with_adapters(runs, tmp_path):
    return runs.hf[:2], {"adapter": "own"}, "add the adapters first"


def idle(runs, tmp_path):
    return runs.hf[:2], {"keep": "*router*"}, "names no tensor"


def few(runs, tmp_path):
    return runs.hf, {}, "as many weights as checkpoints"


def strange(runs, tmp_path):
    return runs.hf[:2], {"method": "ties"}, "method cannot be"


CASES = (lacking, another, quantized, to_quantize, with_optimizer, with_adapters, idle, few, strange)


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_sum_is_refused_by_name(runs, tmp_path, case):
    sources, options, word = case(runs, tmp_path)
    with pytest.raises((carnet.CarnetError, carnet.BadOption)) as refused:
        merging.merge(sources, tmp_path / "out", [0.5, 0.5], **options)
    assert word in str(refused.value)
    assert not [*tmp_path.glob("out*")]


def test_a_sum_beyond_the_range_of_a_type_is_refused(runs, tmp_path):
    with pytest.raises(carnet.BadRequest, match="out of range for f16"):
        merging.merge(runs.hf[:2], tmp_path / "out", [1e6, 1e6], dtype="f16")
    assert not [*tmp_path.glob("out*")]


def test_codes_are_summed_as_the_numbers_that_they_are(runs, tmp_path):
    carnet.cross(runs.hf[0], tmp_path / "codes", to="hf", quantize="fp8-channel", style="compressed-tensors")
    carnet.cross(tmp_path / "codes", tmp_path / "plain", to="hf", dtype="f32")
    for name, first in (("one", "codes"), ("other", "plain")):
        assert merging.merge([tmp_path / first, runs.hf[1]], tmp_path / name, [0.5, 0.5], dtype="bf16")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_the_command_verifies_what_it_merged(runs, tmp_path):
    words = [*map(str, runs.hf), str(tmp_path / "out")]
    run = CliRunner().invoke
    assert run(main, ["merge", *words, "--weights", "0.5,0.3,0.2"]).exit_code == 0
    assert run(main, ["verify", *words, "--weights", "0.5,0.3,0.2"]).exit_code == 0
    assert run(main, ["verify", *words, "--weights", "0.5,0.2,0.3"]).exit_code == 3
    for odd in (
        ["verify", *words],
        ["verify", words[0], words[3], "--weights", "1"],
        ["merge", *words],
        ["merge", *words, "--weights", "a,b"],
    ):
        found = run(main, odd)
        assert found.exit_code == 2, odd
        assert "0.5,0.3,0.2" in found.output or "0.5,0.5" in found.output or "CKPT CKPT" in found.output
