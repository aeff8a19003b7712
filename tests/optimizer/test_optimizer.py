"""An optimizer's state crosses: the real megatron-core loads it on another cut and trains on as if it had never stopped."""

import io
import json
import shutil
import warnings
from argparse import Namespace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import carnet
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.formats.training import training_of
from carnet.plans.options import BadOption
from tests.megatron.test_newest import NEWEST
from tests.optimizer.conftest import train

pytestmark = pytest.mark.referee
TP2 = {"tp": 2}
# as MiMo has it; of norms of 32 elements megatron-core 0.16.1 cannot save the buckets of such a layer
FURTHER = {"mtp": 1, "arguments": {"add_qkv_bias": True, "hidden_size": 64, "kv_channels": 16}}
EP2 = {"dp": 2, "ep": 2, "mixture": 1}
BRING = {"to": "megatron", "spelling": "local", "also": "optimizer"}
GOLDENS = Path(__file__).parents[1] / "goldens"
BUCKETS = GOLDENS / "megatron/llama_dist"


@pytest.mark.parametrize(
    ("name", "job", "cut", "on"),
    [
        ("tp2", TP2, {"pp": 2}, {"pp": 2}),
        ("tp2", TP2, {"tp": 4}, {"tp": 4}),
        ("ep2", EP2, {}, {"mixture": 1}),
        ("buckets", {**TP2, "dp": 2, "form": "dp_reshardable", "ddp": {"bucket_size": 5000}}, {"pp": 2}, {"pp": 2}),
        ("virtual", {"pp": 2, "vpp": 2, "form": "dp_reshardable"}, {}, {}),
        ("further", {"pp": 2, "vpp": 2, "layout": "Et|tt|t|mL", "form": "dp_reshardable", **FURTHER}, {}, FURTHER),
        ("tied", {"pp": 2, "tied": 1, "form": "dp_reshardable"}, {"tp": 2}, {"tp": 2, "tied": 1}),
        ("plain", {**TP2, "form": "plain", "bf16": 1}, {"pp": 2}, {"pp": 2, "bf16": 1}),
        ("plain f32", {**TP2, "form": "plain"}, {}, {}),
        ("fsdp", {**TP2, "form": "fsdp_dtensor", "bf16": 1}, {"pp": 2}, {"pp": 2, "bf16": 1}),
    ],
)
def test_a_training_goes_on_with_the_losses_of_one_that_never_stopped(name, job, cut, on, trained, tmp_path):
    source, losses = trained(name, **job)
    assert carnet.cross(source, tmp_path / "cut", **BRING, **cut).equal
    assert carnet.verify(tmp_path / "cut").equal
    done = train(tmp_path, "on", steps=3, load=str(tmp_path / "cut"), **on)
    assert done["first"] == 3
    assert done["losses"] == pytest.approx(losses, abs=3e-6 if "bf16" not in on else 1e-3)


def every(folder):
    """Return every tensor of a store, as torch reads it."""
    reader = FileSystemReader(folder)
    held = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if hasattr(each, "size")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(held, storage_reader=reader, no_dist=True)
    return held


def test_what_megatron_fsdp_keeps_of_experts_is_joined(trained, tmp_path):
    source, _ = trained("fsdp ep2", **EP2, form="fsdp_dtensor", bf16=1)
    carnet.cross(source, tmp_path / "cut", **BRING, ep=2)
    theirs, ours = (every(folder / "iter_0000003") for folder in (source, tmp_path / "cut"))
    experts = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    for plane in ("param", "exp_avg", "exp_avg_sq"):
        whole = ours[f"optimizer.state.{plane}.{experts}"]
        for layer, expert, (half, at) in product(range(4), range(4), (("_w", slice(48)), ("_v", slice(48, None)))):
            inside = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight{half}"
            name = f"model.module.{inside}" if plane == "param" else f"optimizer.state.module.module.module.{inside}.{plane}"
            assert torch.equal(whole[layer, expert, at], theirs[name])
    assert torch.equal(ours[experts], ours[f"optimizer.state.param.{experts}"].bfloat16())


def test_experts_get_an_optimizer_of_their_own_where_ranks_share_them(trained, tmp_path):
    source, losses = trained("ep2", **EP2)
    assert carnet.cross(source, tmp_path / "one", **BRING).equal
    assert carnet.cross(tmp_path / "one", tmp_path / "two", **BRING, tp=2, ep=2).equal
    done = train(tmp_path, "on", steps=3, load=str(tmp_path / "two"), **EP2)
    assert done["losses"] == pytest.approx(losses, abs=3e-6)


