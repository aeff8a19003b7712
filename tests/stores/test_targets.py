"""A target in a store has the bytes of one on the disk; a killed crossing goes on, and leaves nothing that looks like a target."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import carnet
from carnet.storage.uploads import StreamedUpload
from tests.stores.server import Fault

GOLDENS = Path(__file__).parents[1] / "goldens"
MEGATRON = GOLDENS / "megatron"
TARGETS = (
    {"to": "hf"},
    {"to": "hf", "shard_size": "60k"},
    {"to": "trtllm", "tp": 2},
    {"to": "megatron", "pp": 2},
    {"to": "hf", "quantize": "fp8", "activations": "dynamic", "style": "compressed-tensors"},
    {"to": "hf", "quantize": "mxfp4", "shard_size": "60k"},
)


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_but_for_the_document(one, other):
    found, expected = on_disk(one), on_disk(other)
    assert found.keys() == expected.keys()
    return {name for name in found if found[name] != expected[name]} <= {"carnet.json"}


def crossing(ckpt, out, environ, code=""):
    """Start a crossing in a process of its own."""
    program = f"import carnet; {code}carnet.cross({ckpt!r}, {out!r}, to='hf', shard_size='60k')"
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **environ})


@pytest.mark.parametrize("to", TARGETS, ids=str)
@pytest.mark.parametrize("golden", ["llama_tp2pp2", "llama_legacy"])
def test_a_target_in_a_store_has_the_bytes_of_one_on_the_disk(golden, to, store, tmp_path):
    ckpt, out = store.fill(MEGATRON / golden, "ckpt"), f"{store.url}/models/out"
    assert carnet.cross(ckpt, out, **to).equal
    assert carnet.cross(MEGATRON / golden, tmp_path / "disk", **to).equal
    assert same_but_for_the_document(store.folder / "models/out", tmp_path / "disk")
    assert carnet.verify(out).equal
    with pytest.raises(carnet.BadRequest, match=f"{out} exists"):
        carnet.cross(ckpt, out, **to)


def marked(store):
    """Return the objects of the target, by when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (store.folder / "out").iterdir() if path.is_file()}


@pytest.fixture
def interrupted(store):
    """A crossing that was killed when its third file was being written: (source, target)."""
    ckpt, out = store.fill(MEGATRON / "llama_tp2pp2", "ckpt"), f"{store.url}/out"
    store.relay.fault = lambda asked: Fault(wait=60) if "model-00003" in asked.target and asked.method != "HEAD" else None
    process = crossing(ckpt, out, {})
    for _ in range(400):
        time.sleep(0.05)
        if (store.folder / "out/model-00002-of-00006.safetensors").exists():
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.relay.fault = lambda asked: None
    assert {"journal.jsonl", "model-00002-of-00006.safetensors"} <= marked(store).keys()
    assert "carnet.json" not in marked(store)
    return ckpt, out


def test_a_killed_crossing_goes_on_with_the_objects_that_are_whole(interrupted, store, tmp_path):
    ckpt, out = interrupted
    before = marked(store)
    assert carnet.cross(ckpt, out, to="hf", shard_size="60k").equal
    after = marked(store)
    assert {name for name in after if after[name] == before.get(name)} == before.keys() - {"journal.jsonl"}
    assert carnet.cross(ckpt, tmp_path / "disk", to="hf", shard_size="60k").equal
    assert same_but_for_the_document(store.folder / "out", tmp_path / "disk")


def test_what_is_not_finished_is_no_target(interrupted, store):
    ckpt, out = interrupted
    for ask in (carnet.inspect, carnet.verify, lambda out: carnet.verify(ckpt, out), lambda out: carnet.plan(out, to="hf")):
        with pytest.raises(carnet.BadRequest, match="is not finished") as refused:
            ask(out)
        assert f"carnet clean {out}" in refused.value.remedy


def test_another_crossing_does_not_touch_what_is_not_finished(interrupted, store):
    ckpt, out = interrupted
    before = marked(store)
    with pytest.raises(carnet.BadRequest, match="belongs to another plan"):
        carnet.cross(ckpt, out, to="hf", shard_size="50k")
    assert marked(store) == before


def test_of_a_source_that_changed_nothing_counts(interrupted, store):
    ckpt, out = interrupted
    before = marked(store)
    said = store.folder / "out/journal.jsonl"
    said.write_text(said.read_text().replace('"source": "', '"source": "0'))  # as a crossing of another state would have it
    assert carnet.cross(ckpt, out, to="hf", shard_size="60k").equal
    assert not {name for name, when in marked(store).items() if before.get(name) == when}


def test_clean_removes_what_carnet_wrote_and_nothing_else(interrupted, store):
    _, out = interrupted
    (store.folder / "out/mine").write_text("mine")
    (store.folder / "other").mkdir()
    (store.folder / "other/x").write_text("mine")
    words = [sys.executable, "-m", "carnet", "clean", out, "--json"]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "model-00001-of-00006.safetensors" in json.loads(told.stdout)["removed"]
    assert "shows in no listing" in told.stderr
    assert marked(store).keys() == {"mine"}
    assert (store.folder / "other/x").exists()
    with pytest.raises(carnet.BadRequest, match="no unfinished crossing"):
        carnet.clean(out)


