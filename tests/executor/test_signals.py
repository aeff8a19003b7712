"""A crossing that is asked to end: real processes get real signals, at moments of what they change on the disk."""

import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import carnet
from carnet.plans import saved


@pytest.fixture(autouse=True, scope="module")
def heard():
    """What runs in the background, or beyond its terminal, is started with signals that nobody hears, and hands that on."""
    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGHUP, signal.SIGINT)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


# is sent signals when it is about to change something on the disk for the n-th time, or (0) to put the journal away, its last act, or
# (-1) when a worker is about to write
ASKED = """
import os, signal, sys, threading, time

number, signals = int(sys.argv.pop(1)), [int(word) for word in sys.argv.pop(1).split(",")]
left = number
only = threading.Lock()  # of many workers one sends

def here(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_WRONLY)
    if not writes and event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"):
        return False
    if number > 0:
        left -= 1
        return left == 0
    if number == 0:
        return event == "os.remove" and str(arguments[0]).endswith("journal.jsonl")
    return threading.current_thread() is not threading.main_thread() and only.acquire(blocking=False)

def hook(event, arguments):
    if here(event, arguments):
        for each in signals:
            os.kill(os.getpid(), each)
            time.sleep(1)  # of a worker, for which the main thread waits

sys.dont_write_bytecode = True  # what is imported changes nothing on the disk
from carnet import api
sys.addaudithook(hook)
from carnet.__main__ import main
main()
"""
# a lock that an interrupt left behind would be waited for for ever: by who examines, or by who sends to a store
LOCKED = """
import os, signal, threading, time
from carnet.cli import edge

def ask():
    time.sleep(0.0003)
    os.kill(os.getpid(), signal.SIGINT)

for _ in range(40):
    lock = threading.Condition()
    edge.heed(edge.unwind)
    try:
        threading.Thread(target=ask).start()
        while True:
            with lock:
                pass
    except edge.Ended:
        edge.heed(edge.stop_at_once)
    other = threading.Thread(target=lambda: print(lock.acquire(timeout=5), flush=True))
    other.start()
    other.join()
"""
GOES_ON = "carnet: interrupted; the same command goes on where it stopped\n"


@pytest.fixture(params=["cross", "run"])
def words(request, source, out, tmp_path):
    if request.param == "cross":
        return "cross", source, out, "--to", "hf"
    saved.save(carnet.plan(source, to="hf"), tmp_path / "a.plan")
    return "run", tmp_path / "a.plan", out


def asked(number, signals, words):
    command = [sys.executable, "-c", ASKED, number, ",".join(str(int(each)) for each in signals), *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=120)


def goes_on(words, source, out):
    """Ask that the same command finishes the work, and that it leaves nothing else."""
    done = subprocess.run([sys.executable, "-m", "carnet", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in out.parent.iterdir()} <= {"a.plan", "out", "source"}


@pytest.mark.parametrize("number", [1, 2, 4, 7, 12, 20, 0])
def test_a_crossing_ends_by_sigterm_without_half_a_target_and_says_how_to_go_on(number, words, source, out):
    done = asked(number, [signal.SIGTERM], words)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", GOES_ON)
    assert number == 0 or not out.exists()
    goes_on(words, source, out)


@pytest.mark.parametrize(("ended", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_the_end_of_a_session_is_as_sigterm(ended, code, words, source, out):
    done = asked(3, [ended], words)
    assert (done.returncode, done.stderr) == (code, GOES_ON)
    assert not out.exists()
    goes_on(words, source, out)


def test_a_second_signal_ends_at_once(words, source, out):
    done = asked(-1, [signal.SIGHUP, signal.SIGTERM], words)
    assert (done.returncode, done.stderr) == (143, "carnet: interrupted\n")
    assert not out.exists()
    goes_on(words, source, out)


def test_an_interrupt_leaves_no_lock_behind():
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, check=False, timeout=300)
    assert (done.stdout, done.stderr) == ("True\n" * 40, "")


def test_what_is_ignored_stays_ignored(words, source, out):
    command = [sys.executable, "-c", ASKED, "4", str(int(signal.SIGHUP)), *map(str, words)]
    done = subprocess.run(["nohup", *command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").exists()
