"""FP8 with one scale a matrix, as Ministral 3 and Devstral 2 are published: read as transformers reads it, and carried over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Mistral3ForConditionalGeneration

import carnet
from carnet.errors import BadCheckpoint, NotSupported
from tests.referees import towers

pytestmark = pytest.mark.referee

NAME = "Mistral3ForConditionalGeneration, Ministral 3"
RECORD = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}


@pytest.fixture(params=["static", "dynamic"])
def coded(request, tmp_path):
    """Return the folder of a model whose text is coded as it is published."""
    folder = towers.save(NAME, tmp_path / "coded", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "language_model" in name and name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = (weight.abs().max() / 448).to(torch.bfloat16)
        tensors[name] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        if request.param == "static":
            tensors[name.replace("weight", "activation_scale")] = torch.rand((), dtype=torch.float32).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = RECORD | {"activation_scheme": request.param}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_its_weights_are_those_that_transformers_makes(coded, tmp_path):
    assert carnet.cross(coded, tmp_path / "plain", to="hf", dtype="bf16").equal
    theirs = Mistral3ForConditionalGeneration.from_pretrained(
        coded, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_its_codes_go_along_to_another_folder_and_their_weights_to_megatron(coded, tmp_path):
    assert carnet.cross(coded, tmp_path / "same", to="hf").equal
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "same", coded))
    assert found.keys() == expected.keys()
    assert [
        name for name in found if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])
    ] == []
    records = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (tmp_path / "same", coded)]
    assert records[0] == records[1]
    assert carnet.cross(coded, tmp_path / "megatron", to="megatron", tp=2, dtype="bf16", accept=["needs"]).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    carnet.cross(coded, tmp_path / "plain", to="hf", dtype="bf16")
    assert carnet.verify(tmp_path / "plain", tmp_path / "back").equal


def test_a_wrong_scale_is_found_and_a_missing_one_named(coded, tmp_path):
    carnet.cross(coded, tmp_path / "plain", to="hf", dtype="bf16")
    tensors = load_file(coded / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    assert not carnet.verify(coded, tmp_path / "plain", dtype="bf16").equal
    del tensors[name]
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=f"the scale '{name}' is missing"):
        carnet.plan(coded, to="hf", dtype="bf16")


def code(tensors, name):
    """Code a further matrix, as those of the text are."""
    scale = (tensors[name].float().abs().max() / 448).to(torch.bfloat16)
    tensors[name] = (tensors[name].float() / scale.float()).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = scale


def test_codes_beside_the_text_go_along_or_are_refused(coded, tmp_path):
    """Without a config that says them they would be read as weights."""
    carnet.cross(coded, tmp_path / "plain", to="hf", dtype="bf16")
    for folder in (coded, tmp_path / "plain"):
        tensors = load_file(folder / "model.safetensors")
        code(tensors, next(name for name in tensors if "vision_tower" in name and name.endswith("q_proj.weight")))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert carnet.cross(coded, tmp_path / "same", to="hf").equal
    for to in ("hf", "megatron"):
        with pytest.raises(NotSupported, match="no codes beside the text model"):
            carnet.plan(coded, to=to, dtype="bf16", accept=["needs"])
    tensors = load_file(tmp_path / "plain/model.safetensors")
    wide = {
        name: tensor.to(torch.float8_e5m2 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype)
        for name, tensor in tensors.items()
    }
    (tmp_path / "wide").mkdir()
    save_file(wide, tmp_path / "wide/model.safetensors", metadata={"format": "pt"})
    shutil.copy(tmp_path / "plain/config.json", tmp_path / "wide")
    with pytest.raises(NotSupported, match="no codes beside the text model"):
        carnet.plan(tmp_path / "wide", to="hf")
    found = carnet.verify(coded, tmp_path / "plain", dtype="bf16").findings
    assert any("no codes beside" in f"{each}" for each in found)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_coded_head_and_a_coded_embedding_have_scales_of_their_own(coded, tmp_path, name):
    tensors = load_file(coded / "model.safetensors")
    if not name.startswith("language_model"):  # as transformers has called them since
        tensors = {key.replace("language_model.model.", "model.language_model."): each for key, each in tensors.items()}
    embedding = next(name for name in tensors if "embed_tokens" in name)
    tensors[name] = tensors[embedding].flip(0).contiguous()
    code(tensors, name)
    code(tensors, embedding)
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["quantization_config"]["modules_to_not_convert"].remove("lm_head")
    (coded / "config.json").write_text(json.dumps(config))
    assert carnet.cross(coded, tmp_path / "same", to="hf").equal
    assert carnet.cross(coded, tmp_path / "plain", to="hf", dtype="bf16").equal
    head = load_file(tmp_path / "plain/model.safetensors")[name]
    assert torch.equal(head, (tensors[name].float() * tensors[f"{name}_scale_inv"].float()).to(torch.bfloat16))
