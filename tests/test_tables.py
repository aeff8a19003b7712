"""Names in tables are whole, on a terminal and in a pipe, and nothing in a checkpoint steers a terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import torch
from safetensors.numpy import save_file

import carnet
from tests.terminal import on_a_terminal

LLAMA = Path(__file__).parent / "goldens/megatron/llama_te_pp2_vpp"
STRANGE = {
    "a[bold]b[/bold].weight": None,
    "evil\x1b[31mred": "evil\\x1b[31mred",
    "new\nline": "new\\nline",
    ":bomb:": None,
    "x" * 300: None,
}
NARROW = [40, 80, 120]


def piped(*command, code=0, **environment):
    ended = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    return ended.stdout.splitlines()


def words_of(lines):
    return {word for line in lines for word in line.split()}


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A folder of tensors with names that nobody should choose."""
    folder = tmp_path_factory.mktemp("strange")
    save_file({name: np.zeros(2, np.float32) for name in STRANGE}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A target of which a layer is another."""
    out = tmp_path_factory.mktemp("damaged") / "out"
    assert carnet.cross(LLAMA, out, to="hf")
    tensors = torch.load_file(out / "model.safetensors")
    others = [name for name in tensors if ".3." in name]  # as many as a person is shown
    torch.save_file(tensors | {name: tensors[name] + 1 for name in others}, out / "model.safetensors", {"format": "pt"})
    return out, others


@pytest.mark.parametrize("columns", NARROW)
def test_a_terminal_of_any_width_shows_the_names_of_stored_tensors_whole(columns):
    shown = on_a_terminal("-m", "carnet", "inspect", LLAMA, "--tensors", columns=columns)
    assert words_of(shown) >= {"/".join(filter(None, key)) for key in carnet.inspect(LLAMA).checkpoint.tensors}
    below = shown[next(at for at, line in enumerate(shown) if line.startswith("──")) :]
    assert max(len(line) for line in below if " " in line.strip()) <= columns


@pytest.mark.parametrize("columns", NARROW)
def test_a_terminal_of_any_width_shows_the_names_of_findings_whole(columns, damaged):
    out, names = damaged
    shown = on_a_terminal("-m", "carnet", "verify", LLAMA, out, columns=columns, code=3)
    assert words_of(shown) >= {*names}


def test_what_fits_into_a_terminal_is_a_line_a_row():
    shown = on_a_terminal("-m", "carnet", "inspect", LLAMA, "--tensors", columns=250)
    rows = [line for line in shown if line.startswith("decoder.")]
    assert len(rows) == len({line.split()[0] for line in rows}) == 7
    assert all("bf16" in line for line in rows)


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}])
def test_a_pipe_has_a_line_a_row_whatever_the_length(strange, environment):
    shown = piped("-m", "carnet", "inspect", strange, "--tensors", code=1, **environment)
    rows = shown[next(at for at, line in enumerate(shown) if line.startswith("──")) + 1 :]
    assert {row.split()[0] for row in rows} == {said or name for name, said in STRANGE.items()}
    assert all("f32" in row for row in rows)


def test_nothing_in_a_name_steers_a_terminal(strange):
    shown = on_a_terminal("-m", "carnet", "inspect", strange, "--tensors", columns=80, code=1)
    assert words_of(shown) >= {said or name for name, said in STRANGE.items()}
