"""The names of Megatron's export: the same members, the same renaming, the same refusals, and what it loses kept."""

import warnings
from enum import Enum

import pytest
from megatron.core.export import data_type, export_config, model_type
from megatron.core.export.trtllm import trt_model_type, trtllm_layers
from megatron.core.export.trtllm.model_to_trllm_mapping import default_conversion_dict

from carnet.errors import CarnetError, NotSupported
from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm.binding import names_of
from carnet.megatron.export.trtllm.model_to_trllm_mapping import default_conversion_dict as conversion
from carnet.megatron.export.trtllm.trt_model_config import TRT_MODEL_CONFIG
from carnet.megatron.export.trtllm.trt_model_type import TRT_MODEL_TYPE_STRING
from carnet.megatron.export.trtllm.trtllm_layers import (
    NON_TRANSFORMER_LAYERS_NAMES,
    TRTLLMLayers,
    get_layer_name_without_prefix,
)

pytestmark = pytest.mark.referee

rename = TRTLLMLayers.rename_input_layer_names_to_trtllm_layer_names
original_rename = trtllm_layers.TRTLLMLayers.rename_input_layer_names_to_trtllm_layer_names


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DataType, data_type.DataType), (ModelType, model_type.ModelType), (TRTLLMLayers, trtllm_layers.TRTLLMLayers)],
)
def test_members_have_the_same_names_and_values(ours, theirs):
    assert {member.name: member.value for member in ours} == {member.name: member.value for member in theirs}


@pytest.mark.parametrize("name", ["DEFAULT_CONVERSION_DICT", "NEMOTRON_NAS_CONVERSION_DICT"])
def test_conversion_dictionaries_map_the_same_names(name):
    ours, theirs = getattr(conversion, name), getattr(default_conversion_dict, name)
    assert {key: layer.value for key, layer in ours.items()} == {key: layer.value for key, layer in theirs.items()}


def test_members_equal_those_of_megatron_both_ways():
    theirs = trtllm_layers.TRTLLMLayers
    for ours in TRTLLMLayers:
        assert (ours == theirs[ours.name], theirs[ours.name] == ours) == (True, True)
        assert {theirs[ours.name]: 1}[ours] == {ours: 1}[theirs[ours.name]] == 1
        assert [other.name for other in theirs if other == ours] == [ours.name]
    assert TRTLLMLayers.lm_head != "lm_head.weight"
    assert ModelType.gpt != DataType.bfloat16
    assert conversion.DEFAULT_CONVERSION_DICT == default_conversion_dict.DEFAULT_CONVERSION_DICT


def test_the_names_outside_the_stack_are_the_same():
    assert NON_TRANSFORMER_LAYERS_NAMES == trtllm_layers.NON_TRANSFORMER_LAYERS_NAMES


def test_architectures_are_the_same():
    theirs = {model.name: name for model, name in trt_model_type.TRT_MODEL_TYPE_STRING.items()}
    assert {model.name: name for model, name in TRT_MODEL_TYPE_STRING.items()} == theirs
    assert set(TRT_MODEL_CONFIG) == set(ModelType)


def test_names_without_their_prefix_are_the_same():
    for ours, theirs in zip(TRTLLMLayers, trtllm_layers.TRTLLMLayers, strict=True):
        assert get_layer_name_without_prefix(ours) == trtllm_layers.get_layer_name_without_prefix(theirs)


@pytest.mark.parametrize("layer", TRTLLMLayers)
@pytest.mark.parametrize("gated", [False, True])
def test_the_tables_call_a_layer_as_its_member_does(layer, gated):
    assert names_of(layer, 3, gated=gated)[0].replace("layers.3.", "layers.") == layer.value.removesuffix(".expert")


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.2.self_attention.linear_qkv.weight",
        "decoder.layers.43.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "output_layer.weight",
        "layers.7.weight",
        "decoder.layers.7",
    ],
)
def test_a_layers_number_is_found_and_taken_away(name):
    assert TRTLLMLayers.return_layer_name_and_number(name) == trtllm_layers.TRTLLMLayers.return_layer_name_and_number(name)


def test_an_experts_number_stays_where_it_is_that_of_its_layer():
    name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    expected = "decoder.layers.mlp.experts.local_experts.1.linear_fc1.weight", 1
    assert TRTLLMLayers.return_layer_name_and_number(name) == expected


