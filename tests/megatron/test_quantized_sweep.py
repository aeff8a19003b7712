"""The planner and the examiner agree about every scheme of every style, of models that megatron-core built and saved.

The plan makes codes and scales, the examination judges them by another road: a target is equal, every word of its configs is compared,
and one value of each kind that is changed is a finding.
"""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import carnet
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from tests.megatron.conftest import BASE, MOE, filled, save, world

pytestmark = pytest.mark.referee

SIZES = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 384, "num_attention_heads": 8, "kv_channels": 32}
LLAMA = {**BASE, **SIZES, "vocab_size": 250, "padded_vocab_size": 256, "params_dtype": "torch.bfloat16", "bf16": True}
MODELS = {
    "llama": LLAMA,
    "qwen3, tied": {**LLAMA, "untie_embeddings_and_output_weights": False, "qk_layernorm": True},
    "mixtral": {**LLAMA, **MOE, "moe_ffn_hidden_size": 384},
}
PRESSED, RANKS = "compressed-tensors", {"to": "trtllm", "tp": 2, "pp": 2}
CACHE = {"kv_cache": "fp8"}
WISHES = {
    "modelopt fp8": {"quantize": "fp8", "style": "modelopt", "amax": True},
    "modelopt fp8, cache": {"quantize": "fp8", "style": "modelopt", "amax": True, **CACHE},
    "modelopt fp8-channel": {"quantize": "fp8-channel", "style": "modelopt"},
    "modelopt fp8-channel, cache": {"quantize": "fp8-channel", "style": "modelopt", **CACHE, "kv_scale": 0.5},
    "modelopt fp8-block": {"quantize": "fp8-block", "style": "modelopt"},
    "modelopt nvfp4, cache": {"quantize": "nvfp4", "style": "modelopt", "amax": True, **CACHE},
    "modelopt mxfp8": {"quantize": "mxfp8", "style": "modelopt"},
    "modelopt mxfp4": {"quantize": "mxfp4", "style": "modelopt"},
    "pressed fp8": {"quantize": "fp8", "style": PRESSED, "amax": True},
    "pressed fp8, dynamic": {"quantize": "fp8", "style": PRESSED, "activations": "dynamic"},
    "pressed fp8, cache": {"quantize": "fp8", "style": PRESSED, "amax": True, **CACHE},
    "pressed fp8-channel, cache": {"quantize": "fp8-channel", "style": PRESSED, **CACHE, "kv_scale": 0.5},
    "pressed fp8-block": {"quantize": "fp8-block", "style": PRESSED},
    "pressed nvfp4": {"quantize": "nvfp4", "style": PRESSED, "amax": True},
    "pressed mxfp8": {"quantize": "mxfp8", "style": PRESSED},
    "pressed mxfp4": {"quantize": "mxfp4", "style": PRESSED},
    "pressed int8-channel": {"quantize": "int8-channel", "style": PRESSED},
    "pressed int4-group": {"quantize": "int4-group", "style": PRESSED},
    "pressed int4-group32": {"quantize": "int4-group32", "style": PRESSED},
    "deepseek fp8-block": {"quantize": "fp8-block", "style": "deepseek"},
    "ranks fp8": {**RANKS, "quantize": "fp8", "amax": True},
    "ranks fp8, cache": {**RANKS, "quantize": "fp8", "amax": True, **CACHE},
}
# of models that the styles name otherwise: a tied head, experts
FEW = ("modelopt fp8, cache", "modelopt nvfp4, cache", "pressed fp8-channel, cache", "pressed int4-group", "deepseek fp8-block")
TABLE = [(model, wish) for model in MODELS for wish in (WISHES if model == "llama" else FEW)]
CODES = {torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32}
BESIDE = ("scale", "scale_2", "scale_inv", "scaling_factor", "global_scale", "shape", "packed", "alpha")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a store that megatron-core saved, and a file of what calibration saw in its model."""
    folder = tmp_path_factory.mktemp("trained")

    def store(model):
        root = folder / model
        if not root.exists():
            with world(folder / f"meeting {model}"):
                save(
                    filled(MODELS[model], lambda config, stage: get_gpt_modelopt_spec(config, remap_te_layernorm=True)),
                    MODELS[model],
                    root,
                )
            assert carnet.cross(root, folder / f"{model} hf", to="hf").equal
            names = [name.removesuffix(".weight") for name in load_file(folder / f"{model} hf/model.safetensors")]
            amax = {f"{name}.input_amax": torch.tensor(3.0 + at / 8) for at, name in enumerate(names) if "norm" not in name}
            for end in "kv":
                amax |= {
                    f"{name}.{end}_amax": torch.tensor(700.0 + at)
                    for at, name in enumerate(names)
                    if name.endswith(f"{end}_proj")
                }
            save_file(amax, folder / f"{model}.safetensors")
        return root, folder / f"{model}.safetensors"

    return store


@pytest.mark.parametrize(("model", "wish"), TABLE, ids=[f"{model}: {wish}" for model, wish in TABLE])
def test_what_is_planned_is_what_is_examined_and_one_value_of_each_kind_is_a_finding(model, wish, trained, tmp_path):
    source, measured = trained(model)
    options = {"to": "hf", **WISHES[wish]}
    asked = {"kv_scale": options["kv_scale"]} if "kv_scale" in options else {}
    if options.pop("amax", False):
        options["amax"] = asked["amax"] = measured
    target = tmp_path / "target"
    assert carnet.cross(source, target, **options).equal
    (target / "carnet.json").unlink()
    verdict = carnet.verify(source, target, **asked)
    assert verdict.equal, verdict.findings[:3]
    assert verdict.unexamined == {}
    seen = set()
    for file in sorted(target.glob("*.safetensors")):
        for name, kind in kinds(file).items():
            if kind in seen:
                continue
            seen.add(kind)
            spoiled = shutil.copytree(target, tmp_path / f"spoiled{len(seen)}")
            change(spoiled / file.name, name)
            found = carnet.verify(source, spoiled, **asked).findings
            assert any(name in finding.stored for finding in found), (name, kind, found[:3])
    assert {"codes", "plain"} <= {kind for kind in seen if "." not in kind}
    expected = {"cache": CACHE.items() <= options.items(), "input": "amax" in options and "activations" not in options}
    assert {part for part in expected if any(part in kind for kind in seen)} == {
        part for part, there in expected.items() if there
    }


def kinds(file):
    """Return what each tensor of a file is: codes, plain, or the name of what stands beside codes."""
    found = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            last = name.rsplit(".", 1)[-1]
            if last in ("k_scale", "v_scale") or "kv_cache" in name:
                found[name] = f"cache.{last}"
            elif "input" in last or last == "activation_scaling_factor":
                found[name] = f"input.{last}"
            elif last.endswith(BESIDE) and "packed" not in last:
                found[name] = f"beside.{last}"
            else:
                found[name] = "codes" if opened.get_slice(name).get_dtype() in ("F8_E4M3", "U8", "I8", "I32") else "plain"
    return found


def change(file, name):
    """Change one value of a tensor: a number to another one, a code to its neighbour."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    flat = tensors[name].reshape(-1)
    if flat.dtype in CODES:
        raw = flat.view(torch.uint8)
        raw[0] ^= 1
    else:
        flat[0] = flat[0] * 2 + 1
    save_file(tensors, file, metadata)
