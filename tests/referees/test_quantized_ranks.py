"""FP8 for TensorRT-LLM's ranks beside ModelOpt's export_tensorrt_llm_checkpoint: tensors bit by bit, and what the config says."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    NemotronConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

import carnet
from carnet.errors import BadRequest

pytestmark = pytest.mark.referee

SIZES = {
    "vocab_size": 97,  # two ranks share 98 rows
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "num_attention_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 96, "tie_word_embeddings": False}
GPT2 = GPT2Config(vocab_size=97, n_embd=64, n_layer=4, n_head=8, n_positions=128, bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class Model:
    """A model that ModelOpt exports, and its own word for it."""

    config: Any
    decoder: str
    tp: int = 2
    pp: int = 2
    cache: bool = True
    # what ModelOpt writes and TensorRT-LLM would not read
    amiss: frozenset[str] = field(default_factory=frozenset)


MODELS = {
    "llama": Model(LlamaConfig(**GQA), "llama"),
    "llama, fewer keys than ranks": Model(LlamaConfig(**{**GQA, "num_key_value_heads": 2}), "llama", tp=4, pp=1),
    "mixtral": Model(MixtralConfig(**{**GQA, "intermediate_size": 48}, num_local_experts=4), "llama"),
    "qwen2": Model(Qwen2Config(**GQA), "qwen"),
    "nemotron": Model(NemotronConfig(**GQA), "gpt"),
    # it leaves out the head of the last stage, for which tensorrt_llm's loader finds no embedding there, and does not exclude it
    "gemma": Model(
        GemmaConfig(**{**GQA, "tie_word_embeddings": True}, head_dim=8), "gemma", amiss=frozenset(("lm_head", "lm_head.weight"))
    ),
    # it cuts the embedding of positions, which tensorrt_llm's class has whole; and it has no quantizers for this attention's cache
    "gpt2": Model(GPT2, "gpt", cache=False, amiss=frozenset(("transformer.position_embedding.weight",))),
    "falcon": Model(FalconConfig(**SIZES), "falcon", cache=False),
    "falcon, newer decoder": Model(FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=4), "falcon", cache=False),
}
LOUD = 8192.0  # so much larger are some keys and values that the scale of their cache is not the least one
CACHES = (".k_cache_scaling_factor", ".v_cache_scaling_factor")


def save(config, folder):
    """Save a model whose every parameter is random, with loud keys in layer 0 and loud values in layer 1."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, tensor in model.named_parameters():
        torch.nn.init.normal_(tensor, std=0.2)
        if name.endswith(("layers.0.self_attn.k_proj.weight", "layers.1.self_attn.v_proj.weight")):
            tensor.data *= LOUD
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Have ModelOpt export every model; return the folder of each, with hf, amax.safetensors and ranks in it."""
    base = tmp_path_factory.mktemp("exported")
    folders = {which: base / str(number) for number, which in enumerate(MODELS)}
    jobs = []
    for which, model in MODELS.items():
        folder = save(model.config, folders[which] / "hf")
        jobs.append({"folder": str(folder), "decoder": model.decoder, "tp": model.tp, "pp": model.pp, "cache": model.cache})
    (base / "jobs.json").write_text(json.dumps(jobs))
    program = [sys.executable, str(Path(__file__).with_name("modelopt_ranks.py")), str(base / "jobs.json")]
    done = subprocess.run(program, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folders


def wish(model, folder):
    """Return what is asked of carnet so that it writes what ModelOpt does."""
    cache = {"kv_cache": "fp8"} if model.cache else {}
    asked = {"to": "trtllm", "tp": model.tp, "pp": model.pp, "quantize": "fp8", "amax": folder / "amax.safetensors", **cache}
    return {**asked, "parallel_embedding": "rows"}


def ranks(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("rank*.safetensors"))}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("which", MODELS)
def test_modelopt_exports_the_same_ranks(which, exported, tmp_path):
    model, folder = MODELS[which], exported[which]
    assert carnet.cross(folder / "hf", tmp_path / "ranks", **wish(model, folder)).equal
    ours, theirs = ranks(tmp_path / "ranks"), ranks(folder / "ranks")
    assert len(ours) == model.tp * model.pp
    assert ours.keys() == theirs.keys()
    for rank, expected in theirs.items():
        found = ours[rank]
        # tensorrt_llm 1.x makes the one scale of both, and older ones do not know the two
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith(CACHES)}
        assert found.keys() ^ expected.keys() <= model.amiss
        differing = [n for n in (found.keys() & expected.keys()) - model.amiss if bits(found[n]) != bits(expected[n])]
        assert (rank, differing) == (rank, [])
        codes = [name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn]
        assert codes
        scales = {
            name.replace("weight", scale) for name in codes for scale in ("weights_scaling_factor", "activation_scaling_factor")
        }
        assert {name for name in found if name.endswith("s_scaling_factor") or "activation" in name} == scales


@pytest.mark.parametrize("which", [which for which in MODELS if "falcon" not in which])
def test_modelopt_s_config_says_the_same_of_what_is_quantized(which, exported, tmp_path):
    model, folder = MODELS[which], exported[which]
    assert carnet.cross(folder / "hf", tmp_path / "ranks", **wish(model, folder)).equal
    ours, theirs = (
        json.loads((at / "config.json").read_text())["quantization"] for at in (tmp_path / "ranks", folder / "ranks")
    )
    assert len(ours["exclude_modules"]) == len(set(ours["exclude_modules"]))
    assert set(ours.pop("exclude_modules")) ^ set(theirs.pop("exclude_modules")) <= model.amiss
    assert {key: ours[key] for key in theirs} == theirs
    assert theirs == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if model.cache else None}
    assert not list(folder.glob("ranks/quant_cfg.json"))
    assert not list((tmp_path / "ranks").glob("quant_cfg.json"))


def test_the_routers_of_experts_are_named_as_modelopt_names_them(exported, tmp_path):
    model, folder = MODELS["mixtral"], exported["mixtral"]
    assert carnet.cross(folder / "hf", tmp_path / "ranks", **wish(model, folder)).equal
    routers = {f"transformer.layers.{layer}.mlp.router" for layer in (0, 1)}  # of each stage: their numbers begin again
    for at in (tmp_path / "ranks", folder / "ranks"):
        said = json.loads((at / "config.json").read_text())["quantization"]
        assert set(said["exclude_modules"]) == {"lm_head", *routers}
    for rank in ranks(tmp_path / "ranks").values():
        assert {rank[f"{router}.weight"].dtype for router in routers} == {torch.float32}


def test_the_scale_of_a_cache_is_that_of_the_louder_of_keys_and_values_and_never_below_one(exported, tmp_path):
    folder = exported["llama"]
    assert carnet.cross(folder / "hf", tmp_path / "ranks", **wish(MODELS["llama"], folder)).equal
    amax, found = load_file(folder / "amax.safetensors"), ranks(tmp_path / "ranks")
    for rank, layer in ((0, 0), (0, 1), (2, 0), (2, 1)):
        scale = found[f"rank{rank}.safetensors"][f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
        module = f"model.layers.{rank + layer}.self_attn"
        keys, values = amax[f"{module}.k_proj.k_amax"] / 448, amax[f"{module}.v_proj.v_amax"] / 448
        if rank == 0:
            louder, quieter = (keys, values) if layer == 0 else (values, keys)
            assert louder > 1 > quieter
            assert scale == louder
        else:
            assert max(keys, values) < 1
            assert scale == 1


@pytest.mark.parametrize("which", ["llama", "mixtral"])
def test_every_rank_has_the_scale_of_the_whole_of_what_is_fused(which, exported, tmp_path):
    model, folder = MODELS[which], exported[which]
    source = load_file(folder / "hf/model.safetensors")
    assert carnet.cross(folder / "hf", tmp_path / "ranks", **wish(model, folder)).equal
    found = ranks(tmp_path / "ranks")

    def scale(*names):
        return max(source[name].abs().max().float() for name in names) / 448

    for layer in range(4):
        hf, here = f"model.layers.{layer}", f"transformer.layers.{layer % 2}"
        if which == "llama":
            fused = scale(f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
            expected = {"mlp.fc": [fused], "mlp.gate": [fused], "mlp.proj": [scale(f"{hf}.mlp.down_proj.weight")]}
        else:
            experts = [f"{hf}.block_sparse_moe.experts.{expert}" for expert in range(4)]
            expected = {
                "mlp.fc": [[scale(f"{expert}.w1.weight", f"{expert}.w3.weight")] for expert in experts],
                "mlp.proj": [[scale(f"{expert}.w2.weight")] for expert in experts],
            }
        expected["attention.qkv"] = [scale(*(f"{hf}.self_attn.{part}_proj.weight" for part in "qkv"))]
        for tp in (0, 1):
            rank = found[f"rank{layer // 2 * 2 + tp}.safetensors"]
            for module, scales in expected.items():
                assert torch.equal(rank[f"{here}.{module}.weights_scaling_factor"], torch.tensor(scales)), (layer, tp, module)


SOURCES = {
    "megatron": {"to": "megatron", "tp": 2, "pp": 2},
    "ranks": {"to": "trtllm", "tp": 4},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("which", ["llama", "mixtral"])
def test_a_source_cut_for_ranks_gives_the_same_bytes(which, source, exported, tmp_path):
    model, folder = MODELS[which], exported[which]
    assert carnet.cross(folder / "hf", tmp_path / "source", **SOURCES[source]).equal
    for start, out in ((folder / "hf", "whole"), (tmp_path / "source", "cut")):
        assert carnet.cross(start, tmp_path / out, **wish(model, folder)).equal
    for rank in range(4):
        first, second = ((tmp_path / out / f"rank{rank}.safetensors").read_bytes() for out in ("whole", "cut"))
        assert first == second
    first, second = (json.loads((tmp_path / out / "config.json").read_text()) for out in ("whole", "cut"))
    assert first == second


# --- what the reader asks of the list of excluded modules ----------------------------------------------------------------------

SHARED = Qwen2MoeConfig(
    **GQA,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    decoder_sparse_step=1,
)


def quantized(folder, tmp_path, **asked):
    """Quantize a model with invented activations; return the ranks' tensors and the modules that are excluded."""
    linear = [name for name, t in load_file(folder / "model.safetensors").items() if t.ndim == 2 and "embed" not in name]
    save_file({name.removesuffix("weight") + "input_amax": torch.tensor(2.0) for name in linear}, tmp_path / "amax.safetensors")
    out = tmp_path / "ranks"
    assert carnet.cross(folder, out, to="trtllm", tp=2, quantize="fp8", amax=tmp_path / "amax.safetensors", **asked).equal
    return ranks(out), json.loads((out / "config.json").read_text())["quantization"]["exclude_modules"]


