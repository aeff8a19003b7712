"""docs/document.md lists every key of carnet.json, and none that is not there."""

import json
import re
from pathlib import Path

import carnet

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / "tests/goldens/megatron/llama_te_pp2_vpp"
DEEP = ("request", "source", "target", "versions")  # keys whose own keys are listed too


def listed():
    rows = re.findall(
        r"^\| (`[^|]*) \| (.*) \|$", (ROOT / "docs/document.md").read_text().split("\n## Of deltas")[0], re.MULTILINE
    )
    return {key: said for keys, said in rows for key in re.findall(r"`([^`]+)`", keys)}


def test_the_keys_of_a_document_are_those_that_its_page_lists(tmp_path):
    carnet.run(carnet.plan(LLAMA, to="hf"), tmp_path / "out")
    draft = json.loads((tmp_path / "out/carnet.json").read_text())
    assert carnet.verify(LLAMA, tmp_path / "out").equal
    proven = json.loads((tmp_path / "out/carnet.json").read_text())
    page = listed()
    assert {key for key in page if "." not in key} - {"unused", "accepted", "needs", "merge"} == {*proven}
    assert {*draft} < {*proven}
    for key in DEEP:
        words = set(re.findall(r"`([^` ]+)`", page[key]))
        assert {*proven[key], *draft[key]} == words, key
    assert set(re.findall(r"`([^`]+)`", page["proof"])) == {*proven["proof"], "codes"}
    facts = re.findall(r"`([^`/]+)`", page["source.tensors"])
    assert {key for tensor in proven["target"]["tensors"].values() for key in tensor} == {*facts}
