"""The helper beside Megatron's own, which is given what it imports from TensorRT-LLM: the classes' words are kept as they come."""

import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.export.data_type import DataType as OriginalType
from megatron.core.export.export_config import ExportConfig as OriginalExport
from megatron.core.export.model_type import ModelType as OriginalModel
from megatron.core.export.trtllm import trtllm_helper as original
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported
from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm.records import Mapping, MoeConfig
from carnet.megatron.export.trtllm.trtllm_helper import TRTLLMHelper
from carnet.megatron.export.trtllm.trtllm_weights_converter.utils import non_gated_version
from tests.megatron.export_models import PLAIN, assert_same, models
from tests.te_states import FORMS, first_form, second_form, table

pytestmark = pytest.mark.referee


@pytest.fixture(scope="module", autouse=True)
def _tensorrt_llm():
    """Give Megatron's helper what it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, "HAVE_TRTLLM", True)
        patch.setattr(original, "tensorrt_llm", SimpleNamespace(Mapping=Mapping), raising=False)
        patch.setattr(original, "non_gated_version", non_gated_version, raising=False)
        patch.setattr(original, "MoeConfig", MoeConfig, raising=False)
        patch.setattr(original, "TRT_MODEL_CONFIG", dict.fromkeys(OriginalModel, SimpleNamespace))
        yield


LLAMA = replace(
    PLAIN,
    pp=2,
    activation="swiglu",
    normalization="RMSNorm",
    bias=False,
    positions=0,
    source=torch.bfloat16,
    target="bfloat16",
)


def helpers(model, kind="llama", **given):
    said = {"transformer_config": model.config(), "activation": model.activation, **given}
    return TRTLLMHelper(model_type=ModelType[kind], **said), original.TRTLLMHelper(model_type=OriginalModel[kind], **said)


def both(model, kind="llama", state=None, given=None, **asked):
    """Return what both helpers make of a model on one device."""
    ours, theirs = helpers(model, kind, **given or {})
    cut = (model.tp, model.pp, model.parallel_embedding)
    said = {"state_dict_split_by_layer_numbers": not model.stacked} | asked
    state = state or model.state()
    found = ours.get_trtllm_pretrained_config_and_model_weights(dict(state), DataType[model.target], ExportConfig(*cut), **said)
    expected = theirs.get_trtllm_pretrained_config_and_model_weights(
        dict(state), OriginalType[model.target], OriginalExport(*cut), **said
    )
    return found, expected


def assert_alike(found, expected):
    for weights, theirs in zip(found[0], expected[0], strict=True):
        assert_same(weights, theirs)
    for config, theirs in zip(found[1], expected[1], strict=True):
        said = dict(vars(theirs))
        quantization, mapping = said.pop("quantization"), said.pop("mapping")
        assert {key: getattr(config, key) for key in said} == said
        assert {key: getattr(config.quantization, key) for key in quantization} == quantization
        assert config.mapping == mapping


@settings(max_examples=40, deadline=None)
@given(
    models(),
    st.sampled_from(("gpt", "gptnext", "llama", "starcoder", "mixtral", "gemma", "falcon")),
    st.booleans(),
    st.sampled_from(("rope", "learned_absolute")),
    st.sampled_from((None, 2, 2.5)),
)
def test_weights_and_configs_are_those_of_megatrons_helper(model, kind, cache, position, factor):
    model = replace(model, nas=False)
    given = {
        "position_embedding_type": position,
        "max_position_embeddings": 64,
        "rotary_percentage": 0.5,
        "rotary_base": 500000,
        "seq_len_interpolation_factor": factor,
        "share_embeddings_and_output_weights": model.tied,
    }
    assert_alike(*both(model, kind, given=given, fp8_kvcache=cache))


LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def trained_in_fp8(model, form="1.x"):
    """Return a state dict with the states that Transformer Engine leaves, scales that are no powers of two among them."""
    state = model.state()
    for layer in range(model.layers):
        for number, module in enumerate(LINEAR):
            scales = torch.tensor([3.0 + layer, 11.3 + 7 * number + layer, 1.0])
            state[f"decoder.layers.{layer}.{module}._extra_state"] = FORMS[form](scales)
        state[f"decoder.layers.{layer}.self_attention.core_attention._extra_state"] = io.BytesIO(b"is not looked at")
        state[f"decoder.layers.{layer}.pre_mlp_layernorm._extra_state"] = None
    return state


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("model", [LLAMA, replace(LLAMA, activation="gelu", bias=True, normalization="LayerNorm", tp=4, pp=1)])
def test_fp8_is_that_of_megatrons_helper(model, weights, cache):
    found, expected = both(model, "llama", trained_in_fp8(model), fp8_quantized=weights, fp8_kvcache=cache)
    assert_alike(found, expected)
    made = found[0][0]
    qkv = "transformer.layers.0.attention.qkv"
    assert (made[f"{qkv}.weight"].dtype == torch.float8_e4m3fn) == weights
    assert made["transformer.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert (f"{qkv}.weights_scaling_factor" in made) == weights
    assert ("transformer.layers.0.attention.kv_cache_scaling_factor" in made) == cache
    assert {made[name].dtype for name in made if name.endswith("_factor")} <= {torch.float32}
    assert {algo: getattr(found[1][0].quantization, algo) for algo in ("quant_algo", "kv_cache_quant_algo")} == {
        "quant_algo": "FP8" if weights else None,
        "kv_cache_quant_algo": "FP8" if cache else None,
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_transformer_engines_states_gives_the_same(form):
    expected, _ = both(LLAMA, "llama", trained_in_fp8(LLAMA), fp8_quantized=True)
    ours, _ = helpers(LLAMA)
    state = trained_in_fp8(LLAMA, form)
    made, _ = ours.get_trtllm_pretrained_config_and_model_weights(
        state, DataType.bfloat16, ExportConfig(2, 2), fp8_quantized=True
    )
    for found, wanted in zip(made, expected[0], strict=True):
        assert_same(found, wanted)


def quantized(state, model=LLAMA, kind="llama", **given):
    ours, _ = helpers(model, kind, **given)
    cut = ExportConfig(model.tp, model.pp)
    split = not model.stacked
    made, _ = ours.get_trtllm_pretrained_config_and_model_weights(
        state, DataType.bfloat16, cut, fp8_quantized=True, state_dict_split_by_layer_numbers=split
    )
    return made


def test_a_weight_past_the_largest_number_becomes_the_largest():
    model = replace(LLAMA, tp=1, pp=1)
    state = trained_in_fp8(model)
    state["decoder.layers.0.mlp.linear_fc2.weight"] = torch.tensor([[1e9, -1e9, 40.0] * 4] * 4).bfloat16()
    state["decoder.layers.0.mlp.linear_fc2._extra_state"] = first_form(table(torch.tensor([1.0, 11.0, 1.0]), recipe=False))
    (made,) = quantized(state, model)
    found = made["transformer.layers.0.mlp.proj.weight"].float()
    assert found[0, :3].tolist() == [448, -448, 448]


def test_a_scale_that_is_older_in_its_inverse_goes_with_its_own():
    state = trained_in_fp8(LLAMA)
    old = table(torch.tensor([2.0, 8.0, 1.0]), recipe=False)
    old["scale_inv_fwd"] = torch.full((3,), 0.25)
    state["decoder.layers.0.mlp.linear_fc1._extra_state"] = first_form(old)
    made = quantized(state)[0]
    assert made["transformer.layers.0.mlp.fc.weights_scaling_factor"].tolist() == [0.125]
    assert made["transformer.layers.0.mlp.gate.activation_scaling_factor"].tolist() == [0.5]
    codes = made["transformer.layers.0.mlp.fc.weight"].float() / 8
    weight = state["decoder.layers.0.mlp.linear_fc1.weight"][:6].float()
    assert torch.allclose(codes, weight, rtol=1 / 16, atol=1e-2)


def test_states_that_a_stacked_model_has_for_each_layer_are_its_layers():
    model = replace(LLAMA, stacked=True)
    state = model.state()
    for layer in range(2):
        for module in LINEAR:
            scales = torch.tensor([1.0, 2.0 + layer, 1.0])
            state[f"decoder.layers.{module}._extra_state/shard_{layer}_2"] = second_form(table(scales, recipe=True))
    first, _, last, _ = quantized(state, model)
    scale = "transformer.layers.0.mlp.gate.weights_scaling_factor"
    assert (first[scale].item(), last[scale].item()) == (1 / 2, pytest.approx(1 / 3))
    assert first["transformer.layers.0.mlp.gate.weight"].dtype == torch.float8_e4m3fn


def test_the_gates_of_nemotron_nas_are_quantized_like_the_rest():
    state = trained_in_fp8(LLAMA)
    names = {
        "decoder.layers.mlp.linear_fc1.weight": "ffn_fc_weight",
        "decoder.layers.mlp.linear_fc2.weight": "ffn_projection_weight",
    }
    layers = {name: original.TRTLLMLayers[layer] for name, layer in names.items()}
    made = quantized(state, trtllm_conversion_dict=layers)[0]
    for part in ("fc", "gate", "proj"):
        assert made[f"transformer.layers.0.ffn.{part}.weight"].dtype == torch.float8_e4m3fn
        assert made[f"transformer.layers.0.ffn.{part}.weights_scaling_factor"].shape == (1,)


def test_a_table_of_the_two_numbers_alone_is_read():
    state, packed = trained_in_fp8(LLAMA), io.BytesIO()
    torch.save({"scale_fwd": torch.tensor([2.0, 4.0])}, packed)
    state["decoder.layers.0.mlp.linear_fc1._extra_state"] = packed
    made = quantized(state)[0]
    assert made["transformer.layers.0.mlp.fc.weights_scaling_factor"].tolist() == [0.25]
    assert made["transformer.layers.0.mlp.fc.activation_scaling_factor"].tolist() == [0.5]


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def hostile():
    packed = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3), "more": Hostile()}, packed)
    return packed


@pytest.mark.parametrize("pack", [hostile, lambda: torch.frombuffer(bytearray(pickle.dumps(Hostile())), dtype=torch.uint8)])
def test_nothing_in_a_state_is_executed(pack, capsys):
    state = trained_in_fp8(LLAMA)
    state["decoder.layers.0.mlp.linear_fc1._extra_state"] = pack()
    with pytest.raises(BadCheckpoint):
        quantized(state)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("state", "kind", "says"),
    [
        (io.BytesIO(b"PK and no more"), BadCheckpoint, "_extra_state"),
        (io.BytesIO(b"something"), BadCheckpoint, "_extra_state"),
        ([1, 2], BadCheckpoint, "is not a state of a module"),
        (first_form({"scale_fwd": torch.tensor([1.0, float("inf")])}), BadCheckpoint, "not a positive number"),
        (first_form({"scale_fwd": torch.tensor([1.0])}), BadCheckpoint, "is damaged"),
        (first_form(table(torch.tensor([1.0, 0.0, 1.0]), recipe=False)), BadCheckpoint, "is damaged"),
        (first_form(table(torch.ones(6), recipe=False, gemms=2)), NotSupported, "experts in FP8"),
        (second_form(table(torch.ones(6), recipe=True, gemms=2)), NotSupported, "experts in FP8"),
    ],
)
def test_states_that_say_no_scale_are_refused(state, kind, says):
    with pytest.raises(kind, match=says):
        quantized(trained_in_fp8(LLAMA) | {"decoder.layers.0.mlp.linear_fc1._extra_state": state})


def test_experts_in_fp8_are_refused_and_not_left_out():
    model = replace(LLAMA, experts=2)
    state = trained_in_fp8(model)
    for part in ("1", "2"):
        for layer in range(2):
            moved = state.pop(f"decoder.layers.{layer}.mlp.linear_fc{part}._extra_state")
            state[f"decoder.layers.{layer}.mlp.experts.experts.linear_fc{part}._extra_state"] = moved
    with pytest.raises(NotSupported, match="experts in FP8"):
        quantized(state, model)


@pytest.mark.parametrize("state", [None, first_form(None), second_form(None), torch.empty(0, dtype=torch.uint8)])
def test_fp8_without_any_scale_is_refused(state):
    states = {f"decoder.layers.0.{module}._extra_state": state for module in LINEAR}
    with pytest.raises(BadRequest, match="the model has no scales for FP8"):
        quantized(LLAMA.state() | states)


NAS = {
    "block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": {"replace_with_linear": True, "ffn_mult": None}},
    ]
}


def test_nemotron_nas_says_what_each_layer_is():
    config = HeterogeneousTransformerConfig(
        num_layers=2,
        num_attention_heads=8,
        num_query_groups=4,
        hidden_size=384,
        ffn_hidden_size=256,
        add_bias_linear=False,
        heterogeneous_layers_config_encoded_json=json.dumps(NAS),
    )
    said = {"transformer_config": config, "activation": "swiglu", "position_embedding_type": "rope", "rope_scaling_factor": 4.0}
    ours = TRTLLMHelper(model_type=OriginalModel.nemotron_nas, **said)
    theirs = original.TRTLLMHelper(model_type=OriginalModel.nemotron_nas, **said)
    names = {name: layer.value for name, layer in ours.trtllm_conversion_dict.items()}
    assert names == {name: layer.value for name, layer in theirs.trtllm_conversion_dict.items()}
    shapes = {
        "embedding.word_embeddings": (6, 384),
        "decoder.layers.0.self_attention.linear_qkv": (768, 384),
        "decoder.layers.0.mlp.linear_fc1": (512, 384),
        "decoder.layers.0.mlp.linear_fc2": (384, 256),
        "decoder.layers.1.mlp": (384, 384),
        "decoder.final_layernorm": (384,),
    }
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    cut = ExportConfig(2, 1)
    found = ours.get_trtllm_pretrained_config_and_model_weights(dict(state), DataType.bfloat16, cut)
    expected = theirs.get_trtllm_pretrained_config_and_model_weights(dict(state), OriginalType.bfloat16, cut)
    assert_alike(found, expected)
    assert found[1][1].layer_configs == [
        {"attention": {"impl": "attention", "num_key_value_heads": 4}, "ffn": {"impl": "mlp", "intermediate_size": 256}},
        {"attention": {"impl": "no_op", "num_key_value_heads": None}, "ffn": {"impl": "linear", "intermediate_size": None}},
    ]
    assert "block_configs" not in found[1][0].to_dict()
    assert (found[1][0].layer_types, found[1][0].num_kv_heads_per_layer) == (["attention", "no_op"], [4])


def test_a_config_is_what_config_json_says(tmp_path):
    (_, configs), _ = both(replace(LLAMA, experts=4), "mixtral", given={"max_position_embeddings": 32})
    configs[3].to_json_file(str(tmp_path / "config.json"))
    said = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "hidden_act": "swiglu",
        "head_size": 3,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 32,
        "rotary_embedding_dim": 3,
        "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1},
    }
    assert {key: said[key] for key in expected} == expected
    places = {"world_size": 4, "gpus_per_node": 8, "cp_size": 1, "tp_size": 2, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 1}
    assert said["mapping"] == places
    assert configs[3].mapping.rank == 3
    assert (configs[3].moe.has_moe(), configs[3].quant_algo) == (True, None)
    assert said["quantization"]["quant_algo"] is None
    configs[0].set_rank(2)
    assert configs[0].mapping.pp_rank == 1


def test_a_rank_that_is_none_has_no_place():
    with pytest.raises(ValueError, match="world_size is tp_size"):
        Mapping(world_size=3, tp_size=2)
    with pytest.raises(ValueError, match="there is no rank 2 of 2"):
        Mapping(world_size=2, rank=2, tp_size=2)


def test_the_helper_remembers_what_it_was_told_and_what_converted():
    ours, theirs = helpers(LLAMA, rotary_base=7, moe_renorm_mode=2, trtllm_conversion_dict={"a": original.TRTLLMLayers.lm_head})
    said = [
        {key: value for key, value in vars(each).items() if key not in ("model_type", "trtllm_conversion_dict")}
        for each in (ours, theirs)
    ]
    assert said[0] | {"transformer_config": 0} == said[1] | {"transformer_config": 0}
    assert ours.trtllm_conversion_dict["a"] is original.TRTLLMLayers.lm_head
    assert ours.weights_converter is None
    ours.get_trtllm_pretrained_config_and_model_weights(LLAMA.state(), DataType.bfloat16, ExportConfig(2))
    assert ours.weights_converter.num_kv_heads == 2


STATE = LLAMA.state()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("llama", {"model_state_dict": None}),
        ("llama", {"model_state_dict": None, "vocab_size": 100, "on_device_distributed_conversion": True, "gpus_per_node": 2}),
        ("llama", {"on_device_distributed_conversion": True, "gpus_per_node": 2}),
        ("falcon", {"on_device_distributed_conversion": True, "gpus_per_node": 2, "vocab_size": 100}),
        (
            "llama",
            {"on_device_distributed_conversion": True, "gpus_per_node": 2, "vocab_size": 9, "export_config": ExportConfig()},
        ),
        ("llama", {"on_device_distributed_conversion": True, "vocab_size": 100}),
        ("llama", {"export_config": ExportConfig(), "vocab_size": 100}),
    ],
)
def test_calls_that_cannot_be_answered_are_refused_as_megatron_refuses_them(kind, asked):
    said = []
    for helper in helpers(LLAMA, kind):
        with pytest.raises(AssertionError) as caught:
            helper.get_trtllm_pretrained_config_and_model_weights(
                **{"model_state_dict": STATE, "dtype": DataType.bfloat16} | asked
            )
        said.append(caught.value)
    ours, theirs = said
    assert isinstance(ours, CarnetError)
    assert str(theirs).startswith(ours.what.split(" for some ")[0])


def test_a_position_embedding_that_is_none_of_two_is_refused():
    for kind, model in ((TRTLLMHelper, ModelType.gpt), (original.TRTLLMHelper, OriginalModel.gpt)):
        with pytest.raises(AssertionError, match="Position embedding type should be one of learned_absolute, rope"):
            kind(transformer_config=None, model_type=model, position_embedding_type="alibi")


def test_one_device_has_to_be_told_the_cut():
    with pytest.raises(BadRequest, match="Need to pass in export_config"):
        helpers(LLAMA)[0].get_trtllm_pretrained_config_and_model_weights(STATE, DataType.bfloat16)


def test_an_unmapped_name_is_refused():
    for helper in helpers(LLAMA):
        with pytest.raises(ValueError, match=r"Unable to rename key decoder\.layers\.mlp\.experts\.linear_fc1\.weight0"):
            helper.get_trtllm_pretrained_config_and_model_weights(
                {"decoder.layers.0.mlp.experts.linear_fc1.weight0": torch.zeros(1)}, DataType.bfloat16, ExportConfig()
            )


def test_an_engine_is_refused_where_tensorrt_llm_is_not_installed():
    ours, _ = helpers(LLAMA)
    with pytest.raises(ImportError, match="tensorrt_llm is not installed"):
        ours.build_and_save_engine("engine", {}, SimpleNamespace(architecture="LlamaForCausalLM"))


CHOICE = """
import sys, warnings
warnings.simplefilter("ignore")
from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm.trt_model_config import HAVE_TRTLLM, TRT_MODEL_CONFIG
print(HAVE_TRTLLM, TRT_MODEL_CONFIG[ModelType.gpt].__module__)
"""


def ran(program, modules):
    """Return what a program says that finds other modules first."""
    path = f"{modules}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}).stdout


@pytest.mark.parametrize("complete", [False, True])
def test_tensorrt_llms_own_classes_are_taken_where_it_has_all_of_them(tmp_path, complete):
    classes = {
        "models/gpt/config": "GPTConfig",
        "models/llama/config": "LLaMAConfig",
        "models/gemma/config": "GemmaConfig",
        "models/falcon/config": "FalconConfig",
        "models/nemotron_nas/config": "DeciConfig",
        "layers": "MoeConfig",
    }
    for module, name in (classes | ({"mapping": "Mapping"} if complete else {})).items():
        file = tmp_path / "tensorrt_llm" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"class {name}: pass\n")
    said = ran(CHOICE, tmp_path)
    expected = "True tensorrt_llm.models.gpt.config" if complete else "False carnet.megatron.export.trtllm.records"
    assert said.strip() == expected


def test_the_export_does_without_tqdm(tmp_path):
    for name in ("tqdm", "multistorageclient"):  # which needs tqdm, and which megatron-core imports where it is there
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('not here')\n")
    program = f"""{CHOICE}
import torch
from types import SimpleNamespace as Config
from carnet.megatron.export.trtllm import trtllm_helper as export
config = Config(num_layers=1, num_query_groups=1, num_attention_heads=1, kv_channels=1, hidden_size=1, gated_linear_unit=False,
    layernorm_zero_centered_gamma=False)
made = export.SingleDeviceTRTLLMModelWeightsConverter(export.ExportConfig(), config, export.DataType.float32)
made.convert({{"embedding.word_embeddings.weight": torch.ones(2, 1)}}, export.DEFAULT_CONVERSION_DICT)
print(list(made.trtllm_model_weights))
"""
    assert ran(program, tmp_path).splitlines()[1] == "['transformer.vocab_embedding.weight']"
