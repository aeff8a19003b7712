"""What ModelOpt 0.47 and llm-compressor 0.14 made of one model, bit for bit: each tensor by its digest, the scales and configs whole.

The weights are no part of the goldens: they are the first numbers of torch's generator at seed 1, and their digests are.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from carnet import api

GOLDENS = Path(__file__).parent / "goldens/quantized/llama256"
WISHES = {
    "modelopt-fp8": {"quantize": "fp8"},
    "modelopt-fp8-kv": {"quantize": "fp8", "kv_cache": "fp8"},
    "modelopt-nvfp4": {"quantize": "nvfp4", "style": "modelopt"},
    "compressed-tensors-fp8-channel": {"quantize": "fp8-channel", "style": "compressed-tensors"},
    "compressed-tensors-fp8-block": {"quantize": "fp8-block", "style": "compressed-tensors"},
}
SPREAD = {"embed_tokens": 0.5, "norm": 0.1}  # standard deviations; of all others 0.08


def shapes():
    """Yield names and shapes in the order in which a Llama has its parameters."""
    yield "model.embed_tokens.weight", (512, 256)
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj": (256, 256),
            "self_attn.k_proj": (128, 256),
            "self_attn.v_proj": (128, 256),
            "self_attn.o_proj": (256, 256),
            "mlp.gate_proj": (512, 256),
            "mlp.up_proj": (512, 256),
            "mlp.down_proj": (256, 512),
            "input_layernorm": (256,),
            "post_attention_layernorm": (256,),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (256,)
    yield "lm_head.weight", (512, 256)


def stored(path):
    """Yield name, type, shape and bytes of every tensor of a file, without carnet's reader."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, said in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = said["data_offsets"]
            yield name, said["dtype"], said["shape"], raw[start + first : start + last]


def facts(folder):
    """Return what the goldens say of every tensor."""
    return {
        name: {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(data).hexdigest()}
        for name, dtype, shape, data in stored(folder / "model.safetensors")
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama256")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes():
        spread = next((spread for part, spread in SPREAD.items() if part in name), 0.08)
        tensors[name] = (torch.randn(shape, generator=generator) * spread + ("norm" in name)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert facts(folder) == json.loads((GOLDENS / "hf/tensors.json").read_text())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((GOLDENS / "hf" / name).read_bytes())
    return folder


def magnitudes(golden):
    """Return what calibration must have found for the static scales to be those of a golden."""
    largest = {"input_scale": 448.0 * (6 if "nvfp4" in golden.name else 1), "k_scale": 448.0, "v_scale": 448.0}
    found = {}
    for name, dtype, _, data in stored(golden / "scales.safetensors"):
        module, kind = name.rsplit(".", 1)
        if kind in largest:
            assert dtype == "F32"
            scale = np.frombuffer(data, np.float32).reshape(())
            found[f"{module}.{kind.removesuffix('scale')}amax"] = np.asarray(scale * np.float32(largest[kind]))
    return found


@pytest.mark.parametrize("which", WISHES)
def test_the_tensors_and_the_configs_are_those_of_the_program(which, model, tmp_path):
    golden = GOLDENS / which
    wish = dict(WISHES[which])
    if found := magnitudes(golden):
        wish["amax"] = tmp_path / "amax.safetensors"
        save_arrays(found, wish["amax"])
    out = api.run(api.plan(model, to="hf", **wish), tmp_path / "out")

    expected, found = json.loads((golden / "tensors.json").read_text()), facts(out)
    ours = {name: data for name, *_, data in stored(out / "model.safetensors")}
    scales = {name: data for name, *_, data in stored(golden / "scales.safetensors")}
    assert {name: ours.get(name) for name in scales} == scales  # where these differ, so do the codes
    assert {name: found.get(name) for name in expected} == expected
    assert found.keys() == expected.keys()

    theirs, mine = (json.loads((folder / "config.json").read_text()) for folder in (golden, out))
    assert mine["quantization_config"] == theirs["quantization_config"]
    beside = golden / "hf_quant_config.json"
    assert (out / "hf_quant_config.json").exists() == beside.exists()
    if beside.exists():
        assert json.loads((out / "hf_quant_config.json").read_text()) == json.loads(beside.read_text())
