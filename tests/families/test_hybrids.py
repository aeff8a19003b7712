"""What Megatron's arguments say about the layers of a hybrid, and what is refused."""

import pytest

from carnet.architectures.known import recognise
from carnet.architectures.nemotron_h import MAMBA2, NEMOTRON_H
from carnet.dialects.configs import read
from carnet.dialects.megatron.layers import joined
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import less_one
from carnet.dialects.writing import write
from carnet.errors import BadCheckpoint, NotSupported
from carnet.model.model import canonical_shapes, layers

ARGS = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "ffn_hidden_size": 128,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "normalization": "RMSNorm",
    "squared_relu": True,
    "add_bias_linear": False,
    "position_embedding_type": "none",
    "untie_embeddings_and_output_weights": True,
    "params_dtype": "torch.bfloat16",
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_state_dim": 16,
}
SPEC = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]


def said(**more):
    return read(MEGATRON.table, {**ARGS, **more}, "the arguments")


@pytest.mark.parametrize(
    ("more", "blocks"),
    [
        ({"hybrid_override_pattern": "MM*-"}, "M M * -"),
        ({"hybrid_layer_pattern": "MM*E", "num_experts": 4}, "M M * E"),
        ({"hybrid_layer_pattern": "M*|-M"}, "M * - M"),
        ({"spec": SPEC}, "M M M M"),
        ({"is_hybrid_model": True}, "M M M M"),
    ],
    ids=["the name up to 0.18", "the name since 0.19", "pipeline stages end at a bar", "no pattern, a hybrid's spec", "a flag"],
)
def test_a_hybrid_s_layers_are_read(more, blocks):
    config = said(**more)
    assert (config["hybrid"], config["blocks"]) == (True, blocks)
    mixers = {"M": ("mamba", ""), "*": ("attention", ""), "-": ("", "dense"), "E": ("", "moe")}
    assert [(layer["mixer"], layer["mlp"]) for layer in layers(config)] == [mixers[letter] for letter in blocks.split()]


@pytest.mark.parametrize(
    "more",
    [
        {"hybrid_override_pattern": "MM*"},
        {"hybrid_override_pattern": "MM*X"},
        {"hybrid_layer_pattern": "MM*-/X"},
        {"hybrid_override_pattern": "MM*-", "hybrid_layer_pattern": "MMM-"},
        {"spec": SPEC, "hybrid_attention_ratio": 0.5},
        {"is_hybrid_model": True, "hybrid_mlp_ratio": 0.25},
    ],
    ids=[
        "a letter too few",
        "a letter nobody knows",
        "a letter nobody knows, for further tokens",
        "two patterns",
        "ratios",
        "ratios of MLPs",
    ],
)
def test_a_hybrid_s_layers_are_not_guessed(more):
    with pytest.raises(BadCheckpoint) as caught:
        said(**more)
    assert all(f"{name!r}" in str(caught.value) for name in more if name != "num_experts")


def test_heads_count_where_none_are_given():
    config = said(hybrid_override_pattern="MMMM")
    assert config["ssm_heads"] == 2 * 64 // 16
    assert said(hybrid_override_pattern="MMMM", mamba_num_heads=6)["ssm_heads"] == 6


def test_two_names_of_one_pattern_are_one_pattern():
    assert said(hybrid_override_pattern="MM*-", hybrid_layer_pattern="MM|*-")["blocks"] == "M M * -"


def test_the_norm_inside_a_mixer_is_never_stored_less_one():
    config = said(hybrid_override_pattern="MM*-", layernorm_zero_centered_gamma=True)
    less = {name for name in canonical_shapes(config) if name.tensor.part in less_one(MEGATRON, config)}
    before = {"layers.0.attention_norm", "layers.1.attention_norm", "layers.2.attention_norm", "layers.3.mlp_norm"}
    assert less == {*before, "final_norm"}


@pytest.mark.parametrize("wrong", [{"expand": 4}, {"num_heads": 4}, {"num_heads": None}, {"expand": "2"}], ids=str)
def test_mamba_s_heads_are_as_wide_as_its_expanded_stream(wrong):
    raw = write(MAMBA2.hf.table, said(spec=SPEC) | {"ssm_norm_groups": 1}, MAMBA2.traits, "config.json")
    assert (raw["expand"], raw["num_heads"]) == (2, 8)
    with pytest.raises(BadCheckpoint, match="expand"):
        read(MAMBA2.hf.table, {**raw, **wrong}, "config.json")


def test_a_mamba_of_before_transformers_5_says_that_its_norm_is_gated():
    raw = write(MAMBA2.hf.table, said(spec=SPEC) | {"ssm_norm_groups": 1}, MAMBA2.traits, "config.json")
    assert read(MAMBA2.hf.table, {**raw, "rms_norm": True}, "config.json") == read(MAMBA2.hf.table, raw, "config.json")
    with pytest.raises(NotSupported, match="'rms_norm'"):
        read(MAMBA2.hf.table, {**raw, "rms_norm": False}, "config.json")


def test_a_stack_of_mamba_alone_says_nothing_of_heads_that_it_does_not_have():
    raw = write(MAMBA2.hf.table, said(spec=SPEC) | {"ssm_norm_groups": 1}, MAMBA2.traits, "config.json")
    assert not {"num_attention_heads", "intermediate_size", "hidden_act_mlp"} & raw.keys()
    again = read(MAMBA2.hf.table, raw, "config.json")
    assert (again["blocks"], again["ssm_heads"], again["ssm_state"]) == ("M M M M", 8, 16)


