"""Crossings of which reports are drawn, damaged ones among them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.report.browser import PROGRAM, browsing
from tests.report.reading import GOLDENS, HOSTILE, MODEL, call


@pytest.fixture(scope="session")
def crossed(tmp_path_factory):
    """A store of training, what crossings made of it, and the report that each left."""
    folder = tmp_path_factory.mktemp("crossed")
    (folder / "run").symlink_to(GOLDENS / "llama_te_pp2_vpp")
    for source, out, *words in (
        ("run", "hf", "--to", "hf"),
        ("hf", "fp8", "--to", "hf", "--quantize", "fp8-channel"),
        ("run", "ranks", "--to", "trtllm", "--tp", "2"),
        ("run", "f32", "--to", "hf", "--dtype", "f32"),
    ):
        done = call("cross", folder / source, folder / out, *words, "--report", folder / f"{out}.html")
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def damaged(crossed):
    """Targets in which something was damaged: a number, rows, codes, scales; and a tensor of a hostile name that nobody knows."""
    for name in ("hf", "fp8"):
        bad = Path(shutil.copytree(crossed / name, crossed / f"bad-{name}"))
        tensors = load_file(bad / MODEL)
        if name == "hf":
            tensors["model.layers.1.self_attn.q_proj.weight"][5, 7] += 1
            tensors["model.layers.2.mlp.up_proj.weight"][20:40] = 0
            tensors[HOSTILE] = torch.zeros(3)
        else:
            tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8)[3:9, 10:30] = 17
            tensors["model.layers.0.mlp.up_proj.weight_scale"][4] *= 2
        save_file(tensors, bad / MODEL, metadata={"format": "pt"})
    return crossed


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with browsing(tmp_path_factory.mktemp("browser")) as started:
        yield started
