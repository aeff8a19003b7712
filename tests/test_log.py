"""What --log and --quiet do: lines of JSON of what happened, and no talk; the same in Python by the logger ``carnet``."""

import json
import logging
import resource
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import carnet
from carnet import signing
from tests.terminal import on_a_terminal

LLAMA = Path(__file__).parent / "goldens/megatron/llama_te_pp2_vpp"


def command(*words, code=0, **given):
    ended = subprocess.run([sys.executable, "-m", "carnet", *map(str, words)], capture_output=True, text=True, **given)  # noqa: PLW1510
    assert ended.returncode == code, ended.stderr
    return ended


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(path):
    return [(each["verb"], each["event"], each.get("phase")) for each in lines(path)]


CROSSED = [
    ("cross", "start", None),
    *(("cross", "phase", name) for name in ("planning", "writing", "flushing", "examining")),
    ("cross", "end", None),
]


def test_a_log_has_the_start_the_phases_and_the_end_with_their_times_and_facts(tmp_path):
    log = tmp_path / "log"
    command("cross", LLAMA, tmp_path / "out", "--to", "hf", "--memory", "1G", "--log", log)
    assert events(log) == CROSSED
    found = lines(log)
    assert found[0]["version"] == carnet.__version__
    assert found[0]["arguments"] == {"path": str(LLAMA), "out": str(tmp_path / "out"), "to": "hf", "memory": 1_000_000_000}
    assert (found[-1]["good"], found[-1]["result"].startswith("Verdict(equal")) == (True, True)
    assert 0 == found[1]["done"] < found[3]["done"] < found[3]["total"] == found[4]["total"]
    seconds, times = [each["seconds"] for each in found], [datetime.fromisoformat(each["time"]) for each in found]
    assert seconds == sorted(seconds)
    assert times == sorted(times)
    assert abs((times[-1] - times[0]) - timedelta(seconds=seconds[-1])) < timedelta(seconds=0.1)
    assert times[0].utcoffset() == timedelta(0)


def test_a_log_is_appended_to_and_a_refusal_says_what_was_said_to_the_person(tmp_path):
    log = tmp_path / "log"
    command("cross", LLAMA, tmp_path / "out", "--to", "hf", "--log", log)
    refused = command("cross", LLAMA, tmp_path / "out", "--to", "hf", "--log", log, "--json", code=1)
    assert events(log) == [*CROSSED, ("cross", "start", None), ("cross", "phase", "planning"), ("cross", "refusal", None)]
    last = lines(log)[-1]
    assert {name: last[name] for name in ("error", "facts", "try")} == json.loads(refused.stdout)
    assert last["kind"] == "BadRequest"


def test_what_differs_ends_as_what_is_not_good(tmp_path):
    command("cross", LLAMA, tmp_path / "out", "--to", "hf")
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\1\2")
    command("verify", tmp_path / "out", "--log", tmp_path / "log", code=3)
    last = lines(tmp_path / "log")[-1]
    assert (last["verb"], last["event"], last["good"]) == ("verify", "end", False)


def test_no_log_is_written_where_something_else_lies(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for place in ("/dev/full", tmp_path / "link"):
        refused = command("inspect", LLAMA, "--log", place, code=1)
        assert "a file of its own is needed here" in refused.stderr
    assert not (tmp_path / "there").exists()
    (tmp_path / "config.json").write_text('{"tied": true}')
    assert "exists and is not a log" in command("inspect", LLAMA, "--log", tmp_path / "config.json", code=1).stderr
    assert (tmp_path / "config.json").read_text() == '{"tied": true}'
    assert "has to be a path of this machine" in command("inspect", LLAMA, "--log", "s3://a/b", code=2).stderr


def test_a_log_that_cannot_grow_says_so_once_and_stops_nothing(tmp_path):
    plain = command("inspect", LLAMA)
    small = command(
        "inspect", LLAMA, "--log", tmp_path / "log", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
    )
    assert small.stdout == plain.stdout
    assert small.stderr == "carnet: the log takes nothing more: [Errno 27] File too large\n"


def test_a_log_has_no_secret(tmp_path):
    key = signing.Key(key=tmp_path / "none", password="open sesame", identity_token="token")
    with logged() as found, pytest.raises(carnet.BadRequest):
        signing.sign(tmp_path, key)
    assert [each["event"] for each in found] == ["start", "phase", "refusal"]
    assert "sesame" not in str(found)
    assert "token" not in str(found)


def test_a_key_in_a_url_is_not_kept_and_every_line_is_json(tmp_path):
    log = tmp_path / "log"
    command("cross", "s3://KEY:HIDDEN@bucket/run", tmp_path / "out", "--to", "hf", "--log", log, code=2)
    command("cross", LLAMA, tmp_path / "out", "--to", "hf", "--adapter", "own", "--adapter-scale", "nan", "--log", log, code=2)

    def refuse(word):
        raise AssertionError(word)

    for line in log.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert "bucket/run" in log.read_text()
    assert "HIDDEN" not in log.read_text()


def test_quiet_says_nothing_but_errors_and_prints_the_same(tmp_path):
    plan = tmp_path / "plan"
    loud, still = (command("plan", LLAMA, "--to", "hf", "-o", plan, *words) for words in ((), ("--quiet",)))
    assert (loud.stdout == still.stdout, loud.stderr != "", still.stderr) == (True, True, "")
    shown = on_a_terminal("-m", "carnet", "run", plan, tmp_path / "out", "-q")
    assert shown == [""]
    refused = on_a_terminal("-m", "carnet", "run", plan, tmp_path / "out", "-q", code=1)
    assert refused[0].startswith("carnet: ")
    assert "exists" in "".join(refused)  # in a line of its own where the path is long


@contextmanager
def logged():
    """Yield what the logger hears meanwhile."""
    found, log = [], logging.getLogger("carnet")
    handler = logging.Handler()
    handler.emit = lambda record: found.append({**record.carnet, "message": record.getMessage()})
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


def test_python_hears_the_same(tmp_path):
    with logged() as found:
        carnet.cross(LLAMA, tmp_path / "out", to="hf")
    assert [(each["event"], each.get("phase")) for each in found] == [each[1:] for each in CROSSED]
    assert [each["message"] for each in found] == [f"cross: {phase or event}" for _, event, phase in CROSSED]

    def stop(at):
        raise RuntimeError("enough")

    with logged() as found, pytest.raises(RuntimeError):
        carnet.verify(tmp_path / "out", progress=stop)
    assert (found[-1]["event"], found[-1]["kind"], found[-1]["error"]) == ("failed", "RuntimeError", "enough")


def test_python_prints_nothing_that_nobody_asked_for(tmp_path):
    code = f"import carnet\ntry:\n    carnet.plan({str(tmp_path)!r}, to='hf')\nexcept carnet.CarnetError:\n    pass"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stderr == b""
