"""What ModelOpt trained in Megatron on two ranks crosses as ModelOpt itself exports it from one.

The models are megatron-core's, the quantizers, the state and the export are ModelOpt's; its exporter runs on a CPU, without tensor
parallelism, and with a megatron-core that has the class HybridModel.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import NotSupported
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from tests.megatron.conftest import BASE
from tests.megatron.test_newest import NEWEST
from tests.megatron.trained_by_modelopt import JOBS

pytestmark = [pytest.mark.referee, pytest.mark.skipif(NEWEST is None, reason="`make test` fetches it")]
ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("trained_by_modelopt.py")


def start(*words, paths=()):
    """Start the program of ModelOpt's."""
    path = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "src")))
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*programs):
    """Wait for programs that must not fail."""
    try:
        for program in programs:
            said = program.communicate(timeout=300)[0]
            assert program.returncode == 0, said[-4000:]
    finally:
        for program in programs:
            program.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what two ranks saved of each job, what carnet makes of it, and what ModelOpt does."""
    folder = tmp_path_factory.mktemp("trained")
    finish(*(start("train", folder, rank) for rank in range(2)))
    for name, job in JOBS.items():
        assert carnet.cross(folder / name, folder / f"{name}.hf", to="hf").equal
        assert carnet.cross(folder / name, folder / f"{name}.carnet", to="hf", quantize=job.scheme).equal
    finish(start("export", folder, paths=[NEWEST]))
    return folder


def tensors(folder):
    """Return the tensors of a folder; ModelOpt gives a scale that was loaded an axis of one, and one that it has just found none."""
    found = {name: held for file in folder.glob("*.safetensors") for name, held in load_file(file).items()}
    return {name: held.reshape(()) if name.endswith("input_scale") else held for name, held in found.items()}


def bits(tensor):
    """Return the bytes of a tensor."""
    return tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("name", JOBS)
def test_what_is_fake_quantized_crosses_as_modelopt_exports_it(name, trained):
    ours, theirs = tensors(trained / f"{name}.carnet"), tensors(trained / f"{name}.modelopt")
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("input_scale") for name in ours)
    differ = [name for name, held in ours.items() if held.dtype != theirs[name].dtype or bits(held) != bits(theirs[name])]
    assert differ == []
    for file in ("config.json", "hf_quant_config.json"):
        said = [json.loads((trained / f"{name}.{whose}" / file).read_text()) for whose in ("carnet", "modelopt")]
        assert said[0].get("quantization_config") == said[1].get("quantization_config")
        assert file == "config.json" or said[0] == said[1]


def test_the_magnitudes_are_those_that_training_went_by_and_not_those_of_the_weights(trained):
    weights, codes = tensors(trained / "dense.hf"), tensors(trained / "dense.carnet")
    outgrown = [
        name
        for name in weights
        if f"{name}_scale" in codes and weights[name].float().abs().max() > codes[f"{name}_scale"] * 448 * 1.01
    ]
    assert outgrown  # by one step


def test_what_modelopt_did_is_told(trained):
    said = {name: carnet.inspect(trained / name).checkpoint for name in JOBS}
    version = said["dense"].notes["modelopt_state"].split("(")[1]
    assert version.startswith("ModelOpt 0.")
    assert said["dense"].notes["modelopt_state"].startswith("quantize: weights e4m3, inputs e4m3 (")
    blocks = "e2m1 in blocks of 16 under e4m3"
    assert said["mixture"].notes["modelopt_state"].startswith(f"quantize: weights {blocks}, inputs {blocks} (")
    assert [each.trained_as for each in said.values()] == [("fp8",), ("nvfp4",)]


def test_a_plan_says_what_the_weights_were_trained_as(trained):
    told = {
        scheme: carnet.plan(trained / "dense", to="hf", quantize=scheme).notes.get("trained as")
        for scheme in (None, "fp8", "nvfp4")
    }
    assert told["fp8"] is None
    assert told[None] == "fp8, and written as plain weights: --quantize fp8 takes what its quantizers saw along"
    assert told["nvfp4"] == "fp8, and written as nvfp4: the magnitudes that its quantizers saw go along"


@pytest.mark.parametrize("end", ["input_scale", "weight_scale", "weight_scale_2"])
def test_a_magnitude_of_the_neighbour_is_a_finding(end, trained, tmp_path):
    name = "mixture" if end == "weight_scale_2" else "dense"
    spoiled = shutil.copytree(trained / f"{name}.carnet", tmp_path / "spoiled")
    (spoiled / "carnet.json").unlink()
    held = load_file(spoiled / "model.safetensors")
    ours, neighbour = (f"model.layers.{layer}.self_attn.o_proj.{end}" for layer in range(2))
    assert held[ours] != held[neighbour]
    held[ours] = held[neighbour].clone()
    save_file(held, spoiled / "model.safetensors", {"format": "pt"})
    verdict = carnet.verify(trained / name, spoiled)
    assert any(ours in finding.stored for finding in verdict.findings)


@pytest.mark.parametrize(
    "name", ["eagle_module.decoder.layers.0.self_attention.linear_qkv.weight", "medusa_heads.0.lm_head.weight"]
)
def test_heads_that_guess_tokens_are_refused_by_name_and_the_model_crosses_without_them(name, saved, tmp_path):
    def with_head(state):
        state[name] = ShardedTensor.from_rank_offsets(name, torch.ones(8, 4))

    store = saved(BASE, lambda config, stage: get_gpt_modelopt_spec(config, remap_te_layernorm=True), with_head)
    with pytest.raises(NotSupported) as refusal:
        carnet.plan(store, to="hf")
    pattern = f"*{name.split('.')[0]}.*"
    assert f"--drop '{pattern}'" in refusal.value.remedy
    assert carnet.cross(store, tmp_path / "out", to="hf", drop=(pattern,)).equal
