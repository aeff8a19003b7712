"""Arguments that a run of Megatron-LM saves and does not use: the model is what its builder makes of them, and so is carnet's.

Each checkpoint is one of a real model whose saved arguments say more, as a run with one more flag saves it. megatron-core computes with
what a release's own builder hands on, transformers with what carnet makes of the checkpoint: the same logits.
"""

from typing import Any

import pytest
import torch
import transformers as hf

import carnet
from carnet.errors import BadRequest, NotSupported

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
LLAMA = hf.LlamaConfig(**SIZES)
WHOLE = hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 4})
SCALED = hf.LlamaConfig(**{**SIZES, "rope_scaling": LLAMA3})
GPT2 = hf.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=97, n_positions=64, activation_function="gelu")
MIXTURE = hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)

# remark, model, what a run says besides, release, what carnet says of it
UNUSED: list[tuple[str, Any, dict[str, object], str, dict[str, str]]] = [
    (
        "a factor of Llama 3's angles",
        SCALED,
        {"rope_scaling_factor": 32.0},
        "0.16",
        {"rope_scaling_factor": "32.0, the model has 8.0"},
    ),
    (
        "angles stretched evenly, before 0.19",
        LLAMA,
        {"rotary_seq_len_interpolation_factor": 4},
        "0.18",
        {"rotary_seq_len_interpolation_factor": "4, the model has none"},
    ),
    ("angles stretched evenly, since", LLAMA, {"rotary_seq_len_interpolation_factor": 4}, "0.19", {}),
    ("an older name of the epsilon", LLAMA, {"norm_epsilon": 0.1}, "0.16", {"norm_epsilon": "0.1, the model has none"}),
    (
        "an older name of norms less one",
        LLAMA,
        {"apply_layernorm_1p": True},
        "0.16",
        {"apply_layernorm_1p": "True, the model has none"},
    ),
    ("OpenAI's gelu", GPT2, {"openai_gelu": True}, "0.16", {"openai_gelu": "True, the model has none"}),
    (
        "norms of query and key in the local spec",
        LLAMA,
        {"qk_l2_norm": True, "transformer_impl": "local"},
        "0.16",
        {"qk_l2_norm": "True, the model has none"},
    ),
    (
        "a residual after the norm",
        LLAMA,
        {"apply_residual_connection_post_layernorm": True},
        "0.16",
        {"apply_residual_connection_post_layernorm": "True, the model has none"},
    ),
    (
        "groups without their flag",
        WHOLE,
        {"num_query_groups": 2, "group_query_attention": False},
        "0.16",
        {"num_query_groups": "2, the model has none"},
    ),
    (
        "a limit beside the fused kernel",
        LLAMA,
        {"activation_func_clamp_value": 0.01, "bias_swiglu_fusion": True},
        "0.16",
        {"activation_func_clamp_value": "0.01, the model has none"},
    ),
    (
        "a capacity below zero",
        MIXTURE,
        {"moe_expert_capacity_factor": -1.0},
        "0.16",
        {"moe_expert_capacity_factor": "-1.0, the model has none"},
    ),
]


@pytest.fixture
def trained(saved, tmp_path):
    """Make the checkpoint of a model whose run had further arguments: a path, its iteration, and whether carnet is told its release."""

    def make(config, more):
        said = carnet.cross(saved(config), tmp_path / "megatron", to="megatron", spelling="local")
        assert said.equal
        folder = tmp_path / "megatron/iter_0000001"
        common = torch.load(folder / "common.pt", weights_only=False)
        del common["carnet_meant_for"]  # a run of Megatron-LM's leaves no such word
        vars(common["args"]).update(more)
        torch.save(common, folder / "common.pt")
        return folder

    return make


