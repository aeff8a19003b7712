"""New torch_dist checkpoints: written by numpy between carnet's frames, read by torch, by megatron-core and by carnet.

Run as a program this file is one rank of a megatron-core world that loads such a checkpoint.
"""

import io
import json
import pickle
import pickletools
import re
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from carnet.algebra.box import Box, whole
from carnet.dtypes import DTYPES, array_type
from carnet.errors import BadRequest
from carnet.formats.detect import open_checkpoint
from carnet.formats.torch_dist_files import (
    StoreChunk,
    StoreFiles,
    common_pt,
    folder_of,
    frames_of,
    layout_store,
    store_texts,
    torch_type,
)
from carnet.formats.torch_frames import archive, frame
from carnet.formats.torch_opcodes import Call, Global, Made, Value, dumps
from carnet.steps import TargetFile, TargetTensor

GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
SHAPES = ((), (7,), (1,), (20, 30), (2, 3, 4), (2, 3, 4, 5), (2, 1, 1, 1, 3), (300, 70))
EMPTY = ((0,), (0, 3), (3, 0), (2, 0, 3))
LAYERS = 4
MODEL_TYPE = Call(Global("megatron.core.enums", "ModelType"), (1,))
STATES = [f"decoder.layers.mlp.linear_fc1._extra_state/shard_{layer}_{LAYERS}" for layer in range(LAYERS)]
ARGUMENTS: dict[str, Value] = {
    "num_layers": LAYERS, "hidden_size": 64, "layernorm_epsilon": 1e-5, "params_dtype": torch_type("bf16"), "bf16": True,
    "moe_layer_freq": [0, 1, 1, 1], "rope_type": None, "model_type": MODEL_TYPE, "seed": 1 << 40, "negative": -70000,
    "spec": ("a", "b", "c", "d"), "name": "Straße", "nested": {"x": {}, "y": []}, "tensor_model_parallel_size": 2,
    "attention_backend": Call(Global("megatron.core.transformer.enums", "AttnBackend"), (5,)),
}  # fmt: skip


def values() -> dict[str, np.ndarray]:
    """Every tensor of the store: random bits of finite numbers, in the type that it is stored in."""
    numbers = np.random.default_rng(7)
    shapes = {
        "embedding.word_embeddings.weight": ((256, 64), ml_dtypes.bfloat16),
        "decoder.layers.self_attention.linear_qkv.weight": ((LAYERS, 128, 64), ml_dtypes.bfloat16),
        "decoder.layers.mlp.linear_fc1.weight": ((LAYERS, 192, 64), ml_dtypes.bfloat16),
        "decoder.layers.mlp.linear_fc2.weight": ((LAYERS, 64, 96), np.float32),
        "decoder.final_layernorm.weight": ((64,), np.float32),
    }
    return {name: np.asarray(numbers.standard_normal(shape)).astype(dtype) for name, (shape, dtype) in shapes.items()}