def test_buckets_of_experts_give_what_the_same_run_saved_in_the_shapes_of_its_weights(trained, tmp_path):
    names = {"whole": "ep2", "buckets": "ep2 buckets"}
    for form, name in names.items():
        source, _ = trained(name, **EP2, **({} if form == "whole" else {"form": "dp_reshardable"}))
        assert carnet.cross(source, tmp_path / form, **BRING, tp=2).equal
    held = {form: sorted((tmp_path / form / "iter_0000003").glob("*.distcp")) for form in names}
    assert [file.name for file in held["whole"]] == [file.name for file in held["buckets"]]
    assert [file.read_bytes() for file in held["whole"]] == [file.read_bytes() for file in held["buckets"]]


@pytest.mark.skipif(NEWEST is None, reason="`make test` fetches it")
def test_a_training_with_the_newest_megatron_core_goes_on(trained, tmp_path):
    source, losses = trained("newest", newest=True, form="dp_reshardable")
    assert carnet.cross(source, tmp_path / "cut", **BRING, tp=2).equal
    done = train(tmp_path, "on", newest=True, steps=3, load=str(tmp_path / "cut"))
    assert done["losses"] == pytest.approx(losses, abs=3e-6)


def test_a_training_with_megatron_core_0_13_goes_on(tmp_path):
    """Of two tensor-parallel ranks and four copies: each rank has an interval of what a tensor-parallel rank has of a weight."""
    source = GOLDENS / "optimizer/v0131_model_space"
    moment = open_checkpoint(source, bool).tensors["", "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"]
    assert {chunk.box.shape[-1] for chunk in moment.chunks} == {416, 352, 768}  # they end within a weight
    assert carnet.cross(source, tmp_path / "cut", **BRING).equal
    narrow = {"num_layers": 2, "vocab_size": 128, "padded_vocab_size": 128}
    done = train(tmp_path, "on", steps=3, load=str(tmp_path / "cut"), arguments=narrow)
    assert done["losses"] == pytest.approx(json.loads((source / "losses.json").read_text())["losses"][3:], abs=3e-6)


def test_buckets_whose_parameters_lie_elsewhere_are_refused(tmp_path):
    shutil.copytree(BUCKETS, tmp_path / "shifted")
    name = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"
    file, offset, tensor = stored(tmp_path / "shifted/iter_0000001", name)
    put(file, offset, tensor.roll(1))
    with pytest.raises(NotSupported, match="the buckets of the optimizer's state are not those of these parameters"):
        carnet.plan(tmp_path / "shifted", **BRING)


def test_a_moment_s_bucket_that_is_shifted_by_an_element_is_found(tmp_path):
    shutil.copytree(BUCKETS, tmp_path / "shifted")
    assert carnet.cross(BUCKETS, tmp_path / "cut", **BRING, tp=2).equal
    name = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg_sq"
    file, offset, tensor = stored(tmp_path / "shifted/iter_0000001", name)
    put(file, offset, tensor.roll(1))
    verdict = carnet.verify(tmp_path / "shifted", tmp_path / "cut", also="optimizer")
    where = {place for finding in verdict.findings for place in finding.where.split(", ")}
    assert where
    assert all(place.startswith("exp_avg_sq:") for place in where)


def test_what_it_holds_and_what_it_leaves_behind(trained, tmp_path):
    source, _ = trained("tp2", **TP2)
    carnet.cross(source, tmp_path / "cut", **BRING, pp=2)
    [folder] = (tmp_path / "cut").glob("iter_*")
    assert folder.name == "iter_0000003"
    ours = torch.load(folder / "common.pt", weights_only=False)
    theirs = torch.load(source / "iter_0000003/common.pt", weights_only=False)
    same = ("optimizer", "opt_param_scheduler", "iteration", "num_floating_point_operations_so_far", "content_metadata")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert isinstance(ours["args"], Namespace)
    assert (ours["args"].consumed_train_samples, ours["args"].no_save_rng) == (12, True)
    every = open_checkpoint(tmp_path / "cut")
    there = {name for _, name in open_checkpoint(source).tensors}
    assert {name for _, name in every.tensors} == there


def stored(folder, name):
    """Return a chunk of a tensor: its file, the place of its bytes, and itself, as torch reads it."""
    metadata = FileSystemReader(folder).read_metadata()
    place, at = next((at, index) for index, at in metadata.storage_data.items() if index.fqn == name)
    raw = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    tensor = torch.load(io.BytesIO(raw))
    held = tensor.contiguous().numpy().tobytes()
    assert raw.count(held) == 1, at
    return folder / place.relative_path, place.offset + raw.index(held), tensor


def put(file, offset, tensor):
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(tensor.contiguous().numpy().tobytes())


def exchanged(folder):
    """Exchange the two moments of the head."""
    places = [stored(folder, f"optimizer.state.{plane}.output_layer.weight") for plane in ("exp_avg", "exp_avg_sq")]
    for (file, offset, _), (_, _, other) in zip(places, reversed(places), strict=True):
        put(file, offset, other)


def shifted(folder):
    """Shift a master weight by one element."""
    file, offset, tensor = stored(folder, "optimizer.state.param.embedding.word_embeddings.weight")
    put(file, offset, tensor.flatten().roll(1))


