"""Damaged and hostile per-rank files, and hostile YAML: one clear error, nothing runs, nothing grows."""

import argparse
import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml

from carnet.errors import BadCheckpoint, CarnetError
from carnet.formats.detect import open_checkpoint
from carnet.formats.wrapped import parse_yaml, read_config

PLACE = "mp_rank_00/model_optim_rng.pt"
SIZES = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}


@pytest.fixture
def root(tmp_path, marker) -> Path:
    """A checkpoint of one rank."""
    save(tmp_path / "model", {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3)})
    return tmp_path / "model"


def save(root: Path, model: object, **more: object) -> None:
    (root / PLACE).parent.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(num_layers=1, **SIZES)
    torch.save({"args": args, "iteration": 3, "model": model, **more}, root / PLACE)


def refusal(root: Path) -> str:
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(root)
    return str(error.value)


def first(root: Path) -> str:
    return refusal(root).splitlines()[0]


class Tensor:
    """Pickles as a tensor with any geometry."""

    def __init__(self, offset: object, shape: object, strides: object, storage: torch.Tensor | None = None) -> None:
        self.geometry = (offset, shape, strides)
        self.storage = torch.arange(12.0) if storage is None else storage

    def __reduce__(self) -> tuple[object, ...]:
        storage = torch.storage.TypedStorage(wrap_storage=self.storage.untyped_storage(), dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, *self.geometry, False, OrderedDict())


def rewrite(root: Path, change: dict[str, bytes]) -> None:
    """Write the zip again by torch's own writer with other content in some entries."""
    with zipfile.ZipFile(root / PLACE) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    writer = torch._C.PyTorchFileWriter(str(root / PLACE))
    for name in ("data.pkl", "byteorder", *(name for name in entries if name.startswith("data/"))):
        data = change.get(name, entries[name])
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()


@pytest.mark.parametrize("place", ["model", "args", "optimizer", "rng_state"])
def test_a_command_anywhere_in_a_rank_s_file_is_refused_by_name(root, evil, place):
    save(root, {"w": torch.ones(2)}, **{place: {"x": evil}} if place != "model" else {})
    if place == "model":
        save(root, {"w": evil})
    text = refusal(root)
    assert text.splitlines()[0] == f"{PLACE} names code that carnet does not run"
    assert "  found     posix.system" in text


def test_a_command_in_the_distributed_optimizer_s_file_is_not_even_opened(root, evil):
    torch.save(evil, root / "mp_rank_00/distrib_optim.pt")
    assert open_checkpoint(root).objects["distrib_optim.pt/mp_rank_00"] > 0


def test_a_command_in_the_old_file_format_is_not_run(root, evil):
    torch.save(evil, root / PLACE, _use_new_zipfile_serialization=False)
    with pytest.raises(CarnetError) as error:
        open_checkpoint(root)
    assert str(error.value).splitlines()[0] == "the old file format of torch.save is not read"


def test_a_file_cut_anywhere_is_an_error_about_this_file(root):
    whole = (root / PLACE).read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        (root / PLACE).write_bytes(whole[:size])
        assert first(root).startswith(PLACE), size


def test_a_flipped_byte_never_is_a_traceback(root):
    whole = bytearray((root / PLACE).read_bytes())
    for position in range(0, len(whole), 13):
        whole[position] ^= 0xFF
        (root / PLACE).write_bytes(whole)
        try:
            open_checkpoint(root)
        except CarnetError as error:
            assert len(str(error).splitlines()[0]) < 300
        whole[position] ^= 0xFF


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (Tensor(1, (3, 4), (4, 1)), "reaches beyond its storage"),
        (Tensor(0, (3, 4), (5, 1)), "reaches beyond its storage"),
        (Tensor(0, (1 << 59,), (1,)), "reaches beyond its storage"),
        (Tensor(-1, (3,), (1,)), "an impossible place"),
        (Tensor(11, (3,), (-1,)), "an impossible shape"),
        (Tensor(0, (-3,), (1,)), "an impossible shape"),
        (Tensor(0, (3, 4), (1,)), "an impossible place"),
        (Tensor(0, (True, 4), (4, 1)), "an impossible shape"),
        (Tensor("0", (3,), (1,)), "an impossible place"),
        (Tensor(0, (1 << 40,), (0,)), "lie on top of each other"),
        (Tensor(0, (3, 4), (1, 1)), "lie on top of each other"),
        (Tensor(0, (4, 3), (2, 1)), "lie on top of each other"),
    ],
)
def test_a_tensor_that_its_storage_cannot_hold_is_an_error(root, tensor, fault):
    save(root, {"w": tensor})
    assert fault in refusal(root)


