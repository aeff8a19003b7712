"""What Megatron-LM's releases hand to their models, and what they must be told, as their own sources and runs have it.

The values are those of core_v0.15.3 to 0.19.0 and of 0.20's main of August 2026: megatron/training/arguments.py, argument_utils.py,
checkpointing.py and the builders.
"""

import math

import pytest

from carnet.dialects.configs import read
from carnet.dialects.megatron.needs import needs
from carnet.dialects.megatron.programs import hear, program
from carnet.dialects.megatron.releases import ACCEPTABLE, ARGUMENTS, BY_NAME, IDLE, RELEASES
from carnet.dialects.megatron.rows import MEGATRON
from carnet.errors import BadRequest, NotSupported

LLAMA = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "padded_vocab_size": 256,
    "max_position_embeddings": 64,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "params_dtype": "torch.bfloat16",
}
MIXTURE = {**LLAMA, "num_experts": 4}
LATENT = {**LLAMA, "multi_latent_attention": True, "rope_type": "yarn", "qk_layernorm": True, "kv_lora_rank": 24}
LATENT |= {"qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
YARN = {**LLAMA, "position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}
LM, BRIDGE = "megatron-lm", "megatron-bridge"


def heard(more, writer=None, era="", base=LLAMA):
    told = None if writer is None else program(writer, "--written-by")
    return hear({**base, **more}, "-", written_by=told, era=era)


def model(more, writer=None, era="", base=LLAMA):
    return read(MEGATRON.table, {"vocab_size": 250, **heard(more, writer, era, base).said}, "-")


SCALED = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
STRETCHED = {"rotary_seq_len_interpolation_factor": 4}
CLAMPED = {"activation_func_clamp_value": 7.0}
TEXT = {"heterogeneous_layers_config_encoded_json": '{"block_configs": []}'}
# remark, arguments, who wrote them, what the files' form says, field, its value, what is not used
COMPUTED = [
    ("a factor that no builder hands on", SCALED, None, "", "rope_factor", 8.0, ["rope_scaling_factor"]),
    ("in the latest release neither", SCALED, f"{LM}==0.20", "", "rope_factor", 8.0, ["rope_scaling_factor"]),
    ("Megatron-Bridge hands its own on", SCALED, BRIDGE, "", "rope_factor", 32.0, []),
    ("NeMo too", SCALED, "nemo", "", "rope_factor", 32.0, []),
    ("a factor without its flag is idle, and not news", {"rope_scaling_factor": 32.0}, None, "", "rope_type", "default", []),
    ("a model that somebody built of megatron-core has it", SCALED, "megatron-core", "", "rope_factor", 32.0, []),
    ("a job of 0.18 runs", STRETCHED, None, "==0.18", "rope_type", "default", [*STRETCHED]),
    ("a job of 0.19", STRETCHED, None, "==0.19", "rope_factor", 4.0, []),
    (
        "whatever older run its arguments came from",
        {**STRETCHED, "hybrid_mlp_ratio": 0.0},
        None,
        "==0.19",
        "rope_factor",
        4.0,
        [],
    ),
    ("stretched evenly: not in 0.18", STRETCHED, f"{LM}==0.18", "", "rope_type", "default", [*STRETCHED]),
    ("but in 0.19", STRETCHED, f"{LM}==0.19.0", "", "rope_factor", 4.0, []),
    ("a common.pt is older than 0.19", STRETCHED, None, "<0.19", "rope_type", "default", [*STRETCHED]),
    ("a common_state is not", STRETCHED, None, ">=0.19", "rope_factor", 4.0, []),
    ("an argument of 0.19 beside it", {**STRETCHED, "yarn_beta_fast": None}, None, "", "rope_factor", 4.0, []),
    ("one that ended with 0.16", {**STRETCHED, "hybrid_mlp_ratio": 0.0}, None, "", "rope_type", "default", [*STRETCHED]),
    ("one that ended with 0.17", {**STRETCHED, "use_legacy_models": False}, None, "", "rope_type", "default", [*STRETCHED]),
    ("the older epsilon, alone", {"norm_epsilon": 0.5}, None, "", "norm_eps", 0.5, []),
    ("and beside the newer", {"norm_epsilon": 0.5, "layernorm_epsilon": 0.25}, None, "", "norm_eps", 0.25, ["norm_epsilon"]),
    ("and in a later release", {"norm_epsilon": 0.5}, f"{LM}==0.16.1", "", "norm_eps", 1e-5, ["norm_epsilon"]),
    (
        "the older word for the norms, carried into a newer run",
        {"apply_layernorm_1p": True, "layernorm_zero_centered_gamma": False},
        None,
        "",
        "zero_centred",
        False,
        ["apply_layernorm_1p"],
    ),
    ("the older word, alone", {"apply_layernorm_1p": True}, None, "", "zero_centred", True, []),
    (
        "gelu is what its kernel is",
        {"swiglu": False, "openai_gelu": True, "bias_gelu_fusion": False, "add_bias_linear": True},
        None,
        "",
        "activation",
        "gelu",
        ["openai_gelu"],
    ),
    ("groups without their flag", {"group_query_attention": False}, None, "", "kv_heads", 4, ["num_query_groups"]),
    ("layers that are described, without a path", TEXT, None, "", "layer_ffn", None, [*TEXT]),
    ("a limit that the fused kernel has not", CLAMPED, f"{LM}==0.19", "", "glu_limit", None, [*CLAMPED]),
    ("whoever built the model", CLAMPED, "megatron-core==0.19", "", "glu_limit", None, [*CLAMPED]),
    ("also where a job says the release", CLAMPED, BRIDGE, "==0.19", "glu_limit", None, [*CLAMPED]),
    ("nor any release that builds a dense model of it", CLAMPED, None, "", "glu_limit", None, [*CLAMPED]),
    (
        "norms that the local spec has not",
        {"qk_l2_norm": True, "transformer_impl": "local"},
        None,
        "",
        "qk_norm",
        "none",
        ["qk_l2_norm"],
    ),
    (
        "residuals, before the norm whatever is said",
        {"apply_residual_connection_post_layernorm": True},
        None,
        "",
        "norm",
        "rms",
        ["apply_residual_connection_post_layernorm"],
    ),
    (
        "a hybrid's positions are not scaled",
        {"use_rope_scaling": True, "hybrid_override_pattern": "M*", "num_query_groups": 2},
        None,
        "",
        "rope_type",
        "default",
        ["use_rope_scaling"],
    ),
    (
        "a capacity below zero is none",
        {"num_experts": 4, "moe_expert_capacity_factor": -1.0},
        None,
        "",
        "experts",
        4,
        ["moe_expert_capacity_factor"],
    ),
]


@pytest.mark.parametrize(("_", "more", "writer", "era", "field", "value", "unused"), COMPUTED, ids=[row[0] for row in COMPUTED])
def test_a_field_is_what_the_program_computed_with(_, more, writer, era, field, value, unused):
    assert model(more, writer, era).get(field) == value
    assert [*heard(more, writer, era).unused] == unused


def test_what_is_not_used_is_said_with_what_the_model_has():
    assert heard(SCALED).unused == {"rope_scaling_factor": "32.0, the model has 8.0"}
    assert heard(STRETCHED, f"{LM}==0.17").unused == {"rotary_seq_len_interpolation_factor": "4, the model has none"}


def test_yarn_rotates_whole_heads_whatever_is_said():
    assert model({"rotary_percent": 0.5}, base=YARN)["rope_percent"] == 1.0
    assert model({"rotary_percent": 0.5}, base=LATENT)["rope_percent"] == 1.0


def test_yarn_is_of_0_19_at_least():
    assert model(STRETCHED, base=YARN)["rope_type"] == "yarn"  # no release before builds it, so that nothing is to be asked
    with pytest.raises(BadRequest, match="no release of megatron-lm computes with these arguments"):
        model({}, era="<0.19", base=YARN)
    assert model({}, BRIDGE, base=YARN)["rope_factor"] == 4.0


ASKED = [
    ("stretched evenly or not", LLAMA, STRETCHED, "0.15, 0.16, 0.17, 0.18: not used; 0.19, 0.20: used"),
    ("a limit of experts", MIXTURE, CLAMPED, "0.15, 0.16, 0.17, 0.18, 0.19: not used; 0.20: used"),
]


@pytest.mark.parametrize(("_", "base", "more", "meanings"), ASKED, ids=[row[0] for row in ASKED])
def test_where_releases_compute_different_models_carnet_asks(_, base, more, meanings):
    with pytest.raises(BadRequest) as caught:
        heard(more, base=base)
    (name, value), *_ = more.items()
    assert caught.value.what == "releases of megatron-lm compute different models with these arguments"
    assert caught.value.facts[f"{name} {value!r}"] == meanings
    assert "--written-by megatron-lm==0.15" in caught.value.remedy
    assert "--written-by megatron-lm==0.20" in caught.value.remedy


def test_a_word_that_no_release_has_is_another_program_s():
    more = {"yarn_mscale": 0.5}
    with pytest.raises(BadRequest, match="--written-by megatron-bridge"):
        heard(more, base=YARN)
    # at a factor of 4 (0.1 x 0.5 ln 4 + 1), as yarn_rotary_pos_embedding.py has it
    assert model(more, BRIDGE, base=YARN)["rope_attention"] == pytest.approx(1 + 0.05 * math.log(YARN["rotary_scaling_factor"]))
    assert model(more, LM, base=YARN)["rope_attention"] == pytest.approx(1 + 0.1 * math.log(YARN["rotary_scaling_factor"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("moe_expert_capacity_factor", 0.5), ("moe_router_force_load_balancing", True), ("moe_router_force_biased", 0.1)],
)
def test_a_model_that_is_another_in_evaluation_is_refused_by_name_unless_it_is_accepted(name, value):
    with pytest.raises(NotSupported) as caught:
        heard({name: value}, base=MIXTURE)
    assert repr(name) in caught.value.what
    assert caught.value.remedy.startswith(f"--accept {name}")
    found = hear({**MIXTURE, name: value}, "-", accept=[name])
    assert [*found.accepted] == [name]
    assert name not in found.said
    assert heard({name: value}).said.get(name) is None  # where there are no experts it does nothing


@pytest.mark.parametrize(
    "more",
    [
        {"mla_down_proj_fusion": True},
        {"moe_single_grouped_weight": True},
        {"moe_single_grouped_bias": True},
        {"gdp_num_householder": 2},
        {"moe_router_load_balancing_type": "quantile_balancing"},
        {"moe_router_load_balancing_type": "sinkhorn"},
    ],
)
def test_what_carnet_does_not_carry_over_is_refused_by_name(more):
    with pytest.raises(NotSupported, match=next(iter(more))):
        model(more, f"{LM}==0.20", base=MIXTURE)


def test_a_program_is_named_as_a_requirement():
    for word in ("megatron-lm==0.17", "megatron-lm==0.17.1", "megatron-lm==core_v0.17.0"):
        assert program(word, "-").release == "0.17"
    assert program("megatron-lm==0.9.0", "-").release == "0.15"  # as all before it
    assert program("megatron-core==0.17.1", "-").release == "0.17"
    for word in ("megatron", "megatron-lm==0.99", "megatron-lm==x", "megatron-lm>=0.17"):
        with pytest.raises(BadRequest):
            program(word, "--written-by")


def test_every_argument_that_carnet_reads_has_a_row():
    keys = {key for row in MEGATRON.table.rows for key in _keys(row)} | {*MEGATRON.table.guards}
    others = {
        "num_moe_experts",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
    }  # a field of the config's, words of carnet's own, and slime's
    assert keys - {*BY_NAME, *others} == set()
    assert {idle.name for idle in IDLE} | {*ACCEPTABLE} <= {*BY_NAME}
    assert all(row.since in {*RELEASES, "never"} and row.until in RELEASES for row in ARGUMENTS)
    assert len(BY_NAME) == len(ARGUMENTS) >= 116


def _keys(row):
    found = [*getattr(row, "keys", ()), getattr(row, "key", None), getattr(row, "flag", None), *getattr(row, "more", ())]
    return {key[0] if isinstance(key, tuple) else key for key in found if key is not None}


def told(more, reader=None, base=LLAMA, *, local=False):
    return needs({**base, **more}, None if reader is None else program(reader, "--read-by"), local=local)


# remark, arguments, what must be said besides --use-checkpoint-args and --bf16
SAID = [
    ("nothing", {"layernorm_epsilon": 1e-5}, []),
    ("an epsilon", {"layernorm_epsilon": 1e-6}, ["--norm-epsilon 1e-06"]),
    ("norms less one", {"layernorm_zero_centered_gamma": True}, ["--apply-layernorm-1p"]),
    ("norms of query and key", {"qk_layernorm": True}, ["--qk-layernorm"]),
    ("llama 3's positions", {"use_rope_scaling": True, "rope_scaling_factor": 8.0}, ["--use-rope-scaling"]),
    (
        "a window",
        {"window_size": [127, 0], "window_attn_skip_freq": [1, 0]},
        ["--window-size 127,0", "--window-attn-skip-freq '[1,0]'"],
    ),
    ("sinks", {"softmax_type": "learnable"}, ["--softmax-type learnable"]),
    ("exact gelu", {"bias_gelu_fusion": False}, ["--no-bias-gelu-fusion"]),
    (
        "groups of experts",
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        ["--moe-router-num-groups 4", "--moe-router-group-topk 2"],
    ),
    ("a type", {"params_dtype": "torch.float16"}, ["--fp16"]),
    ("layers for further tokens, in 0.16", {"mtp_num_layers": 1}, ["--mtp-num-layers 1"]),
]


@pytest.mark.parametrize(("_", "more", "flags"), SAID, ids=[row[0] for row in SAID])
def test_what_is_not_carried_is_said_on_the_command_line(_, more, flags):
    found = told(more)
    assert set(found.flags) == {"--use-checkpoint-args", *flags} | ({"--bf16"} if "params_dtype" not in more else set())
    assert found.releases == RELEASES[1:]


def test_latent_attention_is_said_with_every_size():
    assert set(told({}, base=LATENT).flags) >= {
        *("--multi-latent-attention", "--kv-lora-rank 24", "--qk-head-dim 12", "--qk-pos-emb-head-dim 8", "--v-head-dim 16"),
        "--qk-layernorm",
    }


def test_a_release_that_cannot_be_told_is_left_out():
    assert told(STRETCHED).releases == ("0.19", "0.20")
    assert told(STRETCHED).word == f"{LM}==0.20"
    assert "--rotary-seq-len-interpolation-factor 4" in told(STRETCHED).flags
    assert told({}, base=YARN).releases == ("0.19", "0.20")
    assert told({"mtp_num_layers": 1}, f"{LM}==0.17").flags == ("--use-checkpoint-args", "--bf16")
    with pytest.raises(NotSupported):
        told(STRETCHED, f"{LM}==0.18")


UNSAYABLE = [
    ("a factor that no builder hands on", LLAMA, SCALED, "rope_scaling_factor"),
    (
        "a factor that is not an integer",
        LLAMA,
        {"rotary_seq_len_interpolation_factor": 2.5},
        "rotary_seq_len_interpolation_factor",
    ),
    ("a length without a flag", LATENT, {"original_max_position_embeddings": 2048}, "original_max_position_embeddings"),
    ("turns without a flag", LATENT, {"beta_fast": 8.0}, "beta_fast"),
    ("turns without a flag, slow", LATENT, {"beta_slow": 2.0}, "beta_slow"),
]


@pytest.mark.parametrize(("_", "base", "more", "name"), UNSAYABLE, ids=[row[0] for row in UNSAYABLE])
def test_what_no_flag_says_is_refused_and_another_program_can_be_named(_, base, more, name):
    with pytest.raises(NotSupported) as caught:
        told(more, base=base)
    assert name in caught.value.facts
    assert "--read-by megatron-bridge" in caught.value.remedy
    found = told(more, BRIDGE, base)
    assert found.releases == ()
    assert any(line.split()[0] in {name, "seq_len_interpolation_factor"} for line in found.flags)


def test_the_local_spec_is_said():
    assert "--transformer-impl local" in told({}, local=True).flags


SPARSE = {**LATENT, "q_lora_rank": 20, "rope_type": "rope", "experimental_attention_variant": "dsa"}
SPARSE |= {"dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 12, "dsa_indexer_topk": 6}


def test_sparse_attention_is_that_of_0_19_and_later():
    """Before, an indexer rotated the last dimensions of its heads, and read queries that no norm had seen."""
    assert model({}, base=SPARSE)["index_topk"] == 6
    for release in ("0.16", "0.18"):
        with pytest.raises(BadRequest, match="no release of megatron-lm computes with these arguments"):
            heard({}, f"{LM}=={release}", base=SPARSE)
    told = needs(SPARSE, None, local=False)
    assert told.releases == ("0.19", "0.20")
    assert "--experimental-attention-variant dsa" in told.flags
    with pytest.raises(NotSupported) as caught:
        needs(SPARSE, program(f"{LM}==0.17", "--read-by"), local=False)
    assert caught.value.facts["experimental_attention_variant"] == "0.17: 'dsa' builds no such model"


def test_queries_that_are_not_compressed_have_a_norm_of_their_own_from_0_19_on():
    """A second one, behind the layer's: no class of Hugging Face has a place for it."""
    alone = LATENT | {"rope_type": "rope"}
    assert model({}, base=alone)["q_lora"] == 0
    with pytest.raises(BadRequest, match="no release of megatron-lm computes with these arguments") as caught:
        heard({}, era=">=0.19", base=alone)
    assert "qk_layernorm True" in caught.value.facts
    assert model({}, BRIDGE, era=">=0.19", base=alone)["latent"]  # whose spec may be another
    assert needs(alone, None, local=False).releases == ("0.16", "0.17", "0.18")