def common(change):
    def damage(folder):
        said = torch.load(folder / "common.pt", weights_only=False)
        change(said)
        torch.save(said, folder / "common.pt")

    return damage


def step(said):
    for group in said["optimizer"]["optimizer"]["param_groups"]:
        group["step"] = 1


DAMAGES = {
    "a moment and the other": (exchanged, "exp_avg:head"),
    "a shift": (shifted, "param:embed"),
    "the step": (common(step), "training state"),
    "the schedule": (common(lambda said: said["opt_param_scheduler"].update(num_steps=0)), "training state"),
    "a group": (common(lambda said: said["optimizer"]["optimizer"]["param_groups"].pop()), "training state"),
    "the samples": (common(lambda said: setattr(said["args"], "consumed_train_samples", 0)), "training state"),
    "all of it": (common(lambda said: said.pop("optimizer")), "training state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_and_named(damage, trained, tmp_path):
    source, _ = trained("tp2", **TP2)
    carnet.cross(source, tmp_path / "cut", **BRING, pp=2)
    plant, where = DAMAGES[damage]
    plant(tmp_path / "cut/iter_0000003")
    verdict = carnet.verify(source, tmp_path / "cut", also="optimizer")
    assert where in {place for finding in verdict.findings for place in finding.where.split(", ")}


def test_a_group_that_experts_lack_is_found(trained, tmp_path):
    source, _ = trained("fsdp ep2", **EP2, form="fsdp_dtensor", bf16=1)
    assert carnet.cross(source, tmp_path / "cut", **BRING, ep=2).equal

    def without(said):
        for each in said["optimizer"].values():  # of the experts' optimizer alone: of those that ranks share
            groups = each["optimizer"]["param_groups"]
            groups.remove(next(group for group in groups if group["is_expert_parallel"] and group["wd_mult"]))

    common(without)(tmp_path / "cut/iter_0000003")
    findings = carnet.verify(source, tmp_path / "cut", also="optimizer").findings
    assert [finding.what for finding in findings if finding.where == "training state"] == ["missing"]


def test_a_weight_in_f32_among_others_stays_so(trained, tmp_path):
    """Which is its own master, and the others are not."""
    source, _ = trained("plain", **TP2, form="plain", bf16=1)
    shutil.copytree(source, tmp_path / "mixed", ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    held, name = every(source / "iter_0000003"), "decoder.final_layernorm.weight"
    held[name] = held.pop(f"optimizer.state.fp32_param.{name}") + 1 / 999
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(held, storage_writer=FileSystemWriter(tmp_path / "mixed/iter_0000003"), no_dist=True)
    assert carnet.cross(tmp_path / "mixed", tmp_path / "cut", **BRING).equal
    ours = every(tmp_path / "cut/iter_0000003")
    assert torch.equal(ours[name], held[name])
    assert torch.equal(ours[f"optimizer.state.param.{name}"], held[name])
    assert ours["output_layer.weight"].dtype == torch.bfloat16


def test_what_has_no_optimizer_s_state_or_no_place_for_it_is_refused(trained, tmp_path):
    source, _ = trained("tp2", **TP2)
    with pytest.raises(BadOption, match="also is for a target of the kind 'megatron'"):
        carnet.plan(source, to="hf", also="optimizer")
    with pytest.raises(BadRequest, match="a training goes on with the weights that it has"):
        carnet.plan(source, **BRING, dtype="bf16")
    assert carnet.cross(source, tmp_path / "hf", to="hf").equal
    with pytest.raises(BadRequest, match="no optimizer's state is here"):
        carnet.plan(tmp_path / "hf", **BRING)
    assert carnet.cross(source, tmp_path / "bare", to="megatron", spelling="local").equal
    with pytest.raises(BadRequest, match="no optimizer's state is here"):
        carnet.plan(tmp_path / "bare", **BRING)
    shutil.copytree(source, tmp_path / "half")
    common(lambda said: said.pop("optimizer"))(tmp_path / "half/iter_0000003")
    with pytest.raises(BadRequest, match="no optimizer's state is here") as refused:
        carnet.plan(tmp_path / "half", **BRING)
    assert refused.value.facts["lacking"] == "step and groups of parameters"


@pytest.mark.parametrize(
    ("more", "iteration", "what"),
    [
        ({"wd_mult": {"a": 1}}, 3, "which group of parameters is which"),
        ({"step": [3]}, 3, "which group of parameters is which"),
        ({}, -3, "how far the training is"),
        ({}, 10**30, "how far the training is"),
    ],
)
def test_a_training_that_makes_no_sense_is_refused(more, iteration, what):
    said = {"optimizer": {"param_groups": [{"step": 3, **more}]}, "opt_param_scheduler": {}, "iteration": iteration}
    with pytest.raises(BadCheckpoint, match=what):
        training_of(said, {}, "here")
