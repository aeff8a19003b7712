"""Adapters (LoRA): Megatron-Bridge's stores and PEFT's folders, across; peft loads what carnet wrote, and computes the same."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
import yaml
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save

import carnet
from carnet.errors import BadRequest, CarnetError, NotSupported

pytestmark = [pytest.mark.referee, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]

GOLDENS = Path(__file__).parents[1] / "goldens/adapters"
BESIDE, ALONE = GOLDENS / "v0192_lora_llama_te_tp2", GOLDENS / "v0192_loraonly_llama_te_tp2"
ALPHA = 16.0  # which nothing in the first says
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return the golden's base model, as transformers has it."""
    out = tmp_path_factory.mktemp("base") / "hf"
    assert carnet.cross(BESIDE, out, to="hf", drop="*.adapter.*").equal
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the golden's adapters, as PEFT has them."""
    out = tmp_path_factory.mktemp("peft") / "adapters"
    assert carnet.cross(ALONE, out, to="peft").equal
    return out


def with_adapters(model, folder):
    """Return a model with what peft loads, nothing of which is missing or left over."""
    made = peft.PeftModel.from_pretrained(model, folder)
    result = peft.set_peft_model_state_dict(made, load_peft_weights(str(folder), device="cpu"))
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora" in key] == []
    return made.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a tiny Llama of random weights, saved."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("num_attention_heads", "num_hidden_layers"), 4)
    config = hf.LlamaConfig(hidden_size=64, intermediate_size=96, num_key_value_heads=2, vocab_size=97, **sizes)
    out = tmp_path_factory.mktemp("tiny") / "base"
    hf.LlamaForCausalLM(config).save_pretrained(out)
    return out


def saved(tiny, out, **options):
    """Save adapters that peft makes, of random numbers, beside the config of their model."""
    torch.manual_seed(1)
    made = peft.get_peft_model(hf.LlamaForCausalLM.from_pretrained(tiny), peft.LoraConfig(**options))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter) * 0.1
    made.save_pretrained(out)
    (out / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (out / "README.md").unlink(missing_ok=True)
    return out


TOKENS = torch.arange(32).reshape(2, 16)


@pytest.mark.parametrize("source", [ALONE, BESIDE], ids=["alone", "beside their base"])
def test_peft_computes_with_them_what_megatron_did(source, base, tmp_path):
    options = {} if source is ALONE else {"adapter_alpha": ALPHA}
    verdict = carnet.cross(source, tmp_path / "peft", to="peft", **options)
    assert verdict.equal
    assert not verdict.unexamined
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = load_file(BESIDE / "reference.safetensors")
    made = with_adapters(model, tmp_path / "peft")
    expected = reference["logits"][..., :250]
    assert (logits(made, reference["tokens"]) - expected).abs().max() < 1e-4
    with made.disable_adapter():
        assert (logits(made, reference["tokens"]) - expected).abs().max() > 1e-2


def test_a_group_that_megatron_joins_comes_back_joined(folder, tmp_path):
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", tp=2).equal
    said = yaml.safe_load(next((tmp_path / "megatron").glob("iter_*/run_config.yaml")).read_text())
    assert said["peft"]["_target_"] == "megatron.bridge.peft.lora.LoRA"
    assert (said["peft"]["dim"], said["peft"]["alpha"]) == (8, 16)
    assert said["peft"]["target_modules"] == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert said["checkpoint"]["pretrained_checkpoint"] == "checkpoints/base"
    ours, theirs = (carnet.inspect(each).checkpoint.tensors for each in (tmp_path / "megatron", ALONE))
    assert {key: (each.shape, each.dtype) for key, each in ours.items()} == {
        key: (e.shape, e.dtype) for key, e in theirs.items()
    }
    assert carnet.cross(tmp_path / "megatron", tmp_path / "again", to="peft").equal
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


KINDS: dict[str, dict[str, Any]] = {
    "two modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "root": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"down_proj": 5},
    },
    "regular expressions": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {r".*\.layers\.\d+\.self_attn\.(?:q|k)_proj": 2, "layers.[13].mlp.up_proj": 6},
        "alpha_pattern": {"model.layers.2.*.down_proj": 5, "^model.layers.0.mlp.up_proj": 99},
    },
    "mica": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": "mica"},
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
    "magnitudes": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_dora": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_pefts_stays_what_it_is(name, tiny, tmp_path):
    source = saved(tiny, tmp_path / "source", **KINDS[name])
    assert carnet.cross(source, tmp_path / "peft", to="peft").equal
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "peft", source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    made = [
        logits(with_adapters(hf.LlamaForCausalLM.from_pretrained(tiny), tmp_path / each), TOKENS) for each in ("source", "peft")
    ]
    assert (made[0] - made[1]).abs().max() < 1e-6
    assert (made[0] - logits(hf.LlamaForCausalLM.from_pretrained(tiny), TOKENS)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["two modules", "all", "root"])