def boxes_of_rank(rank: int) -> dict[str, list[Box]]:
    """What one rank of TP 2 x PP 2 stores, as Megatron cuts it."""
    tp, layers = rank % 2, range(2 * (rank // 2), 2 * (rank // 2) + 2)
    found = {
        "decoder.layers.self_attention.linear_qkv.weight": [Box((la, 64 * tp, 0), (1, 64, 64)) for la in layers],
        "decoder.layers.mlp.linear_fc1.weight": [
            Box((la, row + 48 * tp, 0), (1, 48, 64)) for la in layers for row in (0, 96)
        ],  # gate, up
        "decoder.layers.mlp.linear_fc2.weight": [Box((la, 0, 48 * tp), (1, 64, 48)) for la in layers],
    }
    if rank < 2:
        found["embedding.word_embeddings.weight"] = [Box((128 * tp, 0), (128, 64))]
    if rank == 3:
        found["decoder.final_layernorm.weight"] = [whole((64,))]
    return found


def name_of(array: np.ndarray) -> str:
    return next(row.name for row in DTYPES if array_type(row.name) == array.dtype)


def part(array: np.ndarray, box: Box) -> np.ndarray:
    return array[(..., *(slice(low, low + size) for low, size in zip(box.start, box.shape, strict=True)))]


def plan_files(tensors: dict[str, np.ndarray], boxes: list[dict[str, list[Box]]]) -> list[tuple[str, list[StoreChunk]]]:
    return [
        (
            f"__{rank}_0.distcp",
            [StoreChunk(name, name_of(tensors[name]), tensors[name].shape, box) for name in held for box in held[name]],
        )
        for rank, held in enumerate(boxes)
    ]


def write_store(root: Path, tensors: dict[str, np.ndarray], boxes: list[dict[str, list[Box]]]) -> StoreFiles:
    """Write a checkpoint as the executor does: holes, frames, then chunks into their places."""
    files = plan_files(tensors, boxes)
    store = layout_store(folder_of(1), files, [("__0_1.distcp", STATES)])
    (root / folder_of(1)).mkdir(parents=True)
    for laid, (_, chunks) in zip(store.files, files, strict=True):
        raw = bytearray(laid.nbytes)
        covered = 0
        for offset, data in frames_of(laid):
            raw[offset : offset + len(data)] = data
            covered += len(data)
        for tensor, chunk in zip(laid.tensors, chunks, strict=True):
            data = part(tensors[chunk.name], chunk.box).tobytes()
            raw[tensor.offset : tensor.offset + len(data)] = data
            covered += len(data)
        assert covered == laid.nbytes == len(raw)
        (root / laid.name).write_bytes(raw)
    for file in store.raws:
        (root / file.name).write_bytes(file.data)
    (root / folder_of(1) / "common.pt").write_bytes(common_pt(ARGUMENTS, 1))
    for text in store_texts(1):
        (root / text.name).write_text(text.text)
    return store


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path, values(), [boxes_of_rank(rank) for rank in range(4)])
    return path


@pytest.fixture
def no_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(compute_crc32=False)
    yield
    torch.serialization.set_crc32_options(compute_crc32=True)


def without_checksums(raw: bytes) -> bytes:
    """Return a zip, or a part of one, with all its checksums set to 0."""
    raw = re.sub(rb"(PK\x07\x08).{4}", rb"\1\0\0\0\0", raw, flags=re.DOTALL)
    return re.sub(rb"(PK\x01\x02.{12}).{4}", rb"\1\0\0\0\0", raw, flags=re.DOTALL)


def without_id(raw: bytes) -> bytes:
    return re.sub(rb"(serialization_idFB..Z*)\d{40}", rb"\1", raw)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# --- frames ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
def test_a_frame_and_zeros_are_what_torch_saves_but_for_the_checksums(no_checksums, row, shape):
    expected = saved(torch.zeros(shape, dtype=getattr(torch, row.torch)))
    framed = frame(row.name, shape)
    middle = bytes(framed.nbytes - len(framed.prefix) - len(framed.suffix))
    assert without_checksums(framed.prefix + middle + framed.suffix) == expected
    assert len(framed.prefix) % 64 == 0


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("name", ["bf16", "f8_e4m3"])
def test_the_frame_of_an_empty_tensor_is_what_torch_saves_but_for_checksums_and_the_id_for_logs(no_checksums, name, shape):
    row = next(row for row in DTYPES if row.name == name)
    framed = frame(name, shape)
    expected = saved(torch.zeros(shape, dtype=getattr(torch, row.torch)))
    assert without_id(without_checksums(framed.prefix + framed.suffix)) == without_id(expected)


class Sink:
    """A file that keeps what is small and counts what is large."""

    def __init__(self) -> None:
        self.ends, self.nbytes = [b"", b""], 0

    def write(self, data: bytes) -> int:
        self.nbytes += len(data)
        if len(data) < 4096:
            self.ends[self.nbytes > 1 << 20] += bytes(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


@pytest.mark.referee
@pytest.mark.parametrize("length", [(1 << 32) - 1728, (1 << 32) - 64, (1 << 32) - 2, (1 << 32) - 1, 1 << 32, (1 << 32) + 5])
def test_a_frame_around_four_gigabytes_is_what_torch_saves_but_for_the_checksums(no_checksums, length):
    sink = Sink()
    torch.save(torch.empty(length, dtype=torch.uint8), sink)
    framed = frame("u8", (length,))
    assert [without_checksums(framed.prefix), without_checksums(framed.suffix)] == sink.ends
    assert framed.nbytes == sink.nbytes


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_loads_a_tensor_whose_checksum_stands_as_zero(tmp_path, weights_only):
    framed = frame("f32", (5, 3))
    data = np.arange(15, dtype=np.float32)
    item = framed.prefix + data.tobytes() + framed.suffix
    (tmp_path / "item.pt").write_bytes(item)
    expected = torch.arange(15, dtype=torch.float32).reshape(5, 3)
    assert torch.equal(torch.load(io.BytesIO(item), weights_only=weights_only), expected)
    assert torch.equal(torch.load(tmp_path / "item.pt", weights_only=weights_only, mmap=True), expected)


def test_python_s_zipfile_reads_every_entry_but_the_tensor_whose_checksum_it_compares():
    framed = frame("f32", (5, 3))
    item = zipfile.ZipFile(io.BytesIO(framed.prefix + bytes(range(60)) + framed.suffix))
    names = [entry.filename for entry in item.infolist()]
    assert [name for name in names if name != "archive/data/0" and item.read(name)] == [
        "archive/data.pkl", "archive/.format_version", "archive/.storage_alignment", "archive/byteorder", "archive/version",
        "archive/.data/serialization_id",
    ]  # fmt: skip
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32 for file 'archive/data/0'"):
        item.read("archive/data/0")


@pytest.mark.parametrize("folder", ["archive", "common"])
def test_a_zip_of_plain_values_is_what_torch_saves_but_for_the_checksums(tmp_path, no_checksums, folder):
    path = tmp_path / f"{folder}.pt"
    torch.save([None], path)
    expected = path.read_bytes()
    assert without_checksums(archive(b"\x80\x02]q\x00Na.", folder)) == expected
    assert zipfile.ZipFile(io.BytesIO(archive(dumps([None]), folder))).testzip() is None


# --- pickles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 255, 256, 65535, 65536, -1, (1 << 31) - 1, 1 << 31, -(1 << 31) - 1, 1 << 200, -(1 << 63),
        0.0, -0.0, 1e300, float("inf"), "", "a\nb", "\ud800", "€" * 300, [], (), {}, [[]], ((),), (1, 2, 3, 4),
        {"a": {"a": ["a", ("a",)]}}, [1, True, 1.0], ["x"] * 500, [str(n) for n in range(600)] * 2,
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_pickle_of_plain_values_loads_as_they_are(value):
    found = pickle.loads(dumps(value))
    assert found == value
    assert repr(found) == repr(value)
    pickletools.dis(dumps(value), io.StringIO())


class Colour(Enum):
    RED = 1


def test_a_pickle_of_objects_loads_as_them():
    value: Value = [
        Made(Global("types", "SimpleNamespace"), {"a": 1}),
        Call(Global("fractions", "Fraction"), (1, 3)),
        Global("collections", "OrderedDict"),
    ]
    found = pickle.loads(dumps(value))
    assert repr(found) == "[namespace(a=1), Fraction(1, 3), <class 'collections.OrderedDict'>]"
    assert isinstance(found[0], SimpleNamespace)


@pytest.mark.parametrize("name", ["", "a\nb", "a b", "os;x"])
def test_a_global_that_is_no_name_is_not_written(name):
    with pytest.raises(ValueError, match="is not a name of Python"):
        dumps(Global("torch", name) if name else Global("", ""))


# --- the layout ------------------------------------------------------------------------------------------------------------


def test_a_store_s_places_are_those_of_a_checkpoint_that_megatron_wrote():
    # facts/megatron.md: bf16 (128, 64) is an item of 17961 bytes, its data 704 bytes into it
    chunks = [StoreChunk("w", "bf16", (256, 64), Box((row, 0), (128, 64))) for row in (0, 128)]
    (file,) = layout_store("iter_0000001", [("__0_0.distcp", chunks)]).files
    assert file == TargetFile(
        "iter_0000001/__0_0.distcp",
        2 * 17961,
        (TargetTensor("w", "bf16", (128, 64), 704), TargetTensor("w", "bf16", (128, 64), 17961 + 704)),
        {},
        "torch_dist",
    )


def test_frames_fill_all_that_is_no_chunk():
    chunks = [StoreChunk("w", "bf16", (256, 64), Box((row, 0), (128, 64))) for row in (0, 128)]
    (file,) = layout_store("iter_0000001", [("__0_0.distcp", chunks)]).files
    framed = frame("bf16", (128, 64))
    assert list(frames_of(file)) == [
        (0, framed.prefix),
        (704 + 16384, framed.suffix + framed.prefix),
        (17961 + 704 + 16384, framed.suffix),
    ]


@pytest.mark.parametrize(
    ("tensors", "nbytes"),
    [
        ((TargetTensor("w", "bf16", (128, 64), 705),), 17962),
        ((TargetTensor("w", "bf16", (128, 64), 704),), 17960),
        ((TargetTensor("w", "bf16", (128, 64), 704), TargetTensor("v", "bf16", (1,), 17961)), 30000),
        ((), 1),
    ],
    ids=["a byte further", "a byte short", "no room for a frame", "bytes of nothing"],
)
def test_places_that_leave_no_room_for_the_frames_are_refused(tensors, nbytes):
    with pytest.raises(BadRequest):
        list(frames_of(TargetFile("f.distcp", nbytes, tensors, {})))


def test_a_file_without_chunks_is_empty():
    (file,) = layout_store("iter_0000001", [("__0_0.distcp", [])]).files
    assert (file.nbytes, list(frames_of(file))) == (0, [])


ONE = StoreChunk("w", "bf16", (4, 3), Box((0, 0), (2, 3)))


@pytest.mark.parametrize(
    ("files", "states", "fault"),
    [
        ([("a", [ONE, ONE])], [], "same name and place"),
        ([("a", [ONE]), ("a", [])], [], "two files"),
        ([("a", [ONE])], [("a", ["s"])], "two files"),
        ([], [("a", ["s", "s"])], "same name and place"),
        ([("a", [ONE, StoreChunk("w", "f32", (4, 3), Box((2, 0), (2, 3)))])], [], "disagree"),
        ([("a", [ONE, StoreChunk("w", "bf16", (5, 3), Box((2, 0), (2, 3)))])], [], "disagree"),
        ([("a", [StoreChunk("w", "bf16", (4, 3), Box((0,), (4,)))])], [], "disagree"),
        ([("a", [StoreChunk("w", "bf16", (4, 3), Box((3, 0), (2, 3)))])], [], "reaches beyond"),
    ],
    ids=["chunk twice", "file twice", "file and states", "state twice", "two types", "two shapes", "rank", "beyond"],
)
def test_a_store_that_contradicts_itself_is_refused(files, states, fault):
    with pytest.raises(ValueError, match=fault):
        layout_store("iter_0000001", files, states)


def test_a_hundred_thousand_chunks_take_about_a_hundred_bytes_each():
    shape = (50_000, 64)
    chunks = [StoreChunk(name, "bf16", shape, Box((row, 0), (1, 64))) for name in ("v", "w") for row in range(50_000)]
    raw = layout_store("iter_0000001", [("__0_0.distcp", chunks)]).raws[-1].data
    assert len(raw) < 100 * len(chunks)


def test_the_same_chunks_give_the_same_bytes():
    stores = [layout_store("f", plan_files(values(), [boxes_of_rank(0)]), [("s", STATES)]) for _ in range(2)]
    assert stores[0] == stores[1]


# --- read again ------------------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_torch_builds():
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks = [StoreChunk("w", "bf16", (4, 3), Box((row, 0), (2, 3))) for row in (0, 2)]
    store = layout_store("iter_0000001", [("__0_0.distcp", chunks)], [("__0_1.distcp", ["x/shard_0_1"])])
    expected = Metadata(
        state_dict_metadata={
            "w": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16),
                torch.Size([4, 3]),
                [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([2, 3])) for row in (0, 2)],
            ),
            "x/shard_0_1": BytesStorageMetadata(),
        },
        planner_data=None,
        storage_data={
            MetadataIndex("x/shard_0_1"): _StorageInfo("__0_1.distcp", 0, 1261),
            MetadataIndex("w", [0, 0]): _StorageInfo("__0_0.distcp", 0, 1577),
            MetadataIndex("w", [2, 0]): _StorageInfo("__0_0.distcp", 1577, 1577),
        },
        storage_meta=StorageMeta(),
        version="1.0.0",
    )
    found = pickle.loads(store.raws[-1].data)
    assert found == expected
    assert [type(size) for size in (found.state_dict_metadata["w"].size, *(i.offset for i in found.storage_data))] == [
        torch.Size, type(None), torch.Size, torch.Size,
    ]  # fmt: skip


