"""`--device cuda`: the same bytes as the processor's, where there is a GPU; a clear refusal where there is none."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from carnet import api
from carnet.errors import MachineFailed

GPU = torch.cuda.is_available() and find_spec("triton") is not None
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (640, 256),
    "mlp.up_proj": (640, 256),
    "mlp.down_proj": (256, 640),
}
WISHES = {
    "modelopt fp8": {"quantize": "fp8"},
    "modelopt nvfp4": {"quantize": "nvfp4"},
    "trtllm fp8": {"quantize": "fp8", "to": "trtllm", "tp": 2},
    "compressed-tensors fp8": {"quantize": "fp8", "style": "compressed-tensors"},
    "compressed-tensors fp8-channel": {"quantize": "fp8-channel", "style": "compressed-tensors"},
    "compressed-tensors fp8-block": {"quantize": "fp8-block", "style": "compressed-tensors"},
    "deepseek fp8-block": {"quantize": "fp8-block", "style": "deepseek"},
    "one without a kernel": {"quantize": "mxfp4", "style": "compressed-tensors"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama with zeros, negative zeros and large values, and the activations' magnitudes beside it."""
    root = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(5)

    def made(*shape):
        return torch.empty(shape).normal_(std=0.05, generator=generator)

    weights, amaxes = {"model.embed_tokens.weight": made(512, 256), "lm_head.weight": made(512, 256)}, {}
    weights["model.norm.weight"] = made(256)
    for layer in range(2):
        stem = f"model.layers.{layer}."
        weights |= {f"{stem}{name}_layernorm.weight": made(256) for name in ("input", "post_attention")}
        for name, shape in SHAPES.items():
            weights[f"{stem}{name}.weight"] = weight = made(*shape) * torch.exp2(8 * made(shape[0], 1) / 0.05)
            weight[:128, :128], weight[3], weight[5, ::2] = 0, 0, -0.0
            amaxes[f"{stem}{name}.input_amax"] = torch.tensor(3.5)
    folder = root / "llama"
    folder.mkdir()
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors")
    save_file(amaxes, root / "amax.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def planned(model, wish):
    return api.plan(model, amax=model.parent / "amax.safetensors", **{"to": "hf", **wish})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(not GPU, reason="no GPU here")
@pytest.mark.parametrize("name", WISHES)
def test_a_gpu_writes_the_bytes_that_the_processor_writes(model, tmp_path, name):
    plan = planned(model, WISHES[name])
    here, there = api.run(plan, tmp_path / "cpu"), api.run(plan, tmp_path / "cuda", device="cuda")
    assert files(here) == files(there)
    wish = {"to": "hf", **WISHES[name], "amax": model.parent / "amax.safetensors"}
    assert api.cross(model, tmp_path / "crossed", device="cuda", **wish).equal


@pytest.mark.skipif(not GPU, reason="no GPU here")
@pytest.mark.parametrize("name", WISHES)
def test_a_gpu_refuses_a_weight_that_is_no_number(model, tmp_path, name):
    from carnet.errors import BadCheckpoint

    raw = bytearray((model / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    at = start + json.loads(raw[8:start])["model.layers.0.self_attn.q_proj.weight"]["data_offsets"][0] + 2 * 256 * 200
    raw[at : at + 2] = np.array([0x7FC0], "<u2").tobytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/model.safetensors").write_bytes(raw)
    (tmp_path / "bad/config.json").write_text(json.dumps(CONFIG))
    plan = api.plan(tmp_path / "bad", amax=model.parent / "amax.safetensors", **{"to": "hf", **WISHES[name]})
    with pytest.raises(BadCheckpoint, match="not a number"):
        api.run(plan, tmp_path / "out", device="cuda")


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize("verb", ["run", "cross"])
def test_without_a_gpu_the_refusal_names_what_is_missing_and_nothing_is_written(verb, model, tmp_path):
    wish = {"to": "hf", **WISHES["modelopt fp8"], "amax": model.parent / "amax.safetensors"}
    done, asked = {"run": (api.run, {}), "cross": (api.cross, wish)}[verb]
    source = planned(model, WISHES["modelopt fp8"]) if verb == "run" else model
    with pytest.raises(MachineFailed) as refusal:
        done(source, tmp_path / "out", device="cuda", **asked)
    assert "carnet[cuda]" in str(refusal.value) or "--device cpu" in str(refusal.value)
    assert not list(tmp_path.iterdir())
