"""The layer of Qwen3-Next and Qwen3.5 that predicts a further token, which transformers has no class for.

What megatron-core computes with it, a decoder layer of transformers does behind what vLLM puts before one: qwen3_next_mtp.py and
qwen3_5_mtp.py, whose loaders have the names.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import carnet
from carnet.errors import BadRequest, CarnetError
from carnet.live import Grid, plan
from carnet.megatron import meta
from carnet.megatron.models import arguments
from tests.megatron.conftest import BASE, MOE, TOKENS, FusedProvider, filled, newer, save
from tests.megatron.test_further_by_pattern import heard
from tests.megatron.test_hybrid_of_gpt import NEXT, arguments_of, assert_same, crossed, ranks, trained  # noqa: F401

pytestmark = [pytest.mark.referee, newer, pytest.mark.usefixtures("megatron_world")]
GATED = {name: said for name, said in NEXT.items() if not name.startswith("moe_")}
DENSE = {
    **BASE,
    **GATED,
    "vocab_size": 64,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "mtp_num_layers": 1,
}
MIXED = {**DENSE, **MOE, **NEXT, "moe_layer_freq": 1}
KEY = "mtp_num_hidden_layers"
MODELS = {"qwen3_next": (MIXED, "num_nextn_predict_layers"), "qwen3_5": (DENSE, KEY), "qwen3_5_moe": (MIXED, KEY)}
AROUND = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "final_layernorm",
    "layers.0.self_attn.o_proj": "mtp_model_layer.self_attention.linear_proj",
    "layers.0.self_attn.q_norm": "mtp_model_layer.self_attention.q_layernorm",
}
FILE = "model.safetensors"


@pytest.fixture
def model(default_spec, monkeypatch):
    """Return the random model of some arguments, of megatron-core's own spec."""
    monkeypatch.setattr(specs, "_get_backend_spec_provider", lambda config: FusedProvider())
    monkeypatch.setattr(meta, "HAVE_TE", True)
    FusedProvider.latent = False

    def spec(config, stage):
        return specs.get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=stage)

    return lambda said: filled(said, spec)


def folder_of(family, model, said, tmp_path):
    root = save(model, said, tmp_path / "saved")
    assert carnet.cross(root, tmp_path / "hf", to="hf", family=family).equal
    return load_file(tmp_path / "hf" / FILE)


