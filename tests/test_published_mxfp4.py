"""GPT-OSS as OpenAI publishes it: experts as MXFP4 blocks and exponents. The numbers are those of transformers' own dequantizer.

All codes and exponents are drawn at random, so that every byte is met; gate and up alternate along the rows of ``gate_up_proj``.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import BadCheckpoint, CarnetError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the programs, at import

HIDDEN, FFN, EXPERTS, LAYERS, HEADS, KV, DIM, VOCAB = 128, 96, 4, 2, 4, 2, 32, 160
EXPERTS_OF = "model.layers.{}.mlp.experts."
UP, DOWN = EXPERTS_OF.format(1) + "gate_up_proj", EXPERTS_OF.format(1) + "down_proj"
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "experts_per_token": 2,
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initial_context_length": 64,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 2048,
    "model_type": "gpt_oss",
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "num_local_experts": EXPERTS,
    "output_router_logits": False,
    "pad_token_id": 0,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 64,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 32,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
}
MODEL = "model.safetensors"


def plain_shapes():
    """Yield the names and shapes of what is published as it is."""
    yield from {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }.items()
    for layer in range(LAYERS):
        base = f"model.layers.{layer}."
        for name, rows, columns in (
            ("q", HEADS * DIM, HIDDEN),
            ("k", KV * DIM, HIDDEN),
            ("v", KV * DIM, HIDDEN),
            ("o", HIDDEN, HEADS * DIM),
        ):
            yield f"{base}self_attn.{name}_proj.weight", (rows, columns)
            yield f"{base}self_attn.{name}_proj.bias", (rows,)
        yield f"{base}self_attn.sinks", (HEADS,)
        yield f"{base}mlp.router.weight", (EXPERTS, HIDDEN)
        yield f"{base}mlp.router.bias", (EXPERTS,)
        yield f"{base}mlp.experts.gate_up_proj_bias", (EXPERTS, 2 * FFN)
        yield f"{base}mlp.experts.down_proj_bias", (EXPERTS, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield base + norm + ".weight", (HIDDEN,)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("published"), torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in plain_shapes()}
    for layer in range(LAYERS):
        for name, outputs, inputs in (("gate_up_proj", 2 * FFN, HIDDEN), ("down_proj", HIDDEN, FFN)):
            shape = EXPERTS, outputs, inputs // 32
            base = EXPERTS_OF.format(layer) + name
            tensors[f"{base}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=random)
            tensors[f"{base}_scales"] = torch.randint(
                252, shape, dtype=torch.uint8, generator=random
            )  # least numbers of bf16, too
    save_file(tensors, folder / MODEL)  # OpenAI's files have no metadata
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def dequantized(tensors, dtype=torch.bfloat16):
    """Return what transformers makes of stored tensors."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.dtype != torch.uint8}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        found[base] = convert_moe_packed_tensors(tensors[name], tensors[f"{base}_scales"], dtype=dtype)
    return found


def differing(found, expected):
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in expected.items()
        if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape)
        or found[name].view(torch.uint8).ne(tensor.contiguous().view(torch.uint8)).any()
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "carnet.json"}


