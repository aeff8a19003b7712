"""What configs say of quantized weights is read back as it was written, by carnet and by the programs; what is not known is refused."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import carnet
from carnet.errors import BadCheckpoint, CarnetError, NotSupported
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.quantize.configs import BESIDE, Codes, with_codes
from carnet.quantize.reading import CONFIG_KEY, RECORD, plain, read
from carnet.quantize.recipes import RECIPES
from carnet.quantize.styles import STYLES
from carnet.report.data import inspection_data

HF = [recipe for recipe in RECIPES if recipe.style != "trtllm"]
IGNORED = ("lm_head", "model.embed_tokens")


def hf(record):
    return read(CONFIG_KEY, {"model_type": "llama", CONFIG_KEY: record}, "here")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("recipe", HF, ids=lambda recipe: recipe.name)
def test_what_is_written_is_read_back(recipe, cache, static):
    scheme_has = recipe.scheme in STYLES[recipe.style].inputs
    cache = cache and bool(STYLES[recipe.style].cache[0])
    static = scheme_has and (static or recipe.style == "modelopt")
    said = hf(with_codes({}, CONFIG_KEY, Codes(recipe, IGNORED, cache, static))["config.json"][CONFIG_KEY])
    assert (said.recipe, said.cache, said.static, said.lists) == (recipe, cache, static, {"config.json": IGNORED})
    assert said.style is STYLES[recipe.style]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("recipe", [recipe for recipe in HF if recipe.style == "modelopt"], ids=lambda recipe: recipe.name)
def test_modelopt_s_file_is_read_where_config_json_says_nothing(recipe, cache):
    record = with_codes({}, CONFIG_KEY, Codes(recipe, IGNORED, cache, static=True))[BESIDE]
    said = read(CONFIG_KEY, {"model_type": "llama", BESIDE: record}, "here")
    assert (said.recipe, said.cache, said.lists) == (recipe, cache, {BESIDE: IGNORED})
    flat = with_codes({}, CONFIG_KEY, Codes(recipe, IGNORED, cache, static=True))["config.json"][CONFIG_KEY]
    assert read(CONFIG_KEY, {BESIDE: flat}, "here") == said
    both = read(CONFIG_KEY, {BESIDE: record, CONFIG_KEY: flat}, "here")
    assert said is not None
    assert both == replace(said, lists={"config.json": IGNORED, BESIDE: IGNORED})


MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "lm_head": {"quant_algo": "NVFP4", "group_size": 16},
    },
}


@pytest.mark.parametrize("how", ["flat", "one level down"])
def test_modules_have_recipes_of_their_own(how):
    said = hf({"quant_method": "modelopt", **(MIXED if how == "flat" else {"quantization": MIXED})})
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.7.up_proj", "lm_head", "model.layers.0.mlp.gate")
    found = [said.recipe_of(f"{name}.weight") for name in names]
    assert [recipe and recipe.name for recipe in found] == ["modelopt/fp8", "modelopt/nvfp4", "modelopt/nvfp4", None]
    assert (said.recipe, said.coded_as, said.static) == (None, "modelopt/fp8, modelopt/nvfp4", True)


def test_where_weights_alone_are_coded_no_scale_of_activations_is_stored():
    said = hf({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16})
    assert (said.recipe.name, said.static) == ("modelopt/nvfp4", False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lm_head": {"quant_algo": "W4A8_AWQ"}}, "quantized_layers.lm_head.quant_algo"),
        ({"lm_head": {"quant_algo": "NVFP4", "group_size": 32}}, "quantized_layers.lm_head.group_size"),
        ({"lm_head": {"quant_algo": "FP8", "pre_quant_scale": True}}, "quantized_layers.lm_head.pre_quant_scale"),
        ({"lm_head": 4}, "lm_head is not a record"),
    ],
)
def test_of_several_recipes_each_must_be_known(change, what):
    with pytest.raises(CarnetError) as refusal:
        hf({"quant_method": "modelopt", **MIXED, "quantized_layers": {**MIXED["quantized_layers"], **change}})
    assert what in str(refusal.value)


@pytest.mark.parametrize(
    ("group", "what"),
    [
        ({"targets": ["lm_head", "model.layers.0.self_attn.q_proj"]}, "disagree"),
        ({"targets": ["model.layers.0.mlp.gate"]}, "disagree"),
        ({"targets": ["lm_head"], "weights": {"num_bits": 8}}, "num_bits"),
    ],
)
def test_a_group_of_modules_that_contradicts_their_recipes_is_refused(group, what):
    with pytest.raises(CarnetError, match=what):
        hf({"quant_method": "modelopt", **MIXED, "config_groups": {"group_0": group}})


def test_two_files_name_the_same_modules():
    other = {**MIXED, "quantized_layers": {**MIXED["quantized_layers"], "lm_head": {"quant_algo": "FP8"}}}
    both = {CONFIG_KEY: {"quant_method": "modelopt", **MIXED}, BESIDE: {"quantization": other}}
    with pytest.raises(BadCheckpoint, match="disagree about the quantized weights"):
        read(CONFIG_KEY, both, "here")


def test_ranks_are_read_back():
    (recipe,) = (recipe for recipe in RECIPES if recipe.style == "trtllm")
    codes = Codes(recipe, ["lm_head"], cache=True, static=True)
    config = with_codes({RECORD: {"group_size": 128}}, RECORD, codes)["config.json"]
    said = read(RECORD, config, "here")
    assert (said.recipe, said.cache, said.static, said.lists) == (recipe, True, True, {"config.json": ("lm_head",)})
    assert plain(RECORD, config)["quantization"] | {"exclude_modules": None} == {
        "group_size": 128,
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "exclude_modules": None,
    }
    usual = read(RECORD, {"quantization": {"quant_algo": "FP8", "exclude_modules": None}}, "here")
    assert "*lm_head" in usual.lists["config.json"]
    cache_alone = read(RECORD, {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, "here")
    assert (cache_alone.recipe, cache_alone.cache) == (None, True)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        (CONFIG_KEY, {"model_type": "llama"}),
        (CONFIG_KEY, {CONFIG_KEY: None}),
        (CONFIG_KEY, {BESIDE: {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}}),
        (RECORD, {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}),
        (RECORD, {}),
        ("", {CONFIG_KEY: {"quant_method": "fp8"}}),
    ],
)
def test_a_plain_checkpoint_says_nothing(key, config):
    assert read(key, config, "here") is None


PUBLISHED = {  # as these models' own config.json has them, shortened to what tells
    "DeepSeek-V3": (
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "deepseek/fp8-block",
    ),
    "DeepSeek-V3.1": (
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "deepseek/fp8-block",
    ),
    "an older compressed-tensors": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        "dynamic": True,
                        "num_bits": 8,
                        "strategy": "token",
                        "symmetric": True,
                        "type": "float",
                    },
                    "targets": ["Linear"],
                    "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
                }
            },
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "frozen",
        },
        "compressed-tensors/fp8-channel",
    ),
    "Kimi-K2.5": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": 32,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
        "compressed-tensors/int4-group32",
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_configs_of_published_models_are_read(model):
    record, name = PUBLISHED[model]
    assert hf(record).recipe.name == name


def pressed(scheme, **weights):
    recipe = next(r for r in HF if r.name == f"compressed-tensors/{scheme}")
    record = json.loads(
        json.dumps(with_codes({}, CONFIG_KEY, Codes(recipe, (), cache=False, static=False))["config.json"][CONFIG_KEY])
    )
    record["config_groups"]["group_0"]["weights"].update(weights)
    return record


def two_groups():
    record = pressed("fp8-channel")
    record["config_groups"]["group_1"] = pressed("int8-channel")["config_groups"]["group_0"]
    return record


DEEPSEEK = PUBLISHED["DeepSeek-V3"][0]
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
UNKNOWN = {
    "another method": ({"quant_method": "awq", "bits": 4}, "quant_method"),
    "no method": ({"bits": 4}, "quant_method"),
    "another algorithm": ({**MODELOPT, "quant_algo": "W4A8_AWQ"}, "quant_algo"),
    "an algorithm that is not a word": ({**MODELOPT, "quant_algo": 8}, "quant_algo"),
    "several algorithms": ({**MODELOPT, "quant_algo": "MIXED_PRECISION"}, "quant_algo"),
    "another cache": ({**MODELOPT, "kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo"),
    "another group": ({**MODELOPT, "quant_algo": "NVFP4", "group_size": 32}, "group_size"),
    "scales before": ({**MODELOPT, "pre_quant_scale": True}, "pre_quant_scale"),
    "an unknown key": ({**MODELOPT, "rotation": "hadamard"}, "rotation"),
    "a group with other bits": (
        {**MODELOPT, "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "dynamic": False}}}},
        "num_bits",
    ),
    "per-tensor fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_block_size"),
    "static deepseek": ({**DEEPSEEK, "activation_scheme": "static"}, "activation_scheme"),
    "e5m2": ({**DEEPSEEK, "fmt": "e5m2"}, "fmt"),
    "smaller blocks": ({**DEEPSEEK, "weight_block_size": [64, 128]}, "weight_block_size"),
    "asymmetric": (pressed("int4-group", symmetric=False), "symmetric"),
    "reordered": (pressed("int4-group", actorder="group"), "actorder"),
    "groups of 64": (pressed("int4-group", group_size=64), "group_size"),
    "other scales": (pressed("mxfp4", scale_dtype="torch.float8_e4m3fn"), "scale_dtype"),
    "a new argument": (pressed("fp8-channel", zero_point=True), "zero_point"),
    "groups that differ": (two_groups(), "fp8-channel, int8-channel"),
    "no group": ({**pressed("fp8-channel"), "config_groups": {}}, "none"),
    "sparse": ({**pressed("fp8-channel"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "rotated": ({**pressed("fp8-channel"), "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "a cache of int8": ({**pressed("fp8"), "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "type"),
}


@pytest.mark.parametrize("which", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(which):
    record, word = UNKNOWN[which]
    with pytest.raises(NotSupported) as refusal:
        hf(record)
    assert word in str(refusal.value)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    "value", [7, "fp8", [], True, {"quant_method": {}}, {"quant_method": "compressed-tensors", "config_groups": 3}]
)
def test_a_config_that_makes_no_sense_is_refused_and_never_a_traceback(value):
    with pytest.raises(CarnetError):
        hf(value)


@pytest.mark.parametrize("record", [MODELOPT, DEEPSEEK, pressed("int4-group")], ids=["modelopt", "deepseek", "pressed"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], {}, {"a": {"b": None}}, True])
def test_any_field_may_be_anything_and_the_worst_is_a_refusal(record, value):
    for path in [
        *((key,) for key in record),
        *(("config_groups", "group_0", key) for key in ("weights", "input_activations", "format")),
    ]:
        damaged = json.loads(json.dumps(record))
        at = damaged
        for key in path[:-1]:
            at = at.get(key, {})
        at[path[-1]] = value
        with suppress(CarnetError):
            hf(damaged)


def test_ranks_of_another_algorithm_are_refused():
    for record in (
        {"quant_algo": "W4A16_AWQ"},
        {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"},
        {"quant_algo": "MIXED_PRECISION"},
    ):
        with pytest.raises(NotSupported, match="quantization"):
            read(RECORD, {"quantization": record}, "here")


# --- whole checkpoints ---------------------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 128,
    "head_dim": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32,
}
AT = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (32, 128),
    "lm_head.weight": (32, 128),
    "model.norm.weight": (128,),
    AT + "input_layernorm.weight": (128,),
    AT + "post_attention_layernorm.weight": (128,),
    AT + "self_attn.q_proj.weight": (128, 128),
    AT + "self_attn.k_proj.weight": (64, 128),
    AT + "self_attn.v_proj.weight": (64, 128),
    AT + "self_attn.o_proj.weight": (128, 128),
    AT + "mlp.gate_proj.weight": (128, 128),
    AT + "mlp.up_proj.weight": (128, 128),
    AT + "mlp.down_proj.weight": (128, 128),
}


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint with FP8 weights under modelopt's names."""
    random = np.random.default_rng(1)
    folder = tmp_path / "plain"
    folder.mkdir()
    save_file(
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    amax = {name.replace("weight", "input_amax"): np.array(3, np.float32) for name in SHAPES if "_proj" in name}
    save_file(amax, tmp_path / "amax.safetensors")
    carnet.run(carnet.plan(folder, to="hf", quantize="fp8", amax=tmp_path / "amax.safetensors"), tmp_path / "fp8")
    return tmp_path / "fp8"


def test_a_quantized_checkpoint_is_understood_tensor_by_tensor(checkpoint):
    found = carnet.inspect(checkpoint)
    assert found.refusal is None
    inventory = found.inventory
    assert {name for _, name in inventory.coded} == {name for name in SHAPES if "_proj" in name}
    assert {name for _, name in inventory.scales} == {n.replace("weight", "input_scale") for n in SHAPES if "_proj" in n}
    one = inventory.coded["", AT + "self_attn.k_proj.weight"]
    assert (one.recipe, one.shape, one.codes.dtype, one.scales.shape) == ("modelopt/fp8", (64, 128), "f8_e4m3", ())
    assert inventory.entries["", AT + "self_attn.k_proj.weight"].shape == (64, 128)
    assert inspection_data(found)["quantized"] == "7 weights as modelopt/fp8, activations static"


def test_packed_codes_have_the_shape_and_the_name_of_the_weight(checkpoint, tmp_path):
    wish = {"to": "hf", "quantize": "int4-group", "style": "compressed-tensors"}
    carnet.run(carnet.plan(tmp_path / "plain", **wish), tmp_path / "int4")
    inventory = carnet.inspect(tmp_path / "int4").inventory
    one = inventory.coded["", AT + "self_attn.k_proj.weight"]
    assert (one.codes.name, one.codes.shape, one.shape) == (AT + "self_attn.k_proj.weight_packed", (64, 16), (64, 128))
    assert [other.name for other in one.others] == [AT + "self_attn.k_proj.weight_shape"]


def test_modelopt_s_file_alone_is_enough_and_the_checkpoint_is_another_without_it(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    before = open_checkpoint(checkpoint)
    assert len(carnet.inspect(checkpoint).inventory.coded) == 7
    assert "hf_quant_config.json" in {stamp.file for stamp in before.stamps}
    text = (checkpoint / "hf_quant_config.json").read_text()
    (checkpoint / "hf_quant_config.json").write_text(text.replace('"FP8"', '"NVFP4"'))
    assert fingerprint(open_checkpoint(checkpoint)) != fingerprint(before)
    (checkpoint / "hf_quant_config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="hf_quant_config"):
        open_checkpoint(checkpoint)


def test_two_files_that_disagree_are_refused(checkpoint):
    text = (checkpoint / "hf_quant_config.json").read_text()
    (checkpoint / "hf_quant_config.json").write_text(text.replace('"FP8"', '"MXFP8"'))
    assert "disagree" in carnet.inspect(checkpoint).refusal.what


def test_a_config_that_says_codes_where_there_are_none_is_refused(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path / "plain/config.json")
    refusal = carnet.inspect(tmp_path / "plain").refusal
    assert refusal.what == "the config says that weights are quantized, and none is"
