"""Qwen3-Next: what transformers saved comes back from Megatron tensor by tensor, and computes the same bits."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3NextConfig

import carnet
from carnet.formats.detect import open_checkpoint
from carnet.steps import kind
from tests.formats.test_torch_dist_goldens import rebuilt
from tests.referees.sizes import HEADS, TOKENS

pytestmark = [
    pytest.mark.referee,
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]

GOLDEN = Path(__file__).parents[1] / "goldens/megatron/v0192_qwen3next_te_tp2"
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 3,
}
SIZES = {**HEADS, **TOKENS, **EXPERTS, **DELTA, "intermediate_size": 56}
KEPT_APART = ("query", "key", "value", "z", "beta", "alpha")
# a parameter of Megatron's module -> the keys that a store has for it
PARTS = {
    "in_proj.weight": KEPT_APART,
    "conv1d.weight": KEPT_APART[:3],
    "out_norm.weight": (),
    "out_proj.weight": (),
    "A_log": (),
    "dt_bias": (),
}
LINEAR, FULL = "linear_attention", "full_attention"
MODELS = {
    "every fourth layer attends": Qwen3NextConfig(**SIZES),
    "layers of any kind, one dense": Qwen3NextConfig(
        **SIZES, layer_types=[FULL, LINEAR, LINEAR, FULL, LINEAR], mlp_only_layers=[2], norm_topk_prob=False
    ),
    "one layer attends": Qwen3NextConfig(**SIZES, layer_types=[FULL, *[LINEAR] * 4]),
    "a value head for each key head": Qwen3NextConfig(**{**SIZES, "linear_num_value_heads": 2}),
}


# where one is taken from a norm and added again float32 loses bits, bfloat16 kept in it does not
BF16 = {"dtype": torch.bfloat16, "summed": ("linear_attn.norm.weight",)}


@pytest.mark.parametrize("cut", [{"tp": 2, "pp": 2}, {"ep": 2, "spelling": "local"}], ids=["tp 2 pp 2", "ep 2"])
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_from_megatron(which, cut, there_and_again):
    there_and_again(MODELS[which], {"to": "megatron", **cut}, **BF16)


def test_query_heads_have_a_bias_beside_their_gates(there_and_again):
    there_and_again(Qwen3NextConfig(**SIZES, attention_bias=True))


def test_a_model_that_was_cut_before_its_first_attention_comes_back(there_and_again):
    there_and_again(Qwen3NextConfig(**{**SIZES, "num_hidden_layers": 2}), spelled_otherwise={"head_dim"})


def test_the_gated_norm_alone_is_stored_whole_and_the_sum_is_kept_exact(tmp_path):
    plan = carnet.plan(GOLDEN, to="hf")
    assert {step.tensor for step in plan.steps if kind(step).startswith("add")} == {
        f"layers.{n}.gdn.out_norm" for n in range(3)
    }
    assert carnet.cross(GOLDEN, tmp_path / "hf", to="hf").equal
    found = load_file(tmp_path / "hf/model.safetensors")
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.{n}.linear_attn.norm.weight" for n in range(3)}


def test_the_way_back_takes_one_from_the_gated_norm_and_is_what_was_trained(tmp_path):
    """What a whole model of Megatron's own says of itself, in the module's one name for what a store keeps apart."""
    assert carnet.cross(GOLDEN, tmp_path / "hf", to="hf").equal
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", tp=2).equal
    found, full = open_checkpoint(tmp_path / "megatron"), load_file(GOLDEN / "full.safetensors")
    assert found.config["experimental_attention_variant"] == "gated_delta_net"
    assert found.config["linear_attention_freq"] == 4
    held = {name: rebuilt(found, tensor) for (_, name), tensor in found.tensors.items()}
    for layer, at in itertools.product(range(3), (f"decoder.layers.{{}}.self_attention.{part}" for part in PARTS)):
        name = at.format(layer)
        parts = [held[f"{name}.{part}"] for part in PARTS[at.rpartition("attention.")[2]]] or [held[name]]
        assert torch.equal(torch.cat(parts).to(full[name].dtype), full[name]), name


def test_the_projection_of_beta_and_alpha_stays_plain_beside_codes_and_is_named_so():
    plan = carnet.plan(GOLDEN, to="hf", quantize="fp8-channel", style="compressed-tensors")
    held = {tensor.name: tensor.dtype for file in plan.files for tensor in getattr(file, "tensors", ())}
    delta = {name.partition("linear_attn.")[2]: dtype for name, dtype in held.items() if ".0.linear_attn." in name}
    coded = {name for name, dtype in delta.items() if dtype == "f8_e4m3"}
    assert coded == {"in_proj_qkvz.weight", "out_proj.weight"}
    assert "model.layers.0.linear_attn.in_proj_ba" in str(plan.texts)