def test_carnet_reads_what_it_wrote(root):
    checkpoint = open_checkpoint(root)
    expected = values()
    assert {name: tensor.shape for (_, name), tensor in checkpoint.tensors.items()} == {n: v.shape for n, v in expected.items()}
    for (_, name), tensor in checkpoint.tensors.items():
        assert array_type(tensor.dtype) == expected[name].dtype
        found = np.zeros(tensor.shape, expected[name].dtype)
        for chunk in tensor.chunks:
            raw = Path(str(checkpoint.root), chunk.file).read_bytes()
            piece = part(found, chunk.box)
            piece[...] = np.frombuffer(raw, found.dtype, piece.size, chunk.offset).reshape(piece.shape)
        assert found.tobytes() == expected[name].tobytes(), name
    assert sorted(checkpoint.objects) == sorted(STATES)
    assert {key: checkpoint.config[key] for key in ("num_layers", "params_dtype", "model_type", "name", "seed")} == {
        "num_layers": LAYERS, "params_dtype": "torch.bfloat16", "model_type": "ModelType(1)", "name": "Straße", "seed": 1 << 40,
    }  # fmt: skip
    assert checkpoint.notes["iteration"] == "1"


@pytest.mark.parametrize(("iteration", "folder", "said"), [(1, "iter_0000001", "1"), (None, "release", "release")])
def test_the_tracker_names_the_folder(tmp_path, iteration, folder, said):
    texts = {text.name: text.text for text in store_texts(iteration)}
    assert texts["latest_checkpointed_iteration.txt"] == said
    described = json.loads(texts[f"{folder}/metadata.json"])
    assert described == json.loads((GOLDENS / "llama_tp2pp2/iter_0000001/metadata.json").read_text())


