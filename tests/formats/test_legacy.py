"""Per-rank checkpoints of Megatron-LM: written as Megatron's save_checkpoint writes them, by the real torch.save."""

import argparse
import enum
import io
import os
import random
import shutil
import signal
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from carnet.dtypes import BY_NAME
from carnet.errors import BadCheckpoint, NotSupported
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.formats.stored import Checkpoint, Stored

State = dict[str, object]


class ModelType(enum.Enum):
    encoder_or_decoder = 1


@pytest.fixture(autouse=True)
def megatron_enum(monkeypatch):
    """The enum's module, so that pickles name it as Megatron's do."""
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = ModelType
    monkeypatch.setattr(ModelType, "__module__", "megatron.core.enums")
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)


def arguments(tensor: int = 1, pipeline: int = 1, expert: int = 1, virtual: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(
        num_layers=4,
        params_dtype=torch.bfloat16,
        model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor,
        virtual_pipeline_model_parallel_size=virtual,
    )


def layers(seed: int, *, first: bool = True, count: int = 2) -> State:
    """One chunk's state: layers counted from 0, extra states as the local spec and Transformer Engine leave them."""
    torch.manual_seed(seed)
    state: State = {"embedding.word_embeddings.weight": torch.randn(8, 4).bfloat16()} if first else {}
    for layer in range(count):
        state[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] = torch.randn(6, 4).bfloat16()
        state[f"decoder.layers.{layer}.mlp.linear_fc1._extra_state"] = None
        state[f"decoder.layers.{layer}.self_attention.linear_qkv._extra_state"] = torch.empty(0, dtype=torch.uint8)
        state[f"decoder.layers.{layer}.mlp.router.expert_bias"] = torch.randn(3)
    return state


def save_rank(root: Path, folder: str, args: argparse.Namespace | None, models: dict[str, object], **more: object) -> Path:
    """Write one rank's file as megatron.training.checkpointing.save_checkpoint does."""
    rng = {
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    state = {"checkpoint_version": 3.0, "iteration": 7, **models, "rng_state": [rng], **more}
    state["num_floating_point_operations_so_far"] = 0
    if args is not None:
        state = {"args": args, **state}
    path = root / folder / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def held(checkpoint: Checkpoint, tensor: Stored) -> torch.Tensor:
    """Return a tensor from nothing but its offset and strides."""
    (chunk,) = tensor.chunks
    dtype = getattr(torch, BY_NAME[tensor.dtype].torch)
    raw = Path(str(checkpoint.root), chunk.file).read_bytes()[chunk.offset :]
    flat = torch.frombuffer(bytearray(raw[: len(raw) // dtype.itemsize * dtype.itemsize]), dtype=dtype)
    return flat.as_strided(tensor.shape, chunk.strides)


def same(checkpoint: Checkpoint, unit: str, state: State) -> None:
    """Assert that a unit holds exactly a state, bit for bit."""
    expected = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    found = {name: tensor for (held_by, name), tensor in checkpoint.tensors.items() if held_by == unit}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].unit, found[name].name) == (unit, name)
        if value.numel():
            assert torch.equal(held(checkpoint, found[name]), value), name
            assert getattr(torch, BY_NAME[found[name].dtype].torch) == value.dtype
        else:
            assert found[name].shape == tuple(value.shape)


def units(checkpoint: Checkpoint) -> list[str]:
    return sorted({unit for unit, _ in checkpoint.tensors})


@pytest.fixture
def two(tmp_path) -> Path:
    """Two tensor-parallel ranks in an iteration's folder, with a tracker file."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    root = tmp_path / "iter_0000007"
    for rank in range(2):
        save_rank(root, f"mp_rank_{rank:02d}", arguments(tensor=2), {"model": layers(rank)})
    return tmp_path


def test_every_tensor_of_every_rank_is_what_torch_saved(two):
    checkpoint = open_checkpoint(two)
    assert (checkpoint.dialect, checkpoint.format) == ("megatron", "torch (per rank)")
    assert units(checkpoint) == ["tp0-pp0-ep0-vp0", "tp1-pp0-ep0-vp0"]
    same(checkpoint, "tp0-pp0-ep0-vp0", layers(0))
    same(checkpoint, "tp1-pp0-ep0-vp0", layers(1))


def test_the_iteration_s_folder_is_the_checkpoint_too(two):
    assert open_checkpoint(two / "iter_0000007").tensors == open_checkpoint(two).tensors


def test_the_arguments_are_plain_values(two):
    config = open_checkpoint(two).config
    assert config["params_dtype"] == "torch.bfloat16"
    said = ModelType.encoder_or_decoder.__reduce_ex__(2)[1][-1]  # its value, or by some Pythons its name
    assert config["model_type"] == f"ModelType({said!r})"
    assert config["tensor_model_parallel_size"] == 2


def test_members_of_enums_may_be_pickled_by_their_names(tmp_path, monkeypatch):
    """As Python 3.11.2 does, Debian 12's."""
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    save_rank(tmp_path, "mp_rank_00", arguments(), {"model": layers(0)})
    config = open_checkpoint(tmp_path).config
    assert config["model_type"] == "ModelType('encoder_or_decoder')"


def test_the_notes_say_what_was_found(two):
    assert open_checkpoint(two).notes == {
        "writer": "Megatron-LM (mp_rank_*)",
        "iteration": "7",
        "checkpoint_version": "3.0",
        "ranks": "tp 2, pp 1, ep 1, vp 1",
    }


def test_what_is_no_tensor_is_recorded_and_never_located(tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(6, 4)}}, "param_groups": [{"lr": 1e-4}]}
    path = save_rank(
        tmp_path, "mp_rank_00", arguments(), {"model": layers(0)}, optimizer=optimizer, opt_param_scheduler={"lr": 1.0}
    )
    (path.parent / "distrib_optim.pt").write_bytes(b"not even a zip")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.objects["optimizer/mp_rank_00"] == 6 * 4 * 4
    assert checkpoint.objects["distrib_optim.pt/mp_rank_00"] == len(b"not even a zip")
    assert checkpoint.objects["opt_param_scheduler/mp_rank_00"] == 0
    assert checkpoint.objects["tp0-pp0-ep0-vp0/decoder.layers.0.mlp.linear_fc1._extra_state"] == 0
    assert not any("exp_avg" in name for _, name in checkpoint.tensors)
    others = sorted(name.partition("/")[0] for name in checkpoint.objects if not name.startswith("tp0"))
    assert " ".join(others) == "distrib_optim.pt num_floating_point_operations_so_far opt_param_scheduler optimizer rng_state"


def test_a_value_that_nobody_knows_is_only_recorded(tmp_path):
    save_rank(tmp_path, "mp_rank_00", arguments(), {"model": layers(0)}, rerun_state_machine={"seen": [1, "two"]}, odd=b"12345")
    assert open_checkpoint(tmp_path).objects["rerun_state_machine/mp_rank_00"] == len("two")
    assert "odd/mp_rank_00" in open_checkpoint(tmp_path).objects


def test_extra_states_as_transformer_engine_pickles_them_are_objects(tmp_path):
    stream = io.BytesIO(b"scales")
    save_rank(tmp_path, "mp_rank_00", arguments(), {"model": {**layers(0), "x._extra_state": stream}})
    assert open_checkpoint(tmp_path).objects["tp0-pp0-ep0-vp0/x._extra_state"] == len(b"scales")


def test_virtual_chunks_are_units_of_their_own(tmp_path):
    for rank in range(2):
        models = {f"model{chunk}": layers(10 * rank + chunk, first=rank == chunk == 0, count=1) for chunk in range(2)}
        save_rank(tmp_path, f"mp_rank_00_{rank:03d}", arguments(pipeline=2, virtual=2), models)
    checkpoint = open_checkpoint(tmp_path)
    assert units(checkpoint) == [f"tp0-pp{rank}-ep0-vp{chunk}" for rank in range(2) for chunk in range(2)]
    same(checkpoint, "tp0-pp1-ep0-vp1", layers(11, first=False, count=1))
    same(checkpoint, "tp0-pp0-ep0-vp0", layers(0, count=1))


@pytest.mark.parametrize(("sizes", "unit"), [({"pipeline": 2}, "tp0-pp1-ep0-vp0"), ({"expert": 2}, "tp0-pp0-ep1-vp0")])
def test_a_single_number_is_what_the_arguments_say(tmp_path, sizes, unit):
    for rank in range(2):
        save_rank(tmp_path, f"mp_rank_00_{rank:03d}", arguments(**sizes), {"model": layers(rank)})
    same(open_checkpoint(tmp_path), unit, layers(1))


def test_all_four_axes_have_their_place(tmp_path):
    for t in range(2):
        for p in range(2):
            for e in range(2):
                save_rank(
                    tmp_path, f"mp_rank_{t:02d}_{p:03d}_{e:03d}", arguments(2, 2, 2), {"model": layers(4 * t + 2 * p + e)}
                )
    checkpoint = open_checkpoint(tmp_path)
    assert len(units(checkpoint)) == 8
    same(checkpoint, "tp1-pp0-ep1-vp0", layers(5))
    same(checkpoint, "tp0-pp1-ep0-vp0", layers(2))


@pytest.mark.parametrize(("stages", "unit"), [(True, "tp0-pp1-ep0-vp0"), (False, "tp0-pp0-ep1-vp0")])
def test_without_arguments_the_names_tell_pipeline_ranks_from_expert_ranks(tmp_path, stages, unit):
    for rank in range(2):
        save_rank(tmp_path, f"mp_rank_00_{rank:03d}", None, {"model": layers(rank, first=not stages or rank == 0)})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == {}
    assert unit in units(checkpoint)


def test_without_arguments_a_rank_that_lacks_is_still_missed(tmp_path):
    for folder in ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000"):
        save_rank(tmp_path, folder, None, {"model": layers(0)})
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(tmp_path)
    assert "  missing                   mp_rank_01_001" in str(error.value)


def test_tied_embeddings_and_views_lie_where_torch_says(tmp_path):
    whole = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    state: State = {"a": whole, "tied": whole, "rows": whole[2:4], "columns": whole[:, 3:5], "turned": whole.T}
    save_rank(tmp_path, "mp_rank_00", arguments(), {"model": state})
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, "tp0-pp0-ep0-vp0", state)
    places = {name: tensor.chunks[0] for (_, name), tensor in checkpoint.tensors.items()}
    assert places["a"].offset == places["tied"].offset
    assert places["rows"].offset == places["a"].offset + 2 * 8 * 4
    assert places["columns"].strides == (8, 1)
    assert places["turned"].strides == (1, 8)


