"""Three versions of a small model as transformers writes them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.deltas.hand import adler32, frame, tensors


@dataclass(frozen=True)
class Versions:
    """The folders of a model's versions."""

    a: Path
    b: Path  # some weights of it are other ones; two shards
    c: Path


@pytest.fixture(scope="session")
def versions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).to(torch.bfloat16)
    model.save_pretrained(folder / "a")
    for name, share, shards in (("b", 0.03, "40KB"), ("c", 0.05, "5GB")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[(torch.rand(parameter.shape) < share) & (parameter != 1)] *= 1.01  # norms stay as they are
        model.save_pretrained(folder / name, max_shard_size=shards)
    return Versions(*(folder / name for name in "abc"))


@pytest.fixture
def said(versions):
    """The frames and checksums from a to b, by hand."""
    old, new = tensors(versions.a), tensors(versions.b)
    changed = sorted(name for name in old if old[name] != new[name])
    return {n: frame(old[n][2], new[n][2]) for n in changed}, {n: adler32(new[n][2]) for n in changed}
