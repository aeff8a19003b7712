"""Folders of safetensors: Hugging Face's and TensorRT-LLM's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from carnet.formats.detect import open_checkpoint
from carnet.formats.stored import dense_strides

GOLDENS = Path(__file__).parents[1] / "goldens/trtllm"
HF = sorted(path.parent for path in GOLDENS.glob("*/hf/config.json"))
ENGINES = sorted(path.parent for path in GOLDENS.glob("*/trtllm-*/config.json"))


@pytest.mark.parametrize("folder", HF, ids=lambda path: path.parent.name)
def test_a_hugging_face_folder_holds_what_the_real_library_finds(folder):
    checkpoint = open_checkpoint(folder)
    real = load_file(folder / "model.safetensors")
    assert checkpoint.dialect == "hf"
    assert {key: tensor.shape for key, tensor in checkpoint.tensors.items()} == {
        ("", name): tuple(tensor.shape) for name, tensor in real.items()
    }
    assert checkpoint.config == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("folder", ENGINES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_tensorrt_llm_folder_holds_every_tensor_of_every_rank(folder):
    checkpoint = open_checkpoint(folder)
    expected = {
        (f"rank{rank}", name): tuple(tensor.shape)
        for rank in range(len(list(folder.glob("rank*.safetensors"))))
        for name, tensor in load_file(folder / f"rank{rank}.safetensors").items()
    }
    assert checkpoint.dialect == "trtllm"
    assert {key: tensor.shape for key, tensor in checkpoint.tensors.items()} == expected
    assert all(tensor.chunks[0].strides == dense_strides(tensor.shape) for tensor in checkpoint.tensors.values())


def folder_of(root: Path, files: dict[str, dict[str, torch.Tensor]], index: bool) -> Path:
    for name, tensors in files.items():
        save_file(tensors, root / name)
    (root / "config.json").write_text('{"model_type": "llama"}')
    if index:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("model-00001.safetensors", "model-00002.safetensors"),
        ("model-00000.safetensors", "model-00001.safetensors"),
    ],
)
def test_shards_are_read_with_and_without_an_index(tmp_path, names, index):
    first, second = names
    checkpoint = open_checkpoint(folder_of(tmp_path, {first: {"a": torch.ones(2)}, second: {"b": torch.ones(3)}}, index))
    assert {name: tensor.chunks[0].file for (_, name), tensor in checkpoint.tensors.items()} == {"a": first, "b": second}


def test_an_index_may_give_its_shards_any_plain_name(tmp_path):
    checkpoint = open_checkpoint(folder_of(tmp_path, {"left.safetensors": {"a": torch.ones(2)}}, index=True))
    assert checkpoint.tensors["", "a"].chunks[0].file == "left.safetensors"


def test_other_safetensors_in_the_folder_are_no_part_of_the_model_and_are_said(tmp_path):
    root = folder_of(tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, index=False)
    save_file({"b": torch.ones(2)}, root / "consolidated.safetensors")
    checkpoint = open_checkpoint(root)
    assert set(checkpoint.tensors) == {("", "a")}
    assert checkpoint.notes["not part of the model"] == "consolidated.safetensors"