def test_the_gate_of_a_shared_expert_is_excluded_beside_routers(tmp_path):
    found, excluded = quantized(save(SHARED, tmp_path / "hf"), tmp_path)
    each = [f"transformer.layers.{layer}.mlp.{name}" for layer in range(4) for name in ("router", "shared_expert_gate")]
    assert excluded == ["lm_head", *each]
    for rank in found.values():
        assert {rank[f"{module}.weight"].dtype for module in each} <= {torch.float32, torch.bfloat16}
        assert rank["transformer.layers.0.mlp.shared_expert.fc.weights_scaling_factor"].shape == (1,)
        assert rank["transformer.layers.0.mlp.fc.weights_scaling_factor"].shape == (4, 1)


def test_experts_that_stay_as_they_are_are_excluded_by_the_name_of_their_module(tmp_path):
    found, excluded = quantized(
        save(MODELS["mixtral"].config, tmp_path / "hf"), tmp_path, exclude=("transformer.layers.1.mlp.*",)
    )
    routers = [f"transformer.layers.{layer}.mlp.router" for layer in range(4)]
    assert sorted(excluded) == sorted(["lm_head", "transformer.layers.1.mlp", *routers])
    for rank in found.values():
        assert rank["transformer.layers.1.mlp.fc.weight"].dtype == torch.bfloat16
        assert rank["transformer.layers.2.mlp.fc.weight"].dtype == torch.float8_e4m3fn


