"""The digests of a target's tensors are those of the bytes that a crossing writes, and nothing is written for them."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

import carnet
from carnet.executor.digesting import digests
from carnet.storage.schemes import folder_at

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = {
    "columns are cut": ("megatron/llama_tp2pp2", {"to": "trtllm", "tp": 2, "pp": 2}),
    "heads are repeated, zeros are filled in": ("megatron/gpt_te_tp2", {"to": "trtllm", "tp": 4}),
    "matrices are turned": ("megatron/gpt_te_tp2", {"to": "hf"}),
    "numbers are cast": ("megatron/llama_tp2pp2", {"to": "hf", "dtype": "fp16"}),
    "copies are compared": ("megatron/llama_te_pp2_vpp", {"to": "hf"}),
}


def of(plan, **more):
    wanted = {(file.name, tensor.name) for file in plan.files for tensor in file.tensors}
    return digests(plan, folder_at(plan.source), wanted, [lambda _: hashlib.sha256(), lambda _: hashlib.md5()], **more)


def written(folder):
    """Return the digests of all tensors in the safetensors files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                low, high = (8 + size + at for at in entry["data_offsets"])
                found[path.name, name] = tuple(of(data[low:high]).hexdigest() for of in (hashlib.sha256, hashlib.md5))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [256, 8 << 20])
def test_digests_are_those_of_the_tensors_that_a_crossing_writes(case, window, tmp_path):
    name, asked = CASES[case]
    plan = carnet.plan(GOLDENS / name, **asked)
    carnet.run(plan, tmp_path / "out")
    seen = []
    assert of(replace(plan, window=window), progress=lambda *done: seen.append(done)) == written(tmp_path / "out")
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