def loaded(folder):
    """Return the model that transformers makes of a folder, which lacks nothing and has nothing over."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    made, said = asked
    assert not any(said.values())
    return made


def alone(found, folder, out):
    """Return the model whose one decoder layer is the one for the further token."""
    shutil.copytree(folder, out)
    inside = {name.removeprefix("mtp."): held for name, held in found.items() if name.startswith("mtp.layers.0.")}
    inside = {f"model.{name}": held for name, held in (*inside.items(), ("norm.weight", found["mtp.norm.weight"]))}
    save_file({**inside, **{name: found[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}}, out / FILE)
    rewrite(out, num_hidden_layers=1, layer_types=["full_attention"])
    return loaded(out)


def rewrite(folder, **keys):
    """Say other things in a config; None takes a key out."""
    said = {**json.loads((folder / "config.json").read_text()), **keys}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


@pytest.mark.parametrize("family", MODELS)
def test_a_decoder_layer_of_transformers_says_the_further_token_behind_what_vllm_puts_before_it(
    family, model, mamba_on_cpu, tmp_path
):
    said, key = MODELS[family]
    made = model(said)
    found, state = folder_of(family, made, said, tmp_path), made.state_dict()
    for name, own in AROUND.items():
        assert torch.equal(found[f"mtp.{name}.weight"], state[f"mtp.layers.0.{own}.weight"]), name
    assert json.loads((tmp_path / "hf/config.json").read_text())[key] == 1
    further, expected = heard(made, TOKENS)
    whole, branch = loaded(tmp_path / "hf"), alone(found, tmp_path / "hf", tmp_path / "one layer")
    later = torch.nn.functional.pad(TOKENS[:, 1:], (0, 1))
    with torch.no_grad():
        hidden = whole.model(TOKENS, use_cache=False).last_hidden_state
        values = {"embedding": whole.get_input_embeddings()(later), "hidden": hidden}
        normed = [
            torch.nn.functional.rms_norm(each, each.shape[-1:], 1 + found[f"mtp.pre_fc_norm_{name}.weight"], 1e-6)
            for name, each in values.items()
        ]
        computed = branch(inputs_embeds=torch.cat(normed, -1) @ found["mtp.fc.weight"].T, use_cache=False).logits
        torch.testing.assert_close(whole.lm_head(hidden), expected, rtol=1e-4, atol=1e-4)
    assert further.std() > 0.1
    torch.testing.assert_close(computed, further, rtol=1e-4, atol=1e-4)
    with plan(arguments(made), source=Grid(), target=Grid(), family=family) as live:
        assert_same(live.run(made), found)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("spelling", ["te", "local"])
def test_there_and_back(family, spelling, model, tmp_path):
    said, _ = MODELS[family]
    found = folder_of(family, model(said), said, tmp_path)
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", spelling=spelling).equal
    carnet.cross(tmp_path / "megatron", tmp_path / "again", to="hf", family=family)
    assert_same(load_file(tmp_path / "again" / FILE), found)
    stored = {name for _, name in carnet.inspect(tmp_path / "megatron").checkpoint.tensors}
    if spelling == "te":
        assert stored == {name for _, name in carnet.inspect(tmp_path / "saved").checkpoint.tensors}


def test_behind_a_hybrid_it_is_two_halves(trained, tmp_path):  # noqa: F811
    more = {**MOE, **NEXT, "mtp_num_layers": 1}
    made = trained("GE*E/*E", {**more, "num_layers": 4})
    said = {**arguments_of("GE*E", more), "hybrid_layer_pattern": "GE*E/*E"}
    found, state = crossed(save(made, said, tmp_path / "saved"), tmp_path / "hf"), made.state_dict()
    inner = "mtp.layers.0.mtp_model_layer.layers."
    assert torch.equal(found["mtp.fc.weight"], state["mtp.layers.0.eh_proj.weight"])
    assert torch.equal(found["mtp.layers.0.self_attn.o_proj.weight"], state[f"{inner}0.self_attention.linear_proj.weight"])
    assert torch.equal(found["mtp.layers.0.mlp.gate.weight"], state[f"{inner}1.mlp.router.weight"])
    carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron")
    assert_same(crossed(tmp_path / "megatron", tmp_path / "again"), found)


def test_the_files_of_ranks_hold_it_too(model, tmp_path):
    made = model(DENSE)
    found = folder_of("qwen3_5", made, DENSE, tmp_path)
    state = {name: tensor for name, tensor in made.state_dict().items() if tensor is not None}
    assert_same(crossed(ranks(tmp_path / "ranks", [state], DENSE), tmp_path / "of the ranks"), found)


def test_a_layer_that_is_no_attention_is_none_of_these(model, tmp_path):
    """Megatron's is like the last of the others, and Megatron refuses to build one of Gated DeltaNet."""
    root = save(model(DENSE), {**DENSE, "linear_attention_freq": [1, 0, 0, 1]}, tmp_path / "saved")
    with pytest.raises(CarnetError, match="mtp_blocks"):
        carnet.cross(root, tmp_path / "hf", to="hf")


def _exchanged(held):
    held["mtp.fc.weight"] = torch.cat(held["mtp.fc.weight"].chunk(2, 1)[::-1], 1)


def _norms(held):
    one, other = "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"
    held[one], held[other] = held[other], held[one]


def _lost(held):
    del held["mtp.layers.0.self_attn.k_norm.weight"]


def _second(held):
    held["mtp.layers.1.self_attn.k_norm.weight"] = held["mtp.layers.0.self_attn.k_norm.weight"].clone()


def _all(held):
    for name in [name for name in held if name.startswith("mtp.")]:
        del held[name]


