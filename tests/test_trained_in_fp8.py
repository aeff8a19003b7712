"""Megatron checkpoints with scales of their own: of training in FP8 with Transformer Engine, of ModelOpt after training."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import carnet
from carnet import api
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.plans import saved
from carnet.report.data import plan_data
from tests.te_states import FORMS, of_modelopt

pytestmark = pytest.mark.referee  # megatron-core saves the stores
GOLDENS = Path(__file__).parent / "goldens/megatron"
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
LAYERS = 4
HF = {  # module of Hugging Face -> of Megatron
    "self_attn.q_proj": LINEAR[0], "self_attn.k_proj": LINEAR[0], "self_attn.v_proj": LINEAR[0], "self_attn.o_proj": LINEAR[1],
    "mlp.gate_proj": LINEAR[2], "mlp.up_proj": LINEAR[2], "mlp.down_proj": LINEAR[3],
}  # fmt: skip
Scales = dict[tuple[str, ...], torch.Tensor]  # (module, layer[, expert]) -> of input, weight and output


def llama() -> dict[str, torch.Tensor]:
    """Return a golden's tensors under the names of Transformer Engine's spec, one for each layer."""
    full = load_file(GOLDENS / "llama_tp2pp2/full.safetensors")
    names = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    names["pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    for old, new in names.items():
        full = {name.replace(old, new): tensor for name, tensor in full.items()}
    return full


def stacked(full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as torch_dist has them: one for all layers, and one for all experts."""
    found = {name: tensor for name, tensor in full.items() if ".layers." not in name}
    for name in full:
        if not name.startswith("decoder.layers.0."):
            continue
        layers = [full[name.replace("layers.0.", f"layers.{layer}.")] for layer in range(LAYERS)]
        plain = name.replace("layers.0.", "layers.")
        if ".local_experts." not in name:
            found[plain] = torch.stack(layers)
        elif ".local_experts.0." in name:
            each = [
                torch.stack(
                    [full[name.replace("layers.0.", f"layers.{at}.").replace("experts.0.", f"experts.{e}.")] for e in range(4)]
                )
                for at in range(LAYERS)
            ]
            found[plain.replace("local_experts.0.", "experts.")] = torch.stack(each)
    return found


def scales_of(seed: int, places: list[tuple[str, ...]]) -> Scales:
    """Return scales that nothing could be computed to: larger magnitudes were seen than there are."""
    random = torch.Generator().manual_seed(seed)
    return {place: 100 + 200 * torch.rand(3, generator=random) for place in places}


DENSE = scales_of(1, [(module, str(layer)) for module in LINEAR for layer in range(LAYERS)])
SPARSE = scales_of(2, [(module, str(layer)) for module in LINEAR[:2] for layer in range(LAYERS)]) | scales_of(
    3, [(module, str(layer), str(expert)) for module in EXPERTS for layer in range(LAYERS) for expert in range(4)]
)


def states(scales: Scales, form: str) -> list[tuple[str, tuple[int, ...], tuple[int, ...], object]]:
    """Return the objects that megatron-core makes of states: key, offset, shape and value."""
    found = []
    for (module, *at), values in scales.items():
        offset = tuple(map(int, at))
        found.append((f"decoder.layers.{module}._extra_state", offset, (LAYERS, 4)[: len(at)], FORMS[form](values)))
    return found


def common(name: str, **changes: object) -> dict[str, Any]:
    said = torch.load(GOLDENS / name / "iter_0000001/common.pt", weights_only=False)
    args = argparse.Namespace(**{**vars(said["args"]), **changes})
    return {"args": args, "iteration": 1, "checkpoint_version": 3.0}


def save(root: Path, world: int, models: dict[str, tuple[Any, Any, Any]]) -> None:
    """Let megatron-core save models, with this many processes."""
    root.mkdir()
    torch.save(models, root / "models.pt")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fp8_ranks.py"))]
    given = [str(world), str(root / "meeting"), str(root / "models.pt"), str(root)]
    ranks = [subprocess.Popen([*command, str(rank), *given], stderr=subprocess.PIPE, text=True) for rank in range(world)]
    ends = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, ends


