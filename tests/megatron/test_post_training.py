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
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import carnet
from carnet.dialects.megatron.heads import config_of
from carnet.dialects.vocabulary import Vocabulary
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from tests.megatron.conftest import BASE
from tests.megatron.test_newest import NEWEST
from tests.megatron.trained_by_modelopt import JOBS

pytestmark = [pytest.mark.referee, pytest.mark.skipif(NEWEST is None, reason="`make test` fetches it")]
ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("trained_by_modelopt.py")

MODELOPT = {  # modelopt/torch/speculative/eagle/default_config.py, the words that the head is made by
    "num_hidden_layers": 1,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "use_aux_hidden_state": True,
    "use_last_layernorm": True,
}


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
    assert carnet.cross(folder / "eagle", folder / "eagle.hf", to="hf").equal
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
        for each in said if name == "dense" else ():  # of what is off ModelOpt names the part of the model, or a pattern of it
            inner = each.get("quantization_config") or each["quantization"]
            plain = {module.removesuffix("*") for module in inner.pop("ignore", None) or inner.pop("exclude_modules")}
            assert plain - {"model.layers.1.mlp.down_proj"} == {"lm_head", "model.embed_tokens", "model.layers.1.mlp"}
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


def test_modules_whose_quantizers_are_off_stay_plain_though_they_saw_magnitudes(trained):
    held = tensors(trained / "dense.carnet")
    off = {name for name in held if ".1.mlp." in name}
    assert off == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert {held[name].dtype for name in off} == {torch.bfloat16}
    told = carnet.plan(trained / "dense", to="hf", quantize="fp8").notes["left plain"]
    assert told == "model.layers.1.mlp.down_proj and 2 more, whose quantizers were off"


def test_codes_of_a_module_whose_quantizers_are_off_are_a_finding(trained, tmp_path):
    assert carnet.cross(trained / "dense", tmp_path / "all", to="hf", quantize="fp8", drop=("*_extra_state*",)).equal
    (tmp_path / "all/carnet.json").unlink()
    found = {finding.stored: finding.what for finding in carnet.verify(trained / "dense", tmp_path / "all").findings}
    off = {f"model.layers.1.mlp.{part}_proj.weight": "coded, and its quantizer was off" for part in ("gate", "up", "down")}
    assert found.items() >= off.items()
    assert len(found) == len(off)


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


def test_a_student_crosses_as_the_model_that_it_was_before_its_distillation(trained, tmp_path):
    assert carnet.cross(trained / "student", tmp_path / "hf", to="hf").equal
    left = carnet.plan(trained / "student", to="hf").dropped["losses of a distillation"]
    assert left == tuple(f"_loss_modules.0._projection._fit.{end}" for end in ("bias", "weight"))
    assert carnet.cross(trained / "student.before", tmp_path / "before", to="hf").equal
    ours, before = tensors(tmp_path / "hf"), tensors(tmp_path / "before")
    assert ours.keys() == before.keys()
    assert all(torch.equal(held, before[name]) for name, held in ours.items())


def test_medusa_heads_are_refused_by_name_and_the_model_crosses_without_them(saved, tmp_path):
    name = "medusa_heads.0.lm_head.weight"

    def with_head(state):
        state[name] = ShardedTensor.from_rank_offsets(name, torch.ones(8, 4))

    store = saved(BASE, lambda config, stage: get_gpt_modelopt_spec(config, remap_te_layernorm=True), with_head)
    with pytest.raises(NotSupported) as refusal:
        carnet.plan(store, to="hf")
    pattern = "*medusa_heads.*"
    assert f"--drop '{pattern}'" in refusal.value.remedy
    assert carnet.cross(store, tmp_path / "out", to="hf", drop=(pattern,)).equal


@pytest.fixture(scope="module")
def head(trained):
    """The folder of the head."""
    out = trained / "eagle.carnet"
    assert carnet.cross(trained / "eagle", out, to="hf", family="eagle3").equal
    return out