def test_modules_of_their_own_are_bridges_canonical_lora(name, tiny, tmp_path):
    source = saved(tiny, tmp_path / "source", **KINDS[name])
    assert carnet.cross(source, tmp_path / "megatron", to="megatron", adapter_base="base").equal
    said = yaml.safe_load(next((tmp_path / "megatron").glob("iter_*/run_config.yaml")).read_text())["peft"]
    assert said["_target_"] == "megatron.bridge.peft.canonical_lora.CanonicalLoRA"
    assert {"linear_q", "linear_v"} <= {*said["target_modules"]}
    names = {name for _, name in carnet.inspect(tmp_path / "megatron").checkpoint.tensors}
    assert "decoder.layers.self_attention.linear_qkv.adapter.adapter_v.linear_out.weight" in names
    assert carnet.cross(tmp_path / "megatron", tmp_path / "peft", to="peft").equal
    made = [
        logits(with_adapters(hf.LlamaForCausalLM.from_pretrained(tiny), tmp_path / each), TOKENS) for each in ("source", "peft")
    ]
    assert (made[0] - made[1]).abs().max() < 1e-6


def test_magnitudes_of_joined_weights_are_bridges_dora(tiny, tmp_path):
    source = changed(saved(tiny, tmp_path / "drawn", **KINDS["magnitudes"]), tmp_path / "source", tensors=with_one_a)
    assert carnet.cross(source, tmp_path / "megatron", to="megatron", tp=2).equal
    said = yaml.safe_load(next((tmp_path / "megatron").glob("iter_*/run_config.yaml")).read_text())["peft"]
    assert said["_target_"] == "megatron.bridge.peft.dora.DoRA"
    shapes = {name: each.shape for (_, name), each in carnet.inspect(tmp_path / "megatron").checkpoint.tensors.items()}
    assert shapes["decoder.layers.self_attention.linear_qkv.adapter.weight_magnitude"] == (4, 128)
    assert carnet.cross(tmp_path / "megatron", tmp_path / "peft", to="peft").equal
    assert (tmp_path / "peft" / WEIGHTS).exists()
    made = [
        logits(with_adapters(hf.LlamaForCausalLM.from_pretrained(tiny), tmp_path / each), TOKENS) for each in ("source", "peft")
    ]
    assert (made[0] - made[1]).abs().max() < 1e-6


def stored(out, named, said):
    """Write the golden's adapters under other names, beside a config in which something else is said."""
    reader = FileSystemReader(ALONE / "iter_0000001")
    found = {key: each for key, each in reader.read_metadata().state_dict_metadata.items() if hasattr(each, "size")}
    state = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in found.items()}
    load(state, storage_reader=reader, no_dist=True)
    save({named(key): each for key, each in state.items()}, storage_writer=FileSystemWriter(out), no_dist=True)
    config = yaml.safe_load((ALONE / "iter_0000001/run_config.yaml").read_text())
    said(config)
    (out / "run_config.yaml").write_text(yaml.safe_dump(config))
    return out