def modelopt(full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of quantizers as ModelOpt's make_sharded_tensors_for_checkpoint has it: a row for each layer."""
    found = {}
    for module in LINEAR:
        weights = full[f"decoder.layers.{module}.weight"].float().abs().amax(dim=(1, 2)).reshape(LAYERS, 1)
        found[f"decoder.layers.{module}.weight_quantizer._amax"] = weights * 1.5  # not what the weights say: it is read
        found[f"decoder.layers.{module}.input_quantizer._amax"] = torch.arange(1.0, 1 + LAYERS).reshape(LAYERS, 1) * len(module)
    for number, what in enumerate("kv"):
        amax = (torch.arange(1.0, 1 + LAYERS) * (3 + number)).bfloat16()
        found[f"decoder.layers.self_attention.core_attention.{what}_bmm_quantizer._amax"] = amax
    return found


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """The models, saved by one process and by two."""
    root = tmp_path_factory.mktemp("trained")
    args, tensors = common("llama_tp2pp2"), stacked(llama())
    sparse = common("mixtral_ep2"), stacked(load_file(GOLDENS / "mixtral_ep2/full.safetensors"))
    sparse[1].update(
        {"decoder.layers.self_attention.linear_qkv.layer_norm_weight": sparse[1].pop("decoder.layers.input_layernorm.weight")}
    )
    models = {form: (args, tensors, states(DENSE, form)) for form in FORMS}
    models["plain"] = (args, tensors, [])
    models["mixtral"] = (*sparse, states(SPARSE, "2.x"))
    quantizers = [(key, at, of, of_modelopt()) for key, at, of, _ in states(DENSE, "1.x")]
    models["modelopt"] = (args, {**tensors, **modelopt(tensors)}, quantizers)
    stale = {place: torch.tensor([values[0], 1e5, values[2]]) for place, values in DENSE.items()}
    models["stale"] = (args, tensors, states(stale, "2.x"))
    new = {place: torch.ones(3) for place in DENSE}
    models["new"] = (args, tensors, states(new, "2.x"))
    mixed = {place: torch.tensor([values[0], 1.0, values[2]]) for place, values in DENSE.items()}
    models["input alone"] = (args, tensors, states(mixed, "1.x"))
    broken = states(DENSE, "2.x")
    models["broken"] = (args, tensors, [*broken[:-1], (*broken[-1][:3], broken[-1][3][:-9].clone())])
    save(root / "one", 1, models)
    save(root / "two", 2, {name: models[name] for name in ("1.x", "2.x", "mixtral")})
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "carnet.json"}


def factor(scale: torch.Tensor) -> torch.Tensor:
    return torch.tensor(1.0) / scale


