"""What describes a running model: what it was built of, or the arguments of the run, as the builder of its release handed them on.

The right angles are those of the module of megatron-core that runs; transformers must make the same of the target's config.
"""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from carnet.errors import CarnetError

SIZES = {"layers": 1, "hidden": 64, "ffn": 48, "heads": 2, "kv": 2, "vocab": 97, "padded": 256}
SCALED = {"rope_scaling": True, "rotary_base": 500000}
STRETCHED = {"seq_len_interpolation_factor": 4, "rotary_base": 500000}
RUN = {"use_rope_scaling": True, "rotary_base": 500000}
# remark, what GPTModel was built with, what the arguments of the run say (None: the model describes itself), the model's own factor
SAID = [
    ("a script of one's own hands the factor on", {**SCALED, "rope_scaling_factor": 32.0}, None, "factor", 32.0),
    ("gpt_builders.py of 0.16 does not", SCALED, {**RUN, "rope_scaling_factor": 32.0}, "factor", 8.0),
    ("a script stretches evenly", STRETCHED, None, "factor", 4),
    (
        "gpt_builders.py of 0.16 does not",
        {"rotary_base": 500000},
        {"rotary_base": 500000, "rotary_seq_len_interpolation_factor": 4},
        "factor",
        None,
    ),
]


@pytest.mark.parametrize(("_", "built", "run", "key", "factor"), SAID, ids=[row[0] for row in SAID])
def test_the_target_turns_by_the_angles_of_the_running_model(world, tmp_path, _, built, run, key, factor):
    for text, angles in world.run("described", {**SIZES, "positions": built}, run, {}):
        (tmp_path / "config.json").write_text(text)
        config = AutoConfig.from_pretrained(tmp_path)
        torch.testing.assert_close(LlamaRotaryEmbedding(config).inv_freq, torch.tensor(angles))
        assert (json.loads(text).get("rope_scaling") or {}).get(key) == factor


def test_a_program_that_is_named_stands_over_the_release_that_runs(world):
    stretched = {"rotary_base": 500000, "rotary_seq_len_interpolation_factor": 4}
    for text, _ in world.run("described", SIZES, stretched, {"written_by": "megatron-lm==0.19"}):
        assert json.loads(text)["rope_scaling"]["factor"] == 4
    for error in world.ask("described", SIZES, stretched, {"written_by": "gpt"}):
        assert isinstance(error, CarnetError)
        assert "no program is called 'gpt'" in str(error)


def test_what_makes_another_model_of_the_weights_is_refused_and_may_be_accepted(world):
    mixture = SIZES | {"experts": 4, "ffn": 24, "moe_ffn": 24}
    dropping = {"moe_expert_capacity_factor": 0.5}
    for error in world.ask("described", mixture, dropping, {}):
        assert isinstance(error, CarnetError)
        assert "the model computes with 'moe_expert_capacity_factor'" in str(error)
    assert world.run("described", mixture, dropping, {"accept": ["moe_expert_capacity_factor"]})
