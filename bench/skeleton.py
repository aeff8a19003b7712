"""Write a Hugging Face folder that is all headers: weights are holes in sparse files, and a trillion parameters take no room."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

SHARD = 4 << 30  # bytes of a file
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> element type as safetensors says it, shape


def write(folder: Path, tensors: Tensors, config: Mapping[str, object], shard: int = SHARD) -> None:
    """Write files of at most ``shard`` bytes (one tensor at least), their index and config.json into an empty folder."""
    shards = list(_shards(tensors, shard))
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, held in zip(names, shards, strict=True):
        _write_headers(folder / name, held)
    index = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    total = sum(map(nbytes, tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    """Return how many bytes a tensor takes."""
    dtype, shape = tensor
    return WIDTHS[dtype] * prod(shape)


def _shards(tensors: Tensors, most: int) -> Iterator[Tensors]:
    shard, filled = dict[str, tuple[str, tuple[int, ...]]](), 0
    for name, tensor in tensors.items():
        if shard and filled + nbytes(tensor) > most:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += nbytes(tensor)
    yield shard


def _write_headers(path: Path, tensors: Tensors) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + nbytes((dtype, shape))]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
