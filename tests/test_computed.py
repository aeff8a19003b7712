"""Tensors that a target computes: their numbers, what is found where one is wrong, and that they do not come back.

NVIDIA's converters are the referees, by way of torch: what carnet's results and theirs differ in is said here.
"""

import json
from decimal import Context, Decimal
from fractions import Fraction
from itertools import product
from pathlib import Path
from random import Random

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import carnet
from carnet.algebra.box import Box
from carnet.errors import BadRequest, NotSupported
from carnet.examiner.functions import is_wrong
from carnet.executor import functions, products
from carnet.plans import saved

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "vocab_size": 96,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 1,
}
A = "backbone.layers.{}.ssm.A"


def model(folder, seed=0):
    """Save a Mamba-2 whose A_log are drawn, in bf16."""
    torch.manual_seed(seed)
    made = Mamba2ForCausalLM(Mamba2Config(**SIZES, expand=2, tie_word_embeddings=False)).to(torch.bfloat16)
    with torch.no_grad():
        for layer in made.backbone.layers:
            layer.mixer.A_log.copy_(torch.randn(8) * 2)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    return model(tmp_path_factory.mktemp("computed") / "hf")


@pytest.fixture
def ranks(mamba, tmp_path):
    assert carnet.cross(mamba, tmp_path / "ranks", to="trtllm").equal
    return tmp_path / "ranks"


def nearest(number):
    """Return the f32 nearest to -exp of a number, by decimals."""
    true = -Context(prec=80).exp(Decimal(number))
    near = np.float32(float(true))
    both = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    return float(min((near, *both), key=lambda each: abs(Decimal(float(each)) - true)))


def test_a_rank_of_a_mamba_holds_the_nearest_f32_and_torch_is_an_ulp_away_at_most(mamba, ranks):
    source, target = load_file(mamba / "model.safetensors"), load_file(ranks / "rank0.safetensors")
    for layer in range(3):
        log, found = source[f"backbone.layers.{layer}.mixer.A_log"].float(), target[A.format(layer)]
        assert found.dtype == torch.float32
        assert found.tolist() == [nearest(each) for each in log.tolist()]
        ulps = found.view(torch.int32) - (-torch.exp(log)).view(torch.int32)
        assert ulps.abs().max() <= 1


def test_the_rank_of_a_mamba_1_is_that_of_nvidia_s_converter_and_what_torch_makes_is_right_of_another_program(tmp_path):
    torch.manual_seed(3)
    made = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    made.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "rank", to="trtllm").equal
    found, held = load_file(tmp_path / "rank/rank0.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    theirs = {
        "lm_head.weight": held["backbone.embeddings.weight"].clone()
    }  # tensorrt_llm/models/mamba/convert.py, line by line
    for name, tensor in held.items():
        name = name.replace("embeddings", "vocab_embedding").replace("mixer", "ssm").replace("norm_f", "ln_f")
        name = name.replace(".norm.", ".input_layernorm.").replace("A_log", "A").replace("dt_proj.bias", "dt_bias")
        if name.endswith(".A"):
            tensor = (-torch.exp(tensor.float())).permute(1, 0).contiguous()
        if name.endswith((".D", "dt_bias")):
            tensor = tensor.float()
        if name.endswith("in_proj.weight"):
            theirs |= zip((name.replace("proj", "proj_x"), name.replace("proj", "proj_z")), tensor.chunk(2), strict=True)
            continue
        theirs[name] = tensor.unsqueeze(3) if name.endswith("conv1d.weight") else tensor
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if not name.endswith(".A"):
            assert torch.equal(found[name], tensor)
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "rank/rank0.safetensors")
    assert not carnet.verify(tmp_path / "hf", tmp_path / "rank")  # carnet.json says that carnet wrote it
    (tmp_path / "rank/carnet.json").unlink()
    assert carnet.verify(tmp_path / "hf", tmp_path / "rank")
    theirs["backbone.layers.1.ssm.A"].view(torch.int32)[2, 3] += 9
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "rank/rank0.safetensors")
    assert [each.where for each in carnet.verify(tmp_path / "hf", tmp_path / "rank").findings] == ["layers.1.s6.a"]


def test_what_a_rank_cannot_say_of_a_mamba_1_is_refused(tmp_path):
    MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)).save_pretrained(tmp_path / "hf")
    for options, words in (
        ({"tp": 2}, "cannot say tp = 2"),
        ({"pp": 2}, "cannot say pp = 2"),
        ({"quantize": "fp8"}, "no codes"),
    ):
        with pytest.raises(NotSupported, match=words):
            carnet.cross(tmp_path / "hf", tmp_path / "never", to="trtllm", **options)


