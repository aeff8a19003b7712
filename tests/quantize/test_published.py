"""Quantized folders as others publish them are read, or named as what they are; the right weights are products written out in torch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from carnet import api
from carnet.errors import BadCheckpoint, NotSupported

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"quant_algo": "FP8", "quant_method": "modelopt", "ignore": ["lm_head"]}


@pytest.fixture
def plain(tmp_path):
    """Have transformers save a small model; rows and columns are no whole number of blocks."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(**sizes, vocab_size=96, num_hidden_layers=1, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def publish(folder, record, scale, **more):
    """Code the linear layers of a folder; ``scale`` gives a scale for each block, of 128 x 128 or of the whole. Return the weights."""
    tensors, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = meant[name] = tensor
        if name.endswith("_proj.weight"):
            scales = scale(tensor)
            wide = scales.float().reshape(-1)[:1].expand(tensor.shape)
            if scales.numel() > 1:
                wide = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
            tensors[name] = (tensor.float() / wide).to(torch.float8_e4m3fn)
            tensors[name + ("_scale_inv" if record["quant_method"] == "fp8" else "_scale")] = scales
            meant[name] = (tensors[name].float() * wide).bfloat16()  # a product in f32, rounded once
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {**record, **more}}))
    return meant


def blocks(dtype):
    return lambda weight: (torch.rand(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128)) / 100 + 0.003).to(dtype)


def crossed(folder, out):
    assert api.cross(folder, out, to="hf", dtype="bf16").equal
    return load_file(out / "model.safetensors")