@pytest.mark.parametrize(("_", "config", "more", "release", "unused"), UNUSED, ids=[row[0] for row in UNUSED])
def test_carnet_reads_what_the_release_computed(_, config, more, release, unused, trained, megatron_core, loaded, tmp_path):
    folder = trained(config, more)
    verdict = carnet.cross(folder, tmp_path / "hf2", to="hf", written_by=f"megatron-lm=={release}")
    assert verdict.equal
    assert verdict.unused == unused
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs = megatron_core(folder, release)
    with torch.no_grad():
        found, expected = loaded(tmp_path / "hf2")(tokens, use_cache=False).logits, theirs(tokens)[0]
    assert expected.std() > 0.1
    assert torch.allclose(found, expected[..., :97], atol=1e-4, rtol=1e-4)


def test_the_releases_of_the_table_do_compute_different_models(trained, megatron_core):
    folder = trained(LLAMA, {"rotary_seq_len_interpolation_factor": 4})
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(megatron_core(folder, "0.18")(tokens)[0], megatron_core(folder, "0.19")(tokens)[0], atol=0.01)


def test_the_form_of_a_store_says_which_releases_wrote_it_and_a_person_s_word_stands_over_it(trained, tmp_path):
    folder = trained(LLAMA, {"rotary_seq_len_interpolation_factor": 4})  # a common.pt: before 0.19
    assert carnet.inspect(folder).inventory.config["rope_type"] == "default"
    later = carnet.inspect(folder, written_by="megatron-lm==0.19").inventory
    assert (later.config["rope_type"], later.config["rope_factor"]) == ("linear", 4.0)
    carnet.cross(folder, tmp_path / "later", to="hf", written_by="megatron-lm==0.19")
    assert carnet.verify(folder, tmp_path / "later", written_by="megatron-lm==0.19").equal
    assert not carnet.verify(folder, tmp_path / "later").equal  # not on the target's word


def test_experts_with_a_capacity_are_another_model_and_crossing_them_is_recorded(trained, tmp_path):
    folder = trained(MIXTURE, {"moe_expert_capacity_factor": 0.5})
    with pytest.raises(NotSupported) as caught:
        carnet.plan(folder, to="hf")
    assert caught.value.what == "the model computes with 'moe_expert_capacity_factor', and no target would"
    accept = ("moe_expert_capacity_factor",)
    verdict = carnet.cross(folder, tmp_path / "hf2", to="hf", accept=accept)
    assert verdict.equal
    assert [*verdict.accepted] == [*accept]
    assert '"accepted": {\n  "moe_expert_capacity_factor": "0.5: experts drop' in (tmp_path / "hf2/carnet.json").read_text()
    assert carnet.verify(folder, tmp_path / "hf2", accept=accept).equal
    with pytest.raises(BadRequest):
        carnet.plan(folder, to="hf", accept=("num_layers",))


def test_a_target_for_another_program_is_read_as_that_program_reads_it(saved, tmp_path):
    source = saved(hf.LlamaConfig(**{**SIZES, "rope_scaling": {**LLAMA3, "factor": 32.0}}))
    verdict = carnet.cross(source, tmp_path / "megatron", to="megatron", read_by="megatron-bridge")
    assert "rope_scaling_factor 32.0" in verdict.needs["say"]
    assert carnet.inspect(tmp_path / "megatron").inventory.config["rope_factor"] == 32.0
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    assert carnet.verify(source, tmp_path / "megatron", read_by="megatron-bridge").equal
    findings = carnet.verify(source, tmp_path / "megatron").findings  # Megatron-LM computes with 8
    assert [finding.where for finding in findings] == ["rope_factor"]


def test_what_must_be_said_stands_in_the_plan_the_verdict_and_the_document(saved, tmp_path):
    source = saved(hf.Qwen3Config(**SIZES, rms_norm_eps=1e-6))
    said = {"--use-checkpoint-args", "--norm-epsilon 1e-06", "--qk-layernorm"}
    planned = carnet.plan(source, to="megatron")
    verdict = carnet.cross(source, tmp_path / "megatron", to="megatron")
    assert set(planned.needs["say"]) == set(verdict.needs["say"]) == said
    assert planned.needs["releases"] == ["0.16", "0.17", "0.18", "0.19", "0.20"]
    assert '"--norm-epsilon 1e-06"' in (tmp_path / "megatron/carnet.json").read_text()
