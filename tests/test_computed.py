"""Tensors that a target computes: their numbers, what is found where one is wrong, and that they do not come back.

NVIDIA's converter is the referee of Mamba's -exp(A_log), by way of torch: what the two differ in is said here.
"""

import json
from decimal import Context, Decimal
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

import carnet
from carnet.errors import BadRequest, NotSupported
from carnet.executor import functions
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
