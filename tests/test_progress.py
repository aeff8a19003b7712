"""What is said of how far a command is: phases by name, bytes that were done before, a bar on a terminal and nothing elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import carnet
from tests.terminal import on_a_terminal

MEGATRON = Path(__file__).parent / "goldens/megatron/llama_te_pp2_vpp"
MEASURED = {
    "quantize": "nvfp4",
    "style": "compressed-tensors",
}  # a scale of each matrix is needed before the first code is written


def phases(lines):
    """Return the first words of the bars, each once, in order."""
    bars = (line.split()[0] for line in lines if "━" in line)
    return [*dict.fromkeys(bars)]


def test_a_bar_names_the_phases(tmp_path):
    asked = ["--to", "hf", "--quantize", MEASURED["quantize"], "--style", MEASURED["style"], "--activations", "dynamic"]
    shown = on_a_terminal("-m", "carnet", "cross", MEGATRON, tmp_path / "out", *asked)
    assert phases(shown) == ["planning", "scales", "writing", "flushing", "examining"]
    assert phases(on_a_terminal("-m", "carnet", "verify", tmp_path / "out")) == ["examining"]
    assert phases(on_a_terminal("-m", "carnet", "verify", MEGATRON, tmp_path / "out")) == ["examining"]


def test_no_bar_is_wider_than_the_terminal(tmp_path):
    shown = on_a_terminal("-m", "carnet", "cross", MEGATRON, tmp_path / "out", "--to", "hf")
    assert max(len(line) for line in shown if "━" in line) <= 80


def test_the_fields_of_a_config_fill_the_lines_of_a_terminal():
    shown = on_a_terminal("-m", "carnet", "inspect", MEGATRON)
    first = next(at for at, line in enumerate(shown) if line.startswith("config"))
    last = next(at for at, line in enumerate(shown) if line.startswith("left behind"))
    fields = [line.rstrip() for line in shown[first:last] if line.strip()]
    words = [re.split(r"  +", line.removeprefix("config").strip()) for line in fields]
    assert max(map(len, fields)) <= 80
    for line, following in zip(fields, words[1:], strict=False):  # no line has room for the next field
        assert len(f"{line}  {following[0]}") > 80


def test_in_a_pipe_nothing_is_drawn(tmp_path):
    command = [sys.executable, "-m", "carnet", "cross", MEGATRON, tmp_path / "out", "--to", "hf"]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


RESUMED = """
import time
from carnet.cli.progress import progress_bar
from carnet.progress import Told
with progress_bar() as progress:
    told = Told(progress, "preparing")
    told.amount(9_000_000_000, 10_000_000_000)
    for part in range(1, 6):
        time.sleep(0.1)
        told.amount(9_000_000_000 + 1000 * part, 10_000_000_000)
        told.phase("writing")
"""


def test_what_an_earlier_run_did_counts_for_no_rate():
    rates = [float(found[1]) for line in on_a_terminal("-c", RESUMED) if (found := re.search(r"([\d.]+) kB/s", line))]
    shown = " ".join(on_a_terminal("-c", RESUMED))
    assert rates
    assert max(rates) < 100
    assert "MB/s" not in shown
    assert "GB/s" not in shown


def test_a_run_of_which_only_the_scales_would_be_left_is_at_its_total(tmp_path):
    plan = carnet.plan(MEGATRON, to="hf", activations="dynamic", **MEASURED)

    def stop(at):
        first.append(at)
        if at.phase == "flushing":
            raise KeyboardInterrupt

    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        carnet.run(plan, tmp_path / "out", progress=stop)
    carnet.run(plan, tmp_path / "out", progress=second.append)
    total = first[-1].total
    assert first[1] == carnet.Progress("preparing", 0, total)
    assert first[-1] == carnet.Progress("flushing", total, total)
    done = [carnet.Progress(phase, total, total) for phase in ("preparing", "flushing")]
    assert second == [carnet.Progress("preparing", 0, 0), *done]


class Enough(Exception):
    pass


def enough(phase):
    """Return a callback that raises in a phase, when something of it is done."""

    def stop(at):
        if at.phase == phase and at.done:
            raise Enough

    return stop


@pytest.mark.parametrize("phase", ["writing", "flushing", "examining"])
@pytest.mark.parametrize("coded", [False, True], ids=["threads", "processes"])
def test_a_callback_that_raises_stops_a_crossing_which_the_same_call_finishes(tmp_path, phase, coded):
    options, again = ({"to": "hf", "activations": "dynamic", **MEASURED} if coded else {"to": "hf"}), []
    with pytest.raises(Enough):
        carnet.cross(MEGATRON, tmp_path / "out", progress=enough(phase), **options)
    assert not (tmp_path / "out").exists()
    assert carnet.cross(MEGATRON, tmp_path / "out", progress=again.append, **options)
    assert next(at for at in again if at.total).done > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_callback_that_raises_in_an_examination_changes_nothing(tmp_path):
    assert carnet.cross(MEGATRON, tmp_path / "out", to="hf")
    before = {path.name: path.stat() for path in (tmp_path / "out").iterdir()}
    for arguments in ((tmp_path / "out",), (MEGATRON, tmp_path / "out")):
        with pytest.raises(Enough):
            carnet.verify(*arguments, progress=enough("examining"))
    assert {path.name: path.stat() for path in (tmp_path / "out").iterdir()} == before


def test_phases_are_told_in_order_and_amounts_never_go_back(tmp_path):
    told = []
    plan = carnet.plan(MEGATRON, to="hf")
    for number in (1, 2):
        carnet.run(plan, tmp_path / "out", part=(number, 2), progress=told.append)
    assert [*dict.fromkeys(at.phase for at in told)] == ["preparing", "writing"]
    told.clear()
    assert carnet.finish(plan, tmp_path / "out", verify=True, progress=told.append)
    assert [*dict.fromkeys(at.phase for at in told)] == ["preparing", "flushing", "examining"]
    assert [at.done for at in told] == sorted(at.done for at in told)