@pytest.mark.parametrize("damage", [_exchanged, _norms, _lost, _second, _all])
def test_a_damaged_one_is_found(damage, model, tmp_path):
    held = folder_of("qwen3_5", model(DENSE), DENSE, tmp_path)
    damage(held)
    save_file(held, tmp_path / "hf" / FILE)
    assert not carnet.verify(tmp_path / "saved", tmp_path / "hf").equal


@pytest.mark.parametrize("number", [None, 0])
def test_the_tensors_say_that_it_is_there_whatever_the_config_says(number, model, tmp_path):
    """Published Qwen3-Next have the layer, and no word of it."""
    found = folder_of("qwen3_next", model(MIXED), MIXED, tmp_path)
    rewrite(tmp_path / "hf", num_nextn_predict_layers=number)
    carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron")
    assert_same(crossed(tmp_path / "megatron", tmp_path / "again"), found)
    other = tmp_path / "hf/config.json"
    carnet.cross(tmp_path / "saved", tmp_path / "by its class", to="hf", config=other)
    assert_same(load_file(tmp_path / "by its class" / FILE), found)


def test_more_layers_than_one_are_refused(model, tmp_path):
    folder_of("qwen3_5", model(DENSE), DENSE, tmp_path)
    rewrite(tmp_path / "hf", mtp_num_hidden_layers=2)
    with pytest.raises(CarnetError, match="mtp_num_hidden_layers"):
        carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron")


def test_it_can_be_left_behind_and_a_config_that_says_it_still_fits(model, tmp_path):
    whole = folder_of("qwen3_5", model(DENSE), DENSE, tmp_path)
    rest = {name: tensor for name, tensor in whole.items() if not name.startswith("mtp.")}
    carnet.cross(tmp_path / "saved", tmp_path / "without", to="hf", drop=["mtp.*"])
    assert_same(load_file(tmp_path / "without" / FILE), rest)
    carnet.cross(tmp_path / "without", tmp_path / "megatron", to="megatron")
    carnet.cross(tmp_path / "megatron", tmp_path / "again", to="hf", config=tmp_path / "hf/config.json")
    assert_same(load_file(tmp_path / "again" / FILE), rest)


def test_its_projection_stays_plain_beside_codes_and_is_named_so(model, tmp_path):
    folder_of("qwen3_5", model(DENSE), DENSE, tmp_path)
    plan = carnet.plan(tmp_path / "hf", to="hf", quantize="fp8-channel", style="compressed-tensors")
    held = {tensor.name: tensor.dtype for file in plan.files for tensor in getattr(file, "tensors", ())}
    assert held["mtp.layers.0.self_attn.q_proj.weight"] == "f8_e4m3"
    assert held["mtp.fc.weight"] == "f32"
    assert '"mtp.fc"' in str(plan.texts)


def test_what_no_calibration_reaches_is_left_plain_by_the_name_that_the_refusal_says(model, tmp_path):
    """transformers computes no such layer, and so says nothing of its activations; NVIDIA publishes it plain."""
    found = folder_of("qwen3_5", model(DENSE), DENSE, tmp_path)
    seen = {name.replace(".weight", ".input_amax"): torch.tensor(3.5) for name in found if name.endswith("proj.weight")}
    seen |= {name.replace("weight", "input_amax"): torch.tensor(3.5) for name in found if ".linear_attn.in_proj_" in name}
    save_file({name: each for name, each in seen.items() if not name.startswith("mtp.")}, tmp_path / "amax.safetensors")
    wish: Any = {"to": "hf", "quantize": "fp8", "amax": tmp_path / "amax.safetensors"}
    with pytest.raises(BadRequest, match="nothing says how large the activations of 'mtp") as refused:
        carnet.plan(tmp_path / "hf", **wish)
    assert "--exclude 'mtp.layers.0.*'" in str(refused.value.remedy)
    assert carnet.cross(tmp_path / "hf", tmp_path / "coded", **wish, exclude=["mtp.layers.0.*"]).equal
    coded = load_file(tmp_path / "coded" / FILE)
    assert [name for name in coded if name.startswith("mtp.") and not torch.equal(coded[name], found[name])] == []
