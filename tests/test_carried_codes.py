"""Codes go along as they are from one Hugging Face folder to another, byte for byte, with what the configs say of them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.inventory.survey import take
from carnet.planner.carrying import carried
from carnet.storage.schemes import folder_at
from tests.test_published_mxfp4 import MODEL, UP, published  # noqa: F401  a fixture
from tests.test_quantized_mutations import DOWN, KEY, TARGETS, proven, source  # noqa: F401  fixtures

KINDS = [name for name, options in TARGETS.items() if options["to"] == "hf"]
RECORDS = ("quantization_config", "hf_quant_config.json")


def stored(folder):
    """Return every tensor of a folder, its bytes as integers."""
    files = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist())
        for f in files
        for name, tensor in f.items()
    }


def records(folder):
    beside = folder / RECORDS[1]
    return json.loads((folder / "config.json").read_text())[RECORDS[0]], beside.exists() and json.loads(beside.read_text())


@pytest.fixture
def coded(request, proven, published, tmp_path):  # noqa: F811
    """Return a folder of codes, by name."""
    return published if request.param == "published" else proven(request.param, tmp_path)[1]


@pytest.mark.parametrize("coded", [*KINDS, "published"], indirect=True)
def test_every_tensor_and_every_word_of_codes_is_the_source_s(coded, tmp_path):
    verdict = carnet.cross(coded, tmp_path / "out", to="hf", shard_size=100_000)
    assert verdict.equal
    assert not verdict.unexamined
    assert stored(tmp_path / "out") == stored(coded)
    assert records(tmp_path / "out") == records(coded)
    plan = carnet.plan(coded, to="hf")
    assert "scales of activations and of the cache" not in plan.dropped
    assert plan.proof["source bytes"] == sum(len(each[2]) for each in stored(coded).values())


def damaged(folder, name, damage):
    tensors = load_file(folder / MODEL)
    damage(tensors, name)
    save_file(tensors, folder / MODEL, {"format": "pt"})


def flip(tensors, name):
    tensors[name].reshape(-1).view(torch.uint8)[-1:] ^= 1


def lose(tensors, name):
    del tensors[name]


DAMAGES = [
    ("fp8", f"{DOWN}.weight", flip),
    ("fp8", f"{DOWN}.weight_scale", flip),
    ("fp8", f"{DOWN}.input_scale", flip),
    ("fp8", f"{DOWN}.input_scale", lose),
    ("fp8", f"{KEY}.k_scale", flip),
    ("nvfp4", f"{DOWN}.weight_scale_2", flip),
    ("ct fp8", f"{DOWN}.input_scale", flip),
    ("ct nvfp4", f"{DOWN}.weight_scale", flip),
    ("deepseek", f"{DOWN}.weight_scale_inv", flip),
    ("int4", f"{DOWN}.weight_shape", flip),
    ("published", f"{UP}_blocks", flip),
    ("published", f"{UP}_scales", flip),
]


@pytest.mark.parametrize(
    ("coded", "name", "damage"), DAMAGES, indirect=["coded"], ids=[f"{k} {d.__name__} {n}" for k, n, d in DAMAGES]
)
def test_what_changed_on_the_way_is_found(coded, name, damage, tmp_path):
    carnet.run(carnet.plan(coded, to="hf"), tmp_path / "out")
    assert carnet.verify(coded, tmp_path / "out").equal
    damaged(tmp_path / "out", name, damage)
    assert not carnet.verify(coded, tmp_path / "out").equal


@pytest.mark.parametrize("coded", ["fp8", "published"], indirect=True)
def test_a_config_that_says_nothing_of_the_codes_is_found(coded, tmp_path):
    carnet.run(carnet.plan(coded, to="hf"), tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    del said[RECORDS[0]]
    (tmp_path / "out/config.json").write_text(json.dumps(said))
    (tmp_path / "out" / RECORDS[1]).unlink(missing_ok=True)
    assert not carnet.verify(coded, tmp_path / "out").equal


@pytest.mark.parametrize("coded", ["deepseek"], indirect=True)
def test_what_others_published_in_other_forms_goes_along_too(coded, tmp_path):
    """Scales of another float type, and a plain weight that the config calls quantized."""
    other = tmp_path / "other"
    shutil.copytree(coded, other)
    (other / "carnet.json").unlink()
    tensors = load_file(other / MODEL)
    scale = tensors.pop(f"{DOWN}.weight_scale_inv")
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].bfloat16() * scale.max().bfloat16()
    for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, other / MODEL, {"format": "pt"})
    assert carnet.cross(other, tmp_path / "out", to="hf").equal
    assert stored(tmp_path / "out") == stored(other)


def test_codes_under_a_name_that_the_target_does_not_have_are_refused(published):  # noqa: F811
    inventory = take(open_checkpoint(folder_at(str(published))))
    with pytest.raises(NotSupported, match="another name in the target") as refused:
        carried(inventory, [])
    assert "--dtype bf16" in str(refused.value.remedy)
