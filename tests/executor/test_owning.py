"""One crossing owns its target: real processes that are killed at every point, or want the same target at once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import carnet
from carnet.errors import BadCheckpoint, BadRequest
from carnet.plans import saved
from carnet.storage.drafts import staging_of


def is_source(out, source):
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def command(*words):
    return [sys.executable, "-m", "carnet", *map(str, words)]


# --- killed at every point -----------------------------------------------------------------------------------------------

# kills itself before the n-th time that it changes something in the file system, and (0) before its last act, when the journal
# leaves a target that is in place; Python tells its audit hooks, and how often depends on threads too
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import carnet
from carnet.plans import saved

verb, base = sys.argv[1], Path(sys.argv[2])
source, plan = base / "source", base / "a.plan"
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")

def act(out):
    if verb == "cross":
        assert carnet.cross(source, out, to="hf").equal
    elif verb == "run":
        carnet.run(plan, out)
    else:
        saved.save(carnet.plan(source, to="hf"), out)

def fork(what):
    pid = os.fork()
    if pid == 0:
        try:
            what()
            os._exit(0)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed(number, out):
    left = number
    def hook(event, arguments):
        nonlocal left
        if number == 0 and event == "os.remove" and str(arguments[0]).endswith("journal.jsonl"):
            os.kill(os.getpid(), signal.SIGKILL)
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_WRONLY)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    act(out)

number, found = 0, []
while True:
    place = base / f"{number}"
    place.mkdir()
    out = place / "out"
    died = fork(lambda: killed(number, out))
    between = sorted(os.listdir(place))
    again = fork(lambda: act(out)) if died else None
    found.append([died, between, again, sorted(os.listdir(place)), sorted(os.listdir(out)) if verb != "plan" else []])
    if died == 0 or number > 300:
        break
    shutil.rmtree(place)
    number += 2
print(json.dumps(found))
"""


