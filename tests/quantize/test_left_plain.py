"""The lists of what is not quantized: written as ModelOpt writes them, read as programs read them, and held against what is stored."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

import carnet
from carnet import api
from carnet.errors import BadCheckpoint
from carnet.planner.choosing import summarized
from carnet.quantize.lists import naming
from carnet.quantize.styles import STYLES

pytestmark = pytest.mark.filterwarnings("ignore")  # of the programs, at import

PARTS = st.sampled_from(["layers", "1", "10", "mlp", "mlp_norm", "up", "up_proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@pytest.fixture(scope="module")
def theirs():
    from modelopt.torch.export.quant_utils import _prefix_wildcard_summarize_exclude_modules

    return _prefix_wildcard_summarize_exclude_modules


@pytest.mark.referee
@given(coded=st.dictionaries(NAMES, st.booleans(), max_size=12))
def test_parts_in_which_nothing_is_coded_are_named_by_modelopt_s_patterns(coded, theirs):
    plain, others = ([name for name, is_coded in coded.items() if is_coded == wanted] for wanted in (False, True))
    assert {*summarized(plain, others)} == theirs(plain, others)


# to transformers an expression, which no star begins
PATTERNS = st.tuples(NAMES, st.lists(st.one_of(PARTS, st.just("*")), max_size=3)).map(
    lambda parts: ".".join([parts[0], *parts[1]])
)
READ_BY_TRANSFORMERS = st.sampled_from([name for name, style in STYLES.items() if style.reaches])
LISTED = st.one_of(
    NAMES, st.sampled_from(["re:.*mlp.*", "re:layers.1.(mlp|up)$", "re:.*\\.up", "re:up", "re:(", "mlp", "layers.1", "*mlp"])
)


@pytest.mark.referee
@given(module=NAMES, name=LISTED)
def test_a_name_of_compressed_tensors_is_read_as_the_library_reads_it(module, name):
    from compressed_tensors.utils import match_name

    try:
        expected = match_name(module, name)
    except re.error:
        expected = False
    assert naming(STYLES["compressed-tensors"], [name])(f"{module}.weight") == expected


@pytest.mark.referee
@given(module=NAMES, name=PATTERNS, style=READ_BY_TRANSFORMERS)
def test_a_name_or_pattern_excludes_nothing_that_transformers_converts(module, name, style):
    from transformers.quantizers.quantizers_utils import should_convert_module

    if naming(STYLES[style], [name])(f"{module}.weight"):
        assert not should_convert_module(module, [name])


def test_a_pattern_of_transformers_reaches_below_what_it_matches():
    pattern, weight = "model.layers.*.self_attn", "model.layers.3.self_attn.q_proj.weight"
    assert {style: naming(STYLES[style], [pattern])(weight) for style in STYLES} == {
        "modelopt": False,
        "compressed-tensors": False,
        "deepseek": True,
        "trtllm": False,
        "openai": True,
    }


@pytest.mark.parametrize("slow", ["(([a-z_.0-9]+)+)+!", ".*" * 12 + "!", "([a-z.]|[a-z_.0-9]){1,}!"])
def test_an_expression_that_takes_for_ever_to_match_matches_nothing(slow):
    module = "model.layers.0.self_attn.q_proj" * 2
    assert not naming(STYLES["compressed-tensors"], [f"re:{slow}"])(f"{module}.weight")


# --- lists that contradict what is stored --------------------------------------------------------------------------------------

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
LIST = {"modelopt": "ignore", "compressed-tensors": "ignore", "deepseek": "modules_to_not_convert"}
STORED = [(style, scheme) for style, scheme in (("modelopt", "fp8-channel"), ("deepseek", "fp8-block"))]
STORED += [("compressed-tensors", scheme) for scheme in ("fp8-channel", "int4-group")]
EACH = pytest.mark.parametrize(("style", "scheme"), STORED, ids=["/".join(each) for each in STORED])


@pytest.fixture
def plain(tmp_path):
    """Have transformers save a small model."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(**sizes, vocab_size=96, num_hidden_layers=1, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def stored(plain, style, scheme):
    """Return a folder in a style, and its config."""
    out = api.run(api.plan(plain, to="hf", quantize=scheme, style=style), plain.with_name("coded"))
    (out / "carnet.json").unlink()
    return out, json.loads((out / "config.json").read_text())


