"""The converter for one device beside Megatron's own, on the same random models: the same names, types and bits.

What Megatron's does wrong is tested against what is right.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

from carnet.errors import BadCheckpoint, BadRequest, CarnetError
from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import (
    DEFAULT_CONVERSION_DICT,
    NEMOTRON_NAS_CONVERSION_DICT,
)
from carnet.megatron.export.trtllm.records import Mapping
from carnet.megatron.export.trtllm.trtllm_layers import TRTLLMLayers
from carnet.megatron.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
    SingleDeviceTRTLLMModelWeightsConverter,
)
from tests.megatron.export_models import PLAIN, assert_same, convert_both, models, single

pytestmark = pytest.mark.referee


@settings(max_examples=150, deadline=None)
@given(models())
def test_every_model_comes_out_as_megatrons_converter_makes_it_for_every_rank(model):
    ours, theirs = convert_both(model)
    assert_same(ours.trtllm_model_weights, theirs.trtllm_model_weights)
    assert ours.get_padded_vocab_size() == theirs.get_padded_vocab_size()
    assert (ours.num_kv_heads, ours.storage_type) == (theirs.num_kv_heads, theirs.storage_type)
    for rank in range(model.tp * model.pp):
        place = Mapping(world_size=model.tp * model.pp, rank=rank, tp_size=model.tp, pp_size=model.pp)
        dealt = [each.get_local_model_weights_per_gpu(place, None) for each in (ours, theirs)]
        assert_same(*dealt)


def converted(model, state=None, names=DEFAULT_CONVERSION_DICT, config=None, split=True, **cut):
    cut = ExportConfig(model.tp, model.pp, **{"use_parallel_embedding": model.parallel_embedding} | cut)
    ours = SingleDeviceTRTLLMModelWeightsConverter(
        cut, config or model.config(), DataType[model.target], activation=model.activation
    )
    ours.convert(state or model.state(), names, split)
    return ours


def dealt(ours, model):
    places = [
        Mapping(world_size=model.tp * model.pp, rank=r, tp_size=model.tp, pp_size=model.pp) for r in range(model.tp * model.pp)
    ]
    return [ours.get_local_model_weights_per_gpu(place, None) for place in places]


def test_the_state_dict_is_left_as_it_was():
    state = PLAIN.state()
    before = dict(state)
    converted(PLAIN, state)
    assert list(state) == list(before)
    assert all(state[name] is tensor for name, tensor in before.items())


def test_what_comes_out_shares_no_memory_with_the_model():
    state = PLAIN.state()
    made = converted(PLAIN, state).trtllm_model_weights
    ours = {tensor.untyped_storage().data_ptr() for tensor in made.values()}
    assert ours.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in state.values())


def test_parameters_that_ask_for_gradients_are_converted_too():
    state = {name: torch.nn.Parameter(tensor) for name, tensor in PLAIN.state().items()}
    assert_same(converted(PLAIN, state).trtllm_model_weights, converted(PLAIN).trtllm_model_weights)


def test_rank_one_of_twelve_gets_its_own_share_and_nothing_of_rank_eleven():
    model = replace(PLAIN, tp=12, kv=12, rep=1, ffn=24)
    state, ranks = model.state(), dealt(converted(model), model)
    down = "transformer.layers.1.mlp.proj.weight"
    assert torch.equal(torch.cat([rank[down] for rank in ranks], dim=1), state["decoder.layers.1.mlp.linear_fc2.weight"])
    assert {len(rank) for rank in ranks} == {len(ranks[0])}
    assert not [name for rank in ranks for name in rank if name.endswith(".bin")]


def test_every_layer_is_on_one_stage_where_they_do_not_divide():
    model = replace(PLAIN, tp=1, pp=3, layers=13)
    state, stages = model.state(), dealt(converted(model), model)
    norm = "transformer.layers.{}.input_layernorm.weight"
    norms = [stage[norm.format(at)] for stage, held in zip(stages, (5, 4, 4), strict=True) for at in range(held)]
    expected = [state[f"decoder.layers.{layer}.input_layernorm.weight"] for layer in range(13)]
    assert torch.equal(torch.stack(norms), torch.stack(expected))
    assert ["lm_head.weight" in stage for stage in stages] == [False, False, True]
    assert ["transformer.vocab_embedding.weight" in stage for stage in stages] == [True, False, False]


@pytest.mark.parametrize("parallel", [False, True])
def test_a_vocabulary_that_does_not_divide_has_the_rows_that_the_engine_asks_for(parallel):
    model = replace(PLAIN, tp=4, kv=4, vocab=9, parallel_embedding=parallel)
    state, ours = model.state(), converted(model)
    assert ours.get_padded_vocab_size() == 12
    padded = torch.cat([state["output_layer.weight"], torch.zeros(3, 4)])
    ranks = dealt(ours, model)
    assert torch.equal(torch.cat([rank["lm_head.weight"] for rank in ranks]), padded)
    assert {len(rank["lm_head.weight"]) for rank in ranks} == {3}
    embedding = [rank["transformer.vocab_embedding.weight"] for rank in ranks]
    whole = torch.cat([state["embedding.word_embeddings.weight"], torch.zeros(3, 4)])
    assert torch.equal(torch.cat(embedding) if parallel else embedding[3], whole)


def test_experts_without_a_gate_keep_the_order_of_their_rows():
    model = replace(PLAIN, experts=3, bias=False)
    state, ours = model.state(), converted(model)
    up = [ours.trtllm_model_weights[f"transformer.layers.1.mlp.fc.weight.{rank}.bin"] for rank in range(2)]
    assert torch.equal(torch.cat(up, dim=1), state["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"])


def test_experts_have_a_gate_where_their_rows_say_so():
    model = replace(PLAIN, experts=3, bias=False, activation="swiglu")
    plainly = replace(model, activation="gelu")
    gated = converted(model).trtllm_model_weights
    assert_same(converted(plainly, model.state()).trtllm_model_weights, gated)


def test_layers_have_kv_heads_of_their_own_in_a_heterogeneous_model():
    block = {"ffn": {"ffn_mult": 1.0}}
    blocks = [{"attention": {"n_heads_in_group": group}, **block} for group in (2, 4)]
    said = '{"block_configs": ' + str(blocks).replace("'", '"') + "}"
    config = HeterogeneousTransformerConfig(
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        hidden_size=12,
        ffn_hidden_size=256,
        add_bias_linear=False,
        heterogeneous_layers_config_encoded_json=said,
    )
    model = replace(PLAIN, hidden=12, dim=3)
    q, k, v = torch.randn(4, 3, 12), torch.randn(1, 3, 12), torch.randn(1, 3, 12)
    fused = torch.cat([q.reshape(1, 12, 12), k, v], dim=1).reshape(18, 12)  # one group: its queries, its key, its value
    state = {
        "decoder.layers.1.self_attention.linear_qkv.weight": fused,
        "decoder.layers.1.mlp.weight": torch.randn(12, 12),
    }
    made = converted(model, state, DEFAULT_CONVERSION_DICT | NEMOTRON_NAS_CONVERSION_DICT, config).trtllm_model_weights
    for rank in range(2):  # both have the one key and value
        expected = torch.cat([q[2 * rank : 2 * rank + 2].reshape(6, 12), k[0], v[0]])
        assert torch.equal(made[f"transformer.layers.1.attention.qkv.weight.{rank}.bin"], expected)
    linear = [made[f"transformer.layers.1.ffn.weight.{rank}.bin"] for rank in range(2)]
    assert torch.equal(torch.cat(linear), state["decoder.layers.1.mlp.weight"])


def test_a_config_without_query_groups_has_one_kv_head_for_each_query_or_for_all():
    for groups, multi_query, expected in ((0, False, 4), (0, True, 1), (2, True, 2), (None, False, 4)):
        config = TransformerConfig(num_layers=1, num_attention_heads=4, num_query_groups=groups, hidden_size=8)
        ours, theirs = (
            kind(ExportConfig(), config, DataType.float32, multi_query)
            for kind in (SingleDeviceTRTLLMModelWeightsConverter, single.SingleDeviceTRTLLMModelWeightsConverter)
        )
        assert ours.num_kv_heads == theirs.num_kv_heads == expected


def test_newer_falcons_call_the_norm_before_the_mlp_otherwise():
    class Newer:
        new_decoder_architecture = True

    ours, theirs = convert_both(PLAIN)
    place = Mapping(world_size=2, rank=1, tp_size=2)
    found, expected = (each.get_local_model_weights_per_gpu(place, Newer()) for each in (ours, theirs))
    assert "transformer.layers.1.mlp_layernorm.bias" in found
    assert_same(found, expected)


def test_stacked_experts_without_a_width_are_taken_as_megatrons_own_tests_hand_them_over():
    config = TransformerConfig(num_layers=2, num_attention_heads=2, num_query_groups=0, hidden_size=4, ffn_hidden_size=16)
    names = {
        "decoder.layers.mlp.fc.weight": TRTLLMLayers.mlp_fc_weight,
        "decoder.layers.mlp.fc.expert": TRTLLMLayers.mlp_fc_weight_mixture_of_experts,
        "decoder.layers.mlp.proj.expert": TRTLLMLayers.mlp_projection_weight_mixture_of_experts,
    }
    shapes = ((2, 16, 4), (2, 4, 16), (2, 16, 4))
    state = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    theirs = single.SingleDeviceTRTLLMModelWeightsConverter(ExportConfig(2), config, DataType.float32, activation="swiglu")
    originals = {name: single.TRTLLMLayers[layer.name] for name, layer in names.items()}
    theirs.convert(dict(state), originals, state_dict_split_by_layer_numbers=False)
    made = converted(replace(PLAIN, activation="swiglu"), state, names, config, split=False).trtllm_model_weights
    assert_same(made, theirs.trtllm_model_weights)
    assert made["transformer.layers.0.mlp.fc.weight.0.bin"].shape == (16, 2)


@pytest.mark.parametrize(("kv", "tp", "heads"), [(3, 4, 6), (5, 4, 10), (4, 3, 12), (6, 4, 12)])
@pytest.mark.parametrize("name", ["self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"])
def test_query_groups_that_fit_no_rank_are_refused_in_the_same_words(kv, tp, heads, name):
    config = TransformerConfig(num_layers=1, num_attention_heads=heads, num_query_groups=kv, hidden_size=8, kv_channels=2)
    rows = (heads + 2 * kv) * 2

    def refusal(kind, layers, name, *shape):
        state = {f"decoder.layers.0.{name}": torch.zeros(shape)}
        names = {f"decoder.layers.{name}": layers}
        with pytest.raises(Exception, match="Number of query groups") as caught:
            kind(ExportConfig(tp), config, DataType.float32).convert(state, names)
        return caught.value

    weight = "self_attention.linear_qkv.weight"
    layer = single.TRTLLMLayers.attention_qkv_weight
    theirs = refusal(single.SingleDeviceTRTLLMModelWeightsConverter, layer, weight, rows, 8)
    kind = TRTLLMLayers.attention_qkv_weight if name == weight else TRTLLMLayers.attention_qkv_bias
    shape = (rows, 8) if name == weight else (rows,)
    ours = refusal(SingleDeviceTRTLLMModelWeightsConverter, kind, name, *shape)
    assert str(ours) == str(theirs)
    assert isinstance(ours, CarnetError)


def test_query_groups_are_looked_at_before_a_head_of_no_width_is():
    config = TransformerConfig(num_layers=1, num_attention_heads=10, num_query_groups=5, hidden_size=8)
    state = {"decoder.layers.self_attention.linear_qkv.weight": torch.zeros(1, 0, 8)}
    with pytest.raises(Exception, match="Number of query groups of the models is 5"):
        converted(replace(PLAIN, tp=4), state, config=config, split=False)


NORM, DOWN, QKV = (
    f"decoder.layers.{name}" for name in ("input_layernorm.weight", "mlp.linear_fc2.weight", "self_attention.linear_qkv.weight")
)


@pytest.mark.parametrize(
    ("name", "shape", "split", "says"),
    [
        (NORM.replace("layers", "layers.2"), [4], True, "the state dict has a layer 2, the config has 2"),
        (NORM, [3, 4], False, "a tensor of all layers has another number of them"),
        (NORM, [], False, "a tensor of all layers has another number of them"),
        (NORM.replace("layers", "layers.1"), [4, 4], True, "transformer.layers.1.input_layernorm.weight has a shape"),
        (QKV.replace("layers", "layers.1"), [25, 4], True, "transformer.layers.1.attention.qkv.weight has a shape"),
        (QKV.replace("layers", "layers.1"), [48, 4], True, "transformer.layers.1.attention.qkv.weight has a shape"),
        (DOWN.replace("layers", "layers.1"), [4, 7], True, "cannot cut axis 'ffn' into 2 equal shards"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(name, shape, split, says):
    with pytest.raises((BadCheckpoint, BadRequest), match=says):
        converted(PLAIN, {name: torch.zeros(shape)}, split=split)


def test_a_gate_and_an_up_projection_of_unequal_rows_are_refused():
    with pytest.raises(BadCheckpoint, match=r"transformer\.layers\.1\.mlp\.fc\.weight has a shape"):
        converted(replace(PLAIN, activation="swiglu"), {"decoder.layers.1.mlp.linear_fc1.weight": torch.zeros(7, 4)})


def test_query_heads_that_ranks_would_have_to_cut_are_refused():
    model = replace(PLAIN, tp=2, kv=1, rep=3)
    with pytest.raises(BadRequest, match="cannot cut axis 'kv' into 2 equal shards"):
        converted(model)


def test_a_value_that_is_no_tensor_is_refused():
    with pytest.raises(AssertionError, match=r"Expected a tensor for transformer\.ln_f\.weight but got"):
        converted(PLAIN, PLAIN.state() | {"decoder.final_layernorm.weight": None})


@pytest.mark.parametrize("missing", ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"])
def test_a_model_without_its_ends_is_refused_when_it_is_dealt_out(missing):
    state = PLAIN.state()
    del state[missing]
    with pytest.raises(BadCheckpoint, match="the state dict has no"):
        dealt(converted(PLAIN, state), PLAIN)
