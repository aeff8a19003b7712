"""torch.save zips, written by torch, located without reading a tensor."""

import argparse
import enum
import io
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from carnet.dtypes import BY_NAME, DTYPES
from carnet.formats.torch_pickles import Inert, Namespace, PickledTensor
from carnet.formats.torch_zip import TensorItem, object_item, tensor_item
from carnet.storage.schemes import folder_at


def located(path: Path, offset: int = 0) -> TensorItem:
    file = folder_at(path.parent).open(path.name)
    return tensor_item(file, offset, file.stamp.nbytes - offset)


def read(path: Path) -> object:
    file = folder_at(path.parent).open(path.name)
    return object_item(file, 0, file.stamp.nbytes)[0]


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (0, 4), (200, 30)])
def test_a_tensor_of_any_type_and_shape_is_where_torch_wrote_it(tmp_path, dtype, shape):
    kind = getattr(torch, BY_NAME[dtype].torch)
    tensor = torch.arange(int(np.prod(shape))).reshape(shape).to(torch.uint8).to(kind)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    (tmp_path / "item").write_bytes(b"12345" + stream.getvalue())  # items begin anywhere
    item = located(tmp_path / "item", 5)
    raw = (tmp_path / "item").read_bytes()[item.offset : item.offset + tensor.nbytes]
    assert (item.dtype, item.shape, item.strides) == (dtype, shape, tensor.stride())
    assert raw == tensor.flatten().view(torch.uint8).numpy().tobytes()


def test_a_parameter_is_located_as_its_tensor(tmp_path):
    torch.save(torch.nn.Parameter(torch.ones(2, 3)), tmp_path / "item")
    assert located(tmp_path / "item").shape == (2, 3)


def attributed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.partition_dim = 0
    return tensor


@pytest.mark.parametrize("tensor", [torch.ones(2, 3), torch.nn.Parameter(torch.ones(2, 3))], ids=["tensor", "parameter"])
def test_attributes_that_a_program_hung_on_a_tensor_are_let_go(tmp_path, tensor):
    torch.save(attributed(tensor), tmp_path / "item")
    assert located(tmp_path / "item").shape == (2, 3)


def test_a_slice_is_located_by_offset_and_strides_into_the_whole_storage(tmp_path):
    torch.save(torch.arange(24.0).reshape(4, 6)[1:3, ::2], tmp_path / "item")
    item = located(tmp_path / "item")
    raw = np.frombuffer((tmp_path / "item").read_bytes()[item.offset :][: 4 * 11], np.float32)
    assert (item.shape, item.strides) == ((2, 3), (6, 2))
    assert [float(raw[row * 6 + column * 2]) for row in range(2) for column in range(3)] == [6, 8, 10, 12, 14, 16]


class Mode(enum.Enum):
    FAST = 3


PICKLED = Mode.FAST.__reduce_ex__(2)[1][-1]  # its value, or by Python 3.11.0 to 3.11.3 its name


def test_what_common_files_hold_becomes_plain(tmp_path):
    saved = {
        "args": argparse.Namespace(layers=4, dtype=torch.bfloat16, mode=Mode.FAST, path=Path("/a")),
        "rng": [random.getstate(), np.random.default_rng(0), np.arange(3), {1, 2}, frozenset({3})],
        "state": OrderedDict(weight=torch.ones(2, dtype=torch.float16)),
        "size": torch.Size([2, 3]),
    }
    torch.save(saved, tmp_path / "common.pt")
    found = read(tmp_path / "common.pt")
    assert isinstance(found, dict)
    assert isinstance(found["args"], Namespace)
    fields = found["args"].fields
    assert (fields["layers"], fields["dtype"]) == (4, "torch.bfloat16")
    assert isinstance(fields["mode"], Inert)
    assert str(fields["mode"]) == f"Mode({PICKLED!r})"
    assert str(fields["path"]) == "PosixPath('/', 'a')"
    assert found["size"] == (2, 3)
    tensor = found["state"]["weight"]
    assert isinstance(tensor, PickledTensor)
    assert (tensor.dtype, tensor.shape) == ("f16", (2,))
    assert found["rng"][0] == random.getstate() or isinstance(found["rng"][0], tuple)


def test_enums_of_one_member_are_hashable_and_compare_by_themselves(tmp_path):
    torch.save({Mode.FAST: 1}, tmp_path / "common.pt")
    found = read(tmp_path / "common.pt")
    assert isinstance(found, dict)
    assert [str(key) for key in found] == [f"Mode({PICKLED!r})"]


def wide_entry(name: bytes, start: int, nbytes: int, crc: int) -> tuple[bytes, bytes]:
    """Return the local header and the directory entry, both zip64."""
    local_extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), 20) + name + local_extra
    extra = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, start)
    sizes = (0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
    return local, struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, *sizes) + name + extra


def test_an_item_of_more_than_4_gib_is_located(tmp_path):
    nbytes = (5 << 30) + 6
    stream = io.BytesIO()
    torch.save(torch.zeros(7, dtype=torch.uint8), stream)
    program = zipfile.ZipFile(stream).read("archive/data.pkl")
    program = program.replace(b"K\x07", b"\x8a\x05" + nbytes.to_bytes(5, "little"))  # LONG1 instead of BININT1
    path = tmp_path / "item"
    with path.open("wb") as file:  # sparse: the tensor's bytes are a hole
        data = {b"archive/data/0": nbytes, b"archive/data.pkl": len(program)}
        directory, place = b"", 0
        for name, size in data.items():
            crc = zlib.crc32(program) if size == len(program) else 0
            local, central = wide_entry(name, file.tell(), size, crc)
            directory += central
            file.write(local)
            if size == len(program):
                file.write(program)
            else:
                place = file.tell()
                file.seek(size, io.SEEK_CUR)
        begin = file.tell()
        file.write(directory)
        record = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), begin))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, record, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    with zipfile.ZipFile(path) as real:  # Python's own reader agrees with the forgery
        assert real.getinfo("archive/data/0").file_size == nbytes
    item = located(path)
    assert (item.shape, item.offset) == ((nbytes,), place)
