"""A config that is given stands in place of the training arguments."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import carnet
from carnet.errors import BadCheckpoint, BadRequest

MEGATRON = Path(__file__).parent / "goldens/megatron"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "carnet.json"}


@pytest.mark.parametrize("golden", ["llama_te_pp2_vpp", "gpt_te_tp2"])
def test_a_hugging_face_config_says_what_the_arguments_say(golden, tmp_path):
    assert carnet.cross(MEGATRON / golden, tmp_path / "by-args", to="hf").equal
    given = tmp_path / "by-args/config.json"
    assert carnet.cross(MEGATRON / golden, tmp_path / "by-config", to="hf", config=given).equal
    assert contents(tmp_path / "by-config") == contents(tmp_path / "by-args")
    assert carnet.verify(MEGATRON / golden, tmp_path / "by-config", config=given).equal


def test_a_config_that_contradicts_the_shapes_is_refused_with_both(tmp_path):
    assert carnet.cross(MEGATRON / "llama_te_pp2_vpp", tmp_path / "hf", to="hf").equal
    said = json.loads((tmp_path / "hf/config.json").read_text()) | {"intermediate_size": 112}
    (tmp_path / "wrong.json").write_text(json.dumps(said))
    with pytest.raises(BadCheckpoint) as caught:
        carnet.plan(MEGATRON / "llama_te_pp2_vpp", to="hf", config=tmp_path / "wrong.json")
    assert caught.value.what == "the shape of 'decoder.layers.mlp.linear_fc1.weight' contradicts the config"
    assert (caught.value.facts["expected"], caught.value.facts["found"]) == ([4, 224, 64], [4, 192, 64])


def test_a_few_lines_of_yaml_are_a_config_too(tmp_path):
    (tmp_path / "args.yaml").write_text(
        "num_layers: 4\nhidden_size: 64\nnum_attention_heads: 4\nnum_query_groups: 2\ngroup_query_attention: true\n"
        "kv_channels: 16\nffn_hidden_size: 96\nvocab_size: 251\npadded_vocab_size: 256\nmax_position_embeddings: 64\n"
        "normalization: RMSNorm\nlayernorm_epsilon: 1.0e-06\nswiglu: true\nposition_embedding_type: rope\nrotary_base: 500000\n"
        "add_bias_linear: false\nuntie_embeddings_and_output_weights: true\nparams_dtype: torch.bfloat16\n"
    )
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "args", to="hf").equal
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "yaml", to="hf", config=tmp_path / "args.yaml").equal
    assert contents(tmp_path / "yaml")["model.safetensors"] == contents(tmp_path / "args")["model.safetensors"]


def test_a_config_that_is_no_config_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2")
    with pytest.raises((BadCheckpoint, BadRequest)) as caught:
        carnet.inspect(MEGATRON / "llama_tp2pp2", config=tmp_path / "x.json")
    assert "x.json" in str(caught.value)


@pytest.fixture
def said(tmp_path):
    """The config.json of a golden, and a way to write it otherwise."""
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "hf", to="hf").equal

    def write(**changes):
        config = json.loads((tmp_path / "hf/config.json").read_text()) | changes
        (tmp_path / "said.json").write_text(json.dumps(config))
        return tmp_path / "said.json"

    return write


@pytest.fixture(params=["no common.pt", "no args in it"])
def bare(request, tmp_path):
    """A torch_dist checkpoint that says nothing of its model."""
    shutil.copytree(MEGATRON / "llama_tp2pp2", tmp_path / "bare")
    common = tmp_path / "bare/iter_0000001/common.pt"
    common.unlink()
    if request.param == "no args in it":
        torch.save({"iteration": 1, "checkpoint_version": 3.0}, common)
    return tmp_path / "bare"


def test_a_store_without_arguments_crosses_with_a_config(bare, said, tmp_path):
    assert carnet.cross(bare, tmp_path / "out", to="hf", config=said()).equal
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    assert carnet.verify(bare, tmp_path / "out", config=said()).equal
    with pytest.raises(BadCheckpoint, match="the training arguments are missing") as caught:
        carnet.verify(bare, tmp_path / "out")
    assert caught.value.facts["its carnet"] == "--config said.json"


def test_a_store_without_arguments_says_where_they_could_be(bare):
    refusal = carnet.inspect(bare).refusal
    assert str(refusal).splitlines() == [
        "the training arguments are missing",
        f"  where     {bare / 'iter_0000001'}",
        "  expected  args in common.pt, the common state or a rank's file; run_config.yaml; model.yaml",
        "  try: name the model's config.json, or a few lines of YAML, with --config",
    ]


@pytest.mark.parametrize("golden", ["llama_legacy", "mixtral_gg_te_ep2_legacy"])
def test_ranks_take_a_config_in_place_of_their_arguments(golden, tmp_path):
    """The config says nothing of the padding: the ranks' parts of the embedding do, together."""
    assert carnet.cross(MEGATRON / golden, tmp_path / "by-args", to="hf").equal
    given = tmp_path / "by-args/config.json"
    assert carnet.cross(MEGATRON / golden, tmp_path / "by-config", to="hf", config=given).equal
    assert contents(tmp_path / "by-config") == contents(tmp_path / "by-args")


@pytest.mark.parametrize(
    ("golden", "changes", "fault", "expected", "found"),
    [
        ("llama_tp2pp2", {"hidden_size": 32, "head_dim": 16}, "'embedding.word_embeddings.weight'", [256, 32], [256, 64]),
        ("llama_tp2pp2", {"num_key_value_heads": 4}, "linear_qkv.weight'", [4, 192, 64], [4, 128, 64]),
        ("llama_tp2pp2", {"num_hidden_layers": 3}, "layer_norm_weight'", [3, 64], [4, 64]),
        ("llama_tp2pp2", {"num_hidden_layers": 5}, "layer_norm_weight'", [5, 64], [4, 64]),
        ("llama_tp2pp2", {"vocab_size": 300}, "'word_embeddings.weight'", "at least 300 rows", "256 rows"),
        ("llama_legacy", {"vocab_size": 300}, "'word_embeddings.weight'", "at least 300 rows", "256 rows"),
        ("llama_legacy", {"num_hidden_layers": 3}, "more layers than the config says", 3, 4),
    ],
)
def test_a_config_that_contradicts_a_shape_is_refused_with_both(golden, changes, fault, expected, found, said):
    with pytest.raises(BadCheckpoint) as caught:
        carnet.plan(MEGATRON / golden, to="hf", config=said(**changes))
    assert fault in caught.value.what
    assert (caught.value.facts["expected"], caught.value.facts["found"]) == (expected, found)
