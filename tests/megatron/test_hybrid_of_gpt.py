"""A GPT's family that megatron-core built as a hybrid, each half of a layer alone: what transformers computes with the target."""

import re
from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import carnet
from carnet.errors import CarnetError
from carnet.live import Grid, plan
from carnet.megatron.models import arguments
from carnet.megatron.modules import Norm, core_attention
from tests.megatron.conftest import BASE, DELTA, MLA, MOE, TOKENS, filled, logits, newer, save

pytestmark = [pytest.mark.referee, pytest.mark.usefixtures("megatron_world")]
SHARED = {"moe_shared_expert_intermediate_size": 24}
NEXT = {
    **{name: said for name, said in DELTA.items() if name.startswith("linear_")},
    **SHARED,
    "moe_shared_expert_gate": True,
    "attention_output_gate": True,
    "layernorm_zero_centered_gamma": True,
    "qk_layernorm": True,
    "rotary_percent": 0.5,
    "kv_channels": 16,
}
DEEPSEEK = {**MLA, **SHARED, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
MODELS = {
    "llama": ("*-*-", {}),
    "mixtral": ("*E*E", {**MOE, "moe_ffn_hidden_size": BASE["ffn_hidden_size"]}),
    "qwen3": pytest.param("*-*-", {"qk_layernorm": True}, marks=newer),
    "qwen3_moe": pytest.param("*E*E", {**MOE, "qk_layernorm": True}, marks=newer),
    "qwen3_next": pytest.param("GE*E", {**MOE, **NEXT}, marks=newer),
    "deepseek_v3": pytest.param("+-+E", {**MOE, **DEEPSEEK}, marks=newer),
}
MODELS = [
    pytest.param(name, *getattr(said, "values", said), marks=getattr(said, "marks", ()), id=name)
    for name, said in MODELS.items()
]
NORM = "decoder.final_norm.weight"


def arguments_of(pattern, more):
    return {**BASE, **more, "num_layers": len(re.sub(r"[][|]", "", pattern)), "hybrid_layer_pattern": pattern, "vocab_size": 64}


@pytest.fixture
def trained(default_stack, default_spec):
    """Return the random model of a pattern; Transformer Engine would bring the norms of queries and keys."""

    def build(pattern, more):
        places = default_stack.submodules
        given = places.attention_layer.submodules.self_attention.submodules
        given.q_layernorm = given.k_layernorm = Norm if more.get("qk_layernorm") else IdentityOp
        if more.get("multi_latent_attention"):
            places.mla_layer.submodules.self_attention.submodules.core_attention = core_attention(local=True, latent=True)
        return filled(arguments_of(pattern, more), lambda *_: default_stack)

    return build


def crossed(root, out):
    carnet.cross(root, out, to="hf")
    return load_file(next(out.glob("*.safetensors")))


@pytest.mark.parametrize(("family", "pattern", "more"), MODELS)
def test_what_megatron_computes_with_halves_transformers_computes_with_layers(
    family, pattern, more, trained, mamba_on_cpu, tmp_path
):
    model = trained(pattern, more)
    root = save(model, arguments_of(pattern, more), tmp_path / "saved")
    seen = carnet.inspect(root)
    assert seen.inventory, str(seen.refusal)
    assert seen.inventory.family.name == family
    found = crossed(root, tmp_path / "hf")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        computed = target(TOKENS, use_cache=False).logits
    torch.testing.assert_close(computed, logits(model), rtol=0, atol=2e-5)
    with plan(arguments(model), source=Grid(), target=Grid()) as live:  # the running model has the same
        assert_same(live.run(model), found)
    carnet.cross(root, tmp_path / "megatron", to="megatron")  # whose form is that of a GPT
    assert_same(crossed(tmp_path / "megatron", tmp_path / "again"), found)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def ranks(root, states, said):
    """Save the files of the ranks of a pipeline."""
    for at, state in enumerate(states):
        file = root / f"iter_0000001/mp_rank_00{f'_{at:03}' * (len(states) > 1)}/model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": len(states), "expert_model_parallel_size": 1}
        torch.save({"args": Namespace(**said, **sizes), "checkpoint_version": 3.0, "iteration": 1, "model": state}, file)
    return root


def number(name):
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else 99 * name.startswith(("decoder", "output"))


def renumbered(state, rule):
    return {re.sub(r"(?<=layers\.)\d+", lambda m: str(rule(int(m[0]))), name): tensor for name, tensor in state.items()}


def test_a_stage_may_end_within_a_layer(trained, tmp_path):
    pattern, model = "*-*|-", trained("*-*-", {})
    stored = crossed(save(model, arguments_of("*-*-", {}), tmp_path / "store"), tmp_path / "of the store")
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    stages = [{name: tensor for name, tensor in state.items() if (number(name) > 2) == last} for last in (False, True)]
    root = ranks(tmp_path / "ranks", [stages[0], renumbered(stages[1], lambda at: at - 3)], arguments_of(pattern, {}))
    assert_same(crossed(root, tmp_path / "of the ranks"), stored)


def test_brackets_join_what_the_checkpoint_then_has_under_one_number(trained, tmp_path):
    """Megatron-LM pull request 4942: a pattern with brackets is stored as a GPT is."""
    model = trained("*-*-", {})
    stored = crossed(save(model, arguments_of("*-*-", {}), tmp_path / "store"), tmp_path / "of the store")
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    state["decoder.final_layernorm.weight"] = state.pop(NORM)
    said = {**arguments_of("[*-][*-]", {}), "num_layers": 2}
    root = ranks(tmp_path / "ranks", [renumbered(state, lambda at: at // 2)], said)
    assert_same(crossed(root, tmp_path / "of the ranks"), stored)


@pytest.mark.parametrize("pattern", ["*-+-", "[*-]*X", "[-*][*-]", "[*-*-]", "*-[", "*-*-/X"])
def test_a_pattern_that_says_no_model_is_refused(pattern, trained, tmp_path):
    root = save(trained("*-*-", {}), {**arguments_of("*-*-", {}), "hybrid_layer_pattern": pattern}, tmp_path / "saved")
    with pytest.raises(CarnetError, match="'hybrid_layer_pattern'"):
        carnet.cross(root, tmp_path / "hf", to="hf")


def test_half_a_layer_that_is_missing_is_missed(trained, tmp_path):
    def lose(state):
        del state["decoder.layers.3.mlp.linear_fc2.weight"]

    root = save(trained("*-*-", {}), arguments_of("*-*-", {}), tmp_path / "saved", change=lose)
    with pytest.raises(CarnetError, match=r"lacks .layers\.1\.mlp\.down"):
        carnet.cross(root, tmp_path / "hf", to="hf")
