"""safetensors headers, against the real library both ways."""

import json
import math
import struct
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from carnet.dtypes import BY_NAME, DTYPES
from carnet.formats.safetensors import layout_file, read_header, render_header
from carnet.storage.schemes import folder_at

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = sorted(path.relative_to(GOLDENS).as_posix() for path in GOLDENS.glob("**/*.safetensors"))


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_where_the_real_library_finds_it(name):
    header = read_header(folder_at(GOLDENS), name)
    data = (GOLDENS / name).read_bytes()
    with safe_open(GOLDENS / name, "pt") as real:
        assert {entry.name for entry in header.tensors} == set(real.keys())
        assert dict(header.metadata) == (real.metadata() or {})
        for entry in header.tensors:
            tensor = real.get_tensor(entry.name)
            offset = entry.chunks[0].offset
            raw = data[offset : offset + entry.nbytes]
            assert entry.shape == tuple(tensor.shape)
            assert f"torch.{BY_NAME[entry.dtype].torch}" == str(tensor.dtype)
            assert raw == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_a_file_without_tensors_has_an_empty_header(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    assert read_header(folder_at(tmp_path), "a.safetensors").tensors == ()


def test_a_scalar_and_an_empty_tensor_have_places(tmp_path):
    save_file({"s": torch.tensor(3.0), "e": torch.ones(0, 4)}, tmp_path / "a.safetensors")
    header = read_header(folder_at(tmp_path), "a.safetensors")
    assert {entry.name: (entry.shape, entry.nbytes) for entry in header.tensors} == {"s": ((), 4), "e": ((0, 4), 0)}


def written(path: Path, tensors, metadata) -> dict[str, bytes]:
    """Write a file as laid out, each tensor filled with its own bytes; return those."""
    file = layout_file(path.name, tensors, metadata)
    contents = {}
    with path.open("wb") as stream:
        stream.write(render_header(file))
        for number, tensor in enumerate(file.tensors):
            assert stream.tell() == tensor.offset
            nbytes = BY_NAME[tensor.dtype].nbytes * math.prod(tensor.shape)
            contents[tensor.name] = bytes((number + index) % 2 for index in range(nbytes))
            stream.write(contents[tensor.name])
        assert stream.tell() == file.nbytes
    return contents


def test_the_header_is_spelled_out_byte_for_byte():
    file = layout_file("a.safetensors", [("w", "bf16", (2, 3)), ("b", "f32", ())], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert render_header(file) == struct.pack("<Q", len(padded)) + padded
    assert [tensor.offset for tensor in file.tensors] == [8 + len(padded), 20 + len(padded)]


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES])
def test_what_is_laid_out_loads_with_the_real_library(tmp_path, dtype):
    tensors = [("b", dtype, (3, 5)), ("a", dtype, ()), ("empty", dtype, (0, 2)), ("ü.weight", "f32", (2,))]
    contents = written(tmp_path / "a.safetensors", tensors, {"format": "pt", "note": 'a "quoted" word'})
    with safe_open(tmp_path / "a.safetensors", "pt") as real:
        assert real.metadata() == {"format": "pt", "note": 'a "quoted" word'}
        for name, kind, shape in tensors:
            tensor = real.get_tensor(name)
            assert str(tensor.dtype) == f"torch.{BY_NAME[kind].torch}"
            assert tuple(tensor.shape) == shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == contents[name]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        NAMES, st.tuples(st.sampled_from([d.name for d in DTYPES]), st.lists(st.integers(0, 4), max_size=4)), max_size=6
    ),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=8).filter(str.isascii), max_size=3
    ),
)
def test_what_is_laid_out_reads_back_as_it_was(tmp_path_factory, table, metadata):
    folder = tmp_path_factory.mktemp("written")
    tensors = [(name, dtype, tuple(shape)) for name, (dtype, shape) in table.items()]
    written(folder / "a.safetensors", tensors, metadata)
    header = read_header(folder_at(folder), "a.safetensors")
    found = {entry.name: (entry.dtype, list(entry.shape)) for entry in header.tensors}
    assert found == table
    assert dict(header.metadata) == metadata
    assert all((entry.chunks[0].offset - 8) % 8 == 0 for entry in header.tensors[:1])


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
def test_names_that_a_header_cannot_hold_are_a_fault_of_the_caller(names):
    with pytest.raises(ValueError, match="not distinct"):
        layout_file("a.safetensors", [(name, "f32", (1,)) for name in names], {})


def test_a_header_reads_the_same_whatever_the_order_of_its_names(tmp_path):
    raw = json.dumps(
        {
            "late": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            "early": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        }
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + np.arange(3, dtype="u1").tobytes())
    assert [entry.name for entry in read_header(folder_at(tmp_path), "a.safetensors").tensors] == ["early", "late"]