def damaged(folder, to, damage):
    """Return a copy of a folder whose tensors ``damage`` has changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / MODEL)
    damage(tensors)
    save_file(tensors, to / MODEL, {"format": "pt"})
    return to


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_experts_are_the_numbers_of_transformers_bit_for_bit(dtype, published, tmp_path):
    assert carnet.cross(published, tmp_path / "out", to="hf", dtype=dtype).equal
    expected = dequantized(load_file(published / MODEL), {"bf16": torch.bfloat16, "f32": torch.float32}[dtype])
    assert differing(load_file(tmp_path / "out" / MODEL), expected) == []
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.referee
def test_it_is_the_model_that_transformers_loads(published, tmp_path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    way = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16, quantization_config=way)
    carnet.cross(published, tmp_path / "out", to="hf", dtype="bf16")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert differing(ours.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("cut", [{}, {"tp": 2, "ep": 2}, {"pp": 2, "ep": 4}], ids=["whole", "tp2 ep2", "pp2 ep4"])
def test_to_megatron_it_is_what_crosses_once_it_is_dequantized(cut, published, tmp_path):
    asked = {"to": "megatron", "dtype": "bf16", **cut}
    assert carnet.cross(published, tmp_path / "there", **asked).equal
    carnet.cross(published, tmp_path / "between", to="hf", dtype="bf16")
    carnet.cross(tmp_path / "between", tmp_path / "both", **asked)
    assert contents(tmp_path / "there") == contents(tmp_path / "both")


def test_a_small_window_gives_the_same_bytes_and_every_byte_of_the_codes_is_used(published, tmp_path):
    plan = carnet.plan(published, to="hf", dtype="bf16")
    assert plan.proof["source bytes"] == sum(tensor.nbytes for tensor in load_file(published / MODEL).values())
    assert "read as plain" not in plan.notes
    carnet.run(plan, tmp_path / "wide")
    carnet.run(replace(plan, window=4096), tmp_path / "narrow", threads=2)
    assert contents(tmp_path / "wide") == contents(tmp_path / "narrow")


def test_codes_that_nobody_makes_are_compared_by_what_they_mean(published, tmp_path):
    carnet.cross(published, tmp_path / "plain", to="hf", dtype="bf16")
    assert {finding.where for finding in carnet.verify(tmp_path / "plain", published).findings} == {
        "dtype"
    }  # its config has none


# --- damage --------------------------------------------------------------------------------------------------------------------


def flip(name, bit):
    def damage(tensors):
        tensors[name].view(-1)[-1:] ^= bit

    return damage


BYTES = [
    pytest.param(f"{UP}_blocks", 1, "layers.1.moe.up", id="the low code of a byte"),
    pytest.param(f"{UP}_blocks", 16, "layers.1.moe.up", id="the high code of a byte"),
    pytest.param(f"{DOWN}_blocks", 128, "layers.1.moe.down", id="a sign"),
    pytest.param(f"{UP}_scales", 1, "layers.1.moe.up", id="an exponent of gate and up"),
    pytest.param(f"{DOWN}_scales", 2, "layers.1.moe.down", id="an exponent of down"),
]


@pytest.mark.parametrize(("name", "bit", "tensor"), BYTES)
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_code_or_an_exponent_that_changed_is_found(to, name, bit, tensor, published, tmp_path):
    carnet.run(carnet.plan(published, to=to, dtype="bf16"), tmp_path / "out")
    other = damaged(published, tmp_path / "other", flip(name, bit))
    assert {finding.where for finding in carnet.verify(other, tmp_path / "out", dtype="bf16").findings} == {tensor}


def rows_exchanged(tensors):
    """Exchange a row of gate with its neighbour of up."""
    for name in (f"{UP}_blocks", f"{UP}_scales"):
        tensors[name][:, [0, 1]] = tensors[name][:, [1, 0]]


def test_gate_and_up_exchanged_are_found(published, tmp_path):
    other = damaged(published, tmp_path / "other", rows_exchanged)
    carnet.run(carnet.plan(other, to="hf", dtype="bf16"), tmp_path / "out")
    found = {finding.where for finding in carnet.verify(published, tmp_path / "out", dtype="bf16").findings}
    assert found == {"layers.1.moe.gate", "layers.1.moe.up"}


# --- what is refused -----------------------------------------------------------------------------------------------------------


def lose(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


REFUSED = [
    pytest.param(lose(f"{UP}_scales"), "the scale 'model.layers.1.mlp.experts.gate_up_proj_scales' is missing", id="no scales"),
    pytest.param(lose(f"{UP}_blocks"), "is a scale that stands beside no codes", id="no blocks"),
    pytest.param(put(f"{UP}_scales", lambda t: t[..., :-1].clone()), "another type or shape", id="fewer scales"),
    pytest.param(put(f"{UP}_blocks", lambda t: t[:, :-1].clone()), "another type or shape", id="fewer rows"),
    pytest.param(put(f"{DOWN}_blocks", lambda t: t.flatten(2).clone()), "that the config does not explain", id="no blocks apart"),
    pytest.param(put(f"{DOWN}_blocks", lambda t: t.bfloat16()), "stands beside no codes", id="numbers under the name of blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "what"), REFUSED)
def test_this_is_refused_before_anything_is_written(damage, what, published, tmp_path):
    with pytest.raises(CarnetError) as refused:
        carnet.plan(damaged(published, tmp_path / "source", damage), to="hf", dtype="bf16")
    assert what in str(refused.value)


def test_an_exponent_that_is_no_number_is_refused(published, tmp_path):
    source = damaged(published, tmp_path / "source", lambda tensors: tensors[f"{DOWN}_scales"].view(-1)[-1:].fill_(255))
    with pytest.raises(BadCheckpoint, match=r"a scale of layers\.1\.moe\.down is not a number"):
        carnet.run(carnet.plan(source, to="hf", dtype="bf16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


RECORDS = [
    pytest.param(
        {"modules_to_not_convert": ["model.layers.*.mlp"]},
        "is stored as codes, and the config says that it is not quantized",
        id="experts that are excluded",
    ),
    pytest.param({"modules_to_not_convert": "lm_head"}, "is not a list of names", id="a name for a list"),
    pytest.param({"block_size": 16}, "does not know the config field 'quantization_config.block_size'", id="another key"),
    pytest.param({"dequantize": True}, None, id="a wish of whoever loads it"),
]


@pytest.mark.parametrize(("more", "what"), RECORDS)
def test_of_a_config_nothing_is_passed_over(more, what, published, tmp_path):
    shutil.copytree(published, tmp_path / "source")
    said = {**CONFIG, "quantization_config": {**CONFIG["quantization_config"], **more}}
    (tmp_path / "source/config.json").write_text(json.dumps(said))
    if what is None:
        carnet.plan(tmp_path / "source", to="hf", dtype="bf16")
        return
    with pytest.raises(CarnetError) as refused:
        carnet.plan(tmp_path / "source", to="hf", dtype="bf16")
    assert what in str(refused.value)