def test_parameters_and_every_type_are_read(tmp_path):
    state: State = {
        "p": torch.nn.Parameter(torch.ones(2, 3)),
        "f8": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "i": torch.arange(3),
        "h": torch.ones(2, dtype=torch.float16),
    }
    save_rank(tmp_path, "mp_rank_00", arguments(), {"model": state})
    checkpoint = open_checkpoint(tmp_path)
    found = {name: tensor.dtype for (_, name), tensor in checkpoint.tensors.items()}
    assert found == {"p": "f32", "f8": "f8_e4m3", "i": "i64", "h": "f16"}
    assert torch.equal(held(checkpoint, checkpoint.tensors["tp0-pp0-ep0-vp0", "p"]), torch.ones(2, 3))


def test_storages_of_a_gpu_are_storages(tmp_path):
    path = save_rank(tmp_path, "mp_rank_00", arguments(), {"model": layers(0)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in entries.items():
        short = name.partition("/")[2]
        if short in ("version", ".data/serialization_id", ".format_version", ".storage_alignment"):
            continue
        turned = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0") if short == "data.pkl" else data
        assert short != "data.pkl" or turned != data
        writer.write_record(short, turned, len(turned))
    writer.write_end_of_file()
    same(open_checkpoint(tmp_path), "tp0-pp0-ep0-vp0", layers(0))


def test_nested_tables_have_dotted_names(tmp_path):
    nested = {"language_model": {"encoder": {"a": torch.ones(2)}, "b": torch.zeros(3)}}
    save_rank(tmp_path, "mp_rank_00", arguments(), {"model": nested})
    names = {name for _, name in open_checkpoint(tmp_path).tensors}
    assert names == {"language_model.encoder.a", "language_model.b"}


def test_only_what_is_asked_for_is_located(two):
    checkpoint = open_checkpoint(two, locate=lambda name: "embedding" in name)
    assert {name for (_, name), tensor in checkpoint.tensors.items() if tensor.chunks} == {"embedding.word_embeddings.weight"}


def test_another_file_of_a_rank_is_another_checkpoint(two):
    before = fingerprint(open_checkpoint(two))
    save_rank(two / "iter_0000007", "mp_rank_01", arguments(tensor=2), {"model": layers(5)})
    assert fingerprint(open_checkpoint(two)) != before


def _without(two: Path) -> None:
    shutil.rmtree(two / "iter_0000007" / "mp_rank_01")


def _alone(two: Path) -> None:
    (two / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt").unlink()


def _extra(two: Path) -> None:
    shutil.copytree(two / "iter_0000007" / "mp_rank_01", two / "iter_0000007" / "mp_rank_02")


def _pipeline(two: Path) -> None:
    for rank in range(2):
        save_rank(two / "iter_0000007", f"mp_rank_{rank:02d}", arguments(tensor=2, pipeline=2), {"model": layers(rank)})


def _mixed(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_01", arguments(tensor=2), {"model": layers(1)}, iteration=8)


def _other_world(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_01", arguments(tensor=4), {"model": layers(1)})


def _other_chunks(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_01", arguments(tensor=2), {"model0": layers(1), "model1": layers(1)})


def _virtual(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_00", arguments(tensor=2, virtual=2), {"model": layers(1)})


def _hole(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_00", arguments(tensor=2), {"model0": layers(1), "model2": layers(1)})


def _no_model(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_00", arguments(tensor=2), {})


def _huge(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_00", arguments(tensor=10**9), {"model": layers(1)})


def _text(two: Path) -> None:
    save_rank(two / "iter_0000007", "mp_rank_00", arguments(tensor="two"), {"model": layers(1)})


@pytest.mark.parametrize(
    ("damage", "what", "fact"),
    [
        (_without, "the ranks' folders are not all here, or too many", "missing                   mp_rank_01"),
        (_alone, "mp_rank_01/model_optim_rng.pt is missing", "where"),
        (_extra, "the ranks' folders are not all here, or too many", "too many                  mp_rank_02"),
        (
            _pipeline,
            "the ranks' folders are not all here, or too many",
            "missing                   mp_rank_00_000, mp_rank_00_001",
        ),
        (_mixed, "the ranks disagree on the iteration", "found     8"),
        (_other_world, "the ranks disagree on the parallel sizes", "found     (4, 1, 1)"),
        (_other_chunks, "the ranks disagree on the number of virtual chunks", "found     2"),
        (_virtual, "a rank's virtual chunks are not all here, or too many", "virtual_pipeline_model_parallel_size  2"),
        (_hole, "a rank's file does not hold the model's state", "model0, model2"),
        (_no_model, "a rank's file does not hold the model's state", "expected  model, or model0, model1, ..."),
        (_huge, "the training arguments say more ranks than any machine has", "1000000000, 1, 1"),
        (_text, "the training argument 'tensor_model_parallel_size' is not a size", "found     two"),
    ],
)
def test_ranks_that_are_no_whole_are_named(two, damage: Callable[[Path], None], what, fact):
    damage(two)
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(two)
    assert str(error.value).splitlines()[0] == what
    assert fact in str(error.value)


def test_experts_that_are_cut_otherwise_are_refused_by_name(tmp_path):
    args = arguments(tensor=2, expert=2)
    args.expert_tensor_parallel_size = 1
    save_rank(tmp_path, "mp_rank_00_000", args, {"model": layers(0)})
    with pytest.raises(NotSupported) as error:
        open_checkpoint(tmp_path)
    assert str(error.value).splitlines()[0] == "ranks whose experts are cut otherwise than the rest are not read"


def test_the_old_file_format_of_torch_is_refused_by_name(tmp_path):
    path = save_rank(tmp_path, "mp_rank_00", arguments(), {"model": layers(0)})
    torch.save({"model": layers(0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(NotSupported) as error:
        open_checkpoint(tmp_path)
    assert str(error.value).splitlines() == [
        "the old file format of torch.save is not read",
        f"  where     {tmp_path / 'mp_rank_00/model_optim_rng.pt'}",
        "  found     a bare pickle, as torch wrote before 1.6",
        "  try: load it with torch.load and save it again with torch.save",
    ]


def test_opening_does_not_read_the_tensors(two, monkeypatch):
    big = {"model": {"w": torch.zeros(1 << 20)}}
    for rank in range(2):
        save_rank(two / "iter_0000007", f"mp_rank_{rank:02d}", arguments(tensor=2), big)
    asked: list[int] = []
    real = os.pread

    def count(fd: int, size: int, at: int) -> bytes:
        asked.append(size)
        return real(fd, size, at)

    monkeypatch.setattr(os, "pread", count)
    open_checkpoint(two)
    assert sum(asked) < 200_000