def same(found, meant):
    return found.keys() == meant.keys() and all(torch.equal(found[name], meant[name]) for name in meant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_are_read_under_scales_of_any_type_as_transformers_reads_them(dtype, plain, tmp_path):
    meant = publish(plain, FP8, blocks(dtype))
    assert same(crossed(plain, tmp_path / "out"), meant)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_the_whole_may_have_dimensions_of_one_and_activations_none(shape, plain, tmp_path):
    meant = publish(plain, MODELOPT, lambda weight: torch.full(shape, 0.004))
    assert same(crossed(plain, tmp_path / "out"), meant)


# of code 0 to 15: NVFP4QTensor.e2m1_values of modelopt 0.47, whose minus zero is zero
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def four_bits(packed, scale, outer):
    values = FP4[torch.stack([packed & 15, packed >> 4], -1).long()].flatten(-2)
    return (values * (scale.float() * outer).repeat_interleave(16, -1)).bfloat16()


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_an_attention_in_fp8_beside_an_mlp_and_a_head_of_four_bits(algorithm, plain, tmp_path):
    meant = publish(plain, MODELOPT, lambda weight: torch.tensor(0.004))
    stored, layers = load_file(plain / "model.safetensors"), {}
    for name, weight in meant.items():
        module = name.removesuffix(".weight")
        if "mlp" in name or name == "lm_head.weight":
            rows, columns = weight.shape
            packed = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
            scale, outer = (torch.rand(rows, columns // 16) + 0.5).to(torch.float8_e4m3fn), torch.tensor(0.01)
            stored |= {name: packed, f"{name}_scale": scale, f"{name}_scale_2": outer}
            meant[name] = four_bits(packed, scale, outer)
            layers[module] = {"quant_algo": algorithm, "group_size": 16}
        elif "proj" in name:
            layers[module] = {"quant_algo": "FP8"}
        if "k_proj" in name or "v_proj" in name:
            stored[f"{module}.{name.split('_proj')[0][-1]}_scale"] = torch.tensor(0.5)
    save_file(stored, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    said = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers, "exclude_modules": []}
    (plain / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    assert same(crossed(plain, tmp_path / "out"), meant)
    del layers["lm_head"]
    (plain / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    with pytest.raises(BadCheckpoint, match=r"'lm_head\.weight' is of a type that the config does not explain"):
        api.plan(plain, to="hf", dtype="bf16")


@pytest.mark.parametrize(
    ("record", "more"),
    [
        (FP8, {"modules_to_not_convert": None, "modules_to_convert": None, "dequantize": False}),
        (FP8, {"fmt": "float8_e4m3fn", "scale_fmt": "float", "expert_dtype": "fp8"}),
        (FP8, {"fmt": None, "kv_cache_scheme": None, "extra": {}, "list": []}),
        (MODELOPT, {"kv_cache_scheme": "fp8"}),
        (MODELOPT, {"kv_cache_scheme": None, "awq": False}),
    ],
)
def test_fields_that_ask_for_nothing_pass(record, more, plain, tmp_path):
    scale = blocks(torch.float32) if record is FP8 else lambda weight: torch.tensor(0.004)
    meant = publish(plain, record, scale, **more)
    assert same(crossed(plain, tmp_path / "out"), meant)


def test_modelopt_s_record_may_be_one_level_down_in_a_config_too(plain, tmp_path):
    meant = publish(plain, MODELOPT, lambda weight: torch.tensor(0.004))
    config = json.loads((plain / "config.json").read_text())
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    # as vLLM's modelopt.py reads it from either file
    config["quantization_config"] = {"producer": {"name": "modelopt"}, "quant_method": "modelopt", "quantization": inner}
    (plain / "config.json").write_text(json.dumps(config))
    assert same(crossed(plain, tmp_path / "out"), meant)


def test_modelopt_s_record_without_an_algorithm_is_named(plain):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt"}}))
    with pytest.raises(BadCheckpoint, match="quantization_config has no quant_algo"):
        api.plan(plain, to="hf", dtype="bf16")


def test_a_field_that_says_something_is_refused(plain):
    publish(plain, FP8, blocks(torch.float32), rotated=True)
    with pytest.raises(NotSupported, match="rotated"):
        api.plan(plain, to="hf", dtype="bf16")


def test_a_cache_in_nvfp4_is_named_and_its_way_out_is_true(plain, tmp_path):
    meant = publish(plain, MODELOPT, lambda weight: torch.tensor(0.004), kv_cache_quant_algo="NVFP4")
    with pytest.raises(NotSupported, match="the cache of keys and values is 'NVFP4'") as refusal:
        api.plan(plain, to="hf", dtype="bf16")
    assert "--config" in refusal.value.remedy
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]["kv_cache_quant_algo"]
    (tmp_path / "said.json").write_text(json.dumps(config))
    assert api.cross(plain, tmp_path / "out", to="hf", dtype="bf16", config=tmp_path / "said.json").equal
    assert same(load_file(tmp_path / "out/model.safetensors"), meant)


def test_scales_that_the_config_does_not_explain_are_left_behind_by_the_option_that_is_named(plain, tmp_path):
    meant = publish(plain, MODELOPT, lambda weight: torch.tensor(0.004))
    places = [f"model.layers.0.self_attn.{name}" for name in ("k_proj.k_scale", "v_proj.v_scale", "q_norm.input_scale")]
    tensors = load_file(plain / "model.safetensors") | dict.fromkeys(places, torch.tensor(1.0).clone())
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, plain / "model.safetensors", {"format": "pt"})
    drop = []
    for _ in places:
        with pytest.raises(BadCheckpoint, match="is a scale") as refusal:
            api.plan(plain, to="hf", dtype="bf16", drop=tuple(drop))
        drop.append(refusal.value.remedy.split("'")[1])
    assert api.cross(plain, tmp_path / "out", to="hf", dtype="bf16", drop=tuple(drop)).equal
    assert same(load_file(tmp_path / "out/model.safetensors"), meant)


@pytest.mark.parametrize(("mark", "what"), [("_orig_mod.", "torch.compile"), ("base_model.model.", "peft")])
def test_a_wrapper_s_weights_are_named(mark, what, plain):
    tensors = load_file(plain / "model.safetensors")
    save_file({mark + name: tensor for name, tensor in tensors.items()}, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotSupported, match=what) as refusal:
        api.plan(plain, to="hf")
    assert "save_pretrained" in refusal.value.remedy


@pytest.mark.parametrize(
    ("files", "what"),
    [(["model-Q4_K_M.gguf"], "GGUF"), (["config.json", "model.gguf"], "GGUF")],
)
def test_what_is_no_model_is_named(files, what, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(NotSupported, match=what):
        api.plan(tmp_path, to="hf")
    with pytest.raises(NotSupported, match=what):
        api.plan(tmp_path / files[-1], to="hf")