def coded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return codes as ModelOpt makes them under a scale: torch/export/quant_utils.py to_quantized_weight."""
    return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)


def hf(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def plain(stores):
    """The same model without scales, as Hugging Face has it."""
    assert carnet.cross(stores / "one/plain", stores / "plain-hf", to="hf").equal
    return hf(stores / "plain-hf")


@pytest.mark.parametrize("form", FORMS)
def test_what_was_trained_in_fp8_crosses_with_its_scales(form, stores, plain, tmp_path):
    verdict = carnet.cross(stores / "one" / form, tmp_path / "hf", to="hf", quantize="fp8")
    assert verdict.equal
    assert verdict.examination.quality.saturated == 0
    found = hf(tmp_path / "hf")
    for layer in range(LAYERS):
        for module, theirs in HF.items():
            name = f"model.layers.{layer}.{module}"
            scale = DENSE[theirs, str(layer)]
            assert torch.equal(found[f"{name}.input_scale"], factor(scale[0]))
            assert torch.equal(found[f"{name}.weight_scale"], factor(scale[1]))
            assert torch.equal(found[f"{name}.weight"].view(torch.uint8), coded(plain[f"{name}.weight"], factor(scale[1])))


@pytest.mark.parametrize(("form", "other"), [("1.x", "1.x"), ("2.x", "2.x"), ("1.x", "2.x"), ("mixtral", "mixtral")])
def test_one_process_and_several_ranks_give_the_same_bytes(form, other, stores, tmp_path):
    for way, wish in {"hf": {"to": "hf"}, "ranks": {"to": "trtllm", "tp": 2, "pp": 2}}.items():
        for side, store in {"one": stores / "one" / form, "two": stores / "two" / other}.items():
            assert carnet.cross(store, tmp_path / way / side, quantize="fp8", **wish).equal
        assert contents(tmp_path / way / "one") == contents(tmp_path / way / "two")


def test_ranks_of_tensorrt_have_the_scales_of_the_modules(stores, tmp_path):
    assert carnet.cross(stores / "one/2.x", tmp_path / "ranks", to="trtllm", tp=2, pp=2, quantize="fp8").equal
    theirs = dict(zip(("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"), LINEAR, strict=True)) | {
        "mlp.gate": LINEAR[2]
    }
    for rank in range(4):
        held = load_file(tmp_path / f"ranks/rank{rank}.safetensors")
        for layer in range(2):
            for module, name in theirs.items():
                scale = DENSE[name, str(layer + rank // 2 * 2)]
                place = f"transformer.layers.{layer}.{module}"
                if f"{place}.weight" not in held:
                    continue
                assert torch.equal(held[f"{place}.weights_scaling_factor"], factor(scale[1:2]))
                assert torch.equal(held[f"{place}.activation_scaling_factor"], factor(scale[:1]))
                assert held[f"{place}.weight"].dtype == torch.float8_e4m3fn


def legacy(root: Path, form: str, scales: Scales) -> Path:
    """Save the model as two tensor-parallel ranks, a file each; both have the states of all layers."""
    full = llama()
    for rank in range(2):
        mine: dict[str, object] = {}
        for name, tensor in full.items():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                mine[name] = tensor.chunk(2, 1)[rank].clone()
            elif name.endswith("linear_fc1.weight"):
                mine[name] = torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
            elif tensor.ndim == 2:
                mine[name] = tensor.chunk(2)[rank].clone()
            else:
                mine[name] = tensor
        for (module, layer), values in scales.items():
            given = values.clone()
            given[1] *= 1 + rank * (layer == "0")  # reduce_amax=False: one rank saw less
            mine[f"decoder.layers.{layer}.{module}._extra_state"] = FORMS[form](given)
        state = common("llama_tp2pp2", tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
        (root / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save({**state, "model": mine}, root / f"mp_rank_{rank:02d}/model_optim_rng.pt")
    return root


@pytest.mark.parametrize("form", FORMS)
def test_files_of_ranks_cross_as_a_store_does_and_the_largest_scale_serves_all(form, stores, tmp_path):
    ranks = legacy(tmp_path / "legacy", form, DENSE)
    for source, out in ((ranks, "a"), (stores / "one/2.x", "b")):
        assert carnet.cross(source, tmp_path / out, to="hf", quantize="fp8").equal
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def grouped(root: Path, form: str) -> Path:
    """Save a mixture of experts as two expert-parallel ranks of Transformer Engine's grouped layers: a state for all of a rank."""
    full = load_file(GOLDENS / "mixtral_ep2/full.safetensors")
    for rank in range(2):
        mine: dict[str, object] = {}
        for name, tensor in full.items():
            match = re.fullmatch(r"(.*\.mlp\.experts)\.local_experts\.(\d)\.(linear_fc[12])\.weight", name)
            if match is None:
                mine[name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")] = tensor
            elif int(match[2]) // 2 == rank:
                mine[f"{match[1]}.{match[3]}.weight{int(match[2]) % 2}"] = tensor
        for (module, layer, *_), values in SPARSE.items():
            given = values
            if module in EXPERTS:
                given = torch.stack([SPARSE[module, layer, str(2 * rank + at)] for at in range(2)], 1).reshape(-1)
            mine[f"decoder.layers.{layer}.{module.replace('experts.experts', 'experts')}._extra_state"] = FORMS[form](given)
        sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 2}
        state = common("mixtral_ep2", **sizes, expert_tensor_parallel_size=1)
        (root / f"mp_rank_00_{rank:03d}").mkdir(parents=True)
        torch.save({**state, "model": mine}, root / f"mp_rank_00_{rank:03d}/model_optim_rng.pt")
    return root