def test_a_published_pattern_and_a_list_of_kinds_must_agree():
    raw = write(NEMOTRON_H.hf.table, said(hybrid_override_pattern="MM*-"), NEMOTRON_H.traits, "config.json")
    assert raw["layers_block_type"] == ["linear_attention", "linear_attention", "full_attention", "mlp"]
    older = {name: value for name, value in raw.items() if name != "layers_block_type"}
    assert read(NEMOTRON_H.hf.table, older, "config.json") == read(NEMOTRON_H.hf.table, raw, "config.json")
    words = {**raw, "layers_block_type": ["mamba", "mamba", "attention", "mlp"]}
    assert read(NEMOTRON_H.hf.table, words, "config.json") == read(NEMOTRON_H.hf.table, raw, "config.json")
    for wrong in ("MMM-", "MM*-M", 4):
        with pytest.raises(BadCheckpoint, match="layers_block_type"):
            read(NEMOTRON_H.hf.table, {**raw, "hybrid_override_pattern": wrong}, "config.json")


PAIRED = {"squared_relu": False, "swiglu": True, "position_embedding_type": "rope"}


def whole(**more):
    return recognise("megatron", {**ARGS, **PAIRED, **more}, "the arguments", {})


@pytest.mark.parametrize(
    ("pattern", "more", "name", "blocks"),
    [
        ("*-*-", {}, "llama", None),
        ("*-|*-", {}, "llama", None),
        ("[*-][*-]", {"num_layers": 2}, "llama", None),
        ("[*-][*-]", {}, "llama", None),
        ("*E*E", {"num_experts": 4, "qk_layernorm": True}, "qwen3_moe", None),
        ("*-*E", {"num_experts": 4, "qk_layernorm": True}, "qwen3_moe", "*- *E"),
    ],
)
def test_blocks_in_pairs_are_layers_of_another_family(pattern, more, name, blocks):
    family, config = whole(hybrid_layer_pattern=pattern, **more)
    assert (family.name, config["layers"], config["blocks"], config["hybrid"]) == (name, 2, blocks, False)
    assert config["halves"] == ("[" not in pattern)


def test_what_is_said_of_each_block_counts_where_tokens_are_mixed():
    every = {"window_size": [7, 0], "window_attn_skip_freq": 2}  # of blocks that are counted: the MLPs
    assert joined(said(hybrid_layer_pattern="*-*-", **PAIRED, **every))["window_layers"] is None
    marks = {"window_size": [7, 0], "window_attn_skip_freq": [1, 0, 0, 1]}
    assert joined(said(hybrid_layer_pattern="*-*-", **PAIRED, **marks))["window_layers"] == (1, 0)
    rope = {"no_rope_freq": [0, 1, 1, 0]}
    assert joined(said(hybrid_layer_pattern="*-*-", **PAIRED, **rope))["rope_layers"] == (1, 0)


def test_single_blocks_stay_what_they_are():
    for pattern in ("MM*-", "-*-*", "***-"):
        found = joined(said(hybrid_layer_pattern=pattern))
        assert (found is None) == ("M" in pattern)
    assert recognise("megatron", {**ARGS, "hybrid_layer_pattern": "*-*-"}, "", {})[0].name == "nemotron_h"


@pytest.mark.parametrize("pattern", ["*-+-", "+-+-", "[-*]*-", "[*-*-]", "[*-", "*-]", "[M*]*-"])
def test_patterns_that_say_no_model_are_refused(pattern):
    with pytest.raises(BadCheckpoint, match="hybrid_layer_pattern"):
        said(hybrid_layer_pattern=pattern, num_layers=len(pattern.strip("[]")))


@pytest.mark.parametrize(
    ("more", "tokens", "words"),
    [
        ({"hybrid_layer_pattern": "MM*-/M*"}, 1, "M *"),
        ({"hybrid_layer_pattern": "MM|*-/M*/M*", "mtp_num_layers": 2}, 2, "M *"),
        ({"hybrid_layer_pattern": "MM*-/-"}, 1, None),
        ({"hybrid_layer_pattern": "MM*-", "mtp_hybrid_override_pattern": "M*", "mtp_num_layers": 2}, 2, "M *"),
        ({"hybrid_layer_pattern": "MM*-/M*/M*", "mtp_num_layers": 2, "mtp_use_repeated_layer": True}, 1, "M *"),
        ({"hybrid_layer_pattern": "MM*-", "mtp_num_layers": 1}, 0, None),
    ],
    ids=[
        "behind a stroke",
        "two",
        "like the last",
        "apart, as Megatron-Bridge has it",
        "stored once",
        "a number alone builds none",
    ],
)
def test_layers_that_predict_further_tokens_have_a_pattern_of_their_own(more, tokens, words):
    config = said(**more)
    assert (config["mtp"], config.get("mtp_blocks"), config["blocks"]) == (tokens, words, "M M * -")
    again = write(MEGATRON.table, config, {}, "the arguments")
    assert again["hybrid_layer_pattern"] == "/".join(["MM*-", *[(words or "-").replace(" ", "")] * tokens])
    assert {name: value for name, value in read(MEGATRON.table, again, "").items() if value != config.get(name)} == {}
