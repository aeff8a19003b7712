"""Pruned models whose saved arguments are those of the model that they were cut from.

They are megatron-core's, built at the widths that pruning leaves and saved as Megatron-LM's prune.py does; and a GPT and a hybrid that
ModelOpt itself prunes, of modules that stand in for Transformer Engine's, which has no build for a CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from transformers import AutoModelForCausalLM

import carnet
from carnet.errors import BadCheckpoint, CarnetError
from tests.megatron.conftest import BASE, HYBRID, MOE, TOKENS, filled, logits, save
from tests.megatron.pruned_by_modelopt import JOBS
from tests.megatron.test_newest import NEWEST

pytestmark = [pytest.mark.referee, pytest.mark.usefixtures("megatron_world")]
LLAMA = {"hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 2, "num_layers": 3}
MIXED = {**BASE, **MOE, "qk_layernorm": True}
HYBRIDS = {**HYBRID, "hybrid_override_pattern": "M*-M*-", "num_layers": 6, "layernorm_epsilon": 1e-5, **dict.fromkeys(MOE)}
BEFORE = {name: {**said, "vocab_size": 64} for name, said in (("gpt", BASE), ("hybrid", HYBRIDS))}  # what ModelOpt prunes
ROOT = Path(__file__).parents[2]
CASES = {  # the model before, what is pruned
    "llama": (BASE, LLAMA),
    "heads of keys, too": ({**BASE, "num_query_groups": 4}, {"num_query_groups": 2, "num_attention_heads": 2}),
    "mixture": (MIXED, {"hidden_size": 24, "num_experts": 3, "moe_ffn_hidden_size": 16}),
    "hybrid": (
        HYBRIDS,
        {"hidden_size": 24, "mamba_num_heads": 6, "ffn_hidden_size": 40, "num_layers": 4, "hybrid_override_pattern": "M*M-"},
    ),
    "hybrid, narrower heads": (HYBRIDS, {"hidden_size": 24, "mamba_num_heads": 8, "mamba_head_dim": 4}),
}


def asked(cut):
    """Return the arguments of prune.py: what it was asked for, by ModelOpt's names."""
    said = {"num_moe_experts" if name == "num_experts" else name: size for name, size in cut.items()}
    return {f"target_{name}": size for name, size in said.items() if "pattern" not in name} | {"layers_to_drop": None}


def with_state(root):
    """Leave ModelOpt's record beside the weights."""
    folder = root / "iter_0000001/modelopt_state"
    folder.mkdir()
    state = {"modelopt_state_dict": [("mcore_minitron", {"config": {}, "metadata": {}})], "modelopt_version": "0.47.0"}
    dist_checkpointing.save(state, str(folder))


@pytest.fixture
def pruned(default_spec, default_stack, tmp_path):
    """Save the model of some arguments, pruned; ``more`` are arguments that are saved with the old ones."""

    def build(said, cut, more=None, change=lambda state: None):
        said = {**said, "vocab_size": 64}
        true = {**said, **cut}
        spec = (lambda *_: default_stack) if said.get("is_hybrid_model") else default_spec("te")
        model = filled(true, spec)
        return model, save(model, {**said, **(more or {})}, tmp_path / "saved", change)

    return build


@pytest.mark.parametrize("why", ["asked", "state", "accept"])
@pytest.mark.parametrize("name", CASES)
def test_the_config_says_the_true_widths(name, why, pruned, mamba_on_cpu, tmp_path):
    said, cut = CASES[name]
    model, root = pruned(said, cut, asked(cut) if why == "asked" else None)
    if why == "state":
        with_state(root)
    elif why == "accept":
        with pytest.raises(CarnetError):  # unasked, it is damage
            carnet.plan(root, to="hf")
    words = {"accept": "pruned"} if why == "accept" else {}
    told = carnet.plan(root, to="hf", **words).notes["pruned"]
    assert all(f"{key} {said[key]} -> {size}" in told for key, size in cut.items() if said.get(key) is not None)
    assert carnet.cross(root, tmp_path / "hf", to="hf", **words).equal
    assert carnet.verify(root, tmp_path / "hf", **words).equal
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager", dtype=torch.float32)
    mamba_on_cpu({**said, **cut})
    with torch.no_grad():
        computed = target(TOKENS, use_cache=False).logits
    torch.testing.assert_close(computed, logits(model), rtol=0, atol=2e-5)


