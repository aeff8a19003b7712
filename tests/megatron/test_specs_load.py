"""Checkpoints of the default specs fill the models of ours: strictly, with the same logits, and `fits` says so beforehand."""

import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import __version__ as installed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors.torch import load_file

from carnet.formats.detect import open_checkpoint
from carnet.megatron.fits import fits
from carnet.megatron.models import describes_hybrid
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from carnet.megatron.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from tests.megatron.conftest import DELTA, HYBRID, MODELS, filled, held, load, logits, newer, save

pytestmark = [
    pytest.mark.referee,
    pytest.mark.usefixtures("megatron_world"),
    pytest.mark.filterwarnings(
        "ignore:.load_state_dict. is deprecated:FutureWarning"
    ),  # megatron-core calls torch's older name
]
GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
# of a GPT with Gated DeltaNet there is no spec: test_specs_build.py holds its refusal; latent mixtures want Transformer Engine
WITHOUT = ("v0192_qwen3next_te_tp2", "v0192_nemotron3_tp2")
STORES = sorted(name for path in GOLDENS.glob("*/iter_*/.metadata") if (name := path.parent.parent.name) not in WITHOUT)
LOCAL = [
    name for name, said in MODELS.items() if not said["layernorm_zero_centered_gamma"]
]  # the local norms cannot be so stored


def ours(saver="te", **given):
    return lambda config, stage: get_gpt_modelopt_spec(config, vp_stage=stage, saved_by=saver, **given)


def stack(**given):
    return lambda config, stage: get_hybrid_stack_modelopt_spec(**given)


@pytest.mark.parametrize(("saver", "name"), [*(("te", name) for name in MODELS), *(("local", name) for name in LOCAL)])
def test_what_the_default_spec_saved_loads_strictly_and_gives_the_same_logits(name, saver, default_spec, tmp_path):
    if name == "latent attention, queries whole" and installed > "0.18":
        pytest.skip("with qk_layernorm 0.19 puts a norm of Transformer Engine's before them, whatever the spec says")
    said = MODELS[name]
    trained = filled(said, default_spec(saver))
    root = save(trained, said, tmp_path / "saved")
    assert fits(root, "modelopt").misfits == ()
    model = load(filled(said, ours(saver, remap_te_layernorm=True), seed=1), root)
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-5)


@pytest.mark.parametrize("said", [HYBRID, pytest.param(DELTA, marks=newer)], ids=["Mamba", "Gated DeltaNet"])
def test_a_hybrid_of_the_default_spec_loads_strictly_and_gives_the_same_logits(said, default_stack, mamba_on_cpu, tmp_path):
    trained = filled(said, lambda *_: default_stack)
    root = save(trained, said, tmp_path / "saved")
    assert fits(root, "modelopt").misfits == ()
    model = load(filled(said, stack(remap_te_layernorm=True), seed=1), root)
    found, expected = held(model), held(trained)
    assert found.keys() == expected.keys()
    assert [place for place in expected if not torch.equal(found[place], expected[place])] == []
    assert sum(map(torch.numel, expected.values())) == sum(map(torch.numel, trained.parameters()))
    mamba_on_cpu(said)
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_without_the_remapping_it_does_not_load(name, default_spec, tmp_path):
    said = MODELS[name]
    root = save(filled(said, default_spec("te")), said, tmp_path / "saved")
    with pytest.raises(CheckpointingException, match="layer_norm_weight"):
        load(filled(said, ours()), root)


@pytest.mark.parametrize("name", STORES)
def test_a_golden_loads_into_the_model_of_our_spec_and_gives_megatrons_own_logits(name, mamba_on_cpu, tmp_path):
    """Transformer Engine's modules have states that no other module has: of these, and of nothing else, some are left over."""
    said = {**open_checkpoint(GOLDENS / name).config, "params_dtype": "torch.float32", "bf16": False}
    saver = "local" if name == "mixtral_ep2" else "te"
    hybrid = describes_hybrid(said)
    model = filled(said, stack(remap_te_layernorm=True) if hybrid else ours(saver, remap_te_layernorm=True))
    folder = tmp_path / "golden"
    shutil.copytree(next((GOLDENS / name).glob("iter_*")), folder)
    if not (folder / "common.pt").exists():  # since 0.19 its content is in the store, where 0.16 does not look
        torch.save({}, folder / "common.pt")
    state = {"model": model.sharded_state_dict()}
    loaded, left, unknown = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    assert unknown == set()
    assert {key for key in left if "_extra_state" not in key and not key.startswith(SET_ASIDE)} == set()
    model.load_state_dict(loaded["model"])
    if hybrid:
        full = load_file(GOLDENS / name / "full.safetensors")
        full = {key: held for key, held in full.items() if "_extra_state" not in key}
        moved = NORMS if hasattr(model.decoder.layers[0].mixer, "conv1d") else NORMS + CONVOLUTION
        renamed = {key.replace(f".{new}", f".{old}"): held for key, held in full.items() for old, new in moved if new in key}
        expected = {key: held for key, held in full.items() if not any(new in key for _, new in moved)} | renamed
        assert {key for key, held in model.state_dict().items() if held is not None} == expected.keys()
        assert [key for key, held in expected.items() if not torch.equal(model.state_dict()[key], held.float())] == []
        mamba_on_cpu(said)
    reference = load_file(GOLDENS / name / "reference.safetensors")
    torch.testing.assert_close(logits(model, reference["tokens"].long()), reference["logits"], rtol=0, atol=1e-4)


SET_ASIDE = ("optimizer.", "rng_state", "common_state")
NORMS = (
    ("norm.weight", "mixer.in_proj.layer_norm_weight"),
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)
CONVOLUTION = (("mixer.conv1d_weight", "mixer.conv1d.weight"), ("mixer.conv1d_bias", "mixer.conv1d.bias"))  # since 0.19
