"""safetensors files that lie, and folders of them that do not fit together."""

import json
import os
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from carnet.errors import BadCheckpoint, CarnetError, NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.formats.safetensors import read_header
from carnet.storage.schemes import folder_at


def refusal(root, kind: type[CarnetError] = BadCheckpoint) -> str:
    with pytest.raises(kind) as error:
        open_checkpoint(root)
    return str(error.value)


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = [
    # header, bytes of data, what the first line says
    ({"a": tensor([2], 0, 8)}, 7, "bad.safetensors is not as long as its header says"),
    ({"a": tensor([2], 0, 8)}, 9, "bad.safetensors is not as long as its header says"),
    ({"a": tensor([2], 4, 12)}, 12, "the tensor 'a' leaves a hole before it"),
    ({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, 20, "the tensor 'b' leaves a hole before it"),
    ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, 12, "the tensor 'b' overlaps the tensor before it"),
    ({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, 8, "the tensor 'b' overlaps the tensor before it"),
    ({"a": tensor([3], 0, 8)}, 8, "the tensor 'a' does not have the bytes that its shape needs"),
    ({"a": tensor([2], 8, 0)}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": tensor([-2], 0, 8)}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": tensor([-1, -2], 0, 8)}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": tensor([True], 0, 4)}, 4, "the tensor 'a' has an impossible shape or place"),
    ({"a": tensor([2.0], 0, 8)}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": tensor([1 << 63, 2], 0, 8)}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": tensor([1 << 62, 1 << 62], 0, 0)}, 0, "the tensor 'a' does not have the bytes that its shape needs"),
    ({"a": tensor("2", 0, 8)}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "the tensor 'a' has an impossible shape or place"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "the tensor 'a' is not described as safetensors describes one"),
    ({"a": {**tensor([2], 0, 8), "more": 1}}, 8, "the tensor 'a' is not described as safetensors describes one"),
    ({"a": 5}, 0, "the tensor 'a' is not described as safetensors describes one"),
    ({"__metadata__": {"a": 1}}, 0, "__metadata__ is not a table of texts"),
    ({"__metadata__": []}, 0, "__metadata__ is not a table of texts"),
    (b"[]", 0, "the header of bad.safetensors does not begin as JSON"),
    (b" {}", 0, "the header of bad.safetensors does not begin as JSON"),
    (b"", 0, "the header of bad.safetensors does not begin as JSON"),
    (b"{", 0, "the header of bad.safetensors is not valid JSON"),
    (b'{"a\xff": 1}', 0, "the header of bad.safetensors is not valid JSON"),
    (b'{"a": NaN}', 0, "the header of bad.safetensors is not valid JSON"),
    (b'{"a": 1, "a": 1}', 0, "the header of bad.safetensors is not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", 0, "the header of bad.safetensors is not valid JSON"),
    (b'{"a":' * 100_000, 0, "the header of bad.safetensors is nested too deeply"),
]


@pytest.mark.parametrize(("header", "data", "line"), LIES)
def test_a_lying_header_is_an_error_that_names_the_tensor_or_the_file(tmp_path, forge, header, data, line):
    (tmp_path / "bad.safetensors").write_bytes(forge(header, b"\0" * data))
    with pytest.raises(BadCheckpoint) as error:
        read_header(folder_at(tmp_path), "bad.safetensors")
    assert str(error.value).splitlines()[0] == line


@pytest.mark.parametrize(("header", "data", "line"), LIES[:9])
def test_the_real_library_refuses_these_too(tmp_path, forge, header, data, line):
    (tmp_path / "bad.safetensors").write_bytes(forge(header, b"\0" * data))
    with pytest.raises(SafetensorError), safe_open(tmp_path / "bad.safetensors", "pt"):
        pass


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 64) - 1, 3])
def test_a_header_longer_than_its_file_is_an_error_and_is_not_read(tmp_path, length):
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(BadCheckpoint) as error:
        read_header(folder_at(tmp_path), "bad.safetensors")
    assert str(error.value).splitlines()[0] == "the header of bad.safetensors has an impossible length"


def test_a_header_of_more_than_100_megabytes_is_an_error_even_where_the_file_has_them(tmp_path):
    with (tmp_path / "bad.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(BadCheckpoint, match="impossible length"):
        read_header(folder_at(tmp_path), "bad.safetensors")


def test_an_unknown_element_type_is_refused_with_the_known_ones(hf, forge):
    (hf / "model.safetensors").write_bytes(forge({"a": tensor([2], 0, 8, "C64")}, b"\0" * 8))
    text = refusal(hf, NotSupported)
    assert text.splitlines()[0] == "the tensor 'a' has an unknown element type"
    assert "  found     C64" in text


@pytest.mark.parametrize("left", [0, 7, 8, 20, -1])
def test_a_truncated_file_is_an_error_that_names_it(hf, left):
    path = hf / "model.safetensors"
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    assert "model.safetensors" in refusal(hf).splitlines()[0]


def sharded(hf, weight_map: dict[str, object]) -> None:
    (hf / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, hf / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, hf / "model-00002-of-00002.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", "a\0b"])