def stored_by_swift(out, ranks):
    """Write the golden's adapters under ms-swift's names, beside a config that says so many ranks."""
    ends = {".adapter.linear_in.": ".lora_A.default.", ".adapter.linear_out.": ".lora_B.default."}

    def said(config):
        del config["peft"]
        config["model"]["tensor_model_parallel_size"] = ranks

    return stored(out, lambda key: re.sub(r"\.adapter\.linear_\w+\.", lambda found: ends[found[0]], key), said)


def test_names_below_those_of_other_modules_are_read_where_there_is_nothing_but_layers(folder, tmp_path):
    store = stored(tmp_path / "store", lambda key: f"module.{key}", lambda config: None)
    assert carnet.cross(store, tmp_path / "peft", to="peft").equal
    assert (tmp_path / "peft" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_adapters_of_experts_that_share_one_half_are_refused(tmp_path):
    store = stored(tmp_path / "store", str, lambda config: config["peft"].update(experts_shared_outer_loras=True))
    with pytest.raises(NotSupported, match="experts_shared_outer_loras"):
        carnet.plan(store, to="peft")


def test_what_ms_swift_saves_is_read_under_its_names(folder, tmp_path):
    store = stored_by_swift(tmp_path / "swift", 1)
    assert carnet.cross(store, tmp_path / "peft", to="peft", adapter_alpha=ALPHA).equal
    ours, theirs = (load_file(each / WEIGHTS) for each in (tmp_path / "peft", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(NotSupported, match="order that depends on the ranks"):
        carnet.plan(stored_by_swift(tmp_path / "ranks", 2), to="peft", adapter_alpha=ALPHA)


@pytest.mark.parametrize(
    ("name", "what"), [("patterns", "one rank"), ("layers", "all layers together"), ("magnitudes", "joins this weight")]
)
def test_what_no_class_of_bridges_makes_is_refused(name, what, tiny, tmp_path):
    source = saved(tiny, tmp_path / "source", **KINDS[name])
    with pytest.raises(NotSupported, match=what):
        carnet.plan(source, to="megatron")


def changed(folder, out, config=None, tensors=None):
    """Copy a folder of PEFT's with something else in it."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    (out / CONFIG).write_text(json.dumps({**json.loads((out / CONFIG).read_text()), **(config or {})}))
    if tensors is not None:
        found = load_file(out / WEIGHTS)
        tensors(found)
        save_file(found, out / WEIGHTS, {"format": "pt"})
    return out


def with_one_a(found):
    """Give modules that Megatron joins one A."""
    for key in found:
        for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            for other in others:
                if f".{other}.lora_A" in key:
                    found[key] = found[key.replace(f".{other}.", f".{first}.")].clone()


TOP = "base_model.model.model.layers."


def exchanged(found):
    one, other = (f"{TOP}{layer}.self_attn.o_proj.lora_B.weight" for layer in (1, 2))
    found[one], found[other] = found[other], found[one]


def without_a_layer(found):
    for key in [key for key in found if key.startswith(f"{TOP}2.mlp.down_proj")]:
        del found[key]


def one_copy_differs(found):
    found[f"{TOP}3.self_attn.k_proj.lora_A.weight"][0, 0] += 1


@pytest.mark.parametrize(
    ("config", "tensors", "where"),
    [
        ({"lora_alpha": 32}, None, "adapters"),
        ({"use_rslora": True}, None, "adapters"),
        ({}, exchanged, "layers.1.attention.o.b"),
        ({}, without_a_layer, "layers.2.mlp.down.a"),
        ({}, one_copy_differs, "layers.3.attention.q.a"),
    ],
    ids=[
        "alpha is twice as large",
        "the root of the rank",
        "B of two layers exchanged",
        "a layer has none",
        "a copy of A differs",
    ],
)
def test_every_damage_is_found(config, tensors, where, folder, tmp_path):
    target = changed(folder, tmp_path / "target", config, tensors)
    (target / "carnet.json").unlink()
    verdict = carnet.verify(ALONE, target)
    assert not verdict.equal
    assert any(where in finding.where for finding in verdict.findings)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"bias": "all"}, "'bias'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"something_new": 3}, "something_new"),
        ({"r": 4}, "rank"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"(.*a)*b": 4}}, "match modules"),
        ({"rank_pattern": {"(.|.|.)" * 20: 4}}, "match modules"),
        ({"rank_pattern": {"(" * 5000 + ")" * 5000: 4}}, "match modules"),
        ({"rank_pattern": {"q_proj": 8.5}}, "no whole number"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"use_rslora": "false"}, "use_rslora"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters"),
        ({"use_dora": True}, "no magnitudes"),
    ],
)
def test_what_would_change_the_meaning_is_refused(config, what, folder, tmp_path):
    with pytest.raises(CarnetError, match=what):
        carnet.plan(changed(folder, tmp_path / "source", config), to="peft")


def test_an_initialization_that_leaves_the_base_model_as_it_was_is_carried_over(folder, tmp_path):
    said = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "whiten": False}}
    assert carnet.cross(changed(folder, tmp_path / "source", said), tmp_path / "out", to="peft").equal


def test_an_alpha_that_a_person_names_counts_where_nothing_else_says_one(folder, tmp_path):
    silent = changed(folder, tmp_path / "silent", {"lora_alpha": None})
    assert carnet.cross(silent, tmp_path / "out", to="peft", adapter_alpha=5.0).equal
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["lora_alpha"] == 5
    assert carnet.cross(folder, tmp_path / "same", to="peft", adapter_alpha=ALPHA).equal
    for source in (folder, ALONE):
        with pytest.raises(BadRequest, match=r"(?s)another alpha.*--adapter-scale"):
            carnet.plan(source, to="peft", adapter_alpha=5.0)


def test_what_is_no_adapter_of_this_model_is_told_with_a_way_out(folder, tmp_path):
    def whole_modules(found):
        found["base_model.model.lm_head.weight"] = torch.zeros(250, 64)

    def of_another_program(found):
        for key in [*found]:
            found[key.replace(".weight", ".default.weight")] = found.pop(key)

    def of_integers(found):
        found[f"{TOP}0.self_attn.q_proj.lora_B.weight"] = torch.zeros(64, 8, dtype=torch.int32)

    for change, what in (
        (whole_modules, r"(?s)does not know.*lm_head.*merge_and_unload"),
        (of_another_program, r"(?s)nothing in the folder is an adapter.*merge_and_unload"),
        (of_integers, r"(?s)a type that carnet does not add.*q_proj\.lora_B.*i32"),
    ):
        with pytest.raises(NotSupported, match=what):
            carnet.plan(changed(folder, tmp_path / change.__name__, tensors=change), to="peft")


def test_what_has_no_place_is_refused_with_the_ways_out(folder, tiny):
    with pytest.raises(NotSupported, match=r"(?s)beside its weights.*--to peft.*--adapter own"):
        carnet.plan(BESIDE, to="hf", adapter_alpha=ALPHA)
    with pytest.raises(NotSupported, match=r"(?s)without their model.*--adapter"):
        carnet.plan(folder, to="hf")
    with pytest.raises(BadRequest, match="holds no adapters"):
        carnet.plan(tiny, to="peft")
    with pytest.raises(BadRequest, match=r"(?s)alpha.*--adapter-alpha"):
        carnet.plan(BESIDE, to="peft")


def test_a_folder_without_the_config_of_its_base_asks_for_it(folder, tmp_path):
    alone = changed(folder, tmp_path / "alone")
    (alone / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(BadRequest, match=r"(?s)checkpoints/base.*--config"):
        carnet.plan(alone, to="megatron")
    assert carnet.cross(alone, tmp_path / "megatron", to="megatron", config=tmp_path / "config.json").equal
