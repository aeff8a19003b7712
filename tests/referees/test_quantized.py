"""Quantized weights beside those that the programs make themselves: ModelOpt's whole export, compressed-tensors' own compressors.

What transformers can execute without a GPU is executed too: FP8, INT8 and INT4 of compressed-tensors, and DeepSeek's blocks, which it
dequantizes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig

import carnet
from carnet import api
from tests.quantize.test_decode import of_library

pytestmark = pytest.mark.referee

SIZES = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 128}
HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": LlamaConfig(**HEADS, **TOKENS, intermediate_size=384),
    "mixtral": MixtralConfig(**HEADS, **TOKENS, intermediate_size=128, num_local_experts=4),
    # kv_a_proj_with_mqa has 128 + 32 rows: the last block of 128 x 128 is a quarter of one
    "deepseek_v3": DeepseekV3Config(
        **SIZES,
        **TOKENS,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        moe_intermediate_size=128,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        tie_word_embeddings=False,
    ),
}
PLAIN = re.compile(r"embed_tokens|lm_head|norm|block_sparse_moe\.gate\.|mlp\.gate\.")  # what all programs leave as it is
FUSED = (  # what an engine makes one tensor of, so that one scale stands over all
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
TOKENIZER = Path(__file__).parents[1] / "goldens/quantized/llama256/hf"
TEXTS = [
    f"The {word} fox jumps over {number} lazy dogs; {word * number}" for number, word in enumerate("quick brown red".split(), 2)
]


def rough(folder):
    """Put into one weight what rarely is there: rows and blocks of zeros, minus zero, numbers that are tiny or large."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.o_proj.weight"]
    weight[5] = 0
    weight[128:, 128:] = 0
    weight[7, 16:32] = 0
    weight[9, :8] = -0.0
    weight[3, 3] = 1e-30
    weight[4] *= 1e-38
    weight[:16, :128] *= 100
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def siblings(module):
    """Return the modules whose weights share a scale of the whole tensor with this one, itself included."""
    for group in FUSED:
        for name in group:
            if module.endswith(f".{name}"):
                return [module.removesuffix(name) + other for other in group]
    return [module]


def equal(ours, theirs):
    """Say whether two tensors are the same, their types and signs of zero included."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs))
    return torch.equal(first, second)


def differing(ours, theirs):
    """Return the names under which two folders of tensors differ, and how."""
    found = dict.fromkeys(ours.keys() ^ theirs.keys(), "only one has it")
    for name in ours.keys() & theirs.keys():
        if not equal(ours[name], theirs[name]):
            a, b = ours[name], theirs[name]
            same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
            found[name] = "values" if same_kind else f"{a.dtype} {tuple(a.shape)}, theirs {b.dtype} {tuple(b.shape)}"
    return found


# --- compressed-tensors --------------------------------------------------------------------------------------------------------

PRESETS = {  # scheme -> the library's own name for it, and for what packs it
    "fp8": ("FP8", "float-quantized"),
    "fp8-channel": ("FP8_DYNAMIC", "float-quantized"),
    "fp8-block": ("FP8_BLOCK", "float-quantized"),
    "nvfp4": ("NVFP4", "nvfp4-pack-quantized"),
    "mxfp8": ("MXFP8", "mxfp8-quantized"),
    "mxfp4": ("MXFP4", "mxfp4-pack-quantized"),
    "int8-channel": ("W8A8", "int-quantized"),
    "int4-group": ("W4A16", "pack-quantized"),
    "int4-group32": ("W4A16", "pack-quantized"),
}


def extremes(weight, args):
    """Return the least and the greatest value of every block: what llm-compressor's observers hand to the library."""
    rows, columns = weight.shape
    strategy = args.strategy  # one of the library's own words, which are strings
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
        return blocks.amin((-1, -2)), blocks.amax((-1, -2))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def compressed(weights, scheme, amaxes):
    """Return what the library makes of every weight, under the names that it has in a file."""
    preset, packer = PRESETS[scheme]
    found = {}
    for name, weight in weights.items():
        wish = of_library(preset, scheme)
        module = name.removesuffix(".weight")
        state = {"weight": weight.clone()}
        whole = None
        if scheme == "nvfp4":
            together = [weights[f"{each}.weight"] for each in siblings(module) if f"{each}.weight" in weights]
            whole = generate_gparam(min(each.min() for each in together), max(each.max() for each in together))
            state["weight_global_scale"] = whole
        state["weight_scale"], _ = calculate_qparams(*extremes(weight, wish.weights), wish.weights, global_scale=whole)
        if module in amaxes:
            amax = torch.tensor([amaxes[module]], dtype=weight.dtype)
            if scheme == "nvfp4":
                state["input_global_scale"] = generate_gparam(-amax, amax)
            else:
                state["input_scale"], _ = calculate_qparams(-amax, amax, wish.input_activations)
        made = BaseCompressor.get_value_from_registry(packer).compress(state, wish)
        found |= {f"{module}.{part}": tensor for part, tensor in made.items() if tensor is not None}
    return found