def narrowed(*names):
    """Return what saves tensors without the last of their columns."""

    def change(state):
        for name, held in state.items():
            if name.endswith(names):
                data = held.data[..., :-8].contiguous()
                axis = held.data.ndim - 1
                offsets = [(at, held.global_offset[at], held.global_shape[at]) for at in range(held.prepend_axis_num)]
                assert axis == 1
                state[name] = ShardedTensor.from_rank_offsets(held.key, data, *offsets, prepend_axis_num=held.prepend_axis_num)

    return change


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (BASE, ("linear_fc2.weight",)),  # of all layers, and the other half of the MLP is as it was
        (HYBRIDS, ("layers.2.mlp.linear_fc2.weight",)),
        (HYBRIDS, ("layers.3.mixer.out_proj.weight",)),
        (BASE, ("word_embeddings.weight",)),
    ],
)
def test_a_tensor_that_others_do_not_bear_out_is_damage(said, names, pruned):
    _, root = pruned(said, {}, change=narrowed(*names))
    with pytest.raises(BadCheckpoint, match="contradicts the config"):
        carnet.plan(root, to="hf", accept="pruned")


@pytest.mark.parametrize("off", [-8, 4])
def test_widths_that_were_not_asked_for_are_refused(off, pruned):
    _, root = pruned(BASE, LLAMA, asked({**LLAMA, "ffn_hidden_size": LLAMA["ffn_hidden_size"] + off}))
    with pytest.raises(BadCheckpoint, match="contradicts the config"):
        carnet.plan(root, to="hf")


def test_layers_that_were_dropped_by_number(pruned):
    said = {**BASE, **MOE, "qk_layernorm": True, "moe_layer_freq": [0, 1, 0, 1]}
    _, root = pruned(said, {"num_layers": 3, "moe_layer_freq": [0, 0, 1]}, {"layers_to_drop": [2]})
    assert carnet.plan(root, to="hf").notes["pruned"] == "num_layers 4 -> 3, moe_layer_freq [0, 1, 0, 1] -> [0, 0, 1]"


def test_a_model_that_is_what_its_arguments_say_stays_that(pruned):
    _, root = pruned(BASE, {}, {"target_num_query_groups": 1})  # which ModelOpt leaves alone
    assert "pruned" not in carnet.plan(root, to="hf").notes
    assert "pruned" not in carnet.plan(root, to="hf", accept="pruned").notes


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_another_cut_has_the_true_widths_in_its_own_arguments(name, pruned, tmp_path):
    said, cut = CASES[name]
    _, root = pruned(said, cut, asked(cut))
    assert carnet.cross(root, tmp_path / "megatron", to="megatron", tp=2).equal
    found = carnet.inspect(tmp_path / "megatron").checkpoint.config
    assert {key: found.get(key) for key in cut} == cut
    assert not [key for key in found if key.startswith("target_") or key == "layers_to_drop"]
    for source, folder in ((root, "before"), (tmp_path / "megatron", "after")):
        assert carnet.cross(source, tmp_path / folder, to="hf").equal
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("before", "after"))
    assert one == other


@pytest.mark.skipif(NEWEST is None, reason="`make test` fetches it")
def test_what_modelopt_prunes_crosses_with_its_true_widths_and_computes_the_same(tmp_path):
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("pruned_by_modelopt.py")), str(tmp_path)]
    paths = os.pathsep.join(map(str, (NEWEST, ROOT, ROOT / "src")))
    ran = subprocess.run(program, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    for name, cut in JOBS.items():
        said, out = BEFORE[name], tmp_path / f"{name}.hf"
        told = carnet.plan(tmp_path / name, to="hf").notes["pruned"]
        mamba = {"mamba_num_heads": 2 * said["hidden_size"] // said.get("mamba_head_dim", 1)}  # what Megatron takes it for
        assert set(told.split(", ")) == {f"{key} {said.get(key) or mamba[key]} -> {size}" for key, size in cut.items()}
        assert carnet.cross(tmp_path / name, out, to="hf").equal
        target = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            computed = target(TOKENS, use_cache=False).logits
        torch.testing.assert_close(computed, torch.load(tmp_path / f"{name}.pt"), rtol=0, atol=2e-5)