def test_a_storage_that_is_shorter_than_the_pickle_says_is_an_error(root):
    rewrite(root, {"data/0": b"\0" * 40})
    text = refusal(root)
    assert text.splitlines()[0] == f"{PLACE} has a storage of another size than its pickle says"
    assert "  expected  48 bytes" in text


def test_a_storage_that_is_not_in_the_file_is_an_error(root):
    data = (root / PLACE).read_bytes()
    (root / PLACE).write_bytes(data.replace(b"/data/1", b"/data/9"))
    assert first(root) == f"{PLACE} lacks the entry data/1"


def test_bytes_of_the_other_order_are_an_error(root):
    rewrite(root, {"byteorder": b"big"})
    assert first(root) == f"{PLACE} is not little-endian"


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ([1, 2], "a rank's file does not hold the model's state"),
        (None, "a rank's file does not hold the model's state"),
        ({1: torch.ones(2)}, "the model's state has a name that is not text"),
        ({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}, "the model's state has the name 'a.b' twice"),
    ],
)
def test_a_state_that_is_none_is_an_error(root, model, what):
    save(root, model)
    assert first(root) == what


def test_a_state_that_contains_itself_is_only_an_error(root):
    model: dict[str, object] = {}
    model["again"] = model
    save(root, model)
    assert first(root) == "the model's state is too large or nested too deeply"


def test_a_state_that_shares_itself_a_billion_times_is_only_an_error(root):
    inner: dict[str, object] = {f"{number}": None for number in range(10)}
    for _ in range(12):
        inner = {f"{number}": inner for number in range(10)}
    save(root, inner)
    assert first(root) == "the model's state is too large or nested too deeply"


def test_a_key_that_is_nested_too_deeply_to_hash_is_only_an_error(root):
    program = b"\x80\x04})" + b"\x85" * 100_000 + b"Ns."
    rewrite(root, {"data.pkl": program})
    assert first(root) == f"{PLACE} holds no state of a rank"
    # the same one level down
    rewrite(root, {"data.pkl": b"\x80\x04}\x8c\x05model})" + b"\x85" * 100_000 + b"Nss."})
    assert first(root) == "the model's state has a name that is not text"


def test_other_values_may_contain_themselves(root):
    loop: list[object] = [torch.ones(4)]
    loop.append(loop)
    save(root, {"w": torch.ones(2)}, optimizer=loop)
    assert open_checkpoint(root).objects["optimizer/mp_rank_00"] == 16


def test_a_rank_s_folder_that_climbs_out_is_refused(root, tmp_path):
    shutil.move(root / "mp_rank_00", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / "mp_rank_00")
    assert first(root) == f"the file name '{PLACE}' leads out of the checkpoint"


def test_an_optimizer_s_file_that_climbs_out_is_refused(root):
    os.symlink("/dev/zero", root / "mp_rank_00/distrib_optim.pt")
    assert first(root) == "the file name 'mp_rank_00/distrib_optim.pt' leads out of the checkpoint"


def test_a_file_that_hangs_is_refused(root):
    (root / PLACE).unlink()
    os.mkfifo(root / PLACE)
    assert first(root) == f"{PLACE} is not a regular file"


@pytest.mark.parametrize("name", ["mp_rank_", "mp_rank_0", "mp_rank_00_00x", "mp_rank_00_001_002_003", "mp_rank_99999_99999"])
def test_a_folder_with_an_odd_name_is_no_rank(root, name):
    save_args = {"model": {"w": torch.ones(2)}}
    for folder in ("mp_rank_00", name):
        (root / folder).mkdir(exist_ok=True)
        torch.save(save_args, root / folder / "model_optim_rng.pt")  # no arguments: the names must say it
    assert "rank" in first(root)


# --- YAML ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrapped(megatron) -> Path:
    """A torch_dist folder of Megatron-Bridge."""
    (megatron.root / "common.pt").unlink()
    (megatron.root / "run_config.yaml").write_text("model: {num_layers: 1}\n")
    assert open_checkpoint(megatron.root).config == {"num_layers": 1}
    return megatron.root


TAGS = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/object:os.system {{}}",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/tuple [1]",
    "!!python/str x",
    "!!binary aGk=",
    "!!set {{a}}",
    "!!omap [a: 1]",
    "!own x",
    "!!int x",
    "!!int ''",
    "!!bool maybe",
    "!!float x",
    "!!map x",
    "!!str [1]",
)


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_never_followed(wrapped, marker, tag):
    (wrapped / "run_config.yaml").write_text(f"model: {{num_layers: {tag.format(marker=marker)}}}\n")
    assert first(wrapped) == "run_config.yaml is not plain YAML"


