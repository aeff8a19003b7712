"""A folder for the workers of vLLM: what each rank holds, by rules of its own; there and back; mutations are found by name.

Models are transformers' own, tiny and random, of a vocabulary that is no multiple of anything.
"""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

import carnet
from carnet.errors import BadRequest, CarnetError
from tests.families import samples
from tests.referees import roomy
from tests.referees.engine_ranks import SIZES as TWO_LAYERS
from tests.referees.engine_ranks import Worker, save_random

SIZES = TWO_LAYERS | {"num_hidden_layers": 3}
LATENT = {
    **SIZES,
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
del LATENT["head_dim"]
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 8}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16, mlp_only_layers=[1]),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(**LATENT),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS),
    "qwen3_next": Qwen3NextConfig(**SIZES, **DELTA, num_experts=8, **FEW, mlp_only_layers=[1]),
    "qwen3_5": Qwen3_5TextConfig(**SIZES, **DELTA, tie_word_embeddings=True),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(**SIZES, **DELTA, num_experts=8, **FEW),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of transformers, made once for each model."""

    def made(name):
        at = tmp_path_factory.getbasetemp() / f"engine {name}"
        return at if at.exists() else save_random(MODELS[name], at, seed=3)

    return made


def tensors_of(folder):
    """Return the tensors of each file."""
    return {path.name: load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def same(ours, theirs):
    """Say whether two sets of tensors are the same, bit for bit."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype or ours[name].shape != theirs[name].shape] == []
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "qwen3_5_moe")
CUTS = [*((name, tp, 1) for name in MODELS for tp in (1, 2, 4)), *((name, tp, tp) for name in MIXTURES for tp in (2, 4))]


@pytest.mark.parametrize(("name", "tp", "ep"), CUTS)
def test_each_rank_holds_what_vllm_would_make_of_the_folder(folder, tmp_path, name, tp, ep):
    source = folder(name)
    verdict = carnet.cross(source, tmp_path / "out", to="vllm", tp=tp, ep=ep)
    assert verdict.equal, verdict.findings
    said, whole = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    files = tensors_of(tmp_path / "out")
    assert [*files] == [f"model-rank-{rank}-part-0.safetensors" for rank in range(tp)]
    for rank, held in enumerate(files.values()):
        same(held, dict(Worker(whole, said, rank, tp, shares_experts=ep > 1).everything()))


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2", "deepseek_v3"])
def test_stages_hold_their_layers_under_the_numbers_of_the_whole(folder, tmp_path, name):
    verdict = carnet.cross(folder(name), tmp_path / "out", to="vllm", tp=2, pp=2)
    assert verdict.equal, verdict.findings
    files = tensors_of(tmp_path / "out")
    assert [*files] == [f"model-pp-{pp}-tp-{tp}-part-0.safetensors" for pp in range(2) for tp in range(2)]
    carnet.cross(folder(name), tmp_path / "whole", to="vllm", tp=2)
    whole = tensors_of(tmp_path / "whole")
    for tp in range(2):
        first, last = (files[f"model-pp-{pp}-tp-{tp}-part-0.safetensors"] for pp in range(2))
        ends = {key for key in (*first, *last) if "layers." not in key}
        assert ends == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert not first.keys() & last.keys()
        assert {key.split(".")[2] for key in first if "layers." in key} == {"0", "1"}
        assert {key.split(".")[2] for key in last if "layers." in key} == {"2"}
        embed = whole[f"model-rank-{tp}-part-0.safetensors"]["lm_head.weight"] if "tied" in name else None
        more = {} if embed is None else {"model.embed_tokens.weight": embed}
        same(first | last, whole[f"model-rank-{tp}-part-0.safetensors"] | more)


