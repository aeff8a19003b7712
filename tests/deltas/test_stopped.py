"""A delta that is stopped, however, leaves no target that is not whole; the same command then makes it from its beginning."""

import shutil
import signal
import subprocess
import sys

import pytest

import carnet
from carnet import deltas
from carnet.errors import MachineFailed
from tests.deltas.hand import tensors

# is killed when it is about to change something on the disk for the n-th time
KILLED = """
import os, sys
left = int(sys.argv.pop(1))
def hook(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_WRONLY)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"):
        left -= 1
        if not left:
            os.kill(os.getpid(), 9)
sys.dont_write_bytecode = True
from carnet import api, deltas
sys.addaudithook(hook)
from carnet.__main__ import main
main()
"""


def killed(at, *words):
    done = subprocess.run([sys.executable, "-c", KILLED, str(at), *map(str, words)], capture_output=True, check=False)
    return done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("verb", ["delta", "apply"])
def test_a_process_that_is_killed_leaves_all_or_nothing(versions, tmp_path, verb):
    deltas.delta(versions.a, versions.b, tmp_path / "step")
    given = {"delta": (versions.a, versions.b), "apply": (versions.a, tmp_path / "step")}[verb]
    moments = 0
    for at in range(1, 60, 3):
        out = tmp_path / f"out-{at}"
        if not killed(at, verb, *given, out):
            assert at > 8
            break
        moments += 1
        if verb == "apply" and out.exists():
            assert tensors(out) == tensors(versions.b)
        getattr(deltas, verb)(*given, out)
        whole = tmp_path / "step" if verb == "delta" else versions.b
        assert tensors(out) == tensors(whole)
        assert not out.with_name(f"{out.name}.partial").exists()
    assert moments > 2


@pytest.mark.parametrize("verb", ["delta", "apply"])
def test_an_interrupt_leaves_nothing(versions, tmp_path, verb):
    deltas.delta(versions.a, versions.b, tmp_path / "step")

    def stop(at):
        if at.done:
            raise KeyboardInterrupt

    given = {"delta": (versions.a, versions.b), "apply": (versions.a, tmp_path / "step")}[verb]
    with pytest.raises(KeyboardInterrupt):
        getattr(deltas, verb)(*given, tmp_path / "out", progress=stop)
    assert not list(tmp_path.glob("out*"))


def test_what_a_killed_delta_left_can_be_cleaned_up(versions, tmp_path):
    assert killed(6, "delta", versions.a, versions.b, tmp_path / "out")
    assert carnet.clean(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_compresses_is_asked_for_by_name(versions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MachineFailed, match="what compresses deltas is not installed") as error:
        deltas.delta(versions.a, versions.b, tmp_path / "out")
    assert error.value.remedy == "pip install 'carnet[delta]'"


def test_a_source_that_changes_meanwhile_is_noticed(versions, tmp_path):
    shutil.copytree(versions.b, tmp_path / "b")

    def touch(at):
        if at.done:
            (tmp_path / "b" / "config.json").write_text((versions.b / "config.json").read_text() + " ")

    with pytest.raises(carnet.BadCheckpoint, match="a file changed while it was used"):
        deltas.delta(versions.a, tmp_path / "b", tmp_path / "out", progress=touch)
    assert not list(tmp_path.glob("out*"))