def say(folder, config, names):
    """Add names to a list of what is not quantized."""
    record = config["quantization_config"]
    listed = LIST[record["quant_method"] if record["quant_method"] in LIST else "deepseek"]
    record[listed] = [*record.get(listed, ()), *names]
    (folder / "config.json").write_text(json.dumps(config))


@EACH
def test_codes_that_the_config_calls_plain_are_refused_and_the_way_out_is_true(style, scheme, plain, tmp_path):
    out, config = stored(plain, style, scheme)
    right = tmp_path / "right.json"
    right.write_text(json.dumps(config))
    say(out, config, [UP])
    with pytest.raises(BadCheckpoint, match=f"'{UP}.weight' is stored as codes") as refusal:
        api.plan(out, to="hf", dtype="bf16")
    assert refusal.value.facts["said by"] == f"'{UP}' in config.json"
    assert refusal.value.remedy.startswith("--config")
    assert [finding.what for finding in api.verify(plain, out).findings if finding.where == UP] == [
        "the config excludes what is quantized"
    ]
    assert carnet.cross(out, tmp_path / "back", to="hf", dtype="bf16", config=right).equal


@pytest.mark.referee
def test_transformers_reads_codes_that_the_config_calls_plain_as_weights(plain):
    out, config = stored(plain, "compressed-tensors", "fp8-channel")
    say(out, config, [UP])
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).get_parameter(f"{UP}.weight")
    assert torch.equal(found, load_file(out / "model.safetensors")[f"{UP}.weight"].to(torch.bfloat16))


def left_plain(out, plain):
    """Store the weight of a module as it was before."""
    tensors = {name: t for name, t in load_file(out / "model.safetensors").items() if not name.startswith(UP)}
    tensors[f"{UP}.weight"] = load_file(plain / "model.safetensors")[f"{UP}.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@EACH
def test_a_plain_weight_that_the_config_calls_quantized_is_read_and_said(style, scheme, plain, tmp_path):
    out, config = stored(plain, style, scheme)
    left_plain(out, plain)
    line = f"{UP}, though the config calls it quantized: engines would look for its scales"
    assert api.plan(out, to="hf", dtype="bf16").notes["read as plain"] == line
    assert carnet.inspect(out).inventory.notes == {"read as plain": line}
    verdict = carnet.cross(out, tmp_path / "back", to="hf", dtype="bf16")
    assert (verdict.equal, verdict.notes["read as plain"]) == (True, line)
    one, other = (load_file(folder / "model.safetensors")[f"{UP}.weight"] for folder in (plain, tmp_path / "back"))
    assert torch.equal(one, other)
    say(out, config, [UP])
    assert "read as plain" not in api.plan(out, to="hf", dtype="bf16").notes


def test_what_no_target_names_is_plain(plain, tmp_path):
    out, config = stored(plain, "compressed-tensors", "fp8-channel")
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["targets"] = ["re:.*self_attn.*", "re:.*mlp\\.(gate|down)_proj"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=f"'{UP}.weight' is stored as codes") as refusal:
        api.plan(out, to="hf", dtype="bf16")
    assert refusal.value.facts["said by"] == "no target has its name"
    left_plain(out, plain)
    assert "read as plain" not in api.plan(out, to="hf", dtype="bf16").notes


def test_both_lists_of_modelopt_are_held_against_what_is_stored(plain):
    out, _ = stored(plain, "modelopt", "fp8-channel")
    beside = json.loads((out / "hf_quant_config.json").read_text())
    beside["quantization"]["exclude_modules"] = ["model.layers.0.mlp*"]
    (out / "hf_quant_config.json").write_text(json.dumps(beside))
    found = {(f.what, f.where) for f in api.verify(plain, out).findings if f.stored == "hf_quant_config.json"}
    excluded = {("the config excludes what is quantized", f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up", "down")}
    assert found == {*excluded, ("the config does not exclude what is plain", "lm_head")}
    with pytest.raises(BadCheckpoint, match=r"stored as codes") as refusal:
        api.plan(out, to="hf", dtype="bf16")
    assert refusal.value.facts["said by"] == "'model.layers.0.mlp*' in hf_quant_config.json"
    assert refusal.value.facts["others"] == 2