def linear(tensors):
    return {name: tensor for name, tensor in tensors.items() if not PLAIN.search(name)}


def invented(modules):
    """Return magnitudes of activations, the same for modules that read the same, each of them a number of bf16."""
    inputs = {module: re.sub(r"experts\.\d+", "experts", siblings(module)[0]) for module in modules}
    order = sorted(set(inputs.values()))
    return {module: 1.5 + 0.25 * order.index(inputs[module]) for module in modules}


@pytest.mark.parametrize("scheme", PRESETS)
@pytest.mark.parametrize("which", MODELS)
def test_compressed_tensors_makes_the_same_of_every_weight(which, scheme, saved, tmp_path):
    folder = saved(MODELS[which], torch.bfloat16)
    source = rough(folder)
    weights = linear(source)
    assert len(weights) == {"llama": 14, "mixtral": 32, "deepseek_v3": 28}[which]
    modules = sorted(name.removesuffix(".weight") for name in weights)
    amaxes = invented(modules) if scheme in ("fp8", "nvfp4") else {}
    wish = {}
    if amaxes:
        wish["amax"] = tmp_path / "amax.safetensors"
        save_file({f"{module}.input_amax": torch.tensor(amax) for module, amax in amaxes.items()}, wish["amax"])
    out = api.run(api.plan(folder, to="hf", quantize=scheme, style="compressed-tensors", **wish), tmp_path / "out")

    plain = {name: tensor for name, tensor in source.items() if name not in weights}
    # engines read the bias that chooses experts as f32, and so do programs write it
    plain = {name: tensor.float() if name.endswith("correction_bias") else tensor for name, tensor in plain.items()}
    assert differing(load_file(out / "model.safetensors"), plain | compressed(weights, scheme, amaxes)) == {}
    said = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    expected = of_library(PRESETS[scheme][0], scheme)
    (group,) = said.config_groups.values()
    assert group.format == said.format == PRESETS[scheme][1]
    for part in ("weights", "input_activations", "output_activations"):
        ours, theirs = getattr(group, part), getattr(expected, part)
        assert (ours is None) == (theirs is None), part
        if theirs is not None:
            assert ours.model_dump(exclude={"observer"}) == theirs.model_dump(exclude={"observer"}), part
    routers = {name.removesuffix(".weight") for name in plain if re.search(r"mlp\.gate\.weight|moe\.gate\.weight", name)}
    assert set(said.ignore) == {"lm_head", *routers}


# --- ModelOpt ------------------------------------------------------------------------------------------------------------------

WISHES = {
    "fp8": {"quantize": "fp8"},
    "fp8-kv": {"quantize": "fp8", "kv_cache": "fp8"},
    "fp8-channel": {"quantize": "fp8-channel"},
    "fp8-block": {"quantize": "fp8-block"},
    "nvfp4": {"quantize": "nvfp4"},
    "mxfp8": {"quantize": "mxfp8"},
    "mxfp4": {"quantize": "mxfp4"},
}
# ModelOpt cannot name experts as their checkpoint does where scales have four dimensions, and it has no place for latent keys
EXCEPT = {"mixtral": {"fp8-block"}, "deepseek_v3": {"fp8-block", "fp8-kv"}}


def in_a_process(*words):
    environment = {**os.environ, "PYTHONPATH": str(Path(carnet.__file__).parents[1])}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("which", MODELS)