def test_a_shard_outside_of_the_folder_is_refused_by_name(hf, name):
    sharded(hf, {"a": ONE, "b": TWO, "c": name})
    assert "leads out of the checkpoint" in refusal(hf).splitlines()[0]


@pytest.mark.parametrize(
    ("weight_map", "line"),
    [
        ({"a": ONE, "b": ONE}, "other weights lie beside the shards that model.safetensors.index.json names"),
        (
            {"a": ONE, "b": TWO, "c": "model-00003.safetensors"},
            "the shards that model.safetensors.index.json names are not all here",
        ),
        ({"a": TWO, "b": ONE}, "model.safetensors.index.json and the files disagree on 'a'"),
        ({"a": ONE, "b": TWO, "c": TWO}, "model.safetensors.index.json and the files disagree on 'c'"),
        ({"a": ONE, "c": TWO}, "model.safetensors.index.json and the files disagree on 'b'"),
        ({}, "model.safetensors.index.json has no weight_map of names"),
        ({"a": 1, "b": TWO}, "model.safetensors.index.json has no weight_map of names"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_an_error_that_says_where(hf, weight_map, line):
    sharded(hf, weight_map)
    assert refusal(hf).splitlines()[0].startswith(line)


def test_a_tensor_in_two_shards_is_an_error_that_names_both(hf):
    sharded(hf, {"a": ONE, "b": TWO})
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, hf / TWO)
    text = refusal(hf)
    assert text.splitlines()[0] == "the tensor 'a' is in two files"
    assert f"  files     {ONE}, {TWO}" in text


def test_a_missing_shard_without_an_index_is_named(hf):
    sharded(hf, {"a": ONE, "b": TWO})
    (hf / "model.safetensors.index.json").unlink()
    (hf / ONE).unlink()
    assert f"  missing   {ONE}" in refusal(hf)


def test_a_whole_file_beside_shards_is_a_choice_that_is_not_made(hf):
    sharded(hf, {"a": ONE, "b": TWO})
    save_file({"a": torch.ones(2)}, hf / "model.safetensors")
    assert "  too many  model.safetensors" in refusal(hf)
    (hf / "model.safetensors.index.json").unlink()
    assert refusal(hf).splitlines()[0] == "it is not clear which files are the model"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '"x"', "\xff"])
def test_a_broken_config_is_an_error_that_names_it(hf, content):
    (hf / "config.json").write_text(content, encoding="latin-1")
    assert refusal(hf).startswith("config.json is ")


@pytest.mark.parametrize("world", [0, -1, True, 2.0, "2", None, 1 << 40])
def test_an_impossible_world_is_an_error(hf, world):
    (hf / "config.json").write_text(json.dumps({"architecture": "LlamaForCausalLM", "mapping": {"world_size": world}}))
    assert refusal(hf).splitlines()[0] == "config.json has no usable mapping.world_size"


def test_missing_and_extra_ranks_are_named(hf):
    (hf / "config.json").write_text(json.dumps({"architecture": "LlamaForCausalLM", "mapping": {"world_size": 2}}))
    for rank in (0, 2):
        save_file({"a": torch.ones(2)}, hf / f"rank{rank}.safetensors")
    text = refusal(hf)
    assert "  missing   rank1.safetensors" in text
    assert "  too many  rank2.safetensors" in text


def test_weights_in_pickles_are_refused_by_name(hf):
    (hf / "model.safetensors").unlink()
    torch.save({}, hf / "pytorch_model.bin")
    assert refusal(hf, NotSupported).splitlines()[0] == "weights in pytorch_model.bin are not read: only safetensors are"


def test_a_pipe_in_place_of_a_shard_is_refused_and_does_not_hang(hf):
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")
    assert refusal(hf).splitlines()[0] == "model.safetensors is not a regular file"


def test_a_link_into_the_cache_of_blobs_is_followed(hf):
    (hf.parent / "blob").write_bytes((hf / "model.safetensors").read_bytes())
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").symlink_to("../blob")
    assert open_checkpoint(hf).tensors["", "a"].shape == (2, 3)
