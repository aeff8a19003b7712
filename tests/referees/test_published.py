"""Configs as they are published: those of every architecture that carnet claims are read and written back, others refused by name.

`make test` puts the package that brings them into the environment, in a folder of its own.
"""

import json
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import carnet
from carnet.architectures.known import FAMILIES, dialect_of, recognise, text_of, types_of
from carnet.architectures.wrappers import WRAPPERS, rewrapped
from carnet.dialects.hf import IDLE
from carnet.dialects.writing import write
from carnet.quantize.reading import CONFIG_KEY, plain
from tests.families.samples import save_file

pytestmark = pytest.mark.referee

BROUGHT = "aiconfigurator-core-*/aiconfigurator_core/model_configs"
CONFIGS = {path.name.removesuffix("_config.json"): path for path in sorted(Path(sys.prefix).glob(f"{BROUGHT}/*_config.json"))}
MODELS = [name for name in CONFIGS if not name.endswith("_hf_quant")]
BESIDE = "hf_quant_config.json"
CLAIMED = {family.hf.architecture: family for family in FAMILIES}
CLAIMED |= {name: CLAIMED[wrapper.text] for name, wrapper in WRAPPERS.items()}
READ = "the config says more layers than the checkpoint can hold"  # the first that is wrong without weights
# claimed, and not read: what their refusal begins with
NO_CLASS = {"mimo", "nemotron_nas"}  # in transformers
# what transformers' class does not have, and the model's own code reads or says once more: key -> the class's own word for it
ELSEWHERE = {"attention_head_dim": "head_dim"}


def said(name):
    return json.loads(CONFIGS[name].read_text())


def family_of(name):
    return CLAIMED.get(said(name)["architectures"][0])


def refusal(name, folder):
    """Return why a folder with a published config, and no weights to speak of, is refused."""
    (folder / "config.json").write_text(CONFIGS[name].read_text())
    if f"{name}_hf_quant" in CONFIGS:
        (folder / BESIDE).write_text(CONFIGS[f"{name}_hf_quant"].read_text())
    few = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight", "tower.weight")
    save_file({name: ("BF16", (2, 2), bytes(8)) for name in few}, folder / "model.safetensors")
    return carnet.inspect(folder).refusal


@pytest.mark.skipif(not MODELS, reason="`make test` fetches them")
def test_all_of_them_are_there():
    assert (len(CONFIGS), len(MODELS)) == (117, 89)


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_is_read_or_refused_by_its_architecture_before_all_else(name, tmp_path):
    found = refusal(name, tmp_path)
    if family_of(name) is None:
        (architecture,) = said(name)["architectures"]
        assert found.what == f"carnet does not know the architecture {architecture!r}"
        assert not [label for label in found.facts if label.startswith("also")]
    else:
        assert found.what == READ


@pytest.mark.parametrize("name", [name for name in MODELS if family_of(name)])
def test_a_published_config_is_written_back_as_transformers_class_understands_it(name):
    family, whole = family_of(name), plain(CONFIG_KEY, said(name))
    text, wrapper = text_of(whole, name)
    text = plain(CONFIG_KEY, text)  # some say it inside
    _, fields = recognise("hf", text, name, {"wrapper": wrapper} if wrapper else {})
    inside = write(dialect_of(family, "hf", fields).table, fields, family.traits, name)
    written = json.loads(json.dumps(rewrapped(inside)))
    around = WRAPPERS.get(whole["architectures"][0])
    if around is not None:
        assert {key: each for key, each in rest_of(whole, around).items() if rest_of(written, around).get(key) != each} == {}
    raw, written = (each if around is None else each[around.key] for each in (whole, written))
    raw = plain(CONFIG_KEY, raw)
    kinds = [raw["model_type"], *types_of(family.hf)]  # Kimi K2's is a name for DeepSeek's
    kind = next((kind for kind in kinds if kind in CONFIG_MAPPING), None)
    found, expected = (
        (set_of(written), set_of(raw)) if family.name in NO_CLASS else (of_class(kind, each) for each in (written, raw))
    )
    moot = {"max_window_layers", "sliding_window"} if not raw.get("use_sliding_window") else set()
    moot |= {"dtype"} if raw.get("torch_dtype", raw.get("dtype")) is None else set()  # which the class leaves to who loads it
    moot |= set() if around is None else {"tie_word_embeddings"}  # the word above the text model's config counts
    named = [key for key in expected if key not in family.hf.table.ignored | moot | {"model_type"}]
    assert {key: expected[key] for key in named} == {key: found.get(key) for key in named}
    assert all(raw[key] == written[elsewhere] for key, elsewhere in ELSEWHERE.items() if key in raw)


def rest_of(whole, around):
    """Return what a class that also sees says of itself and not of its text model; null says nothing."""
    idle = {*IDLE - {"architectures", "model_type"}, "dtype", "torch_dtype", around.key, "quantization_config"}
    return {key: each for key, each in whole.items() if key not in idle and each is not None}


def set_of(said):
    """Return a config without what is null or false, however deep; widths as the model's own code makes them of their factors."""
    if isinstance(said, list):
        return [set_of(each) for each in said]
    if not isinstance(said, dict):
        return said
    found = {key: set_of(each) for key, each in said.items() if each not in (None, False)}
    # modeling_decilm.py: _ffn_mult_to_intermediate_size, of this model's 8192
    return found | ({"ffn_mult": -(-int(2 * found["ffn_mult"] * 8192 / 3) // 256) * 256} if "ffn_mult" in found else {})


def of_class(model_type, raw):
    """Return what the class takes a config for, in its own fields, each that it computes itself filled in."""
    kind = CONFIG_MAPPING[model_type]
    made = kind(**{key: value for key, value in raw.items() if key != "model_type"})
    found = json.loads(made.to_json_string(use_diff=False))
    rope = found.get("rope_parameters")
    if rope:
        rope.pop("type", None)  # the older word for rope_type, which is there too
    limit = found.get("time_step_limit")
    if limit and limit[1] == 1e308:  # which stands where a program's JSON has no infinity
        limit[1] = {"__float__": "Infinity"}
    if "head_dim" in found and found["head_dim"] is None:
        found["head_dim"] = made.hidden_size // made.num_attention_heads
    return {key: found[key] for key in kind().to_dict() if key in found}