def test_modelopt_exports_the_same_folder_from_what_calibrate_found(which, saved, tmp_path):
    folder = saved(MODELS[which], torch.bfloat16)
    rough(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    wishes = [wish for wish in WISHES if wish not in EXCEPT.get(which, ())]
    program = Path(__file__).with_name("modelopt_exports.py")
    in_a_process(program, folder, tmp_path / "texts.jsonl", tmp_path / "theirs", *wishes)
    amax = tmp_path / "amax.safetensors"
    done = in_a_process("-m", "carnet", "calibrate", folder, "--data", tmp_path / "texts.jsonl", "-o", amax)
    assert done.stdout == ""

    found = load_file(amax)
    assert {(tensor.dtype, tensor.shape) for tensor in found.values()} == {(torch.float32, torch.Size([]))}
    modules = {name.removesuffix(".weight") for name in linear(load_file(folder / "model.safetensors"))}
    cached = {f"{m}.{m[-6]}_amax" for m in modules if m.endswith((".k_proj", ".v_proj"))}
    assert found.keys() == {f"{module}.input_amax" for module in modules} | cached

    for wish in wishes:
        ours, theirs = tmp_path / "ours" / wish, tmp_path / "theirs" / wish
        static = {"amax": amax} if wish in ("fp8", "fp8-kv", "nvfp4") else {}
        ours.parent.mkdir(exist_ok=True)
        api.run(api.plan(folder, to="hf", **WISHES[wish], **static), ours)
        made = load_file(theirs / "model.safetensors")
        assert (wish, differing(load_file(ours / "model.safetensors"), made)) == (wish, {})
        configs = [json.loads((each / "config.json").read_text())["quantization_config"] for each in (ours, theirs)]
        assert configs[0] == configs[1]
        besides = [json.loads((each / "hf_quant_config.json").read_text()) for each in (ours, theirs)]
        assert besides[0] == besides[1]


# --- what runs -----------------------------------------------------------------------------------------------------------------


def spread(scale, shape):
    """Return a scale for each element: of a whole tensor, of rows, of 128 x 128 blocks, of groups of a row."""
    if scale.ndim < 2 or 1 in scale.shape[1:]:
        return scale.float() if scale.shape[0] in (1, shape[0]) else scale.float().repeat_interleave(128, 0)[: shape[0]]
    if scale.shape[0] == shape[0]:
        return scale.float().repeat_interleave(shape[1] // scale.shape[1], 1)
    return scale.float().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def dequantized(tensors):
    """Return the weights that codes and scales stand for, in f32."""
    found = {}
    for name, tensor in tensors.items():
        module = name.rsplit(".", 1)[0]
        scale = tensors.get(f"{module}.weight_scale", tensors.get(f"{module}.weight_scale_inv"))
        if name.endswith(".weight_packed"):  # eight codes of four bits, each plus 8
            codes = torch.stack([(tensor >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1) - 8
            found[f"{module}.weight"] = codes.float() * spread(scale, codes.shape)
        elif name.endswith(".weight"):
            found[name] = tensor.float() if scale is None else tensor.float() * spread(scale, tensor.shape)
    return found


def loaded(folder, dtype=torch.float32):
    """Return the model that transformers makes of a folder, after asking whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    model, said = asked
    assert {what: list(names) for what, names in said.items() if names} == {}
    return model.eval()


def logits(model):
    tokens = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


# Relative error of the logits from rounding activations alone, root mean square. A number of e4m3 has 3 bits after the first: rounding
# errs by 2.6% of it on average; there are 4 roundings in each of 2 layers, and independent errors add up as sqrt(8) x 2.6% = 7%.
# Per token, int8 errs by amax / 127 / sqrt(12), 0.8% of a normal row's deviation: 2%. Twice that is allowed: a scale that is wrong by
# 2 errs by 50% or more.
RUNS = {
    "fp8": ({"activations": "static"}, 0.14),
    "fp8, activations dynamic": ({"activations": "dynamic"}, 0.14),
    "fp8-channel": ({}, 0.14),
    "fp8-block": ({}, 0.14),
    "int8-channel": ({}, 0.05),
    "int4-group": ({}, 0.0),  # activations stay as they are
    "int4-group32": ({}, 0.0),
}


@pytest.mark.parametrize("which", RUNS)
def test_transformers_runs_what_was_written_and_agrees_with_the_dequantized_model(which, saved, tmp_path):
    folder = saved(MODELS["llama"], torch.bfloat16)
    wish, allowed = RUNS[which]
    if which == "fp8":
        wish = {**wish, "amax": tmp_path / "amax.safetensors"}
        modules = [name.removesuffix(".weight") for name in linear(load_file(folder / "model.safetensors"))]
        largest = observed(folder, modules)
        save_file({f"{module}.input_amax": amax for module, amax in largest.items()}, wish["amax"])
    scheme = which.split(",")[0]
    out = api.run(api.plan(folder, to="hf", quantize=scheme, style="compressed-tensors", **wish), tmp_path / "out")

    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(dequantized(load_file(out / "model.safetensors")), plain / "model.safetensors", {"format": "pt"})
    shutil.copyfile(folder / "config.json", plain / "config.json")
    expected = logits(loaded(plain))
    assert expected.std() > 0.1
    model = loaded(out)
    error = (logits(model) - expected).square().mean().sqrt() / expected.std()
    assert error <= allowed
    assert (error > 0) == (allowed > 0)  # the config's word about activations was heard

    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    assert torch.equal(logits(model), expected)


def observed(folder, modules):
    """Return the largest input of every linear layer over the tokens of `logits`."""
    model = loaded(folder)
    found = {}
    for name in modules:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found.update({name: inputs[0].abs().max().clone()}))
    logits(model)
    return found


@pytest.mark.parametrize("which", ["llama", "mixtral"])
def test_transformers_dequantizes_deepseek_s_blocks_to_the_same_weights(which, saved, tmp_path):
    folder = saved(MODELS[which], torch.bfloat16)
    out = api.run(api.plan(folder, to="hf", quantize="fp8-block", style="deepseek"), tmp_path / "out")
    source, codes = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name.removesuffix("_scale_inv") for name in codes if name.endswith("_scale_inv")} == linear(source).keys()
    plain = {name: tensor.bfloat16() for name, tensor in dequantized(codes).items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    found, expected = (loaded(each, torch.bfloat16).state_dict() for each in (out, folder))
    assert differing(found, expected) == {}
