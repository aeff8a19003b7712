"""NVIDIA's ModelOpt quantizes models of our spec; what megatron-core then saves crosses with its scales."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.formats.detect import open_checkpoint
from carnet.megatron.fits import fits
from tests.megatron.conftest import BASE, MOE

pytestmark = pytest.mark.referee
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/goldens/megatron/v019_deepseek_te_ep2"
# module of megatron-core -> modules of transformers
ATTENTION = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
    "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
    "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
    "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
    "mlp.shared_experts.linear_fc1": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj",),
}
EXPERTS = {
    "mixtral": {"linear_fc1": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
                "linear_fc2": ("block_sparse_moe.experts.{}.w2",)},
    "deepseek": {"linear_fc1": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
                 "linear_fc2": ("mlp.experts.{}.down_proj",)},
}  # fmt: skip
QUANTIZERS = {"weight_quantizer": "weight_scale", "input_quantizer": "input_scale"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder with each model as it was saved, and with what its quantizers say, all of one run of ModelOpt."""
    folder = tmp_path_factory.mktemp("modelopt")
    deepseek = {**open_checkpoint(GOLDEN).config, "params_dtype": "torch.float32", "bf16": False}
    jobs = {
        "llama": (BASE, "te"),
        "mixtral": ({**BASE, **MOE, "moe_ffn_hidden_size": BASE["ffn_hidden_size"]}, "local"),
        "deepseek": (deepseek, "te"),
    }
    torch.save(jobs, folder / "jobs.pt")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("quantized_by_modelopt.py")),
        str(folder / "jobs.pt"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return folder


def expected(name, amaxes):
    """Return the scales that transformers' modules have: a code of FP8 reaches to 448."""
    found = {}
    for quantizer, amax in amaxes.items():
        layer, inner, kind = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(\w+_quantizer)", quantizer).groups()
        expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(\w+)", inner)
        modules = [each.format(expert[1]) for each in EXPERTS[name][expert[2]]] if expert else ATTENTION[inner]
        found.update({f"model.layers.{layer}.{module}.{QUANTIZERS[kind]}": amax[0] / 448 for module in modules})
    return found


@pytest.mark.parametrize(("name", "spec"), [("llama", "te"), ("mixtral", "local"), ("deepseek", "te")])
def test_what_modelopt_quantized_goes_to_hugging_face_with_its_scales(name, spec, quantized, tmp_path):
    assert fits(quantized / name, "modelopt").good
    assert fits(quantized / name, spec).good
    assert carnet.cross(quantized / name, tmp_path / "hf", to="hf", quantize="fp8").equal
    found = load_file(tmp_path / "hf/model.safetensors")
    scales = expected(name, load_file(quantized / f"{name}.safetensors"))
    stored = {key: value for key, value in found.items() if key.endswith("_scale")}
    assert stored.keys() == scales.keys()
    assert [key for key, scale in scales.items() if not torch.equal(stored[key].reshape(()), scale)] == []


def test_it_goes_to_ranks_of_tensorrt_llm_with_them_too(quantized, tmp_path):
    assert carnet.cross(quantized / "llama", tmp_path / "trtllm", to="trtllm", tp=2, quantize="fp8", dtype="bf16").equal
    amaxes = load_file(quantized / "llama.safetensors")
    modules = {"attention.qkv": "self_attention.linear_qkv", "attention.dense": "self_attention.linear_proj"}
    modules |= {"mlp.proj": "mlp.linear_fc2", "mlp.fc": "mlp.linear_fc1", "mlp.gate": "mlp.linear_fc1"}
    for rank in range(2):
        found = load_file(tmp_path / f"trtllm/rank{rank}.safetensors")
        for layer in range(4):
            for theirs, ours in modules.items():
                amax = amaxes[f"decoder.layers.{layer}.{ours}.input_quantizer"] / 448
                assert torch.equal(found[f"transformer.layers.{layer}.{theirs}.activation_scaling_factor"].reshape(1), amax)
                amax = amaxes[f"decoder.layers.{layer}.{ours}.weight_quantizer"] / 448  # of numbers that are bf16 by then
                scale = found[f"transformer.layers.{layer}.{theirs}.weights_scaling_factor"].reshape(1)
                torch.testing.assert_close(scale, amax, rtol=2**-8, atol=0)
