"""Deltas of what lies in a store, written there, are those of the disk."""

from pathlib import Path

import pytest

import carnet
from carnet import deltas

LLAMA = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def versions(tmp_path):
    """A small model in two shards, and the same after a step that changed the last byte of each."""
    for name in "ab":
        carnet.cross(LLAMA, tmp_path / name, to="hf", shard_size="60k")
    for path in (tmp_path / "b").glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1
        path.write_bytes(raw)
    return tmp_path / "a", tmp_path / "b"


def test_a_delta_in_a_store_has_the_bytes_of_one_on_the_disk(store, versions, tmp_path):
    a, b = (store.fill(folder, folder.name) for folder in versions)
    made = deltas.delta(a, b, f"{store.url}/published/weight_v000001")
    assert made.changed == len([*versions[1].glob("*.safetensors")]) > 1
    deltas.delta(*versions, tmp_path / "disk")
    there = store.folder / "published/weight_v000001"
    assert on_disk(there) == on_disk(tmp_path / "disk")
    written = sorted(there.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert written[-1].name == "carnet.json"
    with pytest.raises(carnet.BadRequest, match="exists"):
        deltas.delta(a, b, f"{store.url}/published/weight_v000001")


def test_a_delta_of_a_store_is_applied_there(store, versions, tmp_path):
    deltas.delta(*versions, tmp_path / "delta")
    a, delta = store.fill(versions[0], "a"), store.fill(tmp_path / "delta", "delta")
    assert deltas.apply(a, delta, f"{store.url}/out").proven
    deltas.apply(versions[0], tmp_path / "delta", tmp_path / "out")
    assert on_disk(store.folder / "out") == on_disk(tmp_path / "out")
    assert carnet.verify(f"{store.url}/out")
    assert deltas.verify(a, delta, against=versions[1])


def test_what_is_refused_leaves_nothing_in_a_store(store, versions, tmp_path):
    deltas.delta(*versions, tmp_path / "delta")
    with pytest.raises(carnet.BadRequest, match="the base is another one"):
        deltas.apply(store.fill(versions[1], "b"), tmp_path / "delta", f"{store.url}/out")
    assert not [*(store.folder / "out").rglob("*")]