@pytest.mark.parametrize("split", [False, True])
def test_state_dicts_are_renamed_in_place_as_megatron_does(split):
    def state():
        names = [
            name if split is False else name.replace("layers.", "layers.3.") for name in conversion.DEFAULT_CONVERSION_DICT
        ]
        once = {name: name for name in names if "layer_norm_" not in name}
        return once | {"decoder.layers.3.mlp.linear_fc1._extra_state": 1}

    ours, theirs = state(), state()
    assert rename(ours, conversion.DEFAULT_CONVERSION_DICT, split) is ours
    original_rename(theirs, default_conversion_dict.DEFAULT_CONVERSION_DICT, split)
    assert ours == theirs
    assert len(ours) == 20


@pytest.mark.parametrize("name", ["adapter_layer.linear_in.weight", "adapter_layer.linear_in._extra_state"])
def test_adapters_which_megatron_drops_in_silence_are_refused_by_name(name):
    state = {"decoder.layers.3.self_attention.linear_qkv.weight": 1, f"decoder.layers.3.self_attention.linear_qkv.{name}": 2}
    assert len(original_rename(dict(state), default_conversion_dict.DEFAULT_CONVERSION_DICT)) == 1
    with pytest.raises(
        NotSupported, match=r"(?s)decoder\.layers\.3\.self_attention\.linear_qkv\.adapter_layer\.linear_in.*merge"
    ):
        rename(state, conversion.DEFAULT_CONVERSION_DICT)
    assert len(state) == 2


def test_numbers_in_a_name_count_whatever_is_said_of_the_others():
    names = {"decoder.layers.a": TRTLLMLayers.attention_dense_bias, "decoder.b": TRTLLMLayers.lm_head}
    state = {"decoder.layers.0.a": 0, "decoder.layers.43.a": 1, "decoder.b": 2}
    expected = {
        "transformer.layers.0.attention.dense.bias": 0,
        "transformer.layers.43.attention.dense.bias": 1,
        "lm_head.weight": 2,
    }
    assert rename(state, names, state_dict_split_by_layer_numbers=False) == expected


def test_members_of_megatrons_own_enum_are_layers_too():
    state = {"a.layers.5.b": 1}
    assert rename(state, {"a.layers.b": trtllm_layers.TRTLLMLayers.mlp_fc_bias}) == {"transformer.layers.5.mlp.fc.bias": 1}


Others = Enum("Others", ["lm_head"])
LAYERS = {
    "a.layers.b": TRTLLMLayers.mlp_fc_bias,
    "a.layers.c": "mlp_fc_bias",
    "a.layers.d": data_type.DataType.float32,
    "a.layers.other": Others.lm_head,
}


@pytest.mark.parametrize(
    ("name", "split", "kind"),
    [
        ("a.layers.b", True, AssertionError),
        ("a.layers.0.c", True, AssertionError),
        ("a.layers.0.d", True, AssertionError),
        ("a.layers.0.other", True, AssertionError),
        ("a.layers.0.e", True, ValueError),
        ("a.layers.e", False, ValueError),
    ],
)
def test_what_cannot_be_renamed_is_refused_as_megatron_refuses_it(name, split, kind):
    said = []
    for called in (rename, original_rename):
        with pytest.raises(kind) as caught:
            called({name: 0}, LAYERS, split)
        said.append(caught.value)
    ours, theirs = said
    assert isinstance(ours, CarnetError)
    assert type(theirs) is kind
    assert str(theirs).startswith(ours.what)


def test_two_names_of_one_tensor_are_refused():
    state = {"decoder.layers.0.input_layernorm.weight": 0, "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": 1}
    with pytest.raises(ValueError, match=r"two tensors of the state dict are transformer\.layers\.0\.input_layernorm\.weight"):
        rename(state, conversion.DEFAULT_CONVERSION_DICT)
    assert len(state) == 2


def test_the_deprecated_word_warns_and_is_no_error():
    for kind in (ExportConfig, export_config.ExportConfig):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("error")
            made = kind(inference_tp_size=2, use_embedding_sharing=True)
        assert made.use_embedding_sharing is True
        assert vars(made) == vars(ExportConfig(2)) | {"use_embedding_sharing": True}
        assert [warning.category for warning in caught] == [DeprecationWarning]
