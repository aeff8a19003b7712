"""The same between two GPUs over NCCL, by hand: `pytest tests/live/test_live_gpu.py` on a machine that has them."""

import json

import pytest
import torch
from safetensors.torch import save_file

import carnet
from tests.live.conftest import World
from tests.live.test_live import DENSE, WIDE, calibration, held

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def gpus():
    made = World(2, "nccl")
    yield made
    made.close()


@pytest.mark.parametrize("memory", [1 << 30, 1 << 14])
@pytest.mark.parametrize(("cut", "ranks"), [({"tp": 2}, (0, 1)), ({"pp": 2}, (1,))])
def test_every_gpu_gets_the_whole_model(gpus, tmp_path, cut, ranks, memory):
    found = gpus.run("cross", DENSE, cut, {"ranks": ranks}, "hf", str(tmp_path / "megatron"), {"memory": memory})
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf").equal
    expected = held(tmp_path / "out/model.safetensors")
    assert all(found[rank][0] == expected for rank in ranks)


@pytest.mark.parametrize("scales", [None, "2.x"])
def test_gpus_make_the_codes_of_processors(gpus, tmp_path, scales):
    save_file({name: torch.tensor(value) for name, value in calibration().items()}, tmp_path / "amax.safetensors")
    options = {"quantize": "fp8", "kv_cache": "fp8", "calibration": calibration()}
    found = gpus.run("cross", DENSE, {"pp": 2}, {"tp": 2}, "trtllm", str(tmp_path / "megatron"), options, scales)
    made = {"quantize": "fp8", "kv_cache": "fp8", "amax": tmp_path / "amax.safetensors"}
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="trtllm", tp=2, **made).equal
    for rank in range(2):
        assert found[rank][0] == held(tmp_path / f"out/rank{rank}.safetensors")
        assert json.loads(found[rank][1]["config.json"]) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("scheme", ["mxfp8", "nvfp4", "mxfp4"])  # the last is coded by the processors
def test_gpus_make_the_blocks_of_processors(gpus, tmp_path, scheme):
    options = {"quantize": scheme, "style": "compressed-tensors"} | ({"activations": "dynamic"} if scheme == "nvfp4" else {})
    found = gpus.run("cross", WIDE, {"tp": 2}, {"ranks": (1,)}, "hf", str(tmp_path / "megatron"), options)
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf", **options).equal
    assert found[1][0] == held(tmp_path / "out/model.safetensors")


def test_a_model_takes_the_weights_of_another_that_is_cut_otherwise(gpus):
    assert [same for same, _ in gpus.run("to_modules", DENSE, {"tp": 2}, {"pp": 2})] == [True, True]


def test_files_are_written_from_gpus(gpus, tmp_path):
    outs = [str(tmp_path / "together")]
    gpus.run("save_together", DENSE, {"tp": 2}, {}, "hf", str(tmp_path / "megatron"), {}, outs)
    assert carnet.verify(tmp_path / "megatron", tmp_path / "together").equal


@pytest.mark.parametrize(("kind", "word"), [("arrival", "layers.1.mlp.down"), ("copy", "should hold the same")])
def test_digests_of_gpus_find_one_bit(gpus, kind, word):
    assert all(word in str(error) for error in gpus.ask("damaged", DENSE, {"tp": 2}, {"tp": 2}, kind))


def test_a_run_needs_its_buckets_and_nothing_else(gpus):
    sizes = DENSE | {"hidden": 512, "ffn": 2048, "layers": 8}
    for memory in (1 << 20, 8 << 20):
        for most in gpus.run("peak", sizes, {"tp": 2}, {"ranks": (0, 1)}, memory):
            assert most <= memory + (1 << 18)  # of small tensors, whose places are rounded up
