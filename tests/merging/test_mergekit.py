"""Sums of Hugging Face folders are mergekit's, run as its own command runs.

Its package asks for much that its sums do not need: ``make test`` puts it beside the environment without.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from carnet import merging
from tests.merging.conftest import WEIGHTS, same, tensors

BROUGHT = next(iter(sorted(Path(sys.prefix).glob("mergekit-*"))), None)
pytestmark = [pytest.mark.referee, pytest.mark.skipif(BROUGHT is None, reason="`make test` brings mergekit")]


def mergekit(said, folder, *words):
    """Return what its command makes of a configuration."""
    (folder / "merge.yaml").write_text(json.dumps(said))
    command = [
        sys.executable,
        "-m",
        "mergekit.scripts.run_yaml",
        folder / "merge.yaml",
        folder / "theirs",
        "--no-copy-tokenizer",
    ]
    space = {**os.environ, "PYTHONPATH": f"{BROUGHT}", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([*command, *words], env=space, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tensors(folder / "theirs")


def models(folders, weights):
    return [{"model": str(folder), "parameters": {"weight": weight}} for folder, weight in zip(folders, weights, strict=True)]


@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.25), (1.0, 0.5, -0.75)])
def test_linear(runs, tmp_path, weights):
    said = {"merge_method": "linear", "models": models(runs.hf, weights), "parameters": {"normalize": False}}
    theirs = mergekit({**said, "dtype": "float32", "out_dtype": "bfloat16"}, tmp_path)
    assert merging.merge(runs.hf, tmp_path / "ours", weights)
    assert same(tensors(tmp_path / "ours"), theirs)


def test_linear_where_products_are_rounded(runs, tmp_path):
    """mergekit's is torch's addcmul, in which a processor may round product and sum together: the last bit of an f32 is its own."""
    said = {"merge_method": "linear", "models": models(runs.hf, WEIGHTS), "dtype": "float32"}
    theirs = mergekit(said, tmp_path)
    assert merging.merge(runs.hf, tmp_path / "ours", WEIGHTS, dtype="f32")
    ours, sides = tensors(tmp_path / "ours"), [tensors(each) for each in runs.hf]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        size = sum(side[name].float().abs() * weight for side, weight in zip(sides, WEIGHTS, strict=True))
        assert bool(((value - theirs[name]).abs() <= size * 2**-22).all())


@pytest.mark.parametrize("weights", [(1.0, 0.7), (0.4, -2.5)])
def test_task_arithmetic(runs, tmp_path, weights):
    said = {"merge_method": "task_arithmetic", "base_model": str(runs.hf[0]), "models": models(runs.hf[1:], weights)}
    theirs = mergekit({**said, "dtype": "float32", "out_dtype": "bfloat16"}, tmp_path)
    assert merging.merge(runs.hf, tmp_path / "ours", weights, method="task_arithmetic")
    assert same(tensors(tmp_path / "ours"), theirs)