def test_the_tensors_are_those_of_modelopts_exporter_and_the_tokens_that_it_forgets(head, trained):
    ours, theirs = tensors(head), tensors(trained / "eagle.modelopt")
    assert ours.keys() - theirs.keys() == {"d2t"}  # it asks whether there is a "dt2"
    assert ours["d2t"].tolist() == [3 * token for token in range(32)]
    assert theirs.keys() <= ours.keys()
    assert all(torch.equal(ours[name], held) for name, held in theirs.items())
    said = [json.loads((folder / "config.json").read_text()) for folder in (head, trained / "eagle.modelopt")]
    template = {"rms_norm_eps", "torch_dtype", "rope_theta", "eagle_aux_hidden_state_layer_ids"}  # of a Llama that it asks for
    assert {key for key in said[0] if said[0][key] != said[1].get(key)} <= template
    assert said[0]["eagle_aux_hidden_state_layer_ids"] == [1, 2]  # vLLM's numbers of what leaves layers 0 and 1
    assert said[0]["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1]


def test_transformers_modules_compute_with_it_what_the_head_computes(head, trained):
    held = {name: tensor.float() for name, tensor in load_file(head / "model.safetensors").items()}
    asked = torch.load(trained / "eagle.pt")
    config = AutoConfig.from_pretrained(head, attn_implementation="eager")
    layer, norm = LlamaDecoderLayer(config, 0), LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    layer.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    for part in "qkv":
        made = getattr(layer.self_attn, f"{part}_proj")
        setattr(layer.self_attn, f"{part}_proj", torch.nn.Linear(2 * made.in_features, made.out_features, bias=False))
    inside = {name.removeprefix("midlayer."): tensor for name, tensor in held.items() if name.startswith("midlayer.")}
    layer.load_state_dict(inside)
    norm.load_state_dict({"weight": held["norm.weight"]})
    token, states = (asked[name].transpose(0, 1) for name in ("token", "states"))
    future = torch.full((16, 16), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        stream = states @ held["fc.weight"].T
        both = torch.cat([layer.input_layernorm(token), layer.hidden_norm(stream)], -1)
        turned = LlamaRotaryEmbedding(config)(both, torch.arange(16)[None])
        stream = stream + layer.self_attn(both, position_embeddings=turned, attention_mask=future)[0]
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        logits = norm(stream) @ held["lm_head.weight"].T
    torch.testing.assert_close(stream.transpose(0, 1), asked["following"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits.transpose(0, 1), asked["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fc.weight", "midlayer.self_attn.k_proj.weight", "midlayer.hidden_norm.weight", "d2t"])
def test_a_head_with_a_number_exchanged_is_found(name, head, trained, tmp_path):
    spoiled = shutil.copytree(head, tmp_path / "spoiled")
    (spoiled / "carnet.json").unlink()
    held = load_file(spoiled / "model.safetensors")
    flat = held[name].view(-1)
    flat[[3, 4]] = flat[[4, 3]]
    save_file(held, spoiled / "model.safetensors", {"format": "pt"})
    verdict = carnet.verify(trained / "eagle", spoiled, family="eagle3")
    assert {finding.stored for finding in verdict.findings} == {name}


def test_the_model_crosses_without_its_head_and_says_so(trained, tmp_path):
    plan = carnet.plan(trained / "eagle", to="hf")
    assert len(plan.dropped["a head of EAGLE, which --as eagle3 takes"]) == 11
    assert "modelopt_state" in carnet.inspect(trained / "eagle").checkpoint.notes
    assert carnet.inspect(trained / "eagle").checkpoint.notes["modelopt_state"].startswith("eagle: num_hidden_layers 1, ")
    with pytest.raises(CarnetError):
        carnet.plan(trained / "eagle", to="trtllm", family="eagle3")
    with pytest.raises(CarnetError):
        carnet.plan(trained / "eagle", to="megatron", family="eagle3")
    with pytest.raises(BadCheckpoint, match="nothing says how the head of EAGLE is made"):
        carnet.plan(trained / "dense", to="hf", family="eagle3")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"use_aux_hidden_state": False}, "use_aux_hidden_state"),
        ({"use_last_layernorm": False}, "use_last_layernorm"),
        ({"parallel_draft_step": 3}, "parallel_draft_step"),
    ],
)
def test_a_head_of_another_kind_is_refused_by_name(more, named):
    with pytest.raises(NotSupported, match=named):
        config_of(BASE, None, {"eagle_architecture_config": MODELOPT | more}, "here")


@pytest.mark.parametrize(
    ("more", "size"), [({}, None), ({"has_lm_head": True}, 61), ({"draft_vocab_size": 64, "has_lm_head": True}, 61)]
)
def test_a_head_that_guesses_among_all_tokens_says_so(more, size):
    vocabulary = Vocabulary(61, 64, "the tokenizer")
    assert config_of(BASE, vocabulary, {"eagle_architecture_config": MODELOPT | more}, "here")["draft_vocab_size"] == size


def test_a_base_of_frequencies_that_nobody_says_is_not_made_up():
    with pytest.raises(BadCheckpoint, match="does not say 'rope_theta'"):
        config_of(BASE, None, {"eagle_architecture_config": MODELOPT | {"rope_theta": None}}, "here")


@pytest.mark.parametrize("layers", [[1, 1], [-1, 0], [0, 4], ["0", 1], [0.0, 1.0], "01"])
def test_layers_that_the_model_has_not_are_refused(layers):
    made = MODELOPT | {"eagle_aux_hidden_state_layer_ids": layers}
    with pytest.raises(BadCheckpoint, match="names layers that the model of a head of EAGLE has not"):
        config_of(BASE, None, {"eagle_architecture_config": made}, "here")


def test_vocabulary_layers_and_type_of_a_head_are_those_of_its_model_and_not_what_was_typed(trained, tmp_path):
    store = shutil.copytree(trained / "eagle", tmp_path / "store")
    place = store / "iter_0000001/common.pt"
    said = torch.load(place, weights_only=False)
    said["args"].__dict__.update(vocab_size=100, tokenizer_type="HuggingFaceTokenizer", num_layers=6)  # 2 are stored
    torch.save(said, place)
    state = store / "iter_0000001/modelopt_state/common.pt"
    modes = torch.load(state, weights_only=False)
    modes["modelopt_state_dict"][0][1]["config"]["eagle_architecture_config"]["torch_dtype"] = "float16"  # the model is not
    torch.save(modes, state)
    words = {"to": "hf", "family": "eagle3", "accept": ("pruned",)}
    with pytest.raises(BadRequest, match="do not say how many tokens the vocabulary has"):
        carnet.plan(store, **words)
    assert carnet.cross(store, tmp_path / "head", **words, vocab_size=120).equal
    said = json.loads((tmp_path / "head/config.json").read_text())
    assert (said["vocab_size"], said["torch_dtype"], said["eagle_aux_hidden_state_layer_ids"]) == (120, "bfloat16", [1, 2])
