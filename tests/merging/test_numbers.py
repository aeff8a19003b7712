"""Every number of a type that sums may meet, and the memory and the places in which they are made."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from carnet import merging
from carnet.examiner.sums import Summed
from tests.peak import SAMPLED

FACTORS = (0.5, float(np.float32(0.3)), -1.0, float(np.float32(1e-3)), 3.0)
ALL = np.arange(1 << 16, dtype=np.uint16)  # every bf16


def asked(one, other, factors, dtype, *, differences):
    """Return a sum as it is defined, operation after operation in f32."""
    x, y = (bits.view(ml_dtypes.bfloat16).astype(np.float32) for bits in (one, other))
    with np.errstate(all="ignore"):
        if differences:
            made = x + (np.float32(0) + np.float32(factors[1]) * (y - x))
        else:
            made = np.float32(0) + np.float32(factors[0]) * x + np.float32(factors[1]) * y
        return made.astype(dtype), made


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16), ("f32", np.float32)])
def test_the_examiner_sums_every_bf16_with_any_other_as_f32_does(seed, differences, name, dtype):
    random = np.random.default_rng(seed)
    # with any number, and with those near to it, whose sums often lie halfway between two
    other = np.where(
        random.random(ALL.shape) < 0.5, random.permutation(ALL), ALL + random.integers(0, 64, ALL.shape).astype(np.uint16)
    )
    factors = random.choice(FACTORS, 2).tolist()
    total = Summed(ALL.size, differences=differences)
    total.add(ALL, "bf16", factors[0])
    total.add(other, "bf16", factors[1])
    found, beyond = total.bits(name)
    expected, exact = asked(ALL, other, factors, dtype, differences=differences)
    found = found.view(dtype)
    numbers = ~np.isnan(expected)
    assert (found.view(f"u{found.itemsize}") == expected.view(f"u{found.itemsize}"))[numbers].all()
    assert np.isnan(found[~numbers]).all()
    there = np.zeros(ALL.shape, bool) if beyond is None else beyond
    assert (there == (np.isinf(expected) & np.isfinite(exact))).all()


def folder(model, path, bits):
    """Save a model with other numbers, repeated in every tensor."""
    path.mkdir()
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        weights[name] = torch.from_numpy(np.resize(bits, tensor.numel()).view(np.int16)).view(torch.bfloat16).view(tensor.shape)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text((model / "config.json").read_text())
    return path


@pytest.mark.parametrize("factors", [(0.5, 0.5), (0.3, -1.0)])
def test_what_is_written_of_odd_numbers_is_what_is_defined(runs, tmp_path, factors):
    values = ALL.view(ml_dtypes.bfloat16).astype(np.float32)
    small = ALL[np.abs(values) < 1e38]  # subnormal ones and zeros with a sign among them
    random = np.random.default_rng(1)
    one, other = random.permutation(small), random.permutation(small)
    sources = [folder(runs.hf[0], tmp_path / name, bits) for name, bits in (("a", one), ("b", other))]
    assert merging.merge(sources, tmp_path / "out", factors).equal
    expected, _ = asked(one, other, [float(np.float32(each)) for each in factors], ml_dtypes.bfloat16, differences=False)
    for tensor in load_file(tmp_path / "out/model.safetensors").values():
        found = tensor.flatten().view(torch.int16).numpy().view(np.uint16)
        assert (found == np.resize(expected.view(np.uint16), found.shape)).all()


CHILD = f"""
{SAMPLED}
from carnet import merging

thread.start()
*sources, out = sys.argv[2:]
assert merging.merge(sources, out, [0.5] * len(sources), memory=sys.argv[1], threads=1).equal
stop()
print(peak)
"""


@pytest.mark.parametrize("memory", [96 << 20, 160 << 20])
def test_a_merge_stays_inside_its_memory(tmp_path, memory):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 8192,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "vocab_size": 40_000,
    }
    sources = []
    for seed in range(3):  # tensors of 40 MB, in all 75 MB each
        torch.manual_seed(seed)
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).to(torch.bfloat16)
        made.save_pretrained(tmp_path / str(seed))
        sources.append(str(tmp_path / str(seed)))
    words = [sys.executable, "-c", CHILD, str(memory), *sources, str(tmp_path / "out")]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    print("measured", int(ended.stdout) >> 20, "of", memory >> 20)
    assert int(ended.stdout) <= memory
