"""A plan, its proof and a verification take as many calls as the model has tensors: twice the model, twice the calls.

Calls of functions are counted, not seconds: they are the same on every machine. Three models, each twice the one before: where the
work grows with the model alone, the second step adds twice what the first adds; where it grows with its square, four times as much.
"""

from random import Random

import pytest

import carnet
from tests.counting import calls_of
from tests.families import samples

BASE = {
    "layers": 2,
    "hidden": 8,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 2,
    "ffn": 8,
    "vocab": 16,
    "positions": 8,
    "dtype": "bf16",
}
COMMON = {"position": "rope", "norm_eps": 1e-5}
MIXTURE = {"experts": 8, "topk": 2, "moe_ffn": 8}
GPT_OSS = MIXTURE | {"window": 4, "window_layers": (1, 0), "glu_limit": 7.0}


def save(name, folder, fields):
    family = samples.family_of(name)
    config = {**COMMON, **family.traits, **samples.SAMPLES[name].fields, **BASE, **fields}
    return samples.save(samples.Model(family.name, config, 1), folder, "hf", Random(1), {}, finite=True)


def assert_linear(counts):
    _, one, two, four = counts
    assert four - two < 2.3 * (two - one) + 100, counts


GROWN = [
    ("llama", "layers", (8, 16, 32), {}, {"to": "hf"}),
    ("llama", "layers", (8, 16, 32), {}, {"to": "megatron", "tp": 2}),
    ("llama", "layers", (8, 16, 32), {}, {"to": "trtllm", "tp": 2}),
    ("llama", "layers", (8, 16, 32), {}, {"to": "hf", "quantize": "fp8-channel"}),
    ("mixtral", "experts", (16, 32, 64), MIXTURE, {"to": "hf"}),
    ("mixtral", "experts", (16, 32, 64), MIXTURE, {"to": "megatron", "ep": 2}),
    ("mixtral", "experts", (16, 32, 64), MIXTURE, {"to": "trtllm"}),
    ("mixtral", "experts", (16, 32, 64), MIXTURE, {"to": "hf", "quantize": "fp8-channel"}),
    ("gpt_oss", "moe_ffn", (64, 128, 256), GPT_OSS, {"to": "hf"}),
    ("gpt_oss", "experts", (16, 32, 64), GPT_OSS, {"to": "megatron"}),
    ("gpt_oss", "moe_ffn", (64, 128, 256), GPT_OSS, {"to": "megatron"}),
    ("llama", "kv_heads", (8, 16, 32), {"heads": 32, "hidden": 32}, {"to": "trtllm", "tp": 4}),
]


@pytest.mark.parametrize(("name", "field", "sizes", "fields", "options"), GROWN)
def test_a_plan_grows_with_the_model(tmp_path, name, field, sizes, fields, options):
    counts = []
    for size in (sizes[0], *sizes):  # the first reads tables and imports modules
        more = {"ffn": size} if field == "moe_ffn" else {}
        folder = save(name, tmp_path / f"{len(counts)}", fields | more | {field: size})
        counts.append(calls_of(lambda folder=folder: carnet.plan(folder, **options)))
    assert_linear(counts)


def test_a_verification_against_another_model_grows_with_it(tmp_path):
    counts = []
    for size in (8, 8, 16, 32):
        folder = save("llama", tmp_path / f"{len(counts)}", {"layers": size})
        other = save("llama", tmp_path / f"{len(counts)} other", {"layers": size})
        file = other / "model.safetensors"
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(byte ^ 1 for byte in data[start:])
        file.write_bytes(data)
        counts.append(calls_of(lambda folder=folder, other=other: carnet.verify(folder, other)))
    assert_linear(counts)
