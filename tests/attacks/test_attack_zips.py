"""torch.save zips whose directory, headers and pickle do not agree."""

import io
import struct
import zipfile

import pytest
import torch

from carnet.errors import BadCheckpoint
from carnet.formats.detect import open_checkpoint


def refusal(checkpoint) -> str:
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(checkpoint.root)
    return str(error.value)


def rezipped(item: bytes, method: int = zipfile.ZIP_STORED, **replaced: bytes | None) -> bytes:
    """Return the item written again by Python's zipfile, some of its entries replaced, or left out where None."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(item)) as source, zipfile.ZipFile(stream, "w", method) as target:
        for name in source.namelist():
            short = name.rpartition("/")[2].partition(".")[0]
            data = replaced.get(short, source.read(name))
            if data is not None:
                target.writestr(name, data)
    return stream.getvalue()


def test_an_item_that_another_zip_writer_wrote_is_read(megatron):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight")))
    chunk = open_checkpoint(megatron.root).tensors["", "decoder.weight"].chunks[0]
    raw = (megatron.root / chunk.file).read_bytes()[chunk.offset :][:24]
    assert torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).tolist() == list(range(12))


def test_a_compressed_item_is_refused(megatron):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight"), zipfile.ZIP_DEFLATED))
    text = refusal(megatron)
    assert text.splitlines()[0].endswith("has a damaged zip directory")
    assert "is not plainly stored" in text


def test_a_big_endian_item_is_refused(megatron):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight"), byteorder=b"big"))
    assert refusal(megatron).splitlines()[0].endswith("is not little-endian")


@pytest.mark.parametrize("left_out", ["byteorder", "version", "serialization_id"])
def test_entries_that_older_writers_lack_are_not_needed(megatron, left_out):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight"), **{left_out: None}))
    assert open_checkpoint(megatron.root).tensors["", "decoder.weight"].dtype == "bf16"


def test_an_item_without_a_pickle_is_refused(megatron):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight"), data=None))
    assert refusal(megatron).splitlines()[0].endswith("lacks the entry data.pkl")


def test_an_item_without_its_storage_is_refused(megatron):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight"), **{"0": None}))
    assert refusal(megatron).splitlines()[0].endswith("lacks the entry data/0")


def test_a_storage_shorter_than_its_pickle_says_is_refused(megatron):
    megatron.replace_item("decoder.weight", rezipped(megatron.item("decoder.weight"), **{"0": b"x" * 23}))
    text = refusal(megatron)
    assert text.splitlines()[0].endswith("has a storage of another size than its pickle says")
    assert "  expected  24 bytes" in text


def test_a_pickle_that_its_checksum_does_not_fit_is_refused(megatron):
    item = bytearray(megatron.item("decoder.weight"))
    item[item.index(b"cpu")] ^= 1
    megatron.replace_item("decoder.weight", bytes(item))
    assert refusal(megatron).splitlines()[0].endswith("has an entry whose checksum is wrong")


def test_a_local_header_of_another_name_is_refused(megatron):
    item = bytearray(megatron.item("decoder.weight"))
    item[item.index(b"archive/data/0") + 13] = ord("1")
    megatron.replace_item("decoder.weight", bytes(item))
    assert refusal(megatron).splitlines()[0].endswith("has an entry that contradicts the zip directory")


@pytest.mark.parametrize("lie", [0, 1, 1 << 20, 0xFFFFFFFE])
def test_a_directory_that_points_elsewhere_is_refused(megatron, lie):
    item = bytearray(megatron.item("decoder.weight"))
    entry = item.rindex(b"archive/data/0") - 46
    struct.pack_into("<I", item, entry + 42, lie)
    megatron.replace_item("decoder.weight", bytes(item))
    assert "__0_0.distcp at byte" in refusal(megatron).splitlines()[0]


def test_two_entries_of_one_name_are_refused(megatron):
    item = megatron.item("decoder.weight").replace(b"archive/version", b"archive/data/0\0")
    stream = io.BytesIO(item)
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", b"x" * 24)
    megatron.replace_item("decoder.weight", stream.getvalue())
    assert "entries double" in refusal(megatron)


@pytest.mark.parametrize("data", [b"PK\3\4" + b"\0" * 100, b"\0" * 500, b"PK\5\6" + b"\0" * 18, b"x"])
def test_what_is_no_zip_is_refused(megatron, data):
    megatron.replace_item("decoder.weight", data)
    assert "__0_0.distcp at byte" in refusal(megatron).splitlines()[0]


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("value", [[torch.ones(3, 4)], {"w": torch.ones(3, 4)}, None, 7, "text"])
def test_an_item_that_holds_no_bare_tensor_is_refused(megatron, value):
    megatron.replace_item("decoder.weight", saved(value))
    assert refusal(megatron).splitlines()[0].endswith("holds no tensor")


@pytest.mark.parametrize("bound", [13, 1 << 40, 1 << 61])
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(megatron, bound):
    # torch writes (storage, offset, shape, strides): BININT1 3, BININT1 4, TUPLE2, then the strides 4 and 1
    item = megatron.item("decoder.weight")
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        program = archive.read("archive/data.pkl")
    assert b"K\x04K\x01\x86" in program
    wide = b"\x8a\x09" + bound.to_bytes(9, "little")
    forged = rezipped(item, data=program.replace(b"K\x04K\x01\x86", wide + b"K\x01\x86"))
    megatron.replace_item("decoder.weight", forged)
    text = refusal(megatron)
    assert text.splitlines()[0].endswith("is not a valid pickle")
    assert "a tensor " in text


def test_a_view_with_strides_is_located_where_it_begins(megatron):
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    megatron.replace_item("decoder.weight", saved(base.T[1:4]))
    chunk = open_checkpoint(megatron.root).tensors["", "decoder.weight"].chunks[0]
    raw = torch.frombuffer(bytearray((megatron.root / chunk.file).read_bytes()[chunk.offset :][:46]), dtype=torch.bfloat16)
    assert chunk.strides == (1, 6)
    assert torch.equal(raw.as_strided((3, 4), chunk.strides), base.T[1:4])
