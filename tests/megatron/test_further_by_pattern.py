"""Layers that predict further tokens behind a hybrid's: what Megatron computes with them, layers of transformers compute."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import carnet
from carnet.errors import CarnetError
from carnet.live import Grid, plan
from carnet.megatron.models import arguments
from tests.megatron.conftest import HYBRID, TOKENS, OnCpu, filled, newer, save
from tests.megatron.test_hybrid_of_gpt import DEEPSEEK, MOE, arguments_of, assert_same, crossed, ranks, trained  # noqa: F401

pytestmark = [pytest.mark.referee, pytest.mark.usefixtures("megatron_world"), newer]
TWO = {
    **HYBRID,
    "num_layers": 4,
    "hybrid_override_pattern": None,
    "hybrid_layer_pattern": "M*-E/*E/*E",
    "mtp_num_layers": 2,
    "vocab_size": 64,
    "layernorm_epsilon": 1e-5,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 24,
}


@pytest.fixture
def model(default_stack):
    return filled(TWO, lambda *_: default_stack)


def heard(model, tokens):
    """Return what the head says each time that it is asked, the next token last."""
    found = []
    watch = model.output_layer.register_forward_hook(lambda *said: found.append(said[-1][0].transpose(0, 1).clone()))
    length = tokens.shape[1]
    with torch.no_grad(), OnCpu(), torch.compiler.set_stance("force_eager"):
        future = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        model(tokens, torch.arange(length)[None].expand(len(tokens), -1), future, labels=tokens)
    watch.remove()
    return found


def test_names_of_the_hub_hold_what_the_layers_do(model, mamba_on_cpu, tmp_path):
    root = save(model, TWO, tmp_path / "saved")
    found, state = crossed(root, tmp_path / "hf"), model.state_dict()
    for depth in range(2):
        first, last = f"mtp.layers.{2 * depth}.", f"mtp.layers.{2 * depth + 1}."
        there = f"mtp.layers.{depth}."
        inner = f"{there}mtp_model_layer.layers."
        for name, own in {
            f"{first}eh_proj.weight": f"{there}eh_proj.weight",
            f"{first}enorm.weight": f"{there}enorm.weight",
            f"{first}hnorm.weight": f"{there}hnorm.weight",
            f"{last}final_layernorm.weight": f"{there}final_layernorm.weight",
            f"{first}mixer.o_proj.weight": f"{inner}0.self_attention.linear_proj.weight",
            f"{first}norm.weight": f"{inner}0.self_attention.linear_qkv.layer_norm_weight",
            f"{last}norm.weight": f"{inner}1.pre_mlp_layernorm.weight",
            f"{last}mixer.gate.weight": f"{inner}1.mlp.router.weight",
            f"{last}mixer.shared_experts.up_proj.weight": f"{inner}1.mlp.shared_experts.linear_fc1.weight",
            f"{last}mixer.experts.3.down_proj.weight": f"{inner}1.mlp.experts.local_experts.3.linear_fc2.weight",
        }.items():
            assert torch.equal(found[name], state[own]), name
    assert sum(name.startswith("mtp.") for name in found) == 2 * (3 + 5 + 1 + 1 + 2 + 2 + 2 * 4)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded[1].values())
    mamba_on_cpu(TWO)
    with torch.no_grad():
        torch.testing.assert_close(loaded[0](TOKENS).logits, heard(model, TOKENS)[-1], rtol=0, atol=2e-5)
    with plan(arguments(model), source=Grid(), target=Grid()) as live:
        assert_same(live.run(model), found)


@pytest.mark.parametrize("spelling", ["te", "local"])
def test_there_and_back(model, spelling, tmp_path):
    root = save(model, TWO, tmp_path / "saved")
    found = crossed(root, tmp_path / "hf")
    carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", spelling=spelling)
    assert_same(crossed(tmp_path / "megatron", tmp_path / "again"), found)
    stored = carnet.inspect(tmp_path / "megatron").checkpoint.tensors
    wanted = {name for _, name in carnet.inspect(root).checkpoint.tensors}
    if spelling == "te":
        assert {name for _, name in stored} == wanted


def test_the_files_of_ranks_hold_them_too(model, tmp_path):
    found = crossed(save(model, TWO, tmp_path / "saved"), tmp_path / "hf")
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    assert_same(crossed(ranks(tmp_path / "ranks", [state], TWO), tmp_path / "of the ranks"), found)


def test_halves_of_a_gpt_s_own(trained, tmp_path):  # noqa: F811
    more = {**MOE, **DEEPSEEK, "mtp_num_layers": 1}
    said = {**arguments_of("+-+E", more), "hybrid_layer_pattern": "+-+E/+E"}
    model = trained("+-+E/+E", {**more, "num_layers": 4})
    found = crossed(save(model, said, tmp_path / "saved"), tmp_path / "hf")
    state = model.state_dict()
    assert torch.equal(found["model.layers.2.eh_proj.weight"], state["mtp.layers.0.eh_proj.weight"])
    inner = "mtp.layers.0.mtp_model_layer.layers."
    assert torch.equal(found["model.layers.2.self_attn.o_proj.weight"], state[f"{inner}0.self_attention.linear_proj.weight"])
    assert torch.equal(found["model.layers.2.mlp.gate.weight"], state[f"{inner}1.mlp.router.weight"])
    carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron")
    assert_same(crossed(tmp_path / "megatron", tmp_path / "again"), found)


def test_they_can_be_left_behind(model, tmp_path):
    root = save(model, TWO, tmp_path / "saved")
    whole = crossed(root, tmp_path / "hf")
    carnet.cross(root, tmp_path / "without", to="hf", drop=["mtp.*"])
    found = load_file(tmp_path / "without/model.safetensors")
    assert_same(found, {name: tensor for name, tensor in whole.items() if not name.startswith("mtp.")})


def test_one_that_is_missing_is_missed(model, tmp_path):
    router = "mtp.layers.1.mtp_model_layer.layers.1.mlp.router.weight"
    root = save(model, TWO, tmp_path / "saved", change=lambda state: state.pop(router))
    with pytest.raises(CarnetError, match=r"lacks .layers\.7\.moe\.router"):
        carnet.cross(root, tmp_path / "hf", to="hf")


@pytest.mark.parametrize("wrong", ["M*-E/*E/*-", "M*-E/*E", "M*-E/X/X", "M*-E/*E/*E/*E"])
def test_patterns_that_say_no_layers_are_refused(model, wrong, tmp_path):
    root = save(model, {**TWO, "hybrid_layer_pattern": wrong}, tmp_path / "saved")
    with pytest.raises(CarnetError, match="mtp_num_layers"):
        carnet.cross(root, tmp_path / "hf", to="hf")
