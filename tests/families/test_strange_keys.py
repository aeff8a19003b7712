"""Keys of a config that nobody knows: neutral values pass and are told, others are refused or accepted, what is mistyped is found."""

import json
from random import Random

import pytest

import carnet
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported
from tests.families.samples import draw, save


@pytest.fixture
def llama(tmp_path):
    """Return the folder of a small Llama, and what sets more keys of its config."""
    folder = tmp_path / "llama"
    save(draw("llama", Random(1)), folder, "hf", Random(1), {})
    plain = json.loads((folder / "config.json").read_text())

    def set_keys(**more):
        (folder / "config.json").write_text(json.dumps({**plain, **more}))
        return folder

    return set_keys


def refused(folder, **options) -> CarnetError:
    with pytest.raises(CarnetError) as caught:
        carnet.plan(folder, to="hf", **options)
    return caught.value


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_a_neutral_value_of_a_key_that_nobody_knows_passes_and_is_told(value, llama, tmp_path):
    crossing = carnet.cross(llama(a_new_feature=value), tmp_path / "out", to="hf")
    assert crossing.equal
    assert (
        dict(carnet.plan(llama(a_new_feature=value), to="hf").unused)["a_new_feature"] == f"{value!r}: carnet does not know it"
    )
    assert json.loads((tmp_path / "out/carnet.json").read_text())["unused"].keys() == {"a_new_feature"}


@pytest.mark.parametrize("value", [True, 1, -0.5, "none", [0], {"a": 1}])
def test_any_other_value_is_refused_with_the_option_that_accepts_it(value, llama):
    error = refused(llama(a_new_feature=value))
    key = "a_new_feature.a" if isinstance(value, dict) else "a_new_feature"
    assert isinstance(error, NotSupported)
    assert error.what == f"the config sets {key!r}, which carnet does not know"
    assert error.remedy == f"--accept {key}, if it means nothing for the weights"


@pytest.mark.parametrize(("value", "key"), [(7, "a_new_feature"), ({"b": {"c": 1}, "d": 2}, "a_new_feature.b.c")])
def test_what_is_accepted_stands_in_the_document_and_the_target_is_proven_without_it(value, key, llama, tmp_path):
    folder = llama(a_new_feature=value)
    assert carnet.cross(folder, tmp_path / "out", to="hf", accept=["a_new_feature"]).equal
    document = json.loads((tmp_path / "out/carnet.json").read_text())
    assert key in document["accepted"]
    assert document["request"]["accept"] == ["a_new_feature"]
    assert carnet.verify(folder, tmp_path / "out", accept=["a_new_feature"]).equal
    assert "a_new_feature" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("name", ["hidden_size", "rope_scaling", "not_there"])
def test_only_what_nobody_knows_can_be_accepted(name, llama):
    error = refused(llama(a_new_feature=7), accept=[name])
    assert isinstance(error, BadRequest)
    assert error.what == f"the config sets no {name!r} that carnet does not know"
    assert error.facts["not known"] == "a_new_feature"


@pytest.mark.parametrize(
    "typo", ["tie_word_embedding", "attention_bais", "rope_teta", "hiden_act", "num_key_value_head", "mlp_bais"]
)
@pytest.mark.parametrize("value", [False, 0, "", 3])
def test_a_key_that_is_mistyped_is_found_whatever_its_value(typo, value, llama):
    error = refused(llama(**{typo: value}))
    assert error.what == f"the config sets {typo!r}, which carnet does not know"
    assert error.remedy.startswith("is '")
    assert carnet.plan(llama(**{typo: value}), to="hf", accept=[typo]).accepted.keys() == {typo}


def test_all_that_is_in_the_way_is_told_at_once(llama):
    error = refused(llama(a=1, b=2, hidden_act="relu", hidden_size="wide", quantization_config={"quant_method": "awq"}))
    assert error.what == "carnet does not know this quantization_config.quant_method"
    assert error.facts["also"] == (
        "the config sets 'a', which carnet does not know: 1; try: --accept a, if it means nothing for the weights; "
        "also the config sets 'b', which carnet does not know: 2; try: --accept b, if it means nothing for the weights; "
        "also the config sets 'hidden_size' to something that is not an int: 'wide'; "
        "also the config sets 'hidden_act' to a value that carnet does not know: 'relu'"
    )


def test_a_field_that_lacks_because_of_another_is_not_told(llama):
    error = refused(llama(num_attention_heads="many"))
    assert error.what == "the config sets 'num_attention_heads' to something that is not an int"
    assert not [label for label in error.facts if label.startswith("also")]


def test_the_architecture_comes_before_all_else(llama):
    error = refused(llama(architectures=["NewForCausalLM"], a=1, quantization_config={"quant_method": "awq"}))
    assert error.what == "carnet does not know the architecture 'NewForCausalLM'"


def test_a_number_is_infinite_only_where_that_means_something(llama, tmp_path):
    (folder := llama()).joinpath("config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "rms_norm_eps": float("inf")})
    )
    assert refused(folder).what == "the config sets 'rms_norm_eps' to something that is not a finite number"
    assert refused(llama(hidden_size=float("-inf"))).what == "the config sets 'hidden_size' to something that is not an int"
    assert carnet.plan(llama(a_new_feature=float("inf")), to="hf", accept=["a_new_feature"]).accepted
    error = refused(llama(rms_norm_eps=float("nan")))
    assert (type(error), error.facts["reason"]) == (BadCheckpoint, "NaN is not a JSON number")


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, 1e308], {"__float__": "Infinity"}])
def test_steps_of_a_state_without_an_upper_limit_may_be_written_in_three_ways(limit, tmp_path):
    save(draw("nemotron_h", Random(1)), tmp_path / "hybrid", "hf", Random(1), {})
    path = tmp_path / "hybrid/config.json"
    said = limit if isinstance(limit, list) else [0.0, limit]
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_step_limit": said}))
    assert carnet.cross(tmp_path / "hybrid", tmp_path / "out", to="hf").equal
