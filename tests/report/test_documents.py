"""Reports of what documents say: of sums, of chains that are broken, and of documents that somebody else sealed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from carnet.examiner.document import sealed, text
from tests.report.reading import HOSTILE, MODEL, Read, call


@pytest.fixture(scope="module")
def summed(crossed, tmp_path_factory):
    """A sum of two targets, of which the norms are the first one's alone."""
    out = tmp_path_factory.mktemp("sums") / "sum"
    done = call("merge", crossed / "hf", crossed / "f32", out, "--weights", "0.5,0.5", "--keep", "*norm*", "--dtype", "bf16")
    assert done.exit_code == 0, done.output
    return out


def test_a_sum_has_all_its_sources_and_is_no_copy_of_any(summed, crossed, tmp_path):
    done = call("report", summed, "-o", tmp_path / "sum.html", "--json")
    said = json.loads(done.stdout)
    assert said["source"] == "hf, f32"
    nbytes = {name: sum(each.nbytes for each in load_file(crossed / name / MODEL).values()) for name in ("hf", "f32")}
    assert said["flow"]["sources"] == {"1: hf": nbytes["hf"], "2: f32": nbytes["f32"]}
    fates = {(each["start"], each["fate"]) for each in said["flow"]["streams"] if each["end"] == MODEL}
    assert {start for start, fate in fates if fate == "as it is"} == {"norms"}
    assert {fate for start, fate in fates if start != "norms"} == {"computed"}
    again = "carnet verify CKPT CKPT OUT --weights 0.5,0.5 --keep '*norm*' --dtype bf16"
    assert said["origin"]["to examine it again"] == again
    assert again in Read(tmp_path / "sum.html").text
    words = [crossed / "hf", crossed / "f32", summed, *again.replace("'", "").split()[5:]]
    assert call("verify", *words).exit_code == 0


def test_the_command_that_examines_it_again_can_be_typed(tmp_path):
    demo = Path(__file__).parents[2] / "demo"
    words = ("cross", demo / "checkpoint", tmp_path / "out", "--to", "hf", "--tokenizer", demo / "tokenizer")
    assert call(*words).exit_code == 0
    said = json.loads(call("report", tmp_path / "out", "-o", tmp_path / "x.html", "--json").stdout)
    assert said["origin"]["to examine it again"] == "carnet verify CKPT OUT --tokenizer DIR"


def test_a_broken_chain_is_told(crossed, tmp_path):
    shutil.copytree(crossed / "hf", tmp_path / "alone")
    done = call("report", tmp_path / "alone", "--beside", tmp_path, "-o", tmp_path / "x.html")
    assert done.exit_code == 0, done.output
    said = Read(tmp_path / "x.html").text
    assert "Where it came from" in said
    assert "is not here; --at" in said


def test_what_a_target_needs_and_what_nobody_examined_stands_beside_equal(crossed, tmp_path):
    done = call("cross", crossed / "hf", tmp_path / "out", "--to", "megatron", "--report", tmp_path / "x.html")
    assert done.exit_code == 0, done.output
    said, shown = Read(tmp_path / "x.html").text, done.stdout
    assert "needs" in shown
    for line in shown.replace("left behind        nothing\n", "").splitlines()[2:]:
        assert line[:18].strip() in said
        assert line[19:] in said


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("vocabulary", "rows"), "9" * 6000),
        (("vocabulary", "left out as padding"), -1),
        (("proof", "tensors"), HOSTILE),
        (("proof", "casts"), 1.5),
        (("proof", "codes", "weights"), None),
        (("proof", "codes", "snr dB"), HOSTILE),
        (("proof", "codes", "snr dB"), 10**400),
        (("proof", "codes", "worst"), True),
        (("proof", "codes", "worst"), ["x"]),
        (("proof", "codes", "worst"), [{"tensor": "x", "saturated": 0}]),
        (("proof", "codes", "worst"), [{"snr dB": 1.5, "saturated": 0}]),
        (("source", "tensors", "x"), {"dtype": "bf16", "shape": [10**30, 10**400], "layout": "hidden: final_norm"}),
        (("source", "tensors", "x"), {"dtype": "bf16", "shape": [-5], "layout": "hidden: final_norm"}),
        (("dropped", HOSTILE), 7),
    ],
)
def test_who_seals_what_is_none_gets_one_message(crossed, tmp_path, path, value):
    done = _sealed(crossed, tmp_path, path, value)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("carnet: the carnet does not say what it should\n")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        (("state",), {"a": 1}, 3),
        (("source", "tensors", "x"), {"dtype": "bf16", "shape": [3], "layout": f"hidden: layers.{'9' * 5000}.mlp.up"}, 0),
        (("vocabulary", "left out as padding"), 10**9, 0),
    ],
)
def test_what_is_odd_is_drawn(crossed, tmp_path, path, value, code):
    done = _sealed(crossed, tmp_path, path, value)
    assert done.exit_code == code, done.output
    assert Read(tmp_path / "x.html").text


@pytest.mark.parametrize("tensors", [{}, {HOSTILE: torch.zeros(0, 4)}])
def test_a_checkpoint_of_nothing_is_drawn(crossed, tmp_path, tensors):
    (tmp_path / "empty").mkdir()
    save_file(tensors, tmp_path / "empty" / MODEL)
    shutil.copy(crossed / "hf/config.json", tmp_path / "empty")
    done = call("inspect", tmp_path / "empty", "--html", tmp_path / "x.html")
    assert (done.exit_code, "mistake" in done.stderr) == (1, False), done.output
    assert Read(tmp_path / "x.html").text
    assert call("report", tmp_path / "empty", crossed / "hf", "-o", tmp_path / "y.html").exit_code == 3


def _sealed(crossed, tmp_path, path, value):
    copy = shutil.copytree(crossed / "fp8", tmp_path / "fp8")
    data = json.loads((copy / "carnet.json").read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (copy / "carnet.json").write_text(text(sealed(data)))
    return call("report", copy, "-o", tmp_path / "x.html")
