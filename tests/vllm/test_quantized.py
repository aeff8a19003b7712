"""vLLM reads quantized weights as carnet wrote them: what it computes is what the dequantized model computes, but for activations.

These are the formats that vLLM 0.32 runs on a CPU without AVX-512. It rounds activations to 8 bits on the way, so that its numbers
differ from those of the dequantized model by about as much as quantized weights differ from the trained ones; a scale that is wrong by
a half costs several times that.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import carnet

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:vllm")

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
NOISE = 0.1  # mean difference of log-probabilities; 0.02 with int8, 0.05 with e4m3
SCHEMES = [("compressed-tensors", "fp8-channel"), ("compressed-tensors", "int8-channel"), ("modelopt", "fp8-channel")]


@pytest.fixture
def trained(tmp_path):
    """A Llama of random weights."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    for name, tensor in model.named_parameters():
        torch.nn.init.normal_(tensor, mean=float("norm" in name), std=0.2 if "norm" in name else 0.05)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize(("style", "scheme"), SCHEMES)
def test_vllm_computes_what_the_dequantized_model_does(style, scheme, trained, by_transformers, by_vllm, tmp_path):
    assert carnet.cross(trained, tmp_path / "codes", to="hf", quantize=scheme, style=style).equal
    assert carnet.cross(tmp_path / "codes", tmp_path / "wide", to="hf", dtype="bf16").equal
    expected = by_transformers(tmp_path / "wide")
    assert expected.std() > 0.5
    noise = (by_vllm(tmp_path / "codes", {}, "bfloat16") - expected).abs().mean()
    assert noise < NOISE

    path = tmp_path / "codes/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 1.5  # the referee must see it
    save_file(tensors, path, {"format": "pt"})
    assert (by_vllm(tmp_path / "codes", {}, "bfloat16") - expected).abs().mean() > 2 * noise
