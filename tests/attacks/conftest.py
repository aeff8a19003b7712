"""Small honest checkpoints, written by the real libraries, for the attacks to damage."""

import argparse
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex


class Evil:
    """Runs a command when a trusting reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@dataclass
class Damaged:
    """A Megatron iteration's folder whose parts a test can replace."""

    root: Path
    marker: Path  # appears if anything was executed

    def edit(self, change: Callable[[Metadata], object]) -> None:
        """Change what .metadata says, by the real classes."""
        path = self.root / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata, protocol=4))

    def index(self, name: str) -> MetadataIndex:
        """Return the first index of a tensor or object."""
        metadata = pickle.loads((self.root / ".metadata").read_bytes())
        return next(index for index in metadata.storage_data if index.fqn == name)

    def item(self, name: str) -> bytes:
        """Return the bytes of an item."""
        info = pickle.loads((self.root / ".metadata").read_bytes()).storage_data[self.index(name)]
        return (self.root / info.relative_path).read_bytes()[info.offset : info.offset + info.length]

    def replace_item(self, name: str, data: bytes) -> None:
        """Put other bytes where the item of a tensor or object was: at the end of its file."""
        index = self.index(name)

        def change(metadata: Metadata) -> None:
            info = metadata.storage_data[index]
            with (self.root / info.relative_path).open("ab") as file:
                metadata.storage_data[index] = replace(info, offset=file.tell(), length=len(data))
                file.write(data)

        self.edit(change)


@pytest.fixture
def marker(tmp_path):
    """A path that nothing may create."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists(), "something was executed"


@pytest.fixture
def megatron(tmp_path, marker) -> Damaged:
    """A tiny torch_dist checkpoint in the form of megatron-core 0.16."""
    root = tmp_path / "model" / "iter_0000003"
    state = {
        "decoder.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "decoder.bias": torch.ones(3),
        "optimizer.state.exp_avg.decoder.bias": torch.ones(3),
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root, single_file_per_rank=True), no_dist=True)
    (root / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"args": argparse.Namespace(num_layers=1), "iteration": 3}, root / "common.pt")
    (root.parent / "latest_checkpointed_iteration.txt").write_text("3")
    return Damaged(root, marker)


@pytest.fixture
def hf(tmp_path) -> Path:
    """A tiny Hugging Face folder of one file."""
    root = tmp_path / "hf"
    root.mkdir()
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, root / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 4}))
    return root


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """Return a file with any header, honest or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture
def forge() -> Callable[..., bytes]:
    """The builder of safetensors files."""
    return safetensors_bytes


@pytest.fixture
def evil(marker) -> Evil:
    """An object that runs a command when a trusting reader unpickles it."""
    return Evil(marker)
