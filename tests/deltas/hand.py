"""Deltas written from the description of their form alone, and folders as safetensors reads them."""

import json
import struct
import zlib
from pathlib import Path

import torch
import zstandard
from safetensors import safe_open

INDEX, SHARD = "model.safetensors.index.json", "model-00000-of-00001.safetensors"


def tensors(folder):
    """Return the bytes of every tensor of a folder, with its type and shape, as safetensors reads them."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                value = file.get_tensor(name)
                found[name] = str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def adler32(data):
    return f"{zlib.adler32(data):08x}"


def frame(old, new):
    """Return the frame of a tensor as slime and ModelExpress make it."""
    return zstandard.ZstdCompressor(level=1).compress(bytes(a ^ b for a, b in zip(old, new, strict=True)))


def by_hand(folder, frames, checksums, version="000001", base_version="000000", **said):
    """Write a delta from the description of its form alone."""
    folder.mkdir(parents=True)
    header, at = {"__metadata__": checksums}, 0
    for name, data in frames.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at := at + len(data)]}
    raw = json.dumps(header).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(frames.values()))
    metadata = {
        "version": version,
        "base_version": base_version,
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    index = {"metadata": {**metadata, **said}, "weight_map": dict.fromkeys(frames, SHARD)}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def change(path, **changes):
    """Change the metadata of an index; None takes a key away."""
    index = json.loads((path / INDEX).read_text())
    index["metadata"] = {key: value for key, value in {**index["metadata"], **changes}.items() if value is not None}
    (path / INDEX).write_text(json.dumps(index))