def test_every_item_is_a_file_that_torch_loads(root):
    metadata = pickle.loads((root / folder_of(1) / ".metadata").read_bytes())
    expected = values()
    for index, info in metadata.storage_data.items():
        raw = (root / folder_of(1) / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        found = torch.load(io.BytesIO(raw), weights_only=True)
        if index.offset is None:
            assert found == [None]
        else:
            box = Box(tuple(index.offset), tuple(found.shape))
            assert as_bytes(found) == part(expected[index.fqn], box).tobytes(), index


@pytest.mark.referee
def test_torch_distributed_checkpoint_loads_it_into_nothing(root):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(root / folder_of(1)), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    assert {name: as_bytes(value) for name, value in state.items() if isinstance(value, torch.Tensor)} == {
        name: value.tobytes() for name, value in values().items()
    }
    assert {name for name, value in state.items() if value == [None]} == set(STATES)


@pytest.mark.referee
@pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
def test_torch_distributed_checkpoint_loads_every_element_type_scalars_and_empty_tensors(tmp_path, row):
    from torch.distributed.checkpoint import FileSystemReader, load

    bits = np.random.default_rng(1).integers(0, 2, (6, 4 * row.nbytes), dtype=np.uint8)
    array = bits.view(array_type(row.name))
    tensors = {"full": array, "scalar": array[5, 3].reshape(()), "empty": np.zeros((0, 3), array.dtype)}
    boxes = {"full": [Box((0, 0), (2, 4)), Box((2, 0), (4, 4))], "scalar": [whole(())], "empty": [whole((0, 3))]}
    write_store(tmp_path, tensors, [boxes])
    dtype = getattr(torch, row.torch)
    state = {name: torch.zeros(value.shape, dtype=dtype) for name, value in tensors.items()}
    load(state, storage_reader=FileSystemReader(tmp_path / folder_of(1)), no_dist=True)
    assert {name: as_bytes(value) for name, value in state.items()} == {name: v.tobytes() for name, v in tensors.items()}


@pytest.mark.referee
@pytest.mark.parametrize("weights_only", [True, False])
def test_the_arguments_load_under_the_globals_that_megatron_core_allows(root, weights_only):
    from megatron.core.enums import ModelType
    from megatron.core.safe_globals import SAFE_GLOBALS
    from megatron.core.transformer.enums import AttnBackend

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        common = torch.load(root / folder_of(1) / "common.pt", weights_only=weights_only)
    expected = ARGUMENTS | {
        "params_dtype": torch.bfloat16, "model_type": ModelType(1), "attention_backend": AttnBackend(5),
    }  # fmt: skip
    assert common == {
        "args": Namespace(**expected),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def as_value(value: object) -> Value:
    """Return what carnet writes for an argument of a real checkpoint."""
    if isinstance(value, torch.dtype):
        return Global("torch", str(value).removeprefix("torch."))
    if isinstance(value, Enum):
        return Call(Global(type(value).__module__, type(value).__name__), (value.value,))
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_value, value))
    return value  # type: ignore[return-value]


