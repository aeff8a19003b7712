"""A config that is given stands in place of the training arguments."""

import json
from pathlib import Path

import pytest

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
    assert carnet.verify(MEGATRON / golden, tmp_path / "by-config").equal  # the document remembers the config


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
        "kv_channels: 16\nffn_hidden_size: 96\nvocab_size: 250\npadded_vocab_size: 256\nmax_position_embeddings: 64\n"
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