def test_half_of_the_experts_of_a_layer_cannot_be_excluded(tmp_path):
    with pytest.raises(BadRequest, match="whole or not at all") as refused:
        quantized(save(MODELS["mixtral"].config, tmp_path / "hf"), tmp_path, exclude=("transformer.layers.1.mlp.fc",))
    assert refused.value.remedy == "--exclude 'transformer.layers.1.mlp.*'"


def test_a_linear_layer_in_place_of_attention_or_an_mlp_stays_as_it_is(tmp_path):
    # transformers has no class of this model
    usual, linear = ({"no_op": False, "replace_with_linear": instead} for instead in (False, True))
    blocks = [{"attention": {"n_heads_in_group": 2, **usual}, "ffn": {"ffn_mult": 1.5, **usual}}]
    blocks += [{"attention": {"n_heads_in_group": None, **linear}, "ffn": {"ffn_mult": None, **linear}}]
    said = {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "block_configs": blocks, "hidden_act": "silu"}
    said |= {**SIZES, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False}
    said |= {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "torch_dtype": "bfloat16"}
    shapes = {"model.embed_tokens": (97, 64), "model.norm": (64,), "lm_head": (97, 64)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{norm}_layernorm": (64,) for norm in ("input", "post_attention")}
    shapes |= {f"model.layers.0.self_attn.{p}_proj": (rows, 64) for p, rows in {"q": 64, "k": 32, "v": 32, "o": 64}.items()}
    shapes |= {"model.layers.0.mlp.gate_proj": (256, 64), "model.layers.0.mlp.up_proj": (256, 64)}
    shapes |= {"model.layers.0.mlp.down_proj": (64, 256)}  # two thirds of 1.5 x 64, in whole 256
    shapes |= {"model.layers.1.self_attn.linear_attn": (64, 64), "model.layers.1.mlp.linear_mlp": (64, 64)}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(said))
    weights = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})

    found, excluded = quantized(tmp_path / "hf", tmp_path)
    assert excluded == ["lm_head", "transformer.layers.1.attention", "transformer.layers.1.ffn"]
    for rank in found.values():
        assert rank["transformer.layers.0.attention.qkv.weight"].dtype == torch.float8_e4m3fn
        assert {rank[f"{module}.weight"].dtype for module in excluded} == {torch.bfloat16}
        assert not [name for name in rank if "layers.1" in name and "scaling" in name]