@pytest.mark.referee
def test_all_arguments_of_a_real_checkpoint_survive():
    import megatron.core.safe_globals  # noqa: F401 - the enums of the golden's arguments

    golden = torch.load(GOLDENS / "llama_tp2pp2/iter_0000001/common.pt", weights_only=False)
    written = common_pt({name: as_value(value) for name, value in vars(golden["args"]).items()}, 1)
    found = torch.load(io.BytesIO(written), weights_only=False)
    assert found["args"] == golden["args"]
    assert len(vars(golden["args"])) > 600
    assert {key: found[key] for key in ("iteration", "checkpoint_version", "content_metadata")} == {
        key: golden[key] for key in ("iteration", "checkpoint_version", "content_metadata")
    }


@pytest.mark.referee
@pytest.mark.parametrize("world", [1, 2])
def test_megatron_core_loads_it_strictly_into_another_cut(root, tmp_path, world):
    command = [sys.executable, __file__, str(root / folder_of(1)), str(tmp_path / "rendezvous"), str(world)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(world)]
    try:
        said = [rank.communicate(timeout=300)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    assert all(f"loaded {len(values())} tensors and {LAYERS} states" in text for text in said)


def load_as_a_rank(folder: str, rendezvous: str, world: int, rank: int) -> None:
    """Load the store with megatron-core, each tensor cut along its last axis where it can be, and compare."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.validation import StrictHandling

    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", world_size=world, rank=rank)
    state, expected = {}, {}
    for name, array in values().items():
        parts = np.split(array, world, axis=-1) if array.ndim > 1 else [array]
        mine = np.ascontiguousarray(parts[rank % len(parts)])
        dtype = torch.bfloat16 if array.dtype.name == "bfloat16" else torch.float32
        stacked = name.startswith("decoder.layers.")
        for layer, data in enumerate(mine) if stacked else [(0, mine)]:
            cut = [(array.ndim - 1, rank, world)] if len(parts) > 1 else []
            ahead = [(0, layer, LAYERS)] if stacked else []
            state[f"{name} {layer}"] = ShardedTensor.from_rank_offsets(
                name,
                torch.zeros(data.shape, dtype=dtype),
                *ahead,
                *cut,
                replica_id=0 if len(parts) == world else rank,
                prepend_axis_num=int(stacked),
            )
            expected[f"{name} {layer}"] = data.tobytes()
    for layer, key in enumerate(STATES):
        state[key] = ShardedObject(key.partition("/")[0], None, (LAYERS,), (layer,), replica_id=rank)
    loaded = dist_checkpointing.load(dict(state), folder, strict=StrictHandling.RAISE_ALL)
    assert loaded["args"].num_layers == LAYERS
    assert loaded["args"].params_dtype is torch.bfloat16
    assert dist_checkpointing.load_common_state_dict(folder)["iteration"] == 1
    assert dist_checkpointing.load_content_metadata(folder)["chained_optim_avoid_prefix"] is True
    different = [name for name, data in expected.items() if as_bytes(loaded[name]) != data]
    assert not different, different
    assert all(loaded[key] is None for key in STATES)
    if world == 1:  # in a larger one megatron-core refuses on the first rank alone, and the others wait for it
        state.pop("decoder.final_layernorm.weight 0")
        with pytest.raises(dist_checkpointing.core.CheckpointingException, match=r"decoder\.final_layernorm"):
            dist_checkpointing.load(state, folder, strict=StrictHandling.RAISE_ALL)
    print(f"loaded {len(values())} tensors and {len(STATES)} states")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    load_as_a_rank(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
