"""A checkpoint in a store is read as one on the disk, in few requests, and one that changes or is not what it seems is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import carnet
from carnet.storage.schemes import folder_at
from tests.stores.server import Fault

GOLDENS = Path(__file__).parents[1] / "goldens"
MEGATRON = GOLDENS / "megatron"


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_but_for_the_document(one, other):
    found, expected = on_disk(one), on_disk(other)
    assert found.keys() == expected.keys()
    return {name for name in found if found[name] != expected[name]} <= {"carnet.json"}  # it names its source


@pytest.mark.parametrize("golden", ["llama_tp2pp2", "llama_legacy"])
@pytest.mark.parametrize("to", [{"to": "hf"}, {"to": "trtllm", "tp": 2}], ids=str)
def test_a_crossing_from_a_store_writes_the_bytes_of_one_from_the_disk(golden, to, store, tmp_path):
    url = store.fill(MEGATRON / golden, "ckpt")
    assert carnet.inspect(url).checkpoint.tensors == carnet.inspect(MEGATRON / golden).checkpoint.tensors
    assert carnet.cross(url, tmp_path / "store", **to).equal
    assert carnet.cross(MEGATRON / golden, tmp_path / "disk", **to).equal
    assert same_but_for_the_document(tmp_path / "store", tmp_path / "disk")
    assert carnet.verify(url, tmp_path / "store").equal


def test_a_target_that_was_brought_to_a_store_is_verified_there(store, tmp_path):
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "out", to="hf").equal
    url = store.fill(tmp_path / "out", "out")
    assert carnet.verify(MEGATRON / "llama_tp2pp2", url).equal
    assert carnet.verify(url).equal
    weights = store.folder / "out/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert not carnet.verify(url).equal


def test_what_goes_along_and_what_configs_say_is_read_from_a_store_too(store, tmp_path):
    hf = store.fill(GOLDENS / "trtllm/llama_kv2/hf", "hf")
    ckpt = store.fill(MEGATRON / "llama_legacy", "ckpt")
    assert carnet.cross(hf, tmp_path / "again", to="hf").equal
    assert carnet.cross(GOLDENS / "trtllm/llama_kv2/hf", tmp_path / "disk", to="hf").equal
    assert same_but_for_the_document(tmp_path / "again", tmp_path / "disk")
    made = carnet.plan(ckpt, to="hf")
    assert carnet.run(made, tmp_path / "run") == tmp_path / "run"
    assert made.source.startswith(ckpt)


def test_planning_a_large_store_takes_few_requests(store):
    """A file costs the request that opens it, and one for each 4 MB of items that lie together."""
    url = store.fill(MEGATRON / "llama_te_pp2_vpp", "ckpt")
    made = carnet.plan(url, to="hf")
    asked = Counter((each.method, "list-type" in each.target) for each in store.requests())
    assert len(made.steps) > 20
    assert asked["GET", False] <= 16
    assert sum(asked.values()) <= 30


def test_reads_that_follow_each_other_cost_one_request_for_many(store):
    (store.folder / "x").write_bytes(bytes(range(256)) * (40 << 12))  # 40 MiB
    file = folder_at(store.url).open("x")
    store.requests()
    got = bytearray(50_000)
    for at in range(100_000, 30_000_000, 50_000):
        file.read_into(at, memoryview(got))
        assert got == (bytes(range(256)) * 400)[at % 256 :][:50_000]
    assert len(store.requests()) < 8
    far = [(at, 1000) for at in range(0, 40 << 20, 5 << 20)]
    file.expect(far)
    for at, nbytes in far:
        file.read_into(at, memoryview(got)[:nbytes])
    assert len(store.requests()) <= len(far)


def test_files_of_no_byte_and_names_that_no_object_has(store):
    (store.folder / "empty").touch()
    folder = folder_at(store.url)
    assert folder.open("empty").stamp.nbytes == 0
    assert (folder.kind("empty"), folder.kind("other"), folder.kind()) == ("file", "", "folder")
    for name in ("other", "a/../b", "", "a//b", "\0"):
        with pytest.raises(carnet.BadCheckpoint):
            folder.open(name)


# --- faults ---------------------------------------------------------------------------------------------------------------------


def data_of(asked):
    return asked.method == "GET" and ".distcp" in asked.target


def some(relay, fault, of=data_of, times=3):
    """Let the first requests of a kind meet a fault."""
    left = [times]

    def meets(asked):
        if of(asked) and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    relay.fault = meets


PASSING = {
    "5xx": Fault(status=503),
    "a cut connection": Fault(cut=0),
    "a cut answer": Fault(cut=700),
    "a slow answer": Fault(wait=0.3),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_is_none(fault, store, tmp_path):
    url = store.fill(MEGATRON / "llama_tp2pp2", "ckpt")
    some(store.relay, fault)
    assert carnet.cross(url, tmp_path / "out", to="hf").equal


def test_a_fault_that_lasts_is_one_error_and_leaves_no_target(store, tmp_path, monkeypatch):
    url = store.fill(MEGATRON / "llama_tp2pp2", "ckpt")
    made = carnet.plan(url, to="hf")
    store.relay.fault = lambda asked: Fault(status=503) if data_of(asked) else None
    monkeypatch.setattr("carnet.storage.obstores.RETRIES", {"max_retries": 1})
    with pytest.raises(carnet.MachineFailed, match="the store failed") as refused:
        carnet.run(made, tmp_path / "out")
    assert "run the same command again" in refused.value.remedy
    assert not (tmp_path / "out").exists()
    store.relay.fault = lambda asked: None
    carnet.run(made, tmp_path / "out")
    assert carnet.verify(url, tmp_path / "out").equal


def test_an_object_that_changes_while_it_is_read_is_refused(store, tmp_path):
    url = store.fill(MEGATRON / "llama_tp2pp2", "ckpt")
    made = carnet.plan(url, to="hf")
    path = next((store.folder / "ckpt").rglob("*.distcp"))

    def exchange(at):
        if 0 < at.done < at.total:
            other = path.with_suffix(".new")
            other.write_bytes(bytes(path.stat().st_size))
            other.rename(path)

    with pytest.raises(carnet.BadCheckpoint, match="a file changed while it was used"):
        carnet.run(made, tmp_path / "out", progress=exchange)
    assert not (tmp_path / "out").exists()


def test_an_object_that_changes_between_two_reads_of_it_is_refused_at_once(store):
    path = store.folder / "x"
    path.write_bytes(bytes(3 << 20))
    file, into = folder_at(store.url).open("x"), memoryview(bytearray(1000))
    path.write_bytes(bytes(2 << 20))
    with pytest.raises(carnet.BadCheckpoint, match="a file changed while it was used"):
        file.read_into(1 << 20, into)
    with pytest.raises(carnet.BadCheckpoint, match="a file changed while it was used"):
        file.read_into((3 << 20) - 1000, into)


def lie(head):
    """Say of a file of 3 MiB that it is larger."""
    return head.replace(b"/3145728", b"/9145728")


def test_a_store_that_lies_about_sizes_is_refused(store):
    (store.folder / "x").write_bytes(bytes(3 << 20))
    store.relay.fault = lambda asked: Fault(patch=lie) if asked.method == "GET" else None
    file = folder_at(store.url).open("x")
    assert file.stamp.nbytes == 9145728
    with pytest.raises(carnet.BadCheckpoint, match=r"does not give|changed while"):
        file.read_into(5 << 20, memoryview(bytearray(1000)))
    with pytest.raises(carnet.BadCheckpoint, match="does not give what it says that it has"):
        file.read_into((3 << 20) - 500, memoryview(bytearray(1 << 20)))


WRONG = {
    "no such bucket": ("s3://nowhere-at-all/x", {}, carnet.CarnetError),
    "no such folder": ("{url}/nothing", {}, carnet.BadRequest),
    "wrong credentials": ("{url}/ckpt", {"AWS_SECRET_ACCESS_KEY": "no"}, carnet.MachineFailed),
    "no bucket": ("s3://", {}, carnet.BadOption),
    "no bucket, but a folder": ("s3:///x", {}, carnet.BadOption),
    "a folder above": ("{url}/ckpt/../ckpt", {}, carnet.BadOption),
}


@pytest.mark.parametrize(("place", "said", "kind"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_reached_is_one_error_with_a_way_out(place, said, kind, store, monkeypatch):
    store.fill(MEGATRON / "llama_tp2pp2", "ckpt")
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as refused:
        carnet.inspect(place.format(url=store.url))
    assert refused.value.remedy or kind is carnet.BadRequest
    assert "\n" not in refused.value.what


def test_a_server_that_is_not_there_is_one_error(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("carnet.storage.obstores.RETRIES", {"max_retries": 1})
    with pytest.raises(carnet.MachineFailed, match="the store failed"):
        carnet.inspect(f"{store.url}/ckpt")


# --- other libraries ------------------------------------------------------------------------------------------------------------


def test_a_profile_of_the_multi_storage_client_is_read(tmp_path, monkeypatch):
    profiles = {"lab": {"storage_provider": {"type": "file", "options": {"base_path": str(tmp_path / "base")}}}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": profiles}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    shutil.copytree(MEGATRON / "llama_tp2pp2", tmp_path / "base/models/ckpt")
    url = "msc://lab/models/ckpt"
    assert carnet.inspect(url).checkpoint.tensors == carnet.inspect(MEGATRON / "llama_tp2pp2").checkpoint.tensors
    assert carnet.cross(url, tmp_path / "store", to="hf").equal
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "disk", to="hf").equal
    assert same_but_for_the_document(tmp_path / "store", tmp_path / "disk")
    for place in ("msc://lab/models/other", "msc://nobody/x"):
        with pytest.raises(carnet.CarnetError):
            carnet.inspect(place)