@pytest.mark.parametrize(("tp", "pp", "ep"), [(4, 1, 1), (2, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_the_folder(folder, tmp_path, name, tp, pp, ep):
    if ep > 1 and name not in MIXTURES:
        with pytest.raises(BadRequest, match="no experts that ranks could share"):
            carnet.plan(folder(name), to="vllm", tp=tp, pp=pp, ep=ep)
        return
    carnet.cross(folder(name), tmp_path / "ranks", to="vllm", tp=tp, pp=pp, ep=ep)
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    same(tensors_of(tmp_path / "back")["model.safetensors"], load_file(folder(name) / "model.safetensors"))


def test_ranks_of_mamba_hold_their_groups_and_what_vllm_computes_of_a_log(tmp_path):
    sizes = {"num_heads": 8, "head_dim": 16, "n_groups": 4, "state_size": 16, "expand": 2}
    source = save_random(Mamba2Config(vocab_size=97, hidden_size=64, num_hidden_layers=2, **sizes), tmp_path / "hf", seed=5)
    assert carnet.cross(source, tmp_path / "out", to="vllm", tp=2).equal
    whole, name = load_file(source / "model.safetensors"), "backbone.layers.1.mixer"
    for rank, held in enumerate(tensors_of(tmp_path / "out").values()):
        for weight, sizes in (("in_proj.weight", [128, 128, 64, 64, 8]), ("conv1d.weight", [128, 64, 64]), ("D", [8])):
            parts = [part.chunk(2)[rank] for part in whole[f"{name}.{weight}"].split(sizes)]
            assert torch.equal(held[f"{name}.{weight}"], torch.cat(parts))
        computed = -torch.exp(whole[f"{name}.A_log"].chunk(2)[rank].double()).float()
        assert held[f"{name}.A"].dtype == torch.float32
        assert torch.equal(held[f"{name}.A"], computed)
        assert f"{name}.A_log" not in held
    expected = carnet.expect(source, engine="vllm", tp=2)
    assert {key.rpartition(".")[2] for key in expected.coded} == {"A"}  # engines compute it with other last bits


WHAT = (("scale", True), ("zero_point", False))
BLOCKS = {
    **SIZES,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 2,
}
# what vLLM looks for beside codes: name, shape, number, and whether it has the type of the weights
BESIDE = {
    "deepseek": [(f"{one}_scale", (), -1.0, True) for one in ("k", "prob", "q", "v")],
    "compressed-tensors": [(f"{one}_{what}", (1,), float(scale), not scale) for one in "kqv" for what, scale in WHAT],
}


@pytest.fixture(scope="module", params=["deepseek", "compressed-tensors"])
def coded(request, tmp_path_factory):
    """A folder of codes in blocks of FP8, and whose they are."""
    top = tmp_path_factory.mktemp("coded")
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(LlamaConfig(**BLOCKS)).bfloat16().save_pretrained(top / "plain")
    assert carnet.cross(top / "plain", top / "codes", to="hf", quantize="fp8-block", style=request.param).equal
    return top / "codes", request.param


@pytest.mark.parametrize("tp", [1, 2])
def test_codes_in_blocks_are_joined_and_cut_with_their_scales(coded, tmp_path, tp):
    source, style = coded
    whole, said = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    assert carnet.cross(source, tmp_path / "out", to="vllm", tp=tp).equal
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == said["quantization_config"]
    end = "weight_scale_inv" if style == "deepseek" else "weight_scale"
    scales = {name.removesuffix(end) + "weight": tensor.float() for name, tensor in whole.items() if name.endswith(end)}
    codes = {name: tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor for name, tensor in whole.items()}
    for rank, held in enumerate(tensors_of(tmp_path / "out").values()):
        expected = dict(Worker(codes, said, rank, tp).everything())
        expected |= {
            f"{name.removesuffix('weight')}{end}": tensor
            for layer in range(2)
            for name, tensor in of_scales(Worker(scales, said, rank, tp), f"model.layers.{layer}.")
        }
        for layer in range(2):
            for name, shape, number, own in BESIDE[style]:
                made = torch.full(shape, number, dtype=torch.bfloat16 if own else torch.float32)
                expected[f"model.layers.{layer}.self_attn.attn.{name}"] = made
        same(
            {name: each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for name, each in held.items()},
            expected,
        )
    assert carnet.cross(tmp_path / "out", tmp_path / "back", to="hf").equal
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(back[name].view(torch.uint8), whole[name].view(torch.uint8))] == []


def of_scales(worker, at):
    yield f"{at}self_attn.qkv_proj.weight", worker.qkv(f"{at}self_attn.", "weight")
    yield f"{at}self_attn.o_proj.weight", worker.part(worker.hf[f"{at}self_attn.o_proj.weight"], 1)
    yield from worker.gated(f"{at}mlp.", f"{at}mlp.")


def test_codes_whose_blocks_would_not_be_whole_are_refused(coded, folder, tmp_path):
    source, _ = coded
    with pytest.raises(CarnetError, match="cannot"):
        carnet.plan(source, to="vllm", tp=8)
    carnet.cross(folder("qwen3_moe"), tmp_path / "codes", to="hf", quantize="fp8-channel")
    with pytest.raises(CarnetError, match="quantized") as refused:
        carnet.plan(tmp_path / "codes", to="vllm")
    assert "--dtype bf16" in str(refused.value)


def test_the_release_whose_names_these_are_is_written_down(folder, tmp_path):
    carnet.cross(folder("llama"), tmp_path / "out", to="vllm")
    assert json.loads((tmp_path / "out/carnet.json").read_text())["request"]["engine_version"] == "0.32"
    with pytest.raises(CarnetError, match="engine_version") as refused:
        carnet.plan(folder("llama"), to="vllm", engine_version="0.1")
    assert "0.33" in str(refused.value)
    with pytest.raises(CarnetError, match="engine_version is for a target of the kind 'vllm'"):
        carnet.plan(folder("llama"), to="hf", engine_version="0.32")


def test_what_ranks_cannot_share_is_refused(folder):
    for options, said in (
        ({"tp": 3}, "cannot"),
        ({"tp": 128}, "vocabulary|cannot cut"),
        ({"tp": 2, "ep": 2}, "the model has no experts that ranks could share"),
        ({"pp": 4}, "cannot share 3 layers among 4 pipeline stages"),
    ):
        with pytest.raises(CarnetError, match=said):
            carnet.plan(folder("llama"), to="vllm", **options)
    with pytest.raises(CarnetError, match="some of the ranks cannot share the experts"):
        carnet.plan(folder("mixtral"), to="vllm", tp=4, ep=2)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_biases_that_vllms_class_has_no_parameters_for_are_refused(tmp_path, name):
    source = roomy.save(name, tmp_path / "source", qkv_bias=True, out_bias=True)
    with pytest.raises(CarnetError, match="the target's config has no place for 'qkv_bias'"):
        carnet.plan(source, to="vllm")
    carnet.plan(source, to="hf")


def test_a_folder_says_what_vllms_class_of_minimax_m2_asks_for(tmp_path):
    # vllm 0.32 model_executor/models/minimax_m2.py: getattr(config, "use_routing_bias", False), config.scoring_func
    assert carnet.cross(roomy.save("minimax_m2", tmp_path / "source"), tmp_path / "out", to="hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["use_routing_bias"], config["scoring_func"]) == (True, "sigmoid")


def test_layers_that_predict_further_tokens_are_left_behind_by_name(tmp_path):
    model = samples.draw("deepseek_v3", Random(2))
    assert model.config["mtp"] == 1
    source = samples.save(model, tmp_path / "further", "hf", Random(1), {})
    with pytest.raises(CarnetError, match="a model of their own") as refused:
        carnet.plan(source, to="vllm")
    assert "--drop '*layers.1.*'" in str(refused.value)
    assert carnet.cross(source, tmp_path / "out", to="vllm", drop="*layers.1.*").equal


LAYER = "model.layers.1."


def exchanged(held):
    gate, up = held[f"{LAYER}mlp.gate_up_proj.weight"].chunk(2)
    held[f"{LAYER}mlp.gate_up_proj.weight"] = torch.cat([up, gate])


def another_head(held):
    fused = held[f"{LAYER}self_attn.qkv_proj.weight"]
    fused[16:24] = torch.randn(8, 32).bfloat16()


def another_number(held):
    held[f"{LAYER}self_attn.attn._k_scale"] = torch.tensor(2.0)


def without_number(held):
    del held[f"{LAYER}self_attn.attn._v_scale"]


def in_padding(held):
    held["lm_head.weight"][-1, 3] = 1.0


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (exchanged, "layers.1.mlp.gate"),
        (another_head, "layers.1.attention.k"),
        (another_number, "rank-3/model.layers.1.self_attn.attn._k_scale"),
        (without_number, "rank-3/model.layers.1.self_attn.attn._v_scale"),
        (in_padding, "head"),
    ],
)
def test_what_is_changed_is_found_and_named(folder, tmp_path, change, where):
    carnet.cross(folder("llama"), tmp_path / "out", to="vllm", tp=4)
    (tmp_path / "out/carnet.json").unlink()
    path = tmp_path / "out/model-rank-3-part-0.safetensors"
    held = load_file(path)
    change(held)
    save_file({key: tensor.contiguous() for key, tensor in held.items()}, path)
    verdict = carnet.verify(folder("llama"), tmp_path / "out")
    assert not verdict.equal
    assert where in {part for finding in verdict.findings for part in finding.where.split(", ")}, verdict.findings


def test_experts_of_another_rank_are_found_and_named(folder, tmp_path):
    carnet.cross(folder("qwen3_moe"), tmp_path / "out", to="vllm", tp=2, ep=2)
    (tmp_path / "out/carnet.json").unlink()
    one, other = (tmp_path / f"out/model-rank-{rank}-part-0.safetensors" for rank in range(2))
    held, theirs = load_file(one), load_file(other)
    held[f"model.layers.2.{W2}"][1] = theirs[f"model.layers.2.{W2}"][3]
    save_file(held, one)
    verdict = carnet.verify(folder("qwen3_moe"), tmp_path / "out")
    assert {finding.where for finding in verdict.findings} == {"layers.2.moe.down"}


W2 = "mlp.experts.routed_experts.w2_weight"


def test_ranks_that_were_exchanged_are_found(folder, tmp_path):
    carnet.cross(folder("llama"), tmp_path / "out", to="vllm", tp=2)
    (tmp_path / "out/carnet.json").unlink()
    one, other = (tmp_path / f"out/model-rank-{rank}-part-0.safetensors" for rank in range(2))
    shutil.move(one, tmp_path / "aside")
    shutil.move(other, one)
    shutil.move(tmp_path / "aside", other)
    assert not carnet.verify(folder("llama"), tmp_path / "out").equal
