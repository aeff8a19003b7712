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
with progress_bar("preparing") as (progress, phase):
    progress(9_000_000_000, 10_000_000_000)
    for part in range(1, 6):
        time.sleep(0.1)
        progress(9_000_000_000 + 1000 * part, 10_000_000_000)
        phase("writing")
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

    def stop(name):
        if name == "flushing":
            raise KeyboardInterrupt

    first, second, begun = [], [], []
    with pytest.raises(KeyboardInterrupt):
        carnet.run(plan, tmp_path / "out", progress=lambda *at: first.append(at), phase=stop)
    carnet.run(plan, tmp_path / "out", progress=lambda *at: second.append(at), phase=begun.append)
    total = first[-1][1]
    assert first[0] == (0, total)
    assert first[-1] == (total, total)
    assert second == [(total, total)]
    assert begun == ["flushing"]
