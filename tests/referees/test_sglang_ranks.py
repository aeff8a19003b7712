"""A folder for the ranks of SGLang: what each holds, by rules of its own; there and back; what has no one layout there is refused.

The rules are vLLM's, whose layers SGLang took over, but for the buffers of a cache's scales: no SGLang ran, its source was read.
"""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

import carnet
from carnet.engines.comparing import compare
from carnet.errors import BadRequest, CarnetError, NotSupported
from tests.referees.engine_ranks import SCALES, SIZES, Worker, save_random

MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, wide": LlamaConfig(
        **SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 4}
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of transformers, made once for each model."""

    def made(name):
        at = tmp_path_factory.getbasetemp() / f"sglang {name}"
        return at if at.exists() else save_random(MODELS[name], at, seed=4)

    return made


def ranks_of(source, tp, ep=1):
    """Return what each rank holds, by the rules."""
    whole, said = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    every = (dict(Worker(whole, said, rank, tp, shares_experts=ep > 1).everything()) for rank in range(tp))
    return [{name: tensor for name, tensor in each.items() if not name.endswith(SCALES)} for each in every]


def first_bits(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_each_rank_holds_what_sglang_would_make_of_the_folder_and_is_read_back(folder, tmp_path, name, tp):
    verdict = carnet.cross(folder(name), tmp_path / "out", to="sglang", tp=tp)
    assert verdict.equal, verdict.findings
    for rank, wanted in enumerate(ranks_of(folder(name), tp)):
        held = load_file(tmp_path / f"out/model-rank-{rank}-part-0.safetensors")
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[each], wanted[each]) for each in held)
    assert carnet.inspect(tmp_path / "out").checkpoint.dialect == "sglang"
    assert carnet.cross(tmp_path / "out", tmp_path / "back", to="hf").equal
    back, source = (load_file(at / "model.safetensors") for at in (tmp_path / "back", folder(name)))
    assert back.keys() == source.keys()
    assert all(torch.equal(back[each], source[each]) for each in back)


def named(name, stored):
    """Return what SGLang calls a tensor that vLLM's file calls so."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if "tied" in name else {}
    return tied.get(stored, stored).replace(".routed_experts.", ".").replace(".mlp.experts.gate.", ".mlp.gate.")


@pytest.mark.parametrize(
    ("name", "ep"), [("llama", 1), ("llama, tied", 1), ("mixtral", 1), ("mixtral", 2), ("qwen3_moe", 1), ("qwen3_moe", 2)]
)
def test_the_digests_are_those_of_a_cpu_and_of_a_gpu(folder, name, ep):
    found = carnet.expect(folder(name), engine="sglang", tp=2, ep=ep)
    wanted = {
        f"dp0:pp0:tp{rank}:{named(name, each)}": first_bits(tensor)
        for rank, held in enumerate(ranks_of(folder(name), 2, ep))
        for each, tensor in held.items()
    }
    assert {key: of_a_cpu for key, (_, of_a_cpu) in found.digests.items()} == wanted
    assert all(len(of_a_gpu) == 16 for of_a_gpu, _ in found.digests.values())
    assert found.release == "0.5.23"


def test_blocks_of_fp8_are_hashed_as_what_they_mean(folder, tmp_path):
    coded = tmp_path / "coded"
    assert carnet.cross(folder("llama, wide"), coded, to="hf", quantize="fp8-block", style="deepseek").equal
    found = carnet.expect(coded, engine="sglang", tp=2)
    tensors, name = load_file(coded / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    scales = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    meant = (tensors[name].float() * scales).bfloat16()
    for rank, part in enumerate(meant.chunk(2, 1)):
        assert found.digests[f"dp0:pp0:tp{rank}:{name}"][1] == first_bits(part)
    assert not any("scale" in key for key in found.digests)
    with pytest.raises(NotSupported, match="what codes mean in bf16"):
        carnet.expect(coded, engine="sglang", dtype="fp16")
    with pytest.raises(CarnetError, match="quantized"):
        carnet.plan(coded, to="sglang")


def test_other_codes_are_hashed_as_they_are_packed_and_so_refused(folder, tmp_path):
    assert carnet.cross(
        folder("llama, wide"), tmp_path / "coded", to="hf", quantize="fp8-channel", style="compressed-tensors"
    ).equal
    with pytest.raises(NotSupported, match="as its kernels have packed them"):
        carnet.expect(tmp_path / "coded", engine="sglang")
    with pytest.raises(NotSupported, match="vllm holds codes, not what they mean in bf16"):
        carnet.expect(tmp_path / "coded", engine="vllm", dtype="bf16")


def test_experts_that_a_kernel_reordered_are_not_comparable_and_those_of_another_rank_are_different(folder):
    expected = carnet.expect(folder("mixtral"), engine="sglang", tp=2, ep=2)
    ours, theirs = (f"dp0:pp0:tp{rank}:model.layers.1.block_sparse_moe.experts.w13_weight" for rank in (0, 1))
    assert {ours, theirs} <= expected.coded
    reordered = compare(expected, expected.checksums | {ours: "0123456789abcdef"})
    assert reordered
    assert [(each.what, each.name) for each in reordered.apart] == [
        ("the engine may have packed it anew", ours.rpartition(":")[2])
    ]
    swapped = compare(expected, expected.checksums | {ours: expected.checksums[theirs]})
    assert [each.what for each in swapped.different] == [f"holds {theirs}"]
    assert not swapped


def test_what_has_no_one_layout_is_refused_by_name(folder):
    with pytest.raises(NotSupported, match="sglang has experts in an order that its kernels choose"):
        carnet.plan(folder("mixtral"), to="sglang")
    with pytest.raises(NotSupported, match="sglang is no place for the family 'gpt_oss'"):
        carnet.expect(folder("gpt_oss"), engine="sglang")
    with pytest.raises(BadRequest, match="of ranks that share each layer alone"):
        carnet.plan(folder("llama"), to="sglang", pp=2)
    with pytest.raises(CarnetError):
        carnet.plan(folder("llama"), to="sglang", quantize="fp8")