def test_ranks_of_a_mamba_are_cut_by_groups_and_made_of_megatron_s_store_too(mamba, ranks, tmp_path):
    assert carnet.cross(mamba, tmp_path / "megatron", to="megatron").equal
    config = tmp_path / "config.json"
    config.write_text((mamba / "config.json").read_text())
    assert carnet.cross(tmp_path / "megatron", tmp_path / "again", to="trtllm", config=config).equal
    ours, theirs = (load_file(at / "rank0.safetensors") for at in (ranks, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_where_f64_does_not_tell_the_nearest_f32_decimals_do():
    draw = Random(1)
    numbers = [draw.uniform(-20, 20) for _ in range(2000)]
    sure = functions.minus_exp(np.array(numbers))
    assert [float(each) for each in sure[:200]] == [nearest(each) for each in numbers[:200]]
    # the sixtieth part of an ulp of f32: some hundred numbers are unsure
    doubted = functions.minus_exp(np.array(numbers), sure=2.0**-30)
    assert (doubted == sure).all()


def test_results_beyond_the_largest_number_are_refused_and_infinite_ones_are_not(mamba, tmp_path):
    weights = load_file(mamba / "model.safetensors")
    name = "backbone.layers.0.mixer.A_log"
    for number, fits in ((88.5, True), (-1e30, True), (float("inf"), True), (89.0, False)):
        weights[name][0] = number
        folder = tmp_path / f"{number}"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((mamba / "config.json").read_text())
        if fits:
            assert carnet.cross(folder, tmp_path / f"{number} ranks", to="trtllm").equal
            continue
        with pytest.raises(BadRequest, match=r"layers\.0\.mamba\.a_log is out of range"):
            carnet.cross(folder, tmp_path / "never", to="trtllm")
        assert not (tmp_path / "never").exists()


def by_one_ulp(weights):
    weights[A.format(1)].view(torch.int32)[3] += 1


def sign(weights):
    weights[A.format(1)][3] *= -1


def of_another_layer(weights):
    weights[A.format(1)] = weights[A.format(2)].clone()


def not_a_number(weights):
    weights[A.format(1)][0] = float("nan")


def not_computed(weights):
    weights[A.format(1)] = (-weights[A.format(1)]).log()


@pytest.mark.parametrize("damage", [by_one_ulp, sign, of_another_layer, not_a_number, not_computed])
def test_a_computed_tensor_that_is_wrong_is_found(mamba, ranks, damage):
    weights = load_file(ranks / "rank0.safetensors")
    damage(weights)
    save_file(weights, ranks / "rank0.safetensors")
    verdict = carnet.verify(mamba, ranks)
    assert {("layers.1.mamba.a", "elements differ")} <= {(each.where, each.what) for each in verdict.findings}


def test_a_computed_tensor_that_is_missing_is_found(mamba, ranks):
    weights = load_file(ranks / "rank0.safetensors")
    del weights[A.format(1)]
    save_file(weights, ranks / "rank0.safetensors")
    found = {(each.where, each.what) for each in carnet.verify(mamba, ranks).findings}
    assert ("layers.1.mamba.a", "missing") in found


def test_a_source_that_holds_what_was_computed_is_refused_by_name(ranks, tmp_path):
    with pytest.raises(NotSupported, match="cannot be had back") as caught:
        carnet.cross(ranks, tmp_path / "hf", to="hf")
    assert caught.value.facts["computed of"] == "layers.0.mamba.a_log"
    assert not (tmp_path / "hf").exists()


def test_a_sum_is_merged_before_it_is_computed_of(mamba, tmp_path):
    other = model(tmp_path / "other", 1)
    with pytest.raises(BadRequest, match=r"computed of layers\.0\.mamba\.a_log"):
        carnet.merge([mamba, other], tmp_path / "sum", [0.5, 0.5], to="trtllm")


def test_a_plan_that_computes_is_kept_and_run(mamba, ranks, tmp_path):
    plan = carnet.plan(mamba, to="trtllm")
    saved.save(plan, tmp_path / "plan")
    carnet.run(saved.load(tmp_path / "plan"), tmp_path / "out")
    assert (tmp_path / "out/rank0.safetensors").read_bytes() == (ranks / "rank0.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["mamba_version"] == "Mamba2"


# --- products: DeepSeek ---------------------------------------------------------------------------------------------------------

HEADS, NOPE, ROPE, VALUES = 4, 8, 4, 6
DEEPSEEK = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "vocab_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUES,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
GREEDY = {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}
CLASSES = {
    "v3": (DeepseekV3ForCausalLM, DeepseekV3Config(**DEEPSEEK, q_lora_rank=16, n_group=2, topk_group=1)),
    "v2": (DeepseekV2ForCausalLM, DeepseekV2Config(**DEEPSEEK, q_lora_rank=16, **GREEDY)),
    "v2 lite": (DeepseekV2ForCausalLM, DeepseekV2Config(**DEEPSEEK, q_lora_rank=None, **GREEDY)),
}
GOLDENS = Path(__file__).parent / "goldens"
FUSED = "transformer.layers.{}.attention.fused_q_proj"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deepseek")
    for name, (kind, config) in CLASSES.items():
        made = kind(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        made.save_pretrained(folder / name)
    return folder


def nvidia(source, layer, tp, rank):
    """Return what NVIDIA's converter makes of the attention of a layer: models/deepseek_v2/convert.py, line by line."""
    held = load_file(source / "model.safetensors")
    prefix = f"model.layers.{layer}.self_attn."
    q = held.get(prefix + "q_b_proj.weight", held.get(prefix + "q_proj.weight")).unflatten(0, [HEADS, NOPE + ROPE])
    kv = held[prefix + "kv_b_proj.weight"].unflatten(0, [HEADS, NOPE + VALUES])
    q, kv = (torch.chunk(each, tp, dim=0)[rank].contiguous() for each in (q, kv))
    q_nope, q_pe = q.split([NOPE, ROPE], dim=1)
    k_nope, v = kv.split([NOPE, VALUES], dim=1)
    fused = torch.cat([torch.einsum("hdq,hdk->hkq", q_nope, k_nope), q_pe], dim=1).flatten(0, 1)
    a = [held[prefix + f"{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa") if prefix + f"{name}.weight" in held]
    dense = torch.chunk(held[prefix + "o_proj.weight"], tp, dim=1)[rank]
    return {
        "fused_q_proj": fused,
        "q_b_proj": q.flatten(0, 1),
        "kv_b_proj": torch.cat([k_nope.flatten(0, 1), v.flatten(0, 1)]),
        "fused_a.weight": torch.cat(a),
        "dense.weight": dense,
    }


def distance(one, other):
    """Return by how many neighbours numbers of bf16 differ at most."""
    ordered = [
        np.where(bits < 0, -(bits & 0x7FFF), bits)
        for bits in (each.contiguous().view(torch.int16).numpy().astype(int) for each in (one, other))
    ]
    return int(np.abs(ordered[0] - ordered[1]).max())


@pytest.mark.parametrize("which", CLASSES)
@pytest.mark.parametrize("cut", [{}, {"tp": 2}, {"tp": 2, "pp": 2}, {"tp": 4, "ep": 2}], ids=str)
def test_ranks_of_a_deepseek_are_those_of_nvidia_s_converter(deepseek, tmp_path, which, cut):
    assert carnet.cross(deepseek / which, tmp_path / "out", to="trtllm", **cut).equal
    tp, pp = cut.get("tp", 1), cut.get("pp", 1)
    for layer in range(3):
        stage, local = (0, layer) if pp == 1 else ((0, layer) if layer < 2 else (1, 0))
        for rank in range(tp):
            held = load_file(tmp_path / f"out/rank{stage * tp + rank}.safetensors")
            for name, tensor in nvidia(deepseek / which, layer, tp, rank).items():
                found = held[f"transformer.layers.{local}.attention.{name}"]
                assert found.shape == tensor.shape
                # torch adds up in f32, in an order of its own: the nearest number is one away at most
                assert distance(found, tensor) <= (name == "fused_q_proj"), name


def test_the_bytes_of_products_depend_on_neither_memory_nor_threads_nor_the_layout(deepseek, tmp_path):
    source = deepseek / "v3"
    assert carnet.cross(source, tmp_path / "one", to="trtllm", tp=2, threads=1).equal
    wanted = [(tmp_path / f"one/rank{rank}.safetensors").read_bytes() for rank in range(2)]
    assert carnet.cross(source, tmp_path / "many", to="trtllm", tp=2, threads=4, memory="80MB").equal
    assert carnet.cross(source, tmp_path / "megatron", to="megatron", tp=2).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "again", to="trtllm", tp=2, config=source / "config.json").equal
    for made in ("many", "again"):
        assert [(tmp_path / f"{made}/rank{rank}.safetensors").read_bytes() for rank in range(2)] == wanted


def fused_by_one_ulp(weights):
    weights[FUSED.format(1)].view(torch.int16)[3, 5] += 1


def zeroed(weights):
    weights[FUSED.format(1)][0, 0] = -0.0


def of_another_head(weights):
    fused = weights[FUSED.format(1)].unflatten(0, [HEADS, -1])
    weights[FUSED.format(1)] = fused[[1, 0, 2, 3]].flatten(0, 1)


def added_in_bf16(weights):
    """Sum in bf16, term by term: what an accumulator that is too narrow would leave."""
    q = weights["transformer.layers.1.attention.q_b_proj"].unflatten(0, [HEADS, NOPE + ROPE])[:, :NOPE]
    k = weights["transformer.layers.1.attention.kv_b_proj"][: HEADS * NOPE].unflatten(0, [HEADS, NOPE])
    total = torch.zeros(HEADS, 12, q.shape[2], dtype=torch.bfloat16)
    for at in range(NOPE):
        total = total + k[:, at, :, None] * q[:, at, None, :]
    weights[FUSED.format(1)] = torch.cat([total, weights[FUSED.format(1)].unflatten(0, [HEADS, -1])[:, 12:]], 1).flatten(0, 1)


def a_rotated_one(weights):
    weights[FUSED.format(1)].view(torch.int16)[13, 0] += 1


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (fused_by_one_ulp, "layers.1.mla.q_b_absorbed"),
        (zeroed, "layers.1.mla.q_b_absorbed"),
        (of_another_head, "layers.1.mla.q_b_absorbed"),
        (added_in_bf16, "layers.1.mla.q_b_absorbed"),
        (a_rotated_one, "layers.1.mla.q_b_rope"),
    ],
)
def test_a_product_that_is_wrong_is_found(deepseek, tmp_path, damage, where):
    assert carnet.cross(deepseek / "v3", tmp_path / "out", to="trtllm").equal
    weights = load_file(tmp_path / "out/rank0.safetensors")
    damage(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "out/rank0.safetensors")
    found = {(each.where, each.what) for each in carnet.verify(deepseek / "v3", tmp_path / "out").findings}
    assert (where, "elements differ") in found


def test_a_source_that_holds_a_product_is_refused_by_name(deepseek, tmp_path):
    assert carnet.cross(deepseek / "v2", tmp_path / "ranks", to="trtllm").equal
    with pytest.raises(NotSupported, match="cannot be had back") as caught:
        carnet.cross(tmp_path / "ranks", tmp_path / "hf", to="hf")
    assert caught.value.facts["tensor"] == "rank0/transformer.layers.0.attention.fused_q_proj"


def test_ranks_that_hold_products_take_no_codes(deepseek, tmp_path):
    with pytest.raises(NotSupported, match="loads no codes"):
        carnet.cross(deepseek / "v3", tmp_path / "never", to="trtllm", quantize="fp8")


def test_sums_of_products_round_as_the_true_sum_does():
    random = np.random.default_rng(3)
    # halves between two numbers of bf16, and what lies too near to them for a sum in f64
    left = np.concatenate([random.integers(1, 128, (3, 40)) * 2.0, np.ones((1, 40)), np.full((1, 40), 2.0**-90)])
    right = np.concatenate(
        [random.integers(1, 128, (3, 50)) * 1.0, np.ones((1, 50)), np.where(np.arange(50) % 3, 0, 2.0**-90)[None]]
    )
    found = products.nearest(left, right, "bf16").astype(np.float64)
    for row, column in product(range(40), range(50)):
        true = sum(Fraction(a) * Fraction(b) for a, b in zip(left[:, row].tolist(), right[:, column].tolist(), strict=True))
        bits = np.array(found[row, column], ml_dtypes.bfloat16).view(np.int16)
        near = [float((bits + step).astype(np.int16).view(ml_dtypes.bfloat16)) for step in (-1, 0, 1)]
        away = [abs(Fraction(each) - true) for each in near]
        assert away[1] == min(away)
        assert away.count(min(away)) == 1 or not bits & 1  # a tie goes to the even one


def test_a_layer_for_a_further_token_is_none_of_nvidia_s_ranks(tmp_path):
    source = GOLDENS / "megatron/deepseek_mtp_te_pp2"
    with pytest.raises(NotSupported) as caught:
        carnet.cross(source, tmp_path / "out", to="trtllm")
    assert "--drop" in str(caught.value)


def test_the_last_of_an_axis_are_told_from_where_a_box_begins():
    held = np.arange(2.0 * 5 * 3).reshape(2, 5, 3)  # of which the last two indices are what is meant
    for start in (0, 1):
        bits = held[:, 3 + start : 4 + start].astype(np.float32).view(np.uint32)
        assert not is_wrong("tail", [held], Box((0, start, 0), (2, 1, 3)), (2, 2, 3), bits, "f32", foreign=False).any()
        assert is_wrong("tail", [held], Box((0, 1 - start, 0), (2, 1, 3)), (2, 2, 3), bits, "f32", foreign=False).all()
