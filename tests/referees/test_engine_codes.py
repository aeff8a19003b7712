"""Codes go along to the workers of vLLM as they are: joined, cut, and back; what is wrong with them is found by name.

tests/vllm asks vLLM itself; here are the numbers that a person would write down, and the ways that need no engine.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen3MoeConfig

import carnet
from carnet.errors import CarnetError
from tests.referees.engine_ranks import SCALES, save_codes, save_random

SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 128}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
GROUPS = {"n_routed_experts": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MODELS = {
    "dense": LlamaConfig(**SIZES, **HEADS),
    "mixture": Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS, num_experts=2, mlp_only_layers=[0]),
    "open": GptOssConfig(**SIZES, head_dim=64, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2),
    "latent": DeepseekV3Config(**SIZES, **LATENT, **EXPERTS, **GROUPS),
}
DENSE = ("modelopt fp8-channel", "modelopt fp8-block", "compressed-tensors fp8", "compressed-tensors nvfp4")
EVERY = (
    "modelopt fp8 static",
    "modelopt nvfp4 static",
    "modelopt mxfp8",
    "compressed-tensors fp8 static",
    "compressed-tensors fp8-channel",
    "compressed-tensors fp8-block",
    "compressed-tensors nvfp4 static",
    "compressed-tensors mxfp8",
    "compressed-tensors mxfp4",
    "compressed-tensors int8-channel",
    "deepseek fp8-block",
)
GOES = [
    *(("dense", words) for words in DENSE),
    *((model, words) for words in EVERY for model in ("mixture", "latent")),
]


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """A folder of codes, made once for each model and form."""
    top = tmp_path_factory.mktemp("codes")

    def made(model, words):
        plain, out = top / model, top / f"{model} {words}"
        if not plain.exists():
            save_random(MODELS[model], plain, seed=3)
        if not out.exists():
            save_codes(plain, out, words)
        return out

    return made


def held(folder):
    """Return the tensors of each file, as bytes."""
    files = {path.name: load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    return {
        file: {name: (each.dtype, tuple(each.shape), bits(each)) for name, each in tensors.items()}
        for file, tensors in files.items()
    }


def bits(tensor):
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("model", "words"), GOES)
def test_codes_go_there_and_back_and_are_cut_anew(coded, tmp_path, model, words):
    source = coded(model, words)
    assert carnet.cross(source, tmp_path / "ranks", to="vllm", tp=2).equal
    config = json.loads((tmp_path / "ranks/config.json").read_text())["quantization_config"]
    assert config == json.loads((source / "config.json").read_text())["quantization_config"]
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    assert held(tmp_path / "back") == held(source)
    beside = "hf_quant_config.json"  # modelopt's
    assert [(at / beside).exists() for at in (source, tmp_path / "back")] in ([False] * 2, [True] * 2)
    assert carnet.cross(tmp_path / "ranks", tmp_path / "whole", to="vllm").equal
    assert carnet.cross(source, tmp_path / "direct", to="vllm").equal
    assert held(tmp_path / "whole") == held(tmp_path / "direct")


@pytest.mark.parametrize("words", ["modelopt fp8 static", "modelopt nvfp4 static"])
def test_what_stands_once_beside_a_module_is_a_number_for_each_that_is_joined(coded, tmp_path, words):
    source = coded("mixture", words)
    hf = load_file(source / "model.safetensors")
    carnet.cross(source, tmp_path / "out", to="vllm", tp=2)
    outer, wide = ("weight_scale", False) if "fp8" in words.split() else ("weight_scale_2", True)
    for rank in range(2):
        ranks = load_file(tmp_path / f"out/model-rank-{rank}-part-0.safetensors")
        at = "model.layers.1."
        for end in (outer, "input_scale"):
            for joined, parts in (("qkv", "qkv"), ("o", "o")):
                found = ranks[f"{at}self_attn.{joined}_proj.{end}"]
                assert found.tolist() == [hf[f"{at}self_attn.{part}_proj.{end}"].item() for part in parts]
            experts = f"{at}mlp.experts.routed_experts."
            numbers = [[hf[f"{at}mlp.experts.{e}.{part}_proj.{end}"].item() for part in ("gate", "up")] for e in range(2)]
            first = end == "input_scale" and not wide  # what reads the same has one
            assert ranks[f"{experts}w13_{end}"].tolist() == ([gate for gate, _ in numbers] if first else numbers)
            assert ranks[f"{experts}w2_{end}"].tolist() == [hf[f"{at}mlp.experts.{e}.down_proj.{end}"].item() for e in range(2)]


def test_what_codes_on_ranks_mean_is_what_they_mean_in_a_folder(coded, tmp_path):
    for words in ("modelopt nvfp4 static", "modelopt fp8 static", "deepseek fp8-block"):
        source = coded("mixture", words)
        carnet.cross(source, tmp_path / f"{words} ranks", to="vllm", tp=2)
        for name, folder in (("there", source), ("here", tmp_path / f"{words} ranks")):
            assert carnet.cross(folder, tmp_path / f"{words} {name}", to="hf", dtype="bf16").equal
        assert held(tmp_path / f"{words} there") == held(tmp_path / f"{words} here")


def test_the_digests_that_an_engine_must_have_are_those_of_its_ranks(coded, tmp_path):
    for model, words in (("mixture", "modelopt nvfp4 static"), ("latent", "compressed-tensors fp8-channel")):
        source, out = coded(model, words), tmp_path / model
        expected = carnet.expect(source, tp=2)
        carnet.cross(source, out, to="vllm", tp=2)
        digests = [
            hashlib.sha256(bits(tensor)).hexdigest()
            for rank in range(2)
            for name, tensor in load_file(out / f"model-rank-{rank}-part-0.safetensors").items()
            if not name.endswith(SCALES)  # buffers, which have none
        ]
        assert sorted(expected.checksums.values()) == sorted(digests)
        packed = {key.rpartition(".")[2] for key in expected.coded}
        assert {"w13_weight_scale", "w2_weight_scale"} < packed
        assert not any("norm" in key or "mlp.gate." in key for key in expected.coded)


def test_experts_of_gpt_oss_go_to_ranks_and_are_cut_anew(coded, tmp_path):
    source = coded("open", "openai mxfp4")
    hf = load_file(source / "model.safetensors")
    assert carnet.cross(source, tmp_path / "ranks", to="vllm", tp=2).equal
    experts = "model.layers.1.mlp.experts."
    for rank in range(2):
        ranks, mine = load_file(tmp_path / f"ranks/model-rank-{rank}-part-0.safetensors"), slice(512 * rank, 512 * rank + 512)
        blocks = hf[f"{experts}gate_up_proj_blocks"].flatten(2)
        assert torch.equal(ranks[f"{experts}routed_experts.w13_weight"], blocks[:, mine])  # gate and up alternate
        assert torch.equal(ranks[f"{experts}routed_experts.w13_weight_scale"], hf[f"{experts}gate_up_proj_scales"][:, mine])
        blocks = hf[f"{experts}down_proj_blocks"].flatten(2)
        assert torch.equal(ranks[f"{experts}routed_experts.w2_weight"], blocks.chunk(2, 2)[rank])
        assert torch.equal(
            ranks[f"{experts}routed_experts.w2_weight_scale"], hf[f"{experts}down_proj_scales"].chunk(2, 2)[rank]
        )
    assert carnet.cross(tmp_path / "ranks", tmp_path / "whole", to="vllm").equal
    assert carnet.cross(source, tmp_path / "direct", to="vllm").equal
    assert held(tmp_path / "whole") == held(tmp_path / "direct")
    with pytest.raises(CarnetError, match="an axis for blocks"):
        carnet.plan(tmp_path / "ranks", to="hf")


@pytest.mark.parametrize("style", ["modelopt", "compressed-tensors"])
def test_scales_of_the_cache_stand_beside_the_attention_of_a_rank(coded, tmp_path, style):
    source = coded("dense", f"{style} fp8 static cache")
    hf = load_file(source / "model.safetensors")
    assert carnet.cross(source, tmp_path / "out", to="vllm", tp=2).equal
    path = tmp_path / "out/model-rank-1-part-0.safetensors"
    ranks = load_file(path)
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        for what in "kv":
            [expected] = [t for name, t in hf.items() if name in (f"{at}{what}_proj.{what}_scale", f"{at}{what}_scale")]
            found = ranks[f"{at}attn.{what}_scale"]
            assert found.tolist() in (expected.to(found.dtype).tolist(), [expected.item()])
            assert found.item() not in (1.0, -1.0)
        assert abs(ranks[f"{at}attn.q_scale"].item()) == 1.0
    with pytest.raises(CarnetError, match="go to ranks alone"):
        carnet.plan(tmp_path / "out", to="hf")
    ranks["model.layers.1.self_attn.attn.v_scale"] *= 2
    save_file(ranks, path)
    (tmp_path / "out/carnet.json").unlink()
    verdict = carnet.verify(source, tmp_path / "out")
    assert [finding.where for finding in verdict.findings] == ["rank-1/model.layers.1.self_attn.attn.v_scale"]


def exchanged(tensors):
    tensors[AT + "self_attn.qkv_proj.weight_scale"] = tensors[AT + "self_attn.qkv_proj.weight_scale"].flip(0)


def of_another_expert(tensors):
    tensors[MIXTURE + "w2_weight_scale"] = tensors[MIXTURE + "w2_weight_scale"].flip(0)


def of_the_other_half(tensors):
    tensors[MIXTURE + "w13_weight_scale"] = tensors[MIXTURE + "w13_weight_scale"].flip(1)


def more_than_it_was(tensors):
    tensors[AT + "self_attn.qkv_proj.input_scale"][1] *= 2


def of_another_input(tensors):
    tensors[MIXTURE + "w13_input_scale"][0] *= 2


def one_bit(tensors):
    tensors[MIXTURE + "w13_weight"].view(torch.uint8)[1, 200, 7] ^= 1


def too_few(tensors):
    tensors[AT + "self_attn.qkv_proj.weight_scale"] = tensors[AT + "self_attn.qkv_proj.weight_scale"][:2].clone()


AT = "model.layers.1."
MIXTURE = f"{AT}mlp.experts.routed_experts."


@pytest.mark.parametrize(
    ("change", "where", "style"),
    [
        (exchanged, "layers.1.attention.q", "compressed-tensors"),
        (of_another_expert, "layers.1.moe.down", "compressed-tensors"),
        (of_the_other_half, "layers.1.moe.up", "compressed-tensors"),
        (more_than_it_was, "layers.1.attention.k", "compressed-tensors"),
        (more_than_it_was, "layers.1.attention.k", "modelopt"),
        (of_another_input, "layers.1.moe.up", "compressed-tensors"),
        (one_bit, "layers.1.moe.up", "compressed-tensors"),
        (too_few, "qkv_proj.weight_scale", "compressed-tensors"),
    ],
)
def test_what_is_changed_is_found_and_named(coded, tmp_path, change, where, style):
    source = coded("mixture", f"{style} fp8 static")
    carnet.cross(source, tmp_path / "out", to="vllm", tp=2)
    (tmp_path / "out/carnet.json").unlink()
    path = tmp_path / "out/model-rank-1-part-0.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    verdict = carnet.verify(source, tmp_path / "out")
    assert not verdict.equal
    assert any(where in finding.where or where in finding.stored for finding in verdict.findings), verdict.findings


@pytest.mark.parametrize(
    ("model", "words", "options", "because"),
    [
        ("mixture", "modelopt fp8-channel", {}, "its layers of experts have no parameters for them"),
        ("mixture", "compressed-tensors fp8", {}, "it looks for scales of activations, and there are none"),
        ("mixture", "modelopt nvfp4 static", {"tp": 2, "ep": 2}, "its kernel decides"),
        ("dense", "modelopt mxfp4", {}, "its layers have no parameters for them"),
        ("dense", "compressed-tensors int4-group", {}, "its layers have no parameters for them"),
        ("mixture", "deepseek fp8-block", {"tp": 4}, "would not be whole on a rank"),
    ],
)
def test_what_vllm_does_not_load_is_refused_by_name(coded, model, words, options, because):
    with pytest.raises(CarnetError, match=because) as refused:
        carnet.plan(coded(model, words), to="vllm", **options)
    assert "--dtype bf16" in str(refused.value)


def test_quantizing_for_ranks_is_told_as_two_steps(coded):
    with pytest.raises(CarnetError, match="not quantized on the way") as refused:
        carnet.plan(coded("dense", "modelopt mxfp8").with_name("dense"), to="vllm", quantize="fp8-channel")
    assert "--to hf --quantize fp8-channel, then that folder --to vllm" in str(refused.value)


def test_experts_whose_activations_have_two_scales_are_not_given_one(coded, tmp_path):
    source = coded("mixture", "modelopt fp8 static")
    shutil.copytree(source, tmp_path / "other")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.1.up_proj.input_scale"] *= 2
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    with pytest.raises(CarnetError, match=r"layers\.1\.moe\.gate input"):
        carnet.cross(tmp_path / "other", tmp_path / "out", to="vllm", tp=2)
