"""Quantized sources become weights again: the numbers that a dequantizer written by hand makes, wherever they then go."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import BadCheckpoint, BadRequest, CarnetError
from carnet.plans import saved
from carnet.plans.columns import Steps
from carnet.quantize.recipes import RECIPES
from carnet.steps import Make, Measure

HF = [recipe for recipe in RECIPES if recipe.style != "trtllm"]
NAMES = [recipe.name for recipe in HF]
HIDDEN, VOCAB, LAYERS, HEADS, KV = 256, 96, 2, 4, 2
SHAPES = {  # ragged in blocks of 128 rows where heads are 48 wide
    "self_attn.q_proj": lambda dim, ffn: (HEADS * dim, HIDDEN),
    "self_attn.k_proj": lambda dim, ffn: (KV * dim, HIDDEN),
    "self_attn.v_proj": lambda dim, ffn: (KV * dim, HIDDEN),
    "self_attn.o_proj": lambda dim, ffn: (HIDDEN, HEADS * dim),
    "mlp.gate_proj": lambda dim, ffn: (ffn, HIDDEN),
    "mlp.up_proj": lambda dim, ffn: (ffn, HIDDEN),
    "mlp.down_proj": lambda dim, ffn: (HIDDEN, ffn),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantized(recipe, tensors, weight):
    """Return a weight, or None where it is stored as it is: plain torch, with nothing of carnet's but the name of the recipe."""
    base = weight.removesuffix("weight")
    scale = tensors.get(base + ("weight_scale_inv" if recipe.style == "deepseek" else "weight_scale"))
    if scale is None:
        return None
    codes = tensors.get(base + "weight_packed", tensors.get(weight))
    if codes.dtype == torch.int32:
        codes = torch.stack([(codes >> 4 * place & 15) - 8 for place in range(8)], -1).flatten(1)
    elif codes.dtype == torch.uint8 and recipe.code.bits == 4:
        zero = 0.0 if recipe.name == "modelopt/nvfp4" else -0.0
        table = torch.tensor([*E2M1, zero, *(-value for value in E2M1[1:])])
        codes = table[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    elif scale.dtype == torch.float8_e4m3fn:
        over = tensors[base + ("weight_scale_2" if recipe.style == "modelopt" else "weight_global_scale")]
        scale = scale.float() * over if recipe.style == "modelopt" else scale.float() / over
    scale = scale.reshape(scale.shape[0], -1) if scale.ndim else scale
    rows, columns = codes.shape
    if scale.numel() > 1:
        down, along = recipe.block[0], recipe.block[1] or columns
        scale = scale.repeat_interleave(down, 0)[:rows].repeat_interleave(along, 1)[:, :columns]
    return codes.to(scale.dtype) * scale


def same(found, expected):
    assert found.keys() == expected.keys()
    wrong = [
        name
        for name, tensor in expected.items()
        if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape)
        or found[name].view(torch.uint8).ne(tensor.contiguous().view(torch.uint8)).any()
    ]
    assert wrong == []


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "carnet.json"}