def test_a_crossing_that_was_killed_at_its_last_moment_is_finished_by_the_same_command(store):
    ckpt, out = store.fill(MEGATRON / "llama_tp2pp2", "ckpt"), f"{store.url}/out"
    store.relay.fault = lambda asked: Fault(status=403) if "delete" in asked.target or asked.method == "DELETE" else None
    with pytest.raises(carnet.MachineFailed, match="cannot be removed"):
        carnet.cross(ckpt, out, to="hf")
    store.relay.fault = lambda asked: None
    assert {"journal.jsonl", "carnet.json"} <= marked(store).keys()
    before = marked(store)
    assert carnet.verify(out).equal
    assert carnet.cross(ckpt, out, to="hf").equal
    after = marked(store)
    assert after.keys() == before.keys() - {"journal.jsonl"}
    assert after["model.safetensors"] == before["model.safetensors"]


def test_a_folder_that_holds_something_is_refused_untouched(store):
    (store.folder / "out").mkdir()
    (store.folder / "out/mine").write_text("mine")
    for out in (f"{store.url}/out", f"{store.url}/out/mine", store.url):
        with pytest.raises(carnet.BadRequest):
            carnet.cross(MEGATRON / "llama_tp2pp2", out, to="hf")
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == ["mine"]


def test_a_target_in_its_source_is_refused(store):
    ckpt = store.fill(MEGATRON / "llama_tp2pp2", "ckpt")
    for out in (f"{ckpt}/iter_0000001/out", f"{ckpt}/iter_0000001", ckpt):
        with pytest.raises(carnet.BadRequest, match=r"lie in each other|exists"):
            carnet.cross(ckpt, out, to="hf")


def test_a_profile_of_the_multi_storage_client_is_written(tmp_path, monkeypatch):
    profiles = {"lab": {"storage_provider": {"type": "file", "options": {"base_path": str(tmp_path / "base")}}}}
    (tmp_path / "base").mkdir()
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": profiles}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    ckpt, out = MEGATRON / "llama_tp2pp2", "msc://lab/models/out"
    assert carnet.cross(ckpt, out, to="hf", shard_size="60k").equal
    assert carnet.cross(ckpt, tmp_path / "disk", to="hf", shard_size="60k").equal
    assert same_but_for_the_document(tmp_path / "base/models/out", tmp_path / "disk")
    assert carnet.verify(out).equal

    def stop(at):
        if at.done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carnet.cross(ckpt, f"{out}2", to="hf", shard_size="60k", progress=stop)
    with pytest.raises(carnet.BadRequest, match="is not finished"):
        carnet.inspect(f"{out}2")
    assert carnet.cross(ckpt, f"{out}2", to="hf", shard_size="60k").equal
    assert same_but_for_the_document(tmp_path / "base/models/out2", tmp_path / "disk")


# --- faults ---------------------------------------------------------------------------------------------------------------------


def is_written(asked):
    return asked.method in ("PUT", "POST") and "/out" in asked.target


PASSING = {"5xx": Fault(status=503), "no answer": Fault(silent=True), "a slow answer": Fault(wait=0.3)}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_is_none(fault, store):
    left = [4]

    def meets(asked):
        # obstore asks again for what may be done twice: not to begin and to end an upload, where it heard nothing
        met = is_written(asked) and (asked.method == "PUT" or not fault.silent)
        left[0] -= met
        return fault if met and left[0] >= 0 else None

    store.relay.fault = meets
    assert carnet.cross(MEGATRON / "llama_tp2pp2", f"{store.url}/out", to="hf", shard_size="60k").equal


def test_a_fault_that_lasts_is_one_error_and_leaves_nothing_that_looks_like_a_target(store, monkeypatch):
    monkeypatch.setattr("carnet.storage.obstores.RETRIES", {"max_retries": 1})
    store.relay.fault = lambda asked: Fault(status=503) if "model-00002" in asked.target and is_written(asked) else None
    out = f"{store.url}/out"
    with pytest.raises(carnet.MachineFailed, match="cannot be written: the store failed"):
        carnet.cross(MEGATRON / "llama_tp2pp2", out, to="hf", shard_size="60k")
    assert not {"carnet.json", "model-00002-of-00006.safetensors"} & marked(store).keys()
    with pytest.raises(carnet.BadRequest, match="is not finished"):
        carnet.inspect(out)
    store.relay.fault = lambda asked: None
    assert carnet.cross(MEGATRON / "llama_tp2pp2", out, to="hf", shard_size="60k").equal


def test_a_bucket_that_may_only_be_read_is_one_error(store):
    store.relay.fault = lambda asked: Fault(status=403) if asked.method in ("PUT", "POST", "DELETE") else None
    with pytest.raises(carnet.MachineFailed, match="the store refuses it") as refused:
        carnet.cross(MEGATRON / "llama_tp2pp2", f"{store.url}/out", to="hf")
    assert "credentials" in refused.value.remedy
    assert not (store.folder / "out").exists()


def test_a_source_that_changes_leaves_nothing_in_the_target(store):
    ckpt, out = store.fill(MEGATRON / "llama_tp2pp2", "ckpt"), f"{store.url}/out"
    path = next((store.folder / "ckpt").rglob("*.distcp"))

    def exchange(at):
        if at.done:
            path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
            path.with_suffix(".new").rename(path)

    with pytest.raises(carnet.BadCheckpoint, match="a file changed while it was used"):
        carnet.cross(ckpt, out, to="hf", progress=exchange)
    assert not (store.folder / "out").exists() or not marked(store)


@pytest.mark.parametrize("end", ["abandon", "close"])
def test_an_upload_whose_store_fails_at_its_end_ends(end):
    def send(pieces):
        try:
            list(pieces)
        finally:
            raise OSError("the store has not forgotten it")

    upload = StreamedUpload(send)
    upload.write(b"some")

    def finish():
        with suppress(OSError):
            getattr(upload, end)()

    ending = threading.Thread(target=finish, daemon=True)
    ending.start()
    ending.join(10)
    assert not ending.is_alive()