@pytest.mark.parametrize("verb", ["cross", "run"])
def test_a_kill_between_any_two_changes_of_the_disk_is_resumed_by_the_same_command(source, tmp_path, verb):
    saved.save(carnet.plan(source, to="hf"), tmp_path / "a.plan")
    child = subprocess.run([sys.executable, "-c", KILLED, verb, tmp_path], capture_output=True, text=True, check=True)
    *killed, last = json.loads(child.stdout.splitlines()[-1])
    files = ["carnet.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert last == [0, ["out"], None, ["out"], files]
    assert len(killed) > 6
    assert {died for died, *_ in killed} == {-signal.SIGKILL}
    assert [row for row in killed if row[2:] != [0, ["out"], files]] == []
    assert killed[0][1] == ["out"]  # after the rename: the target was there, and its journal with it


def test_a_run_that_is_killed_at_random_times_is_finished_by_the_same_command(source, out, tmp_path):
    moments = random.Random(0)
    for _ in range(12):
        with subprocess.Popen(
            command("cross", source, out, "--to", "hf"), stderr=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            time.sleep(moments.uniform(0.1, 1.5))
            child.send_signal(signal.SIGKILL)
        if out.exists():
            break
    done = subprocess.run(command("cross", source, out, "--to", "hf"), capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "exists" in done.stderr
    assert is_source(out, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_staging_folder_that_somebody_renamed_is_no_target(source, out):
    plan = carnet.plan(source, to="hf")
    with pytest.raises(KeyboardInterrupt):
        carnet.run(plan, out, progress=interrupt)
    staging_of(out).rename(out)
    before = sorted(out.iterdir())
    with pytest.raises(BadRequest, match="exists"):
        carnet.run(plan, out)
    assert sorted(out.iterdir()) == before


def interrupt(at):
    if at.total:
        raise KeyboardInterrupt


# --- two at once ---------------------------------------------------------------------------------------------------------

# waits where it is told to, and says so
WAITING = """
import sys, time
from pathlib import Path
import carnet
verb, base, share = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
def progress(at):
    if at.total and at.done >= share * at.total and not (base / "waits").exists():
        (base / "waits").touch()
        while not (base / "go").exists():
            time.sleep(0.01)
if verb == "run":
    carnet.run(base / "a.plan", base / "out", progress=progress)
else:
    assert carnet.cross(base / "source", base / "out", to="hf", progress=progress).equal
"""


# of a crossing a quarter is writing, and the rest examining
@pytest.mark.parametrize(
    ("verb", "share"), [("cross", 0), ("cross", 0.2), ("cross", 0.5), ("cross", 1), ("run", 0), ("run", 1)]
)
def test_of_two_equal_commands_one_wins_and_the_other_says_who_holds_the_target(source, out, tmp_path, verb, share):
    plan = carnet.plan(source, to="hf")
    saved.save(plan, tmp_path / "a.plan")
    words = [sys.executable, "-c", WAITING, verb, str(tmp_path), str(share)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as first:
        while not (tmp_path / "waits").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.01)
        before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in staging_of(out).iterdir()}
        for second in (command("cross", source, out, "--to", "hf"), command("run", tmp_path / "a.plan", out)):
            refused = subprocess.run(second, capture_output=True, text=True, check=False)
            assert refused.returncode == 1
            assert "another run is writing out.partial" in refused.stderr
            assert re.search(rf"held by +process {first.pid} on {os.uname().nodename}\n +since +20\d\d-", refused.stderr)
        assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in staging_of(out).iterdir()} == before
        (tmp_path / "go").touch()
    assert first.returncode == 0
    assert is_source(out, source)
    assert not staging_of(out).exists()


def test_of_many_equal_commands_at_once_one_writes_the_target(source, out, tmp_path):
    children = [
        subprocess.Popen(command("cross", source, out, "--to", "hf"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [(child.communicate()[1], child.returncode) for child in children]
    assert sorted(code for _, code in said) == [0, 1, 1, 1, 1, 1]
    assert all("another run is writing" in words or "exists" in words for words, code in said if code)
    assert is_source(out, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# --- the source meanwhile ------------------------------------------------------------------------------------------------


def exchanged(path: Path) -> None:
    """Put another file in its place, as long and as old."""
    look = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    os.utime(other, ns=(look.st_atime_ns, look.st_mtime_ns))
    other.replace(path)


def rewritten(path: Path) -> None:
    """Write into the file, and set its time back."""
    look = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(look.st_atime_ns, look.st_mtime_ns))


def touched(path: Path) -> None:
    path.touch()


class At:
    """Do something to a file once, when a share of the work is done."""

    def __init__(self, act, path, share):
        self.act, self.path, self.share = act, path, share

    def __call__(self, at):
        if self.act and at.total and at.done >= self.share * at.total:
            act, self.act = self.act, None
            act(self.path)


@pytest.mark.parametrize("act", [exchanged, rewritten, touched])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 1])
def test_a_source_that_changed_on_the_way_is_never_equal(source, out, act, share):
    with pytest.raises(BadCheckpoint, match="changed while it was used"):
        carnet.cross(source, out, to="hf", progress=At(act, source / "model.safetensors", share))
    assert not out.exists()
    assert not staging_of(out).exists()
    assert carnet.cross(source, out, to="hf").equal


@pytest.mark.parametrize("act", [exchanged, rewritten])
@pytest.mark.parametrize("share", [0, 1])
def test_a_source_that_changed_on_the_way_is_never_written(source, out, act, share):
    with pytest.raises(BadCheckpoint, match="changed while it was used"):
        carnet.run(carnet.plan(source, to="hf"), out, progress=At(act, source / "model.safetensors", share))
    assert not out.exists()


@pytest.mark.parametrize("side", ["source", "out"])
@pytest.mark.parametrize("act", [exchanged, rewritten])
def test_what_changed_while_it_was_verified_is_not_equal(source, out, act, side):
    carnet.cross(source, out, to="hf")
    with pytest.raises(BadCheckpoint, match="changed while it was used"):
        carnet.verify(source, out, progress=At(act, {"source": source, "out": out}[side] / "model.safetensors", 1))


@pytest.mark.parametrize("act", [exchanged, rewritten])
def test_what_was_written_of_an_earlier_state_of_the_source_counts_for_nothing(source, out, act):
    plan = carnet.plan(source, to="hf")
    with pytest.raises(KeyboardInterrupt):
        carnet.run(plan, out, progress=At(interrupt_at, source, 1))
    act(source / "model.safetensors")  # size and time are as they were: it is the source that was planned
    carnet.run(plan, out)
    assert is_source(out, source)


def interrupt_at(path: Path) -> None:
    raise KeyboardInterrupt


# --- what run says -------------------------------------------------------------------------------------------------------


def test_a_run_says_that_nobody_examined_what_it_wrote(source, out, tmp_path):
    saved.save(carnet.plan(source, to="hf"), tmp_path / "a.plan")
    done = subprocess.run(command("run", tmp_path / "a.plan", out), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith(f"carnet: {out} is written, not examined: `carnet verify ")
    assert json.loads((out / "carnet.json").read_text())["state"] == "written, not verified"
    alone = subprocess.run(command("verify", out), capture_output=True, text=True, check=False)
    assert alone.returncode == 1
    assert "a target alone has nothing to be compared with" in alone.stderr
    assert subprocess.run(command("verify", source, out), capture_output=True, text=True, check=False).returncode == 0