def written(source, out, **options):
    """Plan and run; the plan goes through a file on the way."""
    plan = carnet.plan(source, **options)
    saved.save(plan, out.with_name(out.name + ".plan"))
    assert saved.load(out.with_name(out.name + ".plan")) == plan
    return carnet.run(plan, out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama in bf16."""

    def make(dim, ffn, dtype=torch.bfloat16):
        folder = tmp_path_factory.mktemp("plain")
        torch.manual_seed(3)
        tensors = {
            "model.embed_tokens.weight": (VOCAB, HIDDEN),
            "lm_head.weight": (VOCAB, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
        for layer in range(LAYERS):
            for name, shape in SHAPES.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = shape(dim, ffn)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = (HIDDEN,)
        made = {name: (torch.randn(shape) * 0.05).to(dtype) for name, shape in tensors.items()}
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": ffn,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV,
            "head_dim": dim,
            "vocab_size": VOCAB,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="module")
def coded(plain, tmp_path_factory):
    """The same Llama as codes, one folder a recipe, made once."""
    sources, made = {}, {}

    def make(recipe, dtype=torch.bfloat16):
        whole = recipe.code.name == "int4" or recipe.name == "modelopt/fp8-block"  # these take no block that is cut off
        shape = (64, 384, dtype) if whole else (48, 352, dtype)
        key = recipe.name, dtype
        if key not in made:
            source = sources.get(shape) or sources.setdefault(shape, plain(*shape))
            folder = tmp_path_factory.mktemp("coded")
            options = (
                {"activations": "dynamic"} if recipe.style == "compressed-tensors" and recipe.scheme in ("fp8", "nvfp4") else {}
            )
            if recipe.style == "modelopt" and recipe.scheme in ("fp8", "nvfp4"):
                inputs = {
                    f"model.layers.{layer}.{name}.input_amax": torch.tensor(3.0) for layer in range(LAYERS) for name in SHAPES
                }
                save_file(inputs, folder / "amax.safetensors")
                options["amax"] = folder / "amax.safetensors"
            made[key] = carnet.run(
                carnet.plan(source, to="hf", quantize=recipe.scheme, style=recipe.style, **options), folder / "out"
            )
        return made[key]

    return make


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("recipe", HF, ids=NAMES)
def test_every_scheme_becomes_the_numbers_of_a_dequantizer_written_by_hand(recipe, dtype, coded, tmp_path):
    source = coded(recipe)
    found = load_file(written(source, tmp_path / "out", to="hf", dtype=dtype) / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    to = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    weights = {name: dequantized(recipe, stored, name) for name in found}
    assert sum(weight is not None for weight in weights.values()) == LAYERS * len(SHAPES)
    same(found, {name: (stored[name] if weight is None else weight).to(to) for name, weight in weights.items()})
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("recipe", HF, ids=NAMES)
@pytest.mark.parametrize(
    "options", [{"to": "trtllm", "tp": 2, "pp": 2}, {"to": "megatron", "tp": 2}], ids=["trtllm", "megatron"]
)
def test_to_any_target_it_is_what_crosses_once_it_is_dequantized(recipe, options, coded, tmp_path):
    source = coded(recipe)
    there = written(source, tmp_path / "there", dtype="bf16", **options)
    between = written(source, tmp_path / "between", to="hf", dtype="bf16")
    assert contents(there) == contents(written(between, tmp_path / "both", dtype="bf16", **options))


REQUANTIZED = [
    ("deepseek/fp8-block", "compressed-tensors", "fp8"),  # one scale a tensor: measured over codes
    ("modelopt/nvfp4", "compressed-tensors", "nvfp4"),
    ("compressed-tensors/fp8-channel", "compressed-tensors", "nvfp4"),
    ("compressed-tensors/mxfp4", "modelopt", "mxfp8"),
    ("modelopt/mxfp8", "deepseek", "fp8-block"),
    ("modelopt/fp8", "modelopt", "fp8-channel"),
]


@pytest.mark.parametrize(("name", "style", "scheme"), REQUANTIZED)
def test_requantizing_is_dequantizing_and_then_quantizing(name, style, scheme, coded, tmp_path):
    source = coded(next(recipe for recipe in HF if recipe.name == name))
    options = {"quantize": scheme, "style": style, "dtype": "bf16", "to": "hf"}
    if style == "compressed-tensors" and scheme in ("fp8", "nvfp4"):
        options["activations"] = "dynamic"
    between = written(source, tmp_path / "between", to="hf", dtype="bf16")
    expected = contents(written(between, tmp_path / "both", **options))
    assert contents(written(source, tmp_path / "out", **options)) == expected


@pytest.mark.parametrize(
    "scheme", ["fp8", "nvfp4"]
)  # whose scale of the whole follows from the largest weight once it is rounded
def test_fp8_of_blocks_becomes_what_modelopt_makes_with_the_amax_of_a_calibration(scheme, coded, tmp_path):
    source = coded(next(recipe for recipe in HF if recipe.name == "modelopt/fp8-block"))
    inputs = {f"model.layers.{layer}.{name}.input_amax": torch.tensor(2.5) for layer in range(LAYERS) for name in SHAPES}
    save_file(inputs, tmp_path / "amax.safetensors")
    options = {"to": "hf", "dtype": "bf16", "quantize": scheme, "amax": tmp_path / "amax.safetensors"}
    between = written(source, tmp_path / "between", to="hf", dtype="bf16")
    expected = contents(written(between, tmp_path / "both", **options))
    assert contents(written(source, tmp_path / "out", **options)) == expected


@pytest.mark.parametrize("name", ["deepseek/fp8-block", "modelopt/nvfp4", "compressed-tensors/int4-group", "modelopt/fp8"])
@pytest.mark.parametrize("options", [{"to": "hf"}, {"to": "trtllm", "tp": 2}], ids=["hf", "trtllm"])
def test_a_small_window_gives_the_same_bytes(name, options, coded, tmp_path):
    source = coded(next(recipe for recipe in HF if recipe.name == name))
    plan = carnet.plan(source, dtype="bf16", **options)
    carnet.run(plan, tmp_path / "wide")
    carnet.run(replace(plan, window=4096), tmp_path / "narrow", threads=2)
    assert contents(tmp_path / "wide") == contents(tmp_path / "narrow")


@pytest.mark.parametrize("options", [{"to": "megatron"}, {"to": "trtllm"}, {"to": "hf", "quantize": "fp8-channel"}], ids=str)
def test_without_a_type_to_dequantize_to_it_is_refused_with_the_option(options, coded):
    with pytest.raises(BadRequest, match="the weights of the source are quantized") as refused:
        carnet.plan(coded(HF[0]), **options)
    assert "--dtype bf16" in str(refused.value.remedy)
    assert refused.value.facts["quantized"] == HF[0].name


@pytest.mark.parametrize("name", ["modelopt/fp8", "compressed-tensors/int4-group"])
def test_what_is_no_part_of_a_weight_is_left_behind_by_name(name, coded):
    plan = carnet.plan(coded(next(recipe for recipe in HF if recipe.name == name)), to="hf", dtype="bf16")
    kind, last = {
        "modelopt/fp8": ("scales of activations and of the cache", "input_scale"),
        "compressed-tensors/int4-group": ("shapes of packed weights", "weight_shape"),
    }[name]
    expected = sorted(f"model.layers.{layer}.{module}.{last}" for layer in range(LAYERS) for module in SHAPES)
    assert list(plan.dropped[kind]) == expected


def test_the_proof_counts_every_byte_of_the_codes_and_their_scales(coded):
    for recipe in HF:
        source = coded(recipe)
        plan = carnet.plan(source, to="hf", dtype="bf16")
        aside = {name for names in plan.dropped.values() for name in names}
        stored = load_file(source / "model.safetensors")
        expected = sum(tensor.nbytes for name, tensor in stored.items() if name not in aside)
        assert (recipe.name, plan.proof["source bytes"]) == (recipe.name, expected)


DAMAGED = [
    ("a scale that is NaN", "modelopt/fp8-channel", "weight_scale", float("nan"), BadCheckpoint, "is not a number"),
    ("a scale that is infinite", "deepseek/fp8-block", "weight_scale_inv", float("inf"), BadCheckpoint, "is not a number"),
    ("an exponent that stands for no number", "modelopt/mxfp8", "weight_scale", 255, BadCheckpoint, "is not a number"),
    ("a scale over all of zero", "compressed-tensors/nvfp4", "weight_global_scale", 0.0, BadCheckpoint, "is not a number"),
    ("weights beyond the type", "modelopt/fp8-channel", "weight_scale", 3e38, BadRequest, "is out of range for bf16"),
]


@pytest.mark.parametrize(("remark", "name", "which", "value", "kind", "what"), DAMAGED, ids=[row[0] for row in DAMAGED])
def test_this_ends_in_one_clear_error(remark, name, which, value, kind, what, coded, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(coded(next(recipe for recipe in HF if recipe.name == name)), source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.1.mlp.up_proj.{which}"].view(-1)[-1:] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(kind, match=what) as refused:
        carnet.run(carnet.plan(source, to="hf", dtype="bf16"), tmp_path / "out")
    assert refused.value.facts["tensor"] == "layers.1.mlp.up"
    assert not (tmp_path / "out").exists()


FORGED = [
    ("a recipe that nobody has", lambda encoding: replace(encoding, recipe="x/fp8")),
    ("a matrix of more rows", lambda encoding: replace(encoding, shape=(10**6, encoding.shape[1]))),
    ("a matrix of no rows", lambda encoding: replace(encoding, shape=(0, encoding.shape[1]))),
    ("a matrix of fewer rows than the box", lambda encoding: replace(encoding, shape=(1, encoding.shape[1]))),
    ("a matrix of fewer columns than the box", lambda encoding: replace(encoding, shape=(encoding.shape[0], 16))),
    ("a matrix that begins past the box", lambda encoding: replace(encoding, first=encoding.first + 16)),
    ("a matrix that begins before the file", lambda encoding: replace(encoding, first=-16)),
    ("a matrix that begins within a byte", lambda encoding: replace(encoding, first=encoding.first - 1)),
    ("scales past the end", lambda encoding: replace(encoding, scales=replace(encoding.scales, offset=10**7))),
    ("scales before the file", lambda encoding: replace(encoding, scales=replace(encoding.scales, offset=-1))),
    ("scales in strides of their own", lambda encoding: replace(encoding, scales=replace(encoding.scales, strides=(1, 1)))),
    ("scales of another type", lambda encoding: replace(encoding, scales=replace(encoding.scales, dtype="f32"))),
    ("scales of a file that is not there", lambda encoding: replace(encoding, scales=replace(encoding.scales, file="x"))),
    ("no scale over the scales", lambda encoding: replace(encoding, outer=None)),
    ("a scale over them past the end", lambda encoding: replace(encoding, outer=replace(encoding.outer, offset=10**7))),
]


@pytest.mark.parametrize(("remark", "change"), FORGED, ids=[row[0] for row in FORGED])
def test_a_forged_encoding_is_refused_before_anything_is_read(remark, change, coded, tmp_path):
    source = coded(next(recipe for recipe in HF if recipe.name == "modelopt/nvfp4"))
    plan = carnet.plan(source, to="hf", dtype="bf16", quantize="nvfp4", style="compressed-tensors", activations="dynamic")
    for kind in (Make, Measure):
        number, step = next((number, step) for number, step in enumerate(plan.steps) if isinstance(step, kind))
        forged = replace(step, encoding=change(step.encoding))
        other = replace(plan, steps=Steps.of([*plan.steps[:number], forged, *plan.steps[number + 1 :]]))
        with pytest.raises(BadRequest, match="a step of the plan reads codes"):
            carnet.run(other, tmp_path / "out")


def test_a_box_outside_of_its_matrix_is_refused(coded, tmp_path):
    plan = carnet.plan(coded(HF[0]), to="hf", dtype="bf16")
    number, step = next((number, step) for number, step in enumerate(plan.steps) if isinstance(step, Make))
    for source in (
        replace(step.source, offset=step.source.offset + 1),
        replace(step.source, offset=step.source.offset - 1),
        replace(step.source, strides=tuple(2 * stride for stride in step.source.strides)),
        replace(step.source, dtype="bf16"),
    ):
        other = replace(plan, steps=Steps.of([*plan.steps[:number], replace(step, source=source), *plan.steps[number + 1 :]]))
        with pytest.raises(CarnetError):
            carnet.run(other, tmp_path / "out")


def test_deepseek_as_it_is_published_with_rows_that_no_block_divides(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=192, intermediate_size=160, moe_intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=144, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=48, num_nextn_predict_layers=0,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    tensors, expected = load_file(tmp_path / "source" / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if name.endswith("e_score_correction_bias"):
            tensors[name] = weight = weight.float()  # as it is published
        expected[name] = weight
        if "_proj" not in name:
            continue
        rows, columns = weight.shape
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-3
        codes = (torch.randn(rows, columns) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name], tensors[name + "_scale_inv"] = codes, scales
        made = torch.empty(rows, columns, dtype=torch.bfloat16)
        for row in range(0, rows, 128):
            for column in range(0, columns, 128):
                box = slice(row, row + 128), slice(column, column + 128)
                made[box] = codes[box].float() * scales[row // 128, column // 128]
        expected[name] = made
    assert tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)  # 576 rows
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((tmp_path / "source" / "config.json").read_text())
    said["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    (tmp_path / "source" / "config.json").write_text(json.dumps(said))
    there = written(tmp_path / "source", tmp_path / "hf", to="hf", dtype="bf16")
    same(load_file(there / "model.safetensors"), expected)
    target = {"to": "megatron", "tp": 2, "ep": 2, "dtype": "bf16"}
    direct = written(tmp_path / "source", tmp_path / "direct", **target)
    assert contents(direct) == contents(written(there, tmp_path / "both", **target))


def test_numbers_of_a_model_in_f16_keep_what_their_scales_have(coded, tmp_path):
    recipe = next(recipe for recipe in HF if recipe.name == "compressed-tensors/int8-channel")
    source = coded(recipe, torch.float16)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name + "_scale"].dtype == torch.float16
    found = load_file(written(source, tmp_path / "out", to="hf", dtype="f32") / "model.safetensors")[name]
    assert np.array_equal(found.numpy(), dequantized(recipe, stored, name).float().numpy())


@pytest.fixture(scope="module")
def ranks(plain, tmp_path_factory):
    """A Llama in FP8 as TensorRT-LLM's ranks hold it; with four of them, each holds a copy of half of the keys and values."""
    source, folder, made = plain(64, 384), tmp_path_factory.mktemp("ranks"), {}
    inputs = {f"model.layers.{layer}.{name}.input_amax": torch.tensor(3.0) for layer in range(LAYERS) for name in SHAPES}
    save_file(inputs, folder / "amax.safetensors")

    def make(tp):
        if tp not in made:
            options = {"to": "trtllm", "tp": tp, "quantize": "fp8", "amax": folder / "amax.safetensors"}
            made[tp] = carnet.run(carnet.plan(source, **options), folder / f"tp{tp}")
        return source, made[tp]

    return make


RANK = {  # where NVIDIA's one rank keeps the weights of a layer
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_become_weights_however_many_they_are(tp, ranks, tmp_path):
    source, of_one = ranks(1)
    before, stored = load_file(source / "model.safetensors"), load_file(of_one / "rank0.safetensors")
    expected = {name: tensor for name, tensor in before.items() if "_proj" not in name}
    for layer in range(LAYERS):
        for module, names in RANK.items():
            base = f"transformer.layers.{layer}.{module}"
            weight = stored[f"{base}.weight"].float() * stored[f"{base}.weights_scaling_factor"]
            parts = [f"model.layers.{layer}.{name}.weight" for name in names]
            pieces = weight.bfloat16().split([len(before[part]) for part in parts])
            expected |= dict(zip(parts, pieces, strict=True))
    found = load_file(written(ranks(tp)[1], tmp_path / "out", to="hf", dtype="bf16") / "model.safetensors")
    same(found, expected)


def test_a_copy_of_codes_that_differs_is_found(ranks, tmp_path):
    shutil.copytree(ranks(4)[1], tmp_path / "source")
    file = tmp_path / "source" / "rank1.safetensors"
    tensors = load_file(file)
    tensors["transformer.layers.0.attention.qkv.weight"].view(torch.uint8)[-1, -1] ^= 1
    save_file(tensors, file)
    with pytest.raises(BadCheckpoint, match=r"two copies of layers.0.attention.v differ"):
        carnet.run(carnet.plan(tmp_path / "source", to="hf", dtype="bf16"), tmp_path / "out")


def test_a_copy_whose_scale_differs_is_found(ranks, tmp_path):
    shutil.copytree(ranks(4)[1], tmp_path / "source")
    file = tmp_path / "source" / "rank1.safetensors"
    tensors = load_file(file)
    tensors["transformer.layers.0.attention.qkv.weights_scaling_factor"] *= 2
    save_file(tensors, file)
    with pytest.raises(BadCheckpoint, match=r"two copies of layers.0.attention.[kv] differ"):
        carnet.run(carnet.plan(tmp_path / "source", to="hf", dtype="bf16"), tmp_path / "out")
