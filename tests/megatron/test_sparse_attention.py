"""Latent attention with an indexer, as the real megatron-core builds, saves and computes it: transformers computes the same.

Its spec asks for Transformer Engine; what stands in for that has the same names and weights.
"""

import importlib

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from megatron.core.post_training.modelopt import layers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import carnet
from carnet.errors import CarnetError
from carnet.live import Grid, plan
from carnet.megatron.models import arguments
from tests.megatron.conftest import BASE, MLA, MOE, TOKENS, FusedProvider, filled, logits, newer, save

pytestmark = [pytest.mark.referee, newer, pytest.mark.usefixtures("megatron_world")]

V32 = {
    **BASE,
    **MLA,
    **MOE,
    "num_layers": 7,
    "moe_layer_freq": [0, *[1] * 6],
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 3,
    "dsa_indexer_head_dim": 6,
    "dsa_indexer_topk": 5,
    "dsa_indexer_k_norm_epsilon": 1e-6,
    "dsa_indexer_topk_freq": 1,
    "dsa_indexer_skip_topk_offset": 0,
    "dsa_indexer_rope_interleaved": False,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 24,
}
GLM5 = {**V32, "dsa_indexer_rope_interleaved": True}
MODELS = {
    "deepseek_v32": V32,
    "glm_moe_dsa": GLM5,
    "glm_moe_dsa, every second layer chooses": {**GLM5, "dsa_indexer_topk_freq": 2},
    "glm_moe_dsa, as GLM-5.2": {**GLM5, "dsa_indexer_topk_freq": 3, "dsa_indexer_skip_topk_offset": 3},
    "glm_moe_dsa, a further token": {
        **GLM5,
        "dsa_indexer_topk_freq": 2,
        "num_layers": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "mtp_num_layers": 1,
    },
}


class Provider(FusedProvider):
    """Modules in place of Transformer Engine's, which are whole on every rank where the spec says so."""

    latent = True

    def linear(self):
        return layers.Linear


@pytest.fixture
def spec(monkeypatch, default_spec):
    """Return megatron-core's own spec of these layers."""
    absorbed = importlib.import_module("megatron.core.transformer.experimental_attention_variant.absorbed_mla")
    monkeypatch.setattr(absorbed, "Linear", layers.Linear)
    monkeypatch.setattr(absorbed, "TELinear", type("TELinear", (), {}))
    monkeypatch.setattr(specs, "_get_backend_spec_provider", lambda config: Provider())
    resolver = importlib.import_module("megatron.core.transformer.mla_qk_norm_config")
    monkeypatch.setattr(resolver, "get_backend", lambda _: Provider())
    return lambda config, stage: specs.get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=stage)


def made(said, spec, seed=17):
    """Return a model that does without the kernel for a rotation that changes no score."""
    model = filled(said, spec, seed)
    model.config.dsa_indexer_rotate_activation = False
    return model


def assert_computed_and_back(name, expected, tmp_path):
    """Assert that a store's family is known, that transformers computes its logits, and that it comes back."""
    assert carnet.inspect(tmp_path / "store").inventory.family.name == name.partition(",")[0]
    assert carnet.cross(tmp_path / "store", tmp_path / "hf", to="hf").equal
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = theirs(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert carnet.cross(tmp_path / "hf", tmp_path / "back", to="megatron").equal


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_megatron_core_does_and_the_store_comes_back(name, spec, tmp_path):
    said = MODELS[name]
    model = made(said, spec)
    expected = logits(model)[..., : said["vocab_size"]]
    save(model, said, tmp_path / "store")
    assert_computed_and_back(name, expected, tmp_path)
    again = made(said, spec, seed=3)
    assert states_aside(again, tmp_path / "back/iter_0000001") == set()
    assert torch.equal(logits(again)[..., : said["vocab_size"]], expected)


def states_aside(model, folder):
    """Load a model, and return what one side alone has, but for the states that Transformer Engine's modules would have."""
    state = {"model": model.sharded_state_dict()}
    loaded, *alone = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict(loaded["model"])
    return {name for names in alone for name in names if not name.endswith("._extra_state")}


@pytest.fixture
def stack(spec, default_stack):
    """Return the stack of a hybrid, megatron-core's own: with modules that are whole on every rank where its own are."""
    layer = default_stack.submodules.dsa_layer.submodules.self_attention.submodules
    layer.linear_q_down_proj = layer.linear_kv_down_proj = layers.Linear
    inner = layer.core_attention.submodules.indexer.submodules
    inner.linear_wq_b = inner.linear_wk = inner.linear_weights_proj = layers.Linear
    return lambda *_: default_stack


HALVES = {
    "deepseek_v32": ("D-DEDE", {}),
    "glm_moe_dsa": ("D-DEDE", {"dsa_indexer_rope_interleaved": True}),
    "glm_moe_dsa, a number of the pattern's layers chooses": (
        "D-DEDE",
        {"dsa_indexer_rope_interleaved": True, "dsa_indexer_topk_freq": 4},
    ),
    "glm_moe_dsa, a further token": ("D-DEDE/DE", {"dsa_indexer_rope_interleaved": True, "mtp_num_layers": 1}),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_hybrid_of_such_layers_is_the_same_family(name, stack, tmp_path):
    pattern, more = HALVES[name]
    said = {**V32, **more, "num_layers": 6, "moe_layer_freq": 1, "hybrid_layer_pattern": pattern, "vocab_size": 64}
    model = made(said, stack)
    expected = logits(model)
    save(model, said, tmp_path / "store")
    assert_computed_and_back(name, expected, tmp_path)
    assert carnet.verify(tmp_path / "store", tmp_path / "back").equal
    stored = load_file(tmp_path / "hf/model.safetensors")
    with plan(arguments(model), source=Grid(), target=Grid(), family=name.partition(",")[0]) as live:
        given = live.run(model)
    assert given.keys() == stored.keys()
    assert [each for each in stored if not torch.equal(given[each], stored[each])] == []


@pytest.mark.parametrize(
    ("pattern", "variant"), [("D-DEDE", None), ("D-+EDE", "dsa"), ("+-+E+E", "dsa"), ("*-*E*E", "dsa")], ids=str
)
def test_a_pattern_with_other_attention_than_the_arguments_say_is_refused(pattern, variant, stack, tmp_path):
    """Without the word megatron-core builds the letter, and its indexer reads what no norm has seen: mla_qk_norm_config.py."""
    said = {**V32, "num_layers": 6, "moe_layer_freq": 1, "hybrid_layer_pattern": "D-DEDE", "vocab_size": 64}
    other = {**said, "hybrid_layer_pattern": pattern, "experimental_attention_variant": variant}
    save(made(said, stack), other, tmp_path / "store")
    with pytest.raises(CarnetError, match="hybrid_layer_pattern"):
        carnet.cross(tmp_path / "store", tmp_path / "hf", to="hf")
