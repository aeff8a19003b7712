"""A target in a store is written in parts of whole files, each by a process of its own."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import carnet
from tests.stores.server import Fault

GOLDENS = Path(__file__).parents[1] / "goldens"
MEGATRON = GOLDENS / "megatron"
PLANS = {
    "plain": {"to": "hf", "shard_size": "60k"},
    "ranks": {"to": "trtllm", "tp": 2, "pp": 2},
    # a shard ends between codes and their scales
    "codes": {"to": "hf", "quantize": "mxfp4", "shard_size": "30k"},
    "measured": {"to": "hf", "quantize": "fp8", "activations": "dynamic", "style": "compressed-tensors", "shard_size": "30k"},
}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "carnet.json"}


@pytest.mark.parametrize("asked", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("golden", ["llama_tp2pp2", "llama_legacy"])
@pytest.mark.parametrize("of", [2, 5])
def test_parts_in_any_order_are_the_whole(golden, asked, of, store, tmp_path):
    made, out = carnet.plan(store.fill(MEGATRON / golden, "ckpt"), **asked), f"{store.url}/out"
    for number in sorted(range(1, of + 1), key=lambda number: number * 7 % of):
        carnet.run(made, out, part=(number, of))
    assert carnet.finish(made, out, verify=True).equal
    assert carnet.cross(MEGATRON / golden, tmp_path / "disk", **asked).equal
    assert content(store.folder / "out") == content(tmp_path / "disk")


def test_a_part_that_is_lacking_is_told_and_one_that_is_there_is_not_written_again(store):
    made, out = carnet.plan(MEGATRON / "llama_tp2pp2", **PLANS["plain"]), f"{store.url}/out"
    with pytest.raises(carnet.BadRequest, match="nothing of this target is written"):
        carnet.finish(made, out)
    assert not (store.folder / "out").exists()
    carnet.run(made, out, part=(1, 2))
    with pytest.raises(carnet.BadRequest, match="not every part of the target is written") as refused:
        carnet.finish(made, out)
    assert refused.value.facts["missing"] == "model-00004-of-00006.safetensors and 2 more files"
    assert refused.value.remedy == "run all parts again: what is written is kept"
    before = {path.name: path.stat().st_mtime_ns for path in (store.folder / "out").iterdir()}
    carnet.run(made, out, part=(1, 2))
    assert {path.name: path.stat().st_mtime_ns for path in (store.folder / "out").iterdir()} == before
    store.relay.fault = lambda asked: Fault(status=403) if "model-00006" in asked.target and asked.method != "HEAD" else None
    with pytest.raises(carnet.MachineFailed):
        carnet.run(made, out, part=(2, 2))
    store.relay.fault = lambda asked: None
    with pytest.raises(carnet.BadRequest, match="not every part of the target is written"):
        carnet.finish(made, out)
    carnet.run(made, out, part=(2, 2))
    carnet.finish(made, out)
    assert carnet.verify(MEGATRON / "llama_tp2pp2", out).equal


def test_copies_that_differ_are_refused_at_the_end(store, tmp_path):
    """What compares is no part's, so whoever finishes compares."""
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "trtllm/llama_kv2/hf", source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    made, out = carnet.plan(source, to="trtllm", tp=2), f"{store.url}/out"
    for number in (1, 2):
        carnet.run(made, out, part=(number, 2))
    with pytest.raises(carnet.BadCheckpoint, match="two copies of embed differ"):
        carnet.finish(made, out)
    assert not (store.folder / "out").exists()
