"""Two programs, one model: what transformers computes the real megatron-core computes too, or carnet refuses by the field's name.

Every field that says what a model computes is varied, one at a time: in transformers' words, then in Megatron's, and the logits of both
programs compared.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import carnet
from carnet.architectures.known import recognise
from carnet.errors import CarnetError
from carnet.model.fields import BY_NAME, FIELDS
from carnet.model.model import matters, value
from tests.referees.meanings import BASES, CASES, EITHER, NEUTRAL, REFUSED, TOLD, UNVARIED, reader

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]
TABLE = [pytest.param(name, case, id=f"{name}: {case.base}, {case.change}") for name, cases in CASES.items() for case in cases]
TOKENS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))


def unvaried(fields):
    """Return the fields that say what a model computes and that no case varies."""
    computing = [field.name for field in fields if not field.storage and field.name not in {"bos", "eos", "pad"}]
    return [name for name in computing if name not in CASES and name not in UNVARIED]


def test_every_field_is_varied_or_has_a_reason_why_not():
    assert unvaried(FIELDS) == []
    assert sorted(CASES.keys() & UNVARIED.keys()) == []
    assert sorted((CASES.keys() | UNVARIED.keys()) - BY_NAME.keys()) == []


def test_a_field_that_is_added_and_not_varied_is_found():
    added = replace(BY_NAME["rope_theta"], name="rope_twist")
    assert unvaried((*FIELDS, added)) == ["rope_twist"]


def config_of(base, change):
    kind, plain = BASES[base]
    return kind(**{**plain, **change})


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def same(found, expected):
    return torch.allclose(found[..., : expected.shape[-1]], expected, rtol=0, atol=1e-4 * float(expected.std()))


def names(error, *words):
    said = f"{error.what} {error.facts}"
    return any(word in said for word in words)


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_a_field_means_in_megatron_what_it_means_in_transformers(name, case, saved, loaded, megatron_core, tmp_path):
    folder = saved(config_of(case.base, case.change))
    model = loaded(folder)
    expected = logits_of(model)
    assert expected.std() > 0.01
    if case.change and case.moves:
        other = AutoModelForCausalLM.from_config(config_of(case.base, {}), dtype=torch.float32, attn_implementation="eager")
        other.load_state_dict(model.state_dict())
        assert not same(logits_of(other.eval()), expected), "a case that changes nothing proves nothing"
    try:
        crossing = carnet.cross(folder, tmp_path / "again", to="hf")
    except CarnetError as error:  # what carnet does not read at all
        assert case.equal is False
        assert names(error, case.named or name)
        return
    assert crossing.equal
    assert same(logits_of(loaded(tmp_path / "again")), expected)
    _, read = recognise("hf", json.loads((folder / "config.json").read_text()), "a config", {})
    _, plain = recognise("hf", config_of(case.base, {}).to_dict(), "a config", {})
    assert value(read, name) not in {BY_NAME[name].neutral} & {value(plain, name)}, "a case that varies nothing"
    try:
        crossing = carnet.cross(
            folder, tmp_path / "megatron", to="megatron", spelling="local", **reader(case.base, case.change)
        )
    except CarnetError as error:
        assert case.equal is not True, str(error)
        assert names(error, case.named or name)
        return
    assert case.equal is not False
    assert crossing.equal
    release = "0.19" if case.equal is EITHER else "0.16"
    assert same(megatron_core(tmp_path / "megatron/iter_0000001", release)(TOKENS)[0], expected)


@pytest.mark.parametrize(("base", "change"), NEUTRAL, ids=[f"{base}, {change}" for base, change in NEUTRAL])
def test_what_changes_nothing_is_nothing_to_carnet(base, change, saved, loaded, tmp_path):
    folder = saved(config_of(base, change))
    model = loaded(folder)
    plain = AutoModelForCausalLM.from_config(config_of(base, {}), dtype=torch.float32, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    assert same(logits_of(plain.eval()), logits_of(model))
    said = json.loads((folder / "config.json").read_text()) | {key: None for key, new in change.items() if new is None}
    (folder / "config.json").write_text(json.dumps(said))
    whole = json.loads(config_of(base, {}).to_json_string(use_diff=False))
    found, expected = (recognise("hf", each, "-", {})[1] for each in (said, {**whole, "architectures": said["architectures"]}))
    named = [name for name in {*found, *expected} if matters(found, name) and name != "dtype"]
    assert {name: value(found, name) for name in named} == {name: value(expected, name) for name in named}
    crossing = carnet.cross(folder, tmp_path / "again", to="hf")
    assert crossing.equal
    assert same(logits_of(loaded(tmp_path / "again")), logits_of(model))


@pytest.mark.parametrize(("base", "change"), REFUSED, ids=[f"{base}, {change}" for base, change in REFUSED])
def test_what_changes_the_model_and_has_no_word_is_refused_by_its_name(base, change, saved, loaded, tmp_path):
    folder = saved(config_of(base, {}))
    (tmp_path / "changed").mkdir()
    said = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "changed/config.json").write_text(json.dumps(said))
    (tmp_path / "changed/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert not same(logits_of(loaded(tmp_path / "changed")), logits_of(loaded(folder)))
    with pytest.raises(CarnetError) as caught:
        recognise("hf", said, "a config", {})
    assert names(caught.value, *change)


@pytest.mark.parametrize("told", TOLD, ids=lambda told: f"{told.base}, {told.arguments}")
def test_an_argument_means_in_transformers_what_it_means_in_megatron(told, saved, loaded, megatron_core, tmp_path):
    source = saved(config_of(told.base, told.change))
    program = reader(told.base, told.change)
    assert carnet.cross(source, tmp_path / "megatron", to="megatron", spelling="local", **program).equal
    folder = tmp_path / "megatron/iter_0000001"
    before = megatron_core(folder)(TOKENS)[0] if told.equal and told.moves else None
    common = torch.load(folder / "common.pt", weights_only=False)
    vars(common["args"]).update(told.arguments)
    torch.save(common, folder / "common.pt")
    try:
        crossing = carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf")
    except CarnetError as error:
        assert not told.equal, str(error)
        assert names(error, *([told.named] if told.named else told.arguments))
        return
    assert told.equal
    assert crossing.equal
    after, expected = megatron_core(folder)(TOKENS)[0], logits_of(loaded(tmp_path / "back"))
    assert same(after, expected)
    assert before is None or not same(before, expected), "an argument that changes nothing proves nothing"
