"""Where megatron-core's code fails, carnet's in its place refuses with an error that is also of the type raised there."""

import io
from dataclasses import replace

import pytest
import torch
from megatron.core.export.trtllm import trtllm_helper
from megatron.core.post_training.modelopt.gpt import model_specs
from megatron.core.transformer import TransformerConfig

from carnet.errors import CarnetError
from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from carnet.megatron.export.trtllm.records import Mapping
from carnet.megatron.export.trtllm.trtllm_helper import TRTLLMHelper
from carnet.megatron.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
    SingleDeviceTRTLLMModelWeightsConverter,
)
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from tests.megatron.export_models import (
    ORIGINAL_NAMES,
    PLAIN,
    OriginalExport,
    OriginalType,
    single,
)

pytestmark = pytest.mark.referee

LAYER = "decoder.layers.1."
NORM, QKV, BIAS, FC1, FC2 = (
    LAYER + name
    for name in (
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    )
)
UP, DOWN = (f"{LAYER}mlp.experts.experts.linear_fc{part}.weight" for part in (1, 2))
EMBED, LAST = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
GATED = replace(PLAIN, activation="swiglu")
ODD = replace(PLAIN, tp=4, kv=3, rep=2)
ALL = {"split": False}  # a tensor holds all layers
SHARED = {"use_parallel_embedding": True}


def failure(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011  any type: it is what is looked for
        call()
    return caught.value


def assert_alike(ours, theirs):
    assert isinstance(ours, CarnetError)
    assert isinstance(ours, type(theirs)), repr(theirs)


def converted(by, model, state, *, split=True, **cut):
    kind, export, types, names = by
    made = kind(export(model.tp, model.pp, **cut), model.config(), types[model.target], activation=model.activation)
    made.convert(dict(state), names, split)
    made.get_padded_vocab_size()
    made.get_local_model_weights_per_gpu(Mapping(world_size=model.tp, tp_size=model.tp), None)


OURS = (SingleDeviceTRTLLMModelWeightsConverter, ExportConfig, DataType, DEFAULT_CONVERSION_DICT)
THEIRS = (single.SingleDeviceTRTLLMModelWeightsConverter, OriginalExport, OriginalType, ORIGINAL_NAMES)


@pytest.mark.parametrize(
    ("model", "name", "value", "said"),
    [
        (PLAIN, EMBED, ..., {}),
        (PLAIN, LAST, ..., {}),
        (PLAIN, EMBED, torch.zeros([]), {}),
        (PLAIN, EMBED, torch.zeros([]), SHARED),
        (PLAIN, NORM.replace(".1", ""), torch.zeros(1, 4), ALL),
        (PLAIN, NORM.replace(".1", ""), torch.zeros([]), ALL),
        (PLAIN, QKV, torch.zeros(25, 4), {}),
        (PLAIN, QKV, torch.zeros(24), {}),
        (PLAIN, QKV, torch.zeros(24, 4, 1), {}),
        (PLAIN, BIAS, torch.zeros(25), {}),
        (PLAIN, BIAS, torch.zeros(24, 2), {}),
        (PLAIN, FC1, torch.zeros([]), {}),
        (PLAIN, FC2, torch.zeros([]), {}),
        (GATED, FC1, torch.zeros(1, 4), {}),
        (PLAIN, UP, torch.zeros(4), {}),
        (PLAIN, UP, torch.zeros(2, 1, 4), {}),
        (PLAIN, DOWN, torch.zeros([]), {}),
        (ODD, QKV, torch.zeros(36, 4), {}),
        (ODD, BIAS, torch.zeros(36), {}),
        (PLAIN, EMBED, None, {}),
        (PLAIN, LAST, None, {}),
        (PLAIN, FC2, None, {}),
        (PLAIN, FC2, [1.0], {}),
        (PLAIN, FC2.replace(".1", ""), None, ALL),
        (PLAIN, FC2.replace(".1", ""), 3, ALL),
        (PLAIN, FC2.replace(".1", ""), [1.0, 2.0], ALL),
        (PLAIN, FC2.replace(".1", ".x"), torch.zeros(4, 12), {}),
        (PLAIN, LAYER + "other.weight", torch.zeros(4), {}),
    ],
)
def test_a_state_dict_that_is_not_the_models_is_refused_as_it_fails_in_megatrons_converter(model, name, value, said):
    ends = {each: tensor for each, tensor in model.state().items() if "layers" not in each and each != name}
    state = ends if value is ... else {name: value} if said == ALL else ends | {name: value}
    assert_alike(*(failure(lambda each=each: converted(each, model, state, **said)) for each in (OURS, THEIRS)))


def helpers(**asked):
    """Return what each helper raises."""
    original, said = trtllm_helper.TRTLLMHelper, {"transformer_config": PLAIN.config()}
    with pytest.MonkeyPatch.context() as patch:  # TensorRT-LLM is not here
        patch.setattr(trtllm_helper, "HAVE_TRTLLM", True)
        ours = TRTLLMHelper(model_type=ModelType.gpt, **said)
        theirs = original(model_type=ModelType.gpt, **said)
        return [
            failure(lambda each=each: each.get_trtllm_pretrained_config_and_model_weights(dtype=DataType.float32, **asked))
            for each in (ours, theirs)
        ]


def test_a_cut_that_nobody_told_is_refused_as_it_fails_in_megatrons_helper():
    assert_alike(*helpers(model_state_dict=PLAIN.state()))


def stored(value):
    found = io.BytesIO()
    torch.save(value, found)
    return found


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        io.BytesIO(b"something"),
        io.BytesIO(b"PK and no more"),
        stored({"other": torch.ones(2)}),
        stored({"scale_fwd": torch.ones(1), "scale_inv_fwd": torch.ones(1)}),
    ],
)
def test_a_state_that_is_none_is_refused_as_it_fails_in_megatrons_helper(state):
    asked = {"model_state_dict": PLAIN.state() | {FC2.removesuffix("weight") + "_extra_state": state}}
    assert_alike(*helpers(**asked, export_config=ExportConfig(), fp8_quantized=True))


@pytest.mark.parametrize(
    "said",
    [
        {"moe_layer_freq": "2"},
        {"moe_layer_freq": [1]},
        {"moe_layer_freq": [1, 2]},
        {"moe_layer_freq": 0},
        {"moe_layer_freq": 1.5},
        {"moe_layer_freq": None},
        {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"real_quant_cfg": "int4"},
    ],
)
def test_a_spec_that_cannot_be_is_refused_as_it_fails_in_megatrons(said, megatron_world):
    config = TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=2, num_moe_experts=2, moe_router_topk=2)
    vars(config).update({name: value for name, value in said.items() if hasattr(config, name)})
    asked = {name: value for name, value in said.items() if not hasattr(config, name)}
    both = (get_gpt_modelopt_spec, model_specs.get_gpt_modelopt_spec)
    assert_alike(*(failure(lambda each=each: each(config, local_core_attention=True, **asked)) for each in both))
