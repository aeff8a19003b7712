"""The training arguments that describe a model which is built are those that it was built of."""

from pathlib import Path

import pytest
import torch
from megatron.core import __version__ as installed
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.torch_norm import L2Norm

from carnet.architectures.known import hear_config, recognise
from carnet.dialects.configs import read
from carnet.dialects.kinds import KINDS
from carnet.dialects.megatron.layers import HYBRID_SPEC
from carnet.dialects.megatron.rows import MEGATRON
from carnet.errors import BadRequest
from carnet.formats.detect import open_checkpoint
from carnet.formats.wrapped import program_of
from carnet.megatron.asks import spec_of
from carnet.megatron.meta import Cut, Rank, built
from carnet.megatron.models import arguments, describes_hybrid
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from carnet.megatron.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from carnet.model.model import concerns
from tests.megatron.conftest import BASE, HYBRID, MLA, MODELS, MOE, PATTERN, filled

pytestmark = pytest.mark.referee
GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
# of a GPT with Gated DeltaNet there is no spec: test_specs_build.py holds its refusal; latent mixtures want Transformer Engine
WITHOUT = ("v0192_qwen3next_te_tp2", "v0192_nemotron3_tp2")
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir() and path.name not in WITHOUT)
SAID = {
    "angles stretched": {**BASE, "use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000},
    "angles stretched, the slowest not wholly": {**BASE, "use_rope_scaling": True, "rope_scaling_factor": 32.0},
    "angles interpolated": {**BASE, "rotary_seq_len_interpolation_factor": 4},
    "angles called yarn": {
        **BASE,
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": 16.0,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "yarn_original_max_position_embeddings": 2048,
        "yarn_beta_fast": 24.0,
        "yarn_beta_slow": 2.0,
        "yarn_correction_range_round_to_int": False,
    },
    "half of each head rotated": {**BASE, "rotary_percent": 0.5, "rotary_base": 500000},
    "a window in some layers": {**BASE, "window_size": [7, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
    "a biased tanh gelu": {**BASE, "swiglu": False, "bias_gelu_fusion": True, "add_bias_linear": True},
    "squared relu": {**BASE, "swiglu": False, "squared_relu": True},
    "latent attention": {**BASE, **MLA, **MOE, **PATTERN, "rope_type": "yarn", "rotary_scaling_factor": 40.0, "mscale": 1.0},
    "a router of its own": {
        **BASE,
        **MLA,
        **MOE,
        **PATTERN,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
    },
}


def spec(config, stage):
    return get_gpt_modelopt_spec(config, vp_stage=stage)


def recognised(said, vocab):
    family, config = recognise("megatron", said, "here", {"vocab": vocab})
    return family.name, config


def understood(said):
    """Return the canonical fields that say something of the model, of a family or of none."""
    found = read(MEGATRON.table, {**said, "vocab_size": 61}, "here")
    return {name: value for name, value in found.items() if concerns(found, name)}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_recognised_as_the_checkpoint_that_describes_it(name):
    said = open_checkpoint(GOLDENS / name).config
    with built(said, spec_of("modelopt", "te", hybrid=describes_hybrid(said))[1]) as [model]:
        assert recognised(arguments(model), 250) == recognised(said, 250)


@pytest.mark.parametrize("name", SAID)
def test_a_model_on_a_cpu_is_recognised_as_the_arguments_that_it_was_built_of(name):
    model = filled(SAID[name], spec)
    assert understood(arguments(model)) == understood(SAID[name])


@pytest.mark.parametrize("name", SAID)
def test_what_a_model_says_is_what_it_computes_whatever_megatron_lm_hands_on(name):
    said = arguments(filled(SAID[name], spec))
    assert program_of(said) == "megatron-core==" + installed.rpartition(".")[0]
    heard = hear_config(KINDS["megatron"], said, "here", program_of(said), "", ())
    assert understood(heard.said) == understood(SAID[name])
    assert heard.unused == {}


def test_a_limit_that_the_fused_kernel_has_not_is_none_of_the_model():
    limited = {**BASE, "activation_func_clamp_value": 0.01}
    for fused in (True, False):
        said = arguments(filled({**limited, "bias_swiglu_fusion": fused}, spec))
        heard = hear_config(KINDS["megatron"], said, "here", program_of(said), "", ()).said
        assert (heard["activation_func_clamp_value"] is None) == fused


def test_every_rank_and_every_virtual_stage_says_the_same():
    said, cut = MODELS["deepseek"], Cut(2, 2, 2)
    found = []
    for rank in cut.ranks():
        with built(said, spec, cut, rank) as stages:
            found.append(understood(arguments(stages)))
    with built(MODELS["llama"], spec, Cut(1, 2, 1, 2), Rank(0, 1, 0)) as stages:
        assert [*map(arguments, stages)] == [arguments(stages)] * 2
        assert understood(arguments(stages)) == understood(MODELS["llama"])
    assert found == [understood(said)] * 8


def test_what_wraps_a_model_is_looked_through():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = filled(BASE, spec)
    expected = arguments(model)
    assert arguments([Wrapper(Wrapper(model))]) == expected
    cast = arguments(Wrapper(model.bfloat16()))
    assert cast == {**expected, "params_dtype": "torch.bfloat16"}


def test_a_model_that_norms_queries_and_keys_by_their_length_says_so():
    with built(MODELS["llama 4"], spec) as [model]:
        assert arguments(model)["qk_l2_norm"] is True
    if installed < "0.18":  # which refuses it where the config does not ask for it
        with built(BASE, lambda config, stage: get_gpt_modelopt_spec(config, qk_l2_norm=True)) as [model]:
            assert arguments(model)["qk_l2_norm"] is True
    with built(BASE, spec) as [model]:
        assert not arguments(model)["qk_l2_norm"]
    asked = {**BASE, "qk_l2_norm": True}
    with built(asked, lambda config, _: get_gpt_decoder_block_spec(config, use_transformer_engine=False)) as [model]:
        assert model.config.qk_l2_norm
        assert arguments(model)["qk_l2_norm"] is any(isinstance(module, L2Norm) for module in model.modules())


def test_a_hybrid_without_a_pattern_says_that_it_is_one():
    said = {**HYBRID, "hybrid_override_pattern": None, "is_hybrid_model": False, "spec": HYBRID_SPEC}
    said |= {"num_experts": None, "moe_ffn_hidden_size": None}
    with built(said, lambda *_: get_hybrid_stack_modelopt_spec()) as [model]:
        found = arguments(model)
    assert understood(found) == understood(said)
    assert understood(found)["blocks"] == "M M M M M"


def test_an_activation_that_no_argument_says_is_left_for_the_families_to_refuse():
    with built(BASE, spec) as [model]:
        model.config.activation_func = torch.tanh
        said = arguments(model)
    assert (said["gated_linear_unit"], said["activation_func"], said.get("swiglu")) == (True, "tanh", None)


@pytest.mark.parametrize("strange", [None, [], torch.nn.Linear(2, 2), "model"])
def test_what_is_no_model_of_megatron_core_is_refused(strange):
    with pytest.raises(BadRequest, match="not a model that carnet knows"):
        arguments(strange)