def test_the_tag_works_on_a_reader_that_trusts(tmp_path):
    yaml.load(f"!!python/object/apply:os.system ['touch {tmp_path / 'trusting'}']", Loader=yaml.UnsafeLoader)
    assert (tmp_path / "trusting").exists()


def test_a_target_is_a_text_and_nothing_more(wrapped, marker):
    call = f"{{_target_: os.system, _call_: true, _args_: ['touch {marker}']}}"
    (wrapped / "run_config.yaml").write_text(f"model: {{_target_: os.system, num_layers: {call}}}\n")
    assert open_checkpoint(wrapped).config == {"_target_": "os.system", "num_layers": f"system('touch {marker}')"}


BOMB = "a: &a [1, 1]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(20))
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [*{chr(97 + n)}, *{chr(97 + n)}]}}\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "too large or nested too deeply"),
        (MERGES, "merge"),
        ("a: &a [*a]\n", "too large or nested too deeply"),
        ("a: " + "[" * 1_000_000, "nested too deeply"),
        ("a: " + "{b: " * 1_000_000, "nested too deeply"),
        ("\n".join(" " * n + "a:" for n in range(300)), "nested too deeply"),
        ("a: 1\na: 2\n", "doubled"),
        ("1: a\n'1': b\n", "doubled"),
        ("? [a]\n: 1\n", "no text"),
        ("a: *nobody\n", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: 1" + ":59" * 100_000, "only texts, numbers"),
        ("a: " + "9" * 100_000, "only texts, numbers"),
        ("a: \x00\n", "unacceptable character"),
        ("a: [", ""),
        ("%YAML 9.9\n--- a\n", ""),
    ],
)
def test_yaml_that_is_a_trap_is_only_an_error(text, reason):
    with pytest.raises(BadCheckpoint) as error:
        parse_yaml(text.encode(), "x.yaml", "-")
    assert str(error.value).splitlines()[0] == "x.yaml is not plain YAML"
    assert reason in str(error.value)
    assert len(str(error.value)) < 400


def test_yaml_that_is_no_text_is_only_an_error():
    with pytest.raises(BadCheckpoint):
        parse_yaml(b"a: \xff\xfe\n", "x.yaml", "-")


@pytest.mark.parametrize("text", ["[1]", "x", "1"])
def test_yaml_that_is_no_table_is_an_error(text):
    with pytest.raises(BadCheckpoint) as error:
        parse_yaml(text.encode(), "x.yaml", "-")
    assert str(error.value).splitlines()[0] == "x.yaml is not a YAML table"


def test_every_cut_of_a_config_is_read_or_refused(tmp_path):
    text = 'model:\n  _target_: a.b\n  f: {_target_: c, _call_: false}\n  x: [1, "two", 3.0e-1, &n null, *n]\n'
    for size in range(len(text)):
        try:
            parse_yaml(text[:size].encode(), "x.yaml", "-")
        except BadCheckpoint as error:
            assert error.what.startswith("x.yaml ")


def test_a_config_that_is_too_large_is_refused(tmp_path):
    with (tmp_path / "x.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadCheckpoint) as error:
        read_config(tmp_path / "x.yaml")
    assert str(error.value).splitlines()[0] == "x.yaml is too large for what it should hold"


def test_a_run_config_that_climbs_out_is_refused(wrapped, tmp_path):
    (tmp_path / "secret").write_text("model: {num_layers: 2}")
    (wrapped / "run_config.yaml").unlink()
    os.symlink(tmp_path / "secret", wrapped / "run_config.yaml")
    assert first(wrapped) == "the file name 'run_config.yaml' leads out of the checkpoint"


@pytest.mark.parametrize("part", ["weights", "context"])
def test_a_part_of_nemo_s_folder_that_climbs_out_is_refused(wrapped, tmp_path, part):
    nemo = tmp_path / "nemo"
    shutil.copytree(wrapped, nemo / "weights")
    (nemo / "context").mkdir()
    (nemo / "context/model.yaml").write_text("config: {num_layers: 1}\n")
    assert open_checkpoint(nemo).config == {"num_layers": 1}
    shutil.move(nemo / part, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", nemo / part)
    assert "leads out of the checkpoint" in first(nemo)


def test_arguments_in_a_plain_store_that_run_code_are_refused(megatron, evil):
    import torch.distributed.checkpoint as dcp

    root = megatron.root.parent / "plain"
    state = {"args": argparse.Namespace(x=1), "model": {"w": torch.ones(2)}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root, single_file_per_rank=True), no_dist=True)
    assert open_checkpoint(root).config == {"x": 1}
    state["args"] = evil
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root, single_file_per_rank=True), no_dist=True)
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(root)
    assert "names code that carnet does not run" in str(error.value)
