"""Processes do what threads do: the same bytes, the same findings, the first error; and they end with who asked them."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import carnet
from carnet import forks, pool
from carnet.storage.drafts import staging_of

WORTH = forks.WORTH
MEGATRON = Path(__file__).parent / "goldens" / "megatron" / "llama_tp2pp2"
CODES = {"to": "hf", "quantize": "nvfp4", "style": "compressed-tensors", "activations": "dynamic"}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fork for any work, however small."""
    monkeypatch.setattr(forks, "WORTH", 0)
    monkeypatch.setattr(forks, "ALONE", ())  # other tests of this process may have imported some


def children():
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def maker(work):
    @contextmanager
    def hire(tell):
        yield lambda number: work(number, tell)

    return hire


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_returned_comes_back_and_bytes_are_told_on_the_thread_that_called():
    found, told = {}, []

    def work(number, tell):
        tell(number)
        return os.getpid(), number * number

    def progress(nbytes):
        told.append((nbytes, threading.current_thread()))

    forks.run(range(1, 20), 3, maker(work), progress, found.__setitem__)
    assert {number: value for number, (_, value) in found.items()} == {number: number**2 for number in range(1, 20)}
    assert os.getpid() not in {pid for pid, _ in found.values()}
    assert sum(nbytes for nbytes, _ in told) == sum(range(1, 20))
    assert {thread for _, thread in told} == {threading.main_thread()}


@pytest.mark.parametrize("number", [1, 7, 19])
def test_the_first_error_comes_up_as_it_was_raised(number):
    def work(at, tell):
        if at == number:
            raise carnet.BadCheckpoint("it is damaged", {"where": "a"}, remedy="copy it again")

    before = children()
    with pytest.raises(carnet.BadCheckpoint) as caught:
        forks.run(range(1, 20), 3, maker(work), lambda nbytes: None)
    assert (caught.value.what, caught.value.facts, caught.value.remedy) == ("it is damaged", {"where": "a"}, "copy it again")
    assert children() <= before


def test_a_process_that_is_killed_is_an_error_of_the_machine():
    def work(number, tell):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(carnet.MachineFailed, match="worker process ended"):
        forks.run(range(3), 2, maker(work), lambda nbytes: None)


def test_a_machine_that_starts_no_more_processes_is_said_with_what_to_do(monkeypatch):
    begun, fork = [], os.fork

    def limited():  # as RLIMIT_NPROC has it, which root does not feel
        if begun:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        begun.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    before = children()
    with pytest.raises(carnet.MachineFailed, match="starts no more processes") as caught:
        forks.run(range(3), 2, maker(lambda number, tell: number), lambda nbytes: None)
    assert "ulimit -u" in caught.value.remedy
    assert children() <= before


def test_ctrl_c_ends_them():
    def stop(nbytes):
        raise KeyboardInterrupt

    def work(number, tell):
        tell(1)
        time.sleep(0.05)

    before = children()
    with pytest.raises(KeyboardInterrupt):
        forks.run(range(1000), 2, maker(work), stop)
    assert children() <= before


STOPPED = """
import os, signal
from contextlib import contextmanager
from carnet import forks
@contextmanager
def hire(tell):
    yield lambda number: number
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
found = {}
forks.run(range(4), 2, hire, lambda nbytes: None, found.__setitem__)
print(sorted(found))
"""


def test_ctrl_c_is_not_heard_by_one_that_just_begins():
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3]\n", "")


def test_a_crossing_by_processes_is_that_by_threads(tmp_path, monkeypatch):
    assert carnet.cross(MEGATRON, tmp_path / "forks", threads=3, **CODES)
    monkeypatch.setattr(forks, "pay", lambda *_: False)
    assert carnet.cross(MEGATRON, tmp_path / "threads", threads=3, **CODES)
    assert content(tmp_path / "forks") == content(tmp_path / "threads")


def test_an_examination_by_processes_finds_what_one_by_threads_does(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert carnet.cross(MEGATRON, out, **CODES)
    file = out / "model.safetensors"
    with file.open("r+b") as damaged:
        for place in range(file.stat().st_size // 2, file.stat().st_size, 4099):
            damaged.seek(place)
            damaged.write(b"\x35")
    (out / "carnet.json").unlink()
    asked = {"threads": 3, "config": None}
    by_processes = carnet.verify(MEGATRON, out, **asked)
    monkeypatch.setattr(forks, "pay", lambda *_: False)
    by_threads = carnet.verify(MEGATRON, out, **asked)
    assert by_processes.findings
    assert by_processes.findings == by_threads.findings


def test_the_pool_is_used_where_another_librarys_threads_would_be_missed(monkeypatch):
    monkeypatch.setattr(forks, "ALONE", ("a_library_with_threads",))
    assert forks.pay(2, 1)
    monkeypatch.setitem(sys.modules, "a_library_with_threads", sys)
    assert not forks.pay(2, 1)


CHILD = f"""
import sys, time
from carnet import forks
forks.WORTH = 0
import carnet.executor.run as run
work = run.work
run.work = lambda worker, job: (time.sleep(0.2), work(worker, job))[1]
import carnet
print("begun", flush=True)
carnet.cross({str(MEGATRON)!r}, sys.argv[1], threads=2, **{CODES!r})
"""


def test_they_end_with_the_one_who_asked_and_the_same_crossing_goes_on(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(out)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while not (staging_of(out) / "model.safetensors").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        child.kill()
    assert children
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in children):
            break
        time.sleep(0.01)
    else:
        pytest.fail("they still run")
    assert carnet.cross(MEGATRON, out, **CODES)


def test_threads_are_what_small_work_gets(monkeypatch):
    monkeypatch.setattr(forks, "WORTH", WORTH)
    assert not forks.pay(8, 1 << 20)
    assert forks.pay(8, 1 << 30)
    assert not forks.pay(1, 1 << 30)
    assert pool.run.__module__ == "carnet.pool"
