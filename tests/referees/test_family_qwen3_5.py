"""Qwen3.5, the text models: what transformers saved comes back from Megatron, and a store that Qwen3-Next could be fills it, too."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

import carnet
from carnet.architectures.known import recognise
from carnet.dialects.writing import write
from carnet.errors import NotSupported
from carnet.quantize.reading import CONFIG_KEY, plain
from tests.referees.sizes import HEADS, TOKENS
from tests.referees.test_family_qwen3_next import BF16, DELTA, EXPERTS, FULL, GOLDEN, LINEAR
from tests.referees.test_published import CONFIGS, of_class, said

pytestmark = [
    pytest.mark.referee,
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]

DENSE = {**HEADS, **TOKENS, **DELTA, "intermediate_size": 56}
MIXED = {**HEADS, **TOKENS, **DELTA, **EXPERTS}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1], "mrope_interleaved": True}
MODELS = {
    "dense": Qwen3_5TextConfig(**DENSE),
    "mixtures": Qwen3_5MoeTextConfig(**MIXED),
    "layers of any kind": Qwen3_5TextConfig(**DENSE, layer_types=[FULL, LINEAR, LINEAR, FULL, LINEAR]),
    "mixtures that all attend": Qwen3_5MoeTextConfig(**MIXED, layer_types=[FULL] * 5),
    "a value head for each key head": Qwen3_5MoeTextConfig(**{**MIXED, "linear_num_value_heads": 2}),
    "tied": Qwen3_5TextConfig(**{**DENSE, "tie_word_embeddings": True}),
}
# experts in one tensor, and what published configs say beside what the class writes
PUBLISHED = {"as_held": True, "spelled_otherwise": ("full_attention_interval", "mamba_ssm_dtype")}
WRAPPED = [name for name in CONFIGS if said(name).get("text_config", {}).get("model_type", "").startswith("qwen3_5")]


@pytest.mark.parametrize("cut", [{"tp": 2, "pp": 2}, {"spelling": "local"}], ids=["tp 2 pp 2", "local"])
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_from_megatron(which, cut, there_and_again):
    family = MODELS[which].model_type.removesuffix("_text")
    there_and_again(MODELS[which], {"to": "megatron", **cut}, **BF16, **PUBLISHED, family=family)


def test_query_heads_have_a_bias_beside_their_gates(there_and_again):
    there_and_again(Qwen3_5TextConfig(**DENSE, attention_bias=True), **PUBLISHED)


def test_what_positions_say_of_images_is_kept(there_and_again):
    there_and_again(Qwen3_5TextConfig(**DENSE, rope_parameters=MROPE), {"to": "hf"}, **PUBLISHED)


def test_experts_that_are_saved_each_for_itself_are_the_same_model(saved, loaded, tmp_path):
    at, tokens = saved(MODELS["mixtures"]), torch.arange(32).reshape(2, 16)
    assert carnet.cross(at, tmp_path / "out", to="hf").equal
    assert any(".experts.0.gate_proj." in name for name in load_file(at / "model.safetensors"))
    assert any(name.endswith(".experts.gate_up_proj") for name in load_file(tmp_path / "out/model.safetensors"))
    with torch.no_grad():
        found, expected = (loaded(folder)(tokens, use_cache=False).logits for folder in (tmp_path / "out", at))
    assert torch.equal(found, expected)


def test_the_store_of_either_kind_of_mixture_fills_both_and_computes_megatrons_logits(tmp_path):
    found = carnet.inspect(GOLDEN).inventory
    assert (found.family.name, found.others) == ("qwen3_next", {"qwen3_5_moe": False})
    assert carnet.plan(GOLDEN, to="hf").notes["could be"].startswith("qwen3_5_moe (other tensors)")
    assert carnet.cross(GOLDEN, tmp_path / "hf", to="hf", family="qwen3_5_moe").equal
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["Qwen3_5MoeForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    golden = load_file(GOLDEN / "reference.safetensors")
    with torch.no_grad():
        logits = model(golden["tokens"].long(), use_cache=False).logits
    torch.testing.assert_close(logits, golden["logits"][..., : logits.shape[-1]], rtol=0, atol=1e-4)


def test_the_gated_norm_alone_takes_one_more(tmp_path):
    carnet.cross(GOLDEN, tmp_path / "hf", to="hf", family="qwen3_5_moe")
    wide = {n for n, t in load_file(tmp_path / "hf/model.safetensors").items() if t.dtype == torch.float32}
    assert wide == {f"model.layers.{n}.linear_attn.norm.weight" for n in range(3)}


def test_a_dense_family_is_none_of_its_mixtures_and_a_mixture_no_dense_one():
    with pytest.raises(NotSupported, match="no model of the family 'qwen3_5'"):
        carnet.plan(GOLDEN, to="hf", family="qwen3_5")


def test_experts_are_one_tensor_where_they_are_plain_and_a_module_each_where_they_are_coded():
    def names(**options):
        plan = carnet.plan(GOLDEN, to="hf", family="qwen3_5_moe", **options)
        held = {tensor.name.partition(".mlp.experts.")[2] for file in plan.files for tensor in getattr(file, "tensors", ())}
        return held - {""}

    assert names() == {"gate_up_proj", "down_proj"}
    parts = {f"{e}.{p}_proj.{w}" for e in range(4) for p in ("gate", "up", "down") for w in ("weight", "weight_scale")}
    assert names(quantize="fp8-channel", style="compressed-tensors") == parts


def test_what_it_leaves_plain_beside_codes_is_what_llm_compressor_leaves():
    plan = carnet.plan(GOLDEN, to="hf", family="qwen3_5_moe", quantize="fp8-channel", style="compressed-tensors")
    (config,) = (json.loads(text.text) for text in plan.texts if text.name == "config.json")
    ignored = [name.partition("layers.0.")[2] for name in config["quantization_config"]["ignore"] if "layers.0." in name]
    assert sorted(ignored) == ["linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.gate", "mlp.shared_expert_gate"]


@pytest.mark.parametrize("key", ["attn_output_gate", "mtp_use_dedicated_embeddings", "output_gate_type", "mlp_only_layers"])
def test_another_model_of_the_class_is_refused_by_the_key(key):
    other = {"attn_output_gate": False, "mtp_use_dedicated_embeddings": True, "output_gate_type": "sigmoid"}.get(key, [1])
    raw = {**MODELS["mixtures"].to_dict(), "architectures": ["Qwen3_5MoeForCausalLM"], key: other}
    with pytest.raises(NotSupported, match=key):
        recognise("hf", raw, "a config", {})


@pytest.mark.skipif(not CONFIGS, reason="`make test` fetches them")
def test_published_ones_are_there():
    assert len(WRAPPED) == 8


@pytest.mark.parametrize("name", WRAPPED)
def test_what_a_published_wrapper_says_of_its_text_is_read_and_written_back(name):
    raw = plain(CONFIG_KEY, said(name))["text_config"]
    family, fields = recognise("hf", raw, name, {})
    written = json.loads(json.dumps(write(family.hf.table, fields, family.traits, name)))
    found, expected = (of_class(raw["model_type"], each) for each in (written, raw))
    assert {**found, "architectures": None} == expected
    beside = {key: value for key, value in raw.items() if key in written and key not in ("architectures", "dtype")}
    assert beside == {key: written[key] for key in beside}
    lost = {key for key in raw.keys() - written.keys() if raw[key] not in (None, [], False)}
    assert lost <= {*family.hf.table.ignored, *family.hf.table.guards, "dtype", "partial_rotary_factor"}