@pytest.mark.parametrize("form", FORMS)
def test_grouped_experts_have_the_scales_that_each_has_in_a_store(form, stores, tmp_path):
    for source, out in ((grouped(tmp_path / "grouped", form), "a"), (stores / "one/mixtral", "b")):
        assert carnet.cross(source, tmp_path / out, to="hf", quantize="fp8").equal
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_state_with_fewer_scales_than_experts_is_refused(tmp_path):
    root = grouped(tmp_path / "grouped", "2.x")
    file = root / "mp_rank_00_001/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.layers.1.mlp.experts.linear_fc2._extra_state"] = FORMS["2.x"](torch.ones(3) * 2)
    torch.save(state, file)
    with pytest.raises(BadCheckpoint, match="fewer products than the module") as refusal:
        api.plan(root, to="hf", quantize="fp8")
    assert "layers.1.mlp.experts.linear_fc2" in str(refusal.value)


def test_weights_that_need_a_scale_before_them_are_not_taken_for_the_models_own(tmp_path):
    root = legacy(tmp_path / "legacy", "2.x", DENSE)
    for file in root.glob("*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        state["model"]["decoder.layers.1.mlp.linear_fc1.input_quantizer._pre_quant_scale"] = torch.ones(64)
        torch.save(state, file)
    with pytest.raises(NotSupported, match="a tensor that carnet does not know") as refusal:
        api.plan(root, to="hf")
    assert "_pre_quant_scale" in str(refusal.value)


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0])
def test_a_quantizer_without_a_magnitude_is_refused(amax, tmp_path):
    root = legacy(tmp_path / "legacy", "2.x", DENSE)
    for file in root.glob("*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        state["model"]["decoder.layers.1.mlp.linear_fc1.input_quantizer._amax"] = torch.tensor(amax)
        torch.save(state, file)
    with pytest.raises(BadCheckpoint, match="not a magnitude") as refusal:
        api.plan(root, to="hf", quantize="fp8")
    assert "layers.1.mlp.linear_fc1.input_quantizer" in str(refusal.value)


def test_every_expert_has_the_scale_of_its_own_weights_and_the_input_that_all_can_bear(stores, tmp_path):
    assert carnet.cross(stores / "one/mixtral", tmp_path / "hf", to="hf", quantize="fp8").equal
    found = hf(tmp_path / "hf")
    for layer in range(LAYERS):
        for module, parts in zip(EXPERTS, (("w1", "w3"), ("w2",)), strict=True):
            held = [SPARSE[module, str(layer), str(expert)] for expert in range(4)]
            largest = max(factor(scale[0]) for scale in held)
            for expert, part in ((expert, part) for expert in range(4) for part in parts):
                name = next(
                    n for n in found if n.endswith(f"layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight_scale")
                )
                assert torch.equal(found[name], factor(held[expert][1]))
                assert torch.equal(found[name.replace("weight_scale", "input_scale")], largest)


def test_a_scale_that_is_too_small_for_the_weights_is_kept_and_what_it_costs_is_said(stores, plain, tmp_path):
    verdict = carnet.cross(stores / "one/stale", tmp_path / "hf", to="hf", quantize="fp8")
    assert verdict.equal
    scale = factor(torch.tensor(1e5))
    beyond = {name: (tensor.float().abs() / scale > 464).sum() for name, tensor in plain.items() if "_proj" in name}
    assert verdict.examination.quality.saturated == sum(beyond.values()) > 1000
    found = hf(tmp_path / "hf")
    assert {float(found[name]) for name in found if name.endswith("weight_scale")} == {float(scale)}
    worst = max(beyond, key=lambda name: plain[name].float().abs().max())
    at = plain[worst].float().abs().argmax()
    assert found[worst].view(torch.uint8).reshape(-1)[at] & 0x7F == 0x7E  # 448


def test_other_scales_than_those_of_training_are_found_out(stores, tmp_path):
    carnet.cross(stores / "one/2.x", tmp_path / "hf", to="hf", quantize="fp8")
    (tmp_path / "hf/carnet.json").unlink()
    file = next((tmp_path / "hf").glob("*.safetensors"))
    held = load_file(file)
    for name, what in (("o_proj.weight_scale", "doubled"), ("o_proj.input_scale", "activations: scales are doubled")):
        changed = {**held, f"model.layers.1.self_attn.{name}": held[f"model.layers.1.self_attn.{name}"] * 2}
        save_file(changed, file, {"format": "pt"})
        verdict = carnet.verify(stores / "one/2.x", tmp_path / "hf")
        assert not verdict.equal
        assert any(what in finding.what for finding in verdict.findings)
    save_file(held, file, {"format": "pt"})
    assert carnet.verify(stores / "one/2.x", tmp_path / "hf").equal


def test_what_a_person_names_counts_before_what_the_checkpoint_says(stores, tmp_path):
    amaxes = {f"model.layers.{at}.self_attn.q_proj.input_amax": torch.tensor(3.5) for at in range(LAYERS)}
    save_file(amaxes, tmp_path / "amax.safetensors")
    wish = {"to": "hf", "quantize": "fp8", "amax": tmp_path / "amax.safetensors"}
    assert carnet.cross(stores / "one/2.x", tmp_path / "hf", **wish).equal
    found = hf(tmp_path / "hf")
    for part in "qkv":
        assert found[f"model.layers.2.self_attn.{part}_proj.input_scale"] == torch.tensor(3.5) / 448
    assert torch.equal(found["model.layers.2.mlp.down_proj.input_scale"], factor(DENSE[LINEAR[3], "2"][0]))


def test_a_state_that_nothing_was_seen_in_is_no_scale(stores, tmp_path):
    with pytest.raises(BadRequest, match="nothing says how large the activations"):
        api.plan(stores / "one/new", to="hf", quantize="fp8")
    for name in ("plain", "input alone"):
        out = tmp_path / name
        wish = {"activations": "dynamic", "style": "compressed-tensors"}
        assert carnet.cross(stores / "one" / name, out, to="hf", quantize="fp8", **wish).equal
    assert contents(tmp_path / "plain") == contents(tmp_path / "input alone")  # the weights are measured
    assert carnet.cross(stores / "one/input alone", tmp_path / "static", to="hf", quantize="fp8").equal


@pytest.mark.parametrize("scheme", ["fp8", "fp8-channel", "fp8-block", "mxfp8"])
def test_other_schemes_and_styles_take_what_is_theirs(scheme, stores, plain, tmp_path):
    wish = {"to": "hf", "quantize": scheme, "style": "compressed-tensors"}
    assert carnet.cross(stores / "one/2.x", tmp_path / "trained", **wish).equal
    found = hf(tmp_path / "trained")
    if scheme == "fp8":
        scale = factor(DENSE[LINEAR[0], "1"]).bfloat16()
        assert found["model.layers.1.self_attn.k_proj.weight_scale"].item() == scale[1].item()
        assert found["model.layers.1.self_attn.k_proj.input_scale"].item() == scale[0].item()
    else:
        assert carnet.cross(stores / "one/plain", tmp_path / "plain", **wish).equal
        assert contents(tmp_path / "plain") == contents(tmp_path / "trained")


def test_without_a_wish_for_codes_states_are_left_behind_unread(stores, tmp_path):
    verdict = carnet.cross(stores / "one/broken", tmp_path / "hf", to="hf")
    assert verdict.equal
    assert len(verdict.examination.dropped["module extra state"]) == len(DENSE)
    with pytest.raises(BadCheckpoint, match=r"linear_fc2\._extra_state/shard_3_4") as refusal:
        api.plan(stores / "one/broken", to="hf", quantize="fp8")
    assert "pickle" in str(refusal.value)


def test_the_quantizers_of_modelopt_are_read_as_calibration(stores, tmp_path):
    assert carnet.cross(stores / "one/modelopt", tmp_path / "hf", to="hf", quantize="fp8", kv_cache="fp8").equal
    found, said = hf(tmp_path / "hf"), modelopt(stacked(llama()))
    for layer in range(LAYERS):
        for module, theirs in HF.items():
            name = f"model.layers.{layer}.{module}"
            for scale, quantizer in (("weight_scale", "weight_quantizer"), ("input_scale", "input_quantizer")):
                amax = said[f"decoder.layers.{theirs}.{quantizer}._amax"][layer]
                amax = amax.bfloat16().float() if scale == "weight_scale" else amax
                assert found[f"{name}.{scale}"] == amax / 448
        for what in "kv":
            amax = said[f"decoder.layers.self_attention.core_attention.{what}_bmm_quantizer._amax"][layer].float()
            assert found[f"model.layers.{layer}.self_attn.{what}_proj.{what}_scale"] == amax / 448


def test_nvfp4_takes_the_largest_magnitudes_of_modelopt_too(stores, tmp_path):
    assert carnet.cross(stores / "one/modelopt", tmp_path / "hf", to="hf", quantize="nvfp4").equal
    found, said = hf(tmp_path / "hf"), modelopt(stacked(llama()))
    amax = said[f"decoder.layers.{LINEAR[3]}.weight_quantizer._amax"][2].bfloat16().float()
    assert found["model.layers.2.mlp.down_proj.weight_scale_2"] == amax / 2688
    amax = said[f"decoder.layers.{LINEAR[3]}.input_quantizer._amax"][2]
    assert found["model.layers.2.mlp.down_proj.input_scale"] == amax / 2688


def test_the_state_of_quantizers_is_dropped_by_name_where_nothing_is_quantized(stores, tmp_path):
    verdict = carnet.cross(stores / "one/modelopt", tmp_path / "hf", to="hf")
    assert verdict.equal
    assert set(verdict.examination.dropped["quantizer state"]) == set(modelopt(stacked(llama())))
    assert carnet.cross(stores / "one/plain", tmp_path / "plain", to="hf").equal
    assert contents(tmp_path / "hf") == contents(tmp_path / "plain")


def test_scales_that_are_dropped_are_found_anew(stores, tmp_path):
    wish = {"to": "hf", "quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic"}
    assert carnet.cross(stores / "one/plain", tmp_path / "plain", **wish).equal
    for name, pattern in (("2.x", "*_extra_state*"), ("broken", "*_extra_state*"), ("modelopt", "*_quantizer*")):
        assert carnet.cross(stores / "one" / name, tmp_path / name, **wish, drop=(pattern,)).equal
        assert contents(tmp_path / name) == contents(tmp_path / "plain")
    ranks = legacy(tmp_path / "legacy", "1.x", DENSE)
    assert carnet.cross(ranks, tmp_path / "ranks", **wish, drop=("*_extra_state",)).equal
    assert contents(tmp_path / "ranks") == contents(tmp_path / "plain")


def test_a_plan_with_scales_is_saved_whole(stores, tmp_path):
    made = api.plan(stores / "one/2.x", to="hf", quantize="fp8")
    saved.save(made, tmp_path / "plan")
    assert saved.load(tmp_path / "plan") == made
    api.run(tmp_path / "plan", tmp_path / "hf")
    assert carnet.verify(stores / "one/2.x", tmp_path / "hf").equal


def test_the_plan_says_where_scales_come_from(stores):
    for name, expected in (("2.x", 28), ("input alone", 0)):
        made = api.plan(stores / "one" / name, to="hf", quantize="fp8")
        assert plan_data(made)["quantized"]["scales of the checkpoint"] == expected
