"""One small model in several checkpoints, and what their sums are, by torch alone."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import carnet

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
WEIGHTS = (0.5, 0.3, 0.2)


def tensors(folder):
    """Return the tensors of a folder, as safetensors reads them."""
    return {name: value for path in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(path).items()}


def linear(folders, weights, dtype=None):
    """Return the sums of folders as ``merge`` is defined, in torch."""
    found = {}
    sides = [tensors(folder) for folder in folders]
    for name, value in sides[0].items():
        total = torch.zeros(value.shape)
        for side, weight in zip(sides, weights, strict=True):
            total = total + side[name].float() * torch.tensor(weight)
        found[name] = total.to(dtype or value.dtype)
    return found


def differences(folders, weights):
    """Return a base and what others differ from it, in torch."""
    base, *others = map(tensors, folders)
    found = {}
    for name, value in base.items():
        total = torch.zeros(value.shape)
        for side, weight in zip(others, weights, strict=True):
            total = total + (side[name].float() - value.float()) * torch.tensor(weight)
        found[name] = (value.float() + total).to(value.dtype)
    return found


def same(one, other):
    """Say whether two models have the same bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@dataclass(frozen=True)
class Runs:
    """Three checkpoints of one model, each as a Hugging Face folder and in another layout."""

    hf: tuple[Path, ...]  # the second in shards
    other: tuple[Path, ...]  # a Megatron store, ranks of TensorRT-LLM, another store


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate("abc"):
        torch.manual_seed(number)
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name, max_shard_size="40KB" if name == "b" else "5GB")
    carnet.cross(folder / "a", folder / "a-megatron", to="megatron", tp=2)
    carnet.cross(folder / "b", folder / "b-trtllm", to="trtllm", tp=2, pp=2)
    carnet.cross(folder / "c", folder / "c-megatron", to="megatron", pp=2, spelling="local")
    return Runs(
        tuple(folder / name for name in "abc"), tuple(folder / name for name in ("a-megatron", "b-trtllm", "c-megatron"))
    )
