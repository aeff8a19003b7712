"""The config tables: what one program's config says is said again, in its own words and in another's, or refused by name."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.architectures.gpt2 import GPT2
from carnet.architectures.known import FAMILIES, dialect_of, recognise
from carnet.architectures.llama import LLAMA
from carnet.dialects.configs import ANY, Choice, Flagged, Place, Table, lookup, place, read
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.megatron.table import GUARDS
from carnet.dialects.writing import write
from carnet.errors import BadCheckpoint, CarnetError, NotSupported
from carnet.formats.wrapped import translate
from carnet.model.fields import BY_NAME, FIELDS

GOLDENS = Path(__file__).parents[1] / "goldens" / "trtllm"

LLAMA_HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
GPT2_HF = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_inner": None,
    "vocab_size": 97,
    "n_positions": 128,
    "dtype": "float32",
}
LLAMA_MEGATRON = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "params_dtype": "torch.bfloat16",
}
GPT2_MEGATRON = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "position_embedding_type": "learned_absolute",
    "params_dtype": "torch.float32",
}
LLAMA_TRTLLM = {
    "architecture": "LlamaForCausalLM",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
GPT2_TRTLLM = {
    "architecture": "GPT2LMHeadModel",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "hidden_act": "gelu_new",
    "dtype": "float32",
}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# --- random configs, written as each program writes them ------------------------------------------------------------------------

SIZES = st.integers(1, 1 << 20)
SMALL = st.floats(1e-8, 1e-3)
BASES = st.one_of(st.integers(1, 10**7), st.floats(1.0, 1e7))


def some_of(**optional):
    """Give a part of a config: each key there or not; null where the program writes null for absent."""
    return st.fixed_dictionaries({}, optional={key: st.one_of(st.none(), values) for key, values in optional.items()})


def scaling(low=st.floats(0.5, 4.0), high=st.floats(4.0, 16.0), original=SIZES):
    factor = st.one_of(st.integers(1, 64), st.floats(1.0, 64.0))
    llama3 = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return st.one_of(
        st.none(),
        st.just({"rope_type": "default"}),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factor}),
        st.fixed_dictionaries({"type": st.just("linear"), "factor": factor}),
        st.fixed_dictionaries({"rope_type": st.just("llama3"), **llama3}),
    )


def merged(*parts):
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


TOKENS = {"bos_token_id": SIZES, "eos_token_id": SIZES, "pad_token_id": SIZES}
EMBEDDINGS = st.sampled_from(
    (
        {},
        {"use_parallel_embedding": False, "embedding_sharding_dim": 1},
        {"use_parallel_embedding": True},
        {"use_parallel_embedding": True, "embedding_sharding_dim": 1},
    )
)


def mapping(tp, pp):
    return {"mapping": {"tp_size": tp, "pp_size": pp, "moe_tp_size": tp, "world_size": tp * pp}}


RANKS = st.builds(mapping, st.integers(1, 8), st.integers(1, 4))
CONFIGS = {
    "llama hf": merged(
        st.just(LLAMA_HF),
        some_of(
            num_key_value_heads=SIZES,
            head_dim=SIZES,
            rms_norm_eps=SMALL,
            hidden_act=st.sampled_from(("silu", "gelu", "gelu_new", "gelu_pytorch_tanh")),
            rope_theta=BASES,
            rope_scaling=scaling(),
            attention_bias=st.booleans(),
            mlp_bias=st.booleans(),
            tie_word_embeddings=st.booleans(),
            torch_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
            **TOKENS,
        ),
    ),
    "gpt2 hf": merged(
        st.just(GPT2_HF),
        some_of(
            n_inner=SIZES,
            layer_norm_epsilon=SMALL,
            activation_function=st.sampled_from(("gelu", "gelu_new", "gelu_fast")),
            tie_word_embeddings=st.booleans(),
            **TOKENS,
        ),
    ),
    "llama trtllm": merged(
        st.just(LLAMA_TRTLLM),
        some_of(
            num_key_value_heads=SIZES,
            head_size=SIZES,
            norm_epsilon=SMALL,
            rotary_base=BASES,
            rotary_scaling=scaling(),
            attn_bias=st.booleans(),
            mlp_bias=st.booleans(),
            tie_word_embeddings=st.booleans(),
        ),
        RANKS,
        EMBEDDINGS,
    ),
    "gpt2 trtllm": merged(
        st.just(GPT2_TRTLLM),
        some_of(intermediate_size=SIZES, norm_epsilon=SMALL, tie_word_embeddings=st.booleans()),
        RANKS,
        EMBEDDINGS,
    ),
    "llama megatron": merged(
        st.just(LLAMA_MEGATRON),
        some_of(
            kv_channels=SIZES, layernorm_epsilon=SMALL, rotary_base=BASES, untie_embeddings_and_output_weights=st.booleans()
        ),
        st.sampled_from(({}, {"group_query_attention": True, "num_query_groups": 2}, {"num_query_groups": 1})),
        st.sampled_from(
            (
                {},
                {"use_rope_scaling": True},
                {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
                {"rotary_seq_len_interpolation_factor": 4},
            )
        ),
        st.sampled_from(({}, {"add_bias_linear": True})),
    ),
    "gpt2 megatron": merged(
        st.just(GPT2_MEGATRON),
        some_of(ffn_hidden_size=SIZES, layernorm_epsilon=SMALL, untie_embeddings_and_output_weights=st.booleans()),
        st.sampled_from(({}, {"openai_gelu": True}, {"bias_gelu_fusion": True}, {"bias_gelu_fusion": False})),
    ),
}
FAMILY = {family.name: family for family in FAMILIES}
ONE_RANK = {"tp": 1, "pp": 1, "ep": 1, "moe_tp": 1, "world": 1, "embedding": "none"}


def said(family, dialect, raw):
    return {**FAMILY[family].traits, **read(dialect_of(FAMILY[family], dialect).table, raw, "a config")}


def said_by(kind, raw):
    family, dialect = kind.split()
    return said(family, dialect, raw)


def respelled(family, dialect, config):
    """Return the config in a program's words, as it comes back from its JSON; for one rank where it does not say for how many."""
    full = {**ONE_RANK, **config} if dialect == "trtllm" else config
    found = write(dialect_of(FAMILY[family], dialect).table, full, FAMILY[family].traits, "a config")
    return json.loads(json.dumps(found))


def meaning(config):
    """Return the facts of a config that every dialect has to keep: how weights are cut and padded is each dialect's own affair."""
    kept = [f for f in FIELDS if not f.soft and (not f.storage or f.name == "dtype")]
    return {f.name: config[f.name] for f in kept if config.get(f.name) not in (None, f.neutral)}


@settings(deadline=None)
@pytest.mark.parametrize("kind", CONFIGS)
@given(data=st.data())
def test_what_a_config_says_is_said_again_in_the_same_words(kind, data):
    family, dialect = kind.split()
    config = said(family, dialect, data.draw(CONFIGS[kind]))
    again = said(family, dialect, respelled(family, dialect, config))
    assert {name: value for name, value in again.items() if value is not None} == {
        name: value for name, value in config.items() if value is not None
    }


PAIRS = [
    ("llama hf", "trtllm"),
    ("gpt2 hf", "trtllm"),
    ("llama trtllm", "hf"),
    ("gpt2 trtllm", "hf"),
    ("llama megatron", "hf"),
    ("llama megatron", "trtllm"),
    ("gpt2 megatron", "hf"),
    ("gpt2 megatron", "trtllm"),
    ("gpt2 hf", "megatron"),
    ("gpt2 trtllm", "megatron"),
]


@settings(deadline=None)
@pytest.mark.parametrize(("kind", "other"), PAIRS)
@given(data=st.data())
def test_a_config_that_went_to_another_program_and_back_means_the_same(kind, other, data):
    family, dialect = kind.split()
    config = said(family, dialect, data.draw(CONFIGS[kind]))
    abroad = said(family, other, respelled(family, other, config))
    assert meaning(abroad) == meaning(config)
    assert meaning(said(family, dialect, respelled(family, dialect, abroad))) == meaning(config)


@settings(deadline=None)
@given(data=st.data())
def test_what_megatron_says_of_a_llama_is_the_same_by_way_of_hugging_face_and_tensorrt(data):
    config = said("llama", "megatron", data.draw(CONFIGS["llama megatron"]))
    by_way = config
    for dialect in ("hf", "trtllm", "hf", "megatron"):
        by_way = said("llama", dialect, respelled("llama", dialect, by_way))
    assert meaning(by_way) == meaning(config)


# --- what a config says, written out --------------------------------------------------------------------------------------------

MLA = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}
DSA = {
    **MLA,
    "q_lora_rank": 6,
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 3,
    "dsa_indexer_head_dim": 6,
    "dsa_indexer_topk": 5,
}
QUICK = {"swiglu": False, "quick_geglu": True}
WINDOW = {"window_size": [127, 0]}
UNSTRETCHED = {"position_embedding_type": "yarn"}
YARN = {**UNSTRETCHED, "rotary_scaling_factor": 4.0}
STRETCHED = {"rope_type": "yarn", "factor": 40.0}
SIGMOID = {"num_experts": 8, "moe_router_score_function": "sigmoid"}
GROUPS = {**SIGMOID, "moe_router_num_groups": 4}
MEANINGS = [
    ("hf: a missing number of KV heads is the number of heads", "llama hf", {}, "kv_heads", 4),
    ("hf: null is absent", "llama hf", {"num_key_value_heads": None}, "kv_heads", 4),
    ("hf: a head is as wide as its part of the stream", "llama hf", {}, "head_dim", 8),
    ("hf: unless the config says so", "llama hf", {"head_dim": 16}, "head_dim", 16),
    ("hf: an integer serves as a float", "llama hf", {"rope_theta": 500000}, "rope_theta", 500000.0),
    ("hf: transformers 5 keeps the base elsewhere", "llama hf", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta", 5e5),
    (
        "hf: both places may say the same",
        "llama hf",
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
        "rope_theta",
        5e5,
    ),
    (
        "hf: rope types by the old name of the key",
        "llama hf",
        {"rope_scaling": {"type": "linear", "factor": 2}},
        "rope_factor",
        2.0,
    ),
    ("hf: swish is silu", "llama hf", {"hidden_act": "swish"}, "activation", "silu"),
    ("hf: attention_bias is a bias of q, k and v", "llama hf", {"attention_bias": True}, "qkv_bias", True),
    ("hf: and of the output projection", "llama hf", {"attention_bias": True}, "out_bias", True),
    ("hf: a Llama without a word is untied", "llama hf", {}, "tied", False),
    ("hf: a GPT-2 without a word is tied", "gpt2 hf", {}, "tied", True),
    ("hf: GPT-2's MLP is four times as wide", "gpt2 hf", {}, "ffn", 128),
    ("hf: GPT-2's own activation is the tanh form", "gpt2 hf", {}, "activation", "gelu_tanh"),
    (
        "megatron: num_query_groups counts with its flag",
        "llama megatron",
        {"group_query_attention": True, "num_query_groups": 2},
        "kv_heads",
        2,
    ),
    ("megatron: and means nothing without it", "llama megatron", {"num_query_groups": 1}, "kv_heads", 4),
    (
        "megatron: nor where the flag is off",
        "llama megatron",
        {"group_query_attention": False, "num_query_groups": 2},
        "kv_heads",
        4,
    ),
    ("megatron: the fused GELU is the tanh form", "gpt2 megatron", {"bias_gelu_fusion": True}, "activation", "gelu_tanh"),
    ("megatron: the plain GELU is exact", "gpt2 megatron", {"bias_gelu_fusion": False}, "activation", "gelu"),
    ("megatron: OpenAI's GELU is the tanh form", "gpt2 megatron", {"openai_gelu": True}, "activation", "gelu_tanh"),
    (
        "megatron: and changes nothing beside it",
        "gpt2 megatron",
        {"openai_gelu": True, "bias_gelu_fusion": True},
        "activation",
        "gelu_tanh",
    ),
    ("megatron: a quick GEGLU", "llama megatron", {**QUICK, "bias_gelu_fusion": True}, "activation", "gelu_quick"),
    ("megatron: is gated", "llama megatron", QUICK, "gated", True),
    ("megatron: what it multiplies may have an offset", "llama megatron", {**QUICK, "glu_linear_offset": 1}, "glu_offset", 1.0),
    ("megatron: or none", "llama megatron", QUICK, "glu_offset", 0.0),
    ("megatron: and a limit", "llama megatron", {**QUICK, "activation_func_clamp_value": 7.0}, "glu_limit", 7.0),
    ("megatron: or none of that", "llama megatron", QUICK, "glu_limit", None),
    ("megatron: a squared ReLU", "gpt2 megatron", {"squared_relu": True}, "activation", "relu2"),
    ("megatron: SwiGLU is not fused with a bias", "llama megatron", {"bias_gelu_fusion": True}, "activation", "silu"),
    ("megatron: epsilon by its config's name", "llama megatron", {"layernorm_epsilon": 1e-6}, "norm_eps", 1e-6),
    ("megatron: epsilon by its argument's name", "llama megatron", {"norm_epsilon": 1e-6}, "norm_eps", 1e-6),
    ("megatron: epsilon where nobody says it", "llama megatron", {}, "norm_eps", 1e-5),
    ("megatron: rope scaling is Llama 3's", "llama megatron", {"use_rope_scaling": True}, "rope_type", "llama3"),
    ("megatron: by 8", "llama megatron", {"use_rope_scaling": True}, "rope_factor", 8.0),
    (
        "megatron: or by what it says",
        "llama megatron",
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        "rope_factor",
        32.0,
    ),
    ("megatron: from 8192 positions", "llama megatron", {"use_rope_scaling": True}, "rope_original", 8192),
    (
        "megatron: a factor without its flag stretches nothing",
        "llama megatron",
        {"rope_scaling_factor": 32.0},
        "rope_type",
        "default",
    ),
    ("megatron: interpolation is linear", "llama megatron", {"rotary_seq_len_interpolation_factor": 2}, "rope_type", "linear"),
    (
        "megatron: norms are stored less one where it says so",
        "llama megatron",
        {"apply_layernorm_1p": True},
        "zero_centred",
        True,
    ),
    ("megatron: in TE's words", "llama megatron", {"layernorm_zero_centered_gamma": True}, "zero_centred", True),
    ("megatron: queries and keys are normed head by head", "llama megatron", {"qk_layernorm": True}, "qk_norm", "head"),
    ("megatron: or not at all", "llama megatron", {"qk_layernorm": False}, "qk_norm", "none"),
    ("megatron: 127 tokens before this one are a window of 128", "llama megatron", WINDOW, "window", 128),
    ("megatron: everything before it is none", "llama megatron", {"window_size": [-1, 0]}, "window", None),
    ("megatron: in every layer", "llama megatron", WINDOW, "window_layers", None),
    ("megatron: or all but every n-th", "llama megatron", {**WINDOW, "window_attn_skip_freq": 2}, "window_layers", (1, 0)),
    ("megatron: or these layers", "llama megatron", {**WINDOW, "window_attn_skip_freq": [0, 1]}, "window_layers", (0, 1)),
    ("megatron: a score that goes to no token", "llama megatron", {"softmax_type": "learnable"}, "sinks", True),
    ("megatron: or none", "llama megatron", {"softmax_type": "vanilla"}, "sinks", False),
    ("megatron: YaRN outside latent attention is a rope", "llama megatron", YARN, "position", "rope"),
    ("megatron: stretched", "llama megatron", YARN, "rope_type", "yarn"),
    ("megatron: by a factor of 1, which is nothing", "llama megatron", UNSTRETCHED, "rope_type", "default"),
    # 0.1 ln(40) + 1
    ("megatron: 40 does not", "llama megatron", {**YARN, "rotary_scaling_factor": 40.0}, "rope_attention", 1.36888794541),
    # 0.07 ln(40) + 1, each of Megatron's words for itself
    ("megatron: 0.7 of it less", "llama megatron", {**MLA, "mscale": 0.7}, "rope_attention", 1.25822156179),
    ("megatron: or not at all", "llama megatron", {**MLA, "mscale": 0.0}, "rope_attention", 1.0),
    ("hf: YaRN's factor follows from its own", "llama hf", {"rope_scaling": STRETCHED}, "rope_attention", 1.36888794541),
    (
        "hf: one word alone changes nothing",
        "llama hf",
        {"rope_scaling": {**STRETCHED, "mscale": 0.7}},
        "rope_attention",
        1.36888794541,
    ),
    (
        "hf: nor does it beside 0",
        "llama hf",
        {"rope_scaling": {**STRETCHED, "mscale": 0.7, "mscale_all_dim": 0.0}},
        "rope_attention",
        1.36888794541,
    ),
    # (0.07 ln(40) + 1) / (0.1 ln(40) + 1)
    (
        "hf: two do",
        "llama hf",
        {"rope_scaling": {**STRETCHED, "mscale": 0.7, "mscale_all_dim": 1.0}},
        "rope_attention",
        0.919155995204,
    ),
    (
        "hf: unless it is given",
        "llama hf",
        {"rope_scaling": {**STRETCHED, "mscale": 0.7, "attention_factor": 0.5}},
        "rope_attention",
        0.5,
    ),
    (
        "hf: a factor that is not said is that of the lengths",
        "llama hf",
        {"rope_scaling": {**STRETCHED, "factor": None, "original_max_position_embeddings": 16}},
        "rope_factor",
        8.0,
    ),
    ("hf: and lengths are those of the model", "llama hf", {"rope_scaling": STRETCHED}, "rope_original", 128),
    ("hf: an indexer everywhere", "glm_moe_dsa hf", {}, "index_layers", None),
    ("hf: listed", "glm_moe_dsa hf", {"indexer_types": ["full", "shared"] * 3}, "index_layers", (1, 0) * 3),
    ("hf: a pattern", "glm_moe_dsa hf", {"index_topk_pattern": "FSSFFS"}, "index_layers", (1, 0, 0, 1, 1, 0)),
    ("hf: a step, behind two", "glm_moe_dsa hf", {"index_topk_freq": 3}, "index_layers", (1, 1, 0, 0, 1, 0)),
    (
        "hf: as GLM-5.2 says it twice",
        "glm_moe_dsa hf",
        {"indexer_types": ["full"] * 3 + ["shared"] * 3, "index_topk_freq": 4, "index_skip_topk_offset": 3},
        "index_layers",
        (1, 1, 1, 0, 0, 0),
    ),
    ("hf: the norm of an indexer's keys", "deepseek_v32 hf", {"rms_norm_eps": 1e-5}, "index_norm_eps", 1e-6),
    ("megatron: an indexer's keys are normed like all else", "llama megatron", DSA, "index_norm_eps", 1e-5),
    ("megatron: unless it is said", "llama megatron", {**DSA, "dsa_indexer_k_norm_epsilon": 1e-6}, "index_norm_eps", 1e-6),
    ("megatron: the first has an indexer", "llama megatron", {**DSA, "dsa_indexer_topk_freq": 2}, "index_layers", (1, 0)),
    (
        "megatron: behind so many",
        "llama megatron",
        {**DSA, "dsa_indexer_topk_freq": 2, "dsa_indexer_skip_topk_offset": 2},
        "index_layers",
        None,
    ),
    ("hf: DeepSeek's compressed norms", "deepseek_v3 hf", {"rms_norm_eps": 1e-5}, "latent_norm_eps", 1e-6),
    ("megatron: its own are like all others", "llama megatron", {**MLA, "layernorm_epsilon": 1e-5}, "latent_norm_eps", 1e-5),
    (
        "megatron: a factor of 0 is none",
        "llama megatron",
        {"num_experts": 8, "moe_router_topk_scaling_factor": 0.0},
        "router_scale",
        1.0,
    ),
    ("megatron: or more", "llama megatron", {**YARN, "rotary_scaling_factor": 32.0}, "rope_factor", 32.0),
    ("megatron: in Megatron-Bridge's word", "llama megatron", {**YARN, "yarn_rotary_scaling_factor": 4.0}, "rope_factor", 4.0),
    ("megatron: from 4096 positions", "llama megatron", YARN, "rope_original", 4096),
    (
        "megatron: or another number",
        "llama megatron",
        {**YARN, "yarn_original_max_position_embeddings": 64},
        "rope_original",
        64,
    ),
    ("megatron: its rotations", "llama megatron", {**YARN, "yarn_beta_fast": 16.0}, "rope_beta_fast", 16.0),
    ("megatron: and others", "llama megatron", {**YARN, "yarn_beta_slow": 2.0}, "rope_beta_slow", 2.0),
    ("megatron: its bounds are whole", "llama megatron", YARN, "rope_truncated", True),
    (
        "megatron: or not",
        "llama megatron",
        {**YARN, "yarn_correction_range_round_to_int": False},
        "rope_truncated",
        False,
    ),
    ("megatron: experts", "llama megatron", {"num_experts": 8}, "experts", 8),
    ("megatron: no experts", "llama megatron", {"num_experts": None}, "experts", 0),
    ("megatron: biases of theirs", "llama megatron", {"num_experts": 8, "add_bias_linear": True}, "moe_bias", True),
    ("megatron: and of the router", "llama megatron", {"num_experts": 8, "add_bias_linear": True}, "router_shift", True),
    ("megatron: or none of either", "llama megatron", {"num_experts": 8}, "router_shift", False),
    ("megatron: their weights sum to one", "llama megatron", {"num_experts": 8}, "router_normed", True),
    ("megatron: not so", "llama megatron", {"num_experts": 8, "moe_router_pre_softmax": True}, "router_normed", False),
    ("megatron: sigmoids of several do", "llama megatron", SIGMOID, "router_normed", True),
    ("megatron: the sigmoid of one does not", "llama megatron", {**SIGMOID, "moe_router_topk": 1}, "router_normed", False),
    (
        "megatron: the weight of one may be a factor on what goes in",
        "llama megatron",
        {**SIGMOID, "moe_router_topk": 1, "moe_apply_probs_on_input": True},
        "router_on_input",
        True,
    ),
    ("megatron: groups of them", "llama megatron", {**GROUPS, "moe_router_group_topk": 2}, "router_group_topk", 2),
    ("megatron: all of which may be used", "llama megatron", GROUPS, "router_group_topk", 4),
    ("megatron: two of them by default", "llama megatron", {"num_experts": 8}, "topk", 2),
    ("megatron: each as wide as an MLP", "llama megatron", {"num_experts": 8}, "moe_ffn", 48),
    ("megatron: in every layer", "llama megatron", {"num_experts": 8}, "blocks", None),
    ("megatron: or every second", "llama megatron", {"num_experts": 8, "moe_layer_freq": 2}, "blocks", "*E *-"),
    ("megatron: or these", "llama megatron", {"num_experts": 8, "moe_layer_freq": [0, 1]}, "blocks", "*- *E"),
    ("megatron: latent attention", "llama megatron", MLA, "latent", True),
    ("megatron: its heads are as wide as both their parts", "llama megatron", MLA, "head_dim", 12),
    ("megatron: its queries may be whole", "llama megatron", MLA, "q_lora", 0),
    ("megatron: or compressed", "llama megatron", {**MLA, "q_lora_rank": 6}, "q_lora", 6),
    ("megatron: its rope is YaRN by default", "llama megatron", MLA, "rope_type", "yarn"),
    ("megatron: by 40", "llama megatron", MLA, "rope_factor", 40.0),
    ("megatron: unless it says plain", "llama megatron", {**MLA, "rope_type": "rope"}, "rope_type", "default"),
    ("megatron: every linear layer has a bias by default", "gpt2 megatron", {}, "mlp_bias", True),
    ("megatron: q, k and v alone may have one", "llama megatron", {"add_qkv_bias": True}, "qkv_bias", True),
    ("megatron: the output projection then has none", "llama megatron", {"add_qkv_bias": True}, "out_bias", False),
    ("megatron: tied unless it says untied", "gpt2 megatron", {}, "tied", True),
    ("megatron: the MLP is four times as wide", "gpt2 megatron", {}, "ffn", 128),
    ("trtllm: one rank where the mapping is missing", "llama trtllm", {}, "tp", 1),
    ("trtllm: ranks as the mapping says", "llama trtllm", {"mapping": {"tp_size": 4}}, "tp", 4),
    ("trtllm: rows of the embedding", "llama trtllm", {"use_parallel_embedding": True}, "embedding", "rows"),
    (
        "trtllm: columns of it",
        "llama trtllm",
        {"use_parallel_embedding": True, "embedding_sharding_dim": 1},
        "embedding",
        "columns",
    ),
    ("trtllm: the sharding means nothing without its flag", "llama trtllm", {"embedding_sharding_dim": 1}, "embedding", "none"),
]
MLA_HF = {
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
SPARSE_HF = {**MLA_HF, "q_lora_rank": 8, "index_n_heads": 3, "index_head_dim": 6, "index_topk": 5}
SPARSE_HF |= {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-6}
LLAMA4_HF = {"intermediate_size_mlp": 64, "attention_chunk_size": 8, "interleave_moe_layer_step": 2}


def hf_like(architecture, model_type, **more):
    """Give the config of a family that is Llama's and some more."""
    said = {"architectures": [architecture], "model_type": model_type, "num_key_value_heads": 4}
    return {**LLAMA_HF, **said, **more}


HEADS = {"num_key_value_heads": 2, "head_dim": 8}
# of the mixtures, one config a family
MIXTURES = {
    "mixtral hf": hf_like("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe hf": hf_like(
        "Qwen3MoeForCausalLM", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
    "qwen2_moe hf": hf_like(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    ),
    "qwen3_next hf": hf_like(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=6,
        full_attention_interval=3,
        linear_num_value_heads=48,
    ),
    "qwen3_5_moe hf": hf_like(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=6,
        full_attention_interval=3,
        linear_num_value_heads=48,
    ),
    "minimax_m2 hf": hf_like("MiniMaxM2ForCausalLM", "minimax_m2", num_local_experts=4, num_experts_per_tok=2),
    "olmoe hf": hf_like("OlmoeForCausalLM", "olmoe", num_experts=4),
    "deepseek_v2 hf": hf_like("DeepseekV2ForCausalLM", "deepseek_v2", **MLA_HF),
    "deepseek_v3 hf": hf_like(
        "DeepseekV3ForCausalLM", "deepseek_v3", n_group=1, topk_group=1, routed_scaling_factor=1.0, **MLA_HF
    ),
    "glm4_moe hf": hf_like(
        "Glm4MoeForCausalLM", "glm4_moe", n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "glm4_moe_lite hf": hf_like("Glm4MoeLiteForCausalLM", "glm4_moe_lite", **MLA_HF),
    "deepseek_v32 hf": hf_like("DeepseekV32ForCausalLM", "deepseek_v32", **SPARSE_HF),
    "glm_moe_dsa hf": hf_like("GlmMoeDsaForCausalLM", "glm_moe_dsa", **SPARSE_HF, num_hidden_layers=6),
    "llama4 hf": hf_like("Llama4ForCausalLM", "llama4_text", **HEADS, **LLAMA4_HF),
    "gpt_oss hf": hf_like(
        "GptOssForCausalLM",
        "gpt_oss",
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_scaling={"rope_type": "default"},
    ),
}
BASE = {
    **MIXTURES,
    "mistral hf": hf_like("MistralForCausalLM", "mistral"),
    "nemotron hf": hf_like("NemotronForCausalLM", "nemotron"),
    "llama hf": LLAMA_HF,
    "gpt2 hf": GPT2_HF,
    "llama megatron": LLAMA_MEGATRON,
    "gpt2 megatron": GPT2_MEGATRON,
    "llama trtllm": LLAMA_TRTLLM,
    "gpt2 trtllm": GPT2_TRTLLM,
}


@pytest.mark.parametrize(("remark", "kind", "more", "field", "value"), MEANINGS, ids=[row[0] for row in MEANINGS])
def test_a_config_means(remark, kind, more, field, value):
    found = said_by(kind, {**BASE[kind], **more})[field]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("kind", BASE)
def test_the_family_of_a_config_is_recognised(kind):
    family, dialect = kind.split()
    found, config = recognise(dialect, BASE[kind], "a config", {})
    assert found.name == family
    assert {name: config[name] for name in found.traits} == found.traits


def test_a_vocabulary_given_by_hand_stands_over_the_config():
    for kind, raw in BASE.items():
        assert recognise(kind.split()[1], raw, "a config", {"vocab": 90})[1]["vocab"] == 90


@pytest.mark.parametrize(
    ("kind", "more", "what"),
    [
        ("llama hf", {"num_key_value_heads": 3}, "query heads do not divide among the KV heads"),
        ("qwen3_next hf", {"linear_num_value_heads": 40}, "value heads do not divide among the key heads"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_heads_that_share_one_divide_among_those_that_they_share(kind, more, what):
    with pytest.raises(BadCheckpoint, match=what):
        recognise(kind.split()[1], {**BASE[kind], **more}, "a config", {})


# --- refusals -------------------------------------------------------------------------------------------------------------------

# who must act, and what is said: the key stands in the middle
UNKNOWN = (NotSupported, "the config sets '{}', which carnet does not know")
STRANGE = (NotSupported, "the config sets '{}' to a value that carnet does not know")
FOREIGN = (NotSupported, "the config sets '{}' to a value that carnet cannot carry over")
NO_INT = (BadCheckpoint, "the config sets '{}' to something that is not an int")
NO_FLOAT = (BadCheckpoint, "the config sets '{}' to something that is not a float")
NO_BOOL = (BadCheckpoint, "the config sets '{}' to something that is not a bool")
SILENT = (BadCheckpoint, "the config does not say '{}'")
DIFFERENT = (NotSupported, "the config's '{}' differs from what the model is otherwise")
IDLE = (NotSupported, "the config sets '{}', which means nothing beside the rest")
COMBINED = (NotSupported, "the config's combination of {} is not known")
CONTRADICTS = (BadCheckpoint, "the config contradicts itself")
SENSELESS = (BadCheckpoint, "the config sets '{}' to what makes no sense")
ACTIVATIONS = "swiglu, squared_relu, quick_geglu, openai_gelu, bias_gelu_fusion"
REFUSALS = [
    (
        "linear attention of a kind that nobody knows",
        "llama megatron",
        {"experimental_attention_variant": "csa"},
        STRANGE,
        "experimental_attention_variant",
    ),
    (
        "linear attention in no layers",
        "llama megatron",
        {"experimental_attention_variant": "gdn"},
        (BadCheckpoint, "the config does not say 'linear_attention_freq'"),
        "",
    ),
    ("an unknown key", "llama hf", {"sliding_window": 4}, UNKNOWN, "sliding_window"),
    (
        "an unknown key inside a known one",
        "llama hf",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        UNKNOWN,
        "rope_parameters.partial_rotary_factor",
    ),
    ("a text for rope_scaling", "llama hf", {"rope_scaling": "linear"}, UNKNOWN, "rope_scaling"),
    ("a text for an integer", "llama hf", {"hidden_size": "32"}, NO_INT, "hidden_size"),
    ("true for an integer", "llama hf", {"num_key_value_heads": True}, NO_INT, "num_key_value_heads"),
    ("a fraction for an integer", "llama hf", {"hidden_size": 32.0}, NO_INT, "hidden_size"),
    ("a list for an integer", "llama hf", {"hidden_size": [32]}, NO_INT, "hidden_size"),
    ("true for a fraction", "llama hf", {"rms_norm_eps": True}, NO_FLOAT, "rms_norm_eps"),
    ("a text for a fraction", "llama hf", {"rms_norm_eps": "1e-5"}, NO_FLOAT, "rms_norm_eps"),
    ("1 for true", "llama hf", {"tie_word_embeddings": 1}, NO_BOOL, "tie_word_embeddings"),
    ("an activation of another family", "llama hf", {"hidden_act": "relu"}, STRANGE, "hidden_act"),
    ("an element type without a name", "llama hf", {"torch_dtype": "float8_e4m3fn"}, STRANGE, "torch_dtype"),
    ("two element types", "llama hf", {"dtype": "float16"}, CONTRADICTS, ""),
    (
        "two places for rope that differ in type",
        "llama hf",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        CONTRADICTS,
        "",
    ),
    (
        "two places for rope that differ in factor",
        "llama hf",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        CONTRADICTS,
        "",
    ),
    ("two bases of rope", "llama hf", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, CONTRADICTS, ""),
    (
        "rope by YaRN, of NVIDIA's ranks",
        "llama trtllm",
        {"rotary_scaling": {"rope_type": "yarn", "factor": 4.0}},
        STRANGE,
        "rotary_scaling.rope_type",
    ),
    (
        "an attention factor that is not a number",
        "llama hf",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}},
        SENSELESS,
        "rope_scaling.attention_factor",
    ),
    (
        "an attention factor beside plain rope",
        "llama hf",
        {"rope_scaling": {"rope_type": "default", "attention_factor": 0.5}},
        IDLE,
        "rope_scaling.attention_factor",
    ),
    (
        "one expert whose score alone would be normed",
        "llama megatron",
        {"num_experts": 8, "moe_router_topk": 1},
        COMBINED,
        "moe_router_pre_softmax",
    ),
    (
        "rope that changes as it runs",
        "llama hf",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        STRANGE,
        "rope_scaling.type",
    ),
    (
        "rope stretched by nobody knows how much",
        "llama hf",
        {"rope_scaling": {"type": "linear"}},
        SILENT,
        "rope_scaling.factor",
    ),
    (
        "Llama 3's rope without its constants",
        "llama hf",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        SILENT,
        "rope_scaling.low_freq_factor",
    ),
    ("another model's type", "llama hf", {"model_type": "mistral"}, FOREIGN, "model_type"),
    (
        "attention that is scaled by layer",
        "gpt2 hf",
        {"scale_attn_by_inverse_layer_idx": True},
        FOREIGN,
        "scale_attn_by_inverse_layer_idx",
    ),
    ("attention that is not scaled", "gpt2 hf", {"scale_attn_weights": False}, FOREIGN, "scale_attn_weights"),
    ("cross-attention", "gpt2 hf", {"add_cross_attention": True}, FOREIGN, "add_cross_attention"),
    ("a quantized checkpoint", "llama trtllm", {"quantization": {"quant_algo": "FP8"}}, FOREIGN, "quantization.quant_algo"),
    (
        "a quantized cache",
        "llama trtllm",
        {"quantization": {"kv_cache_quant_algo": "INT8"}},
        FOREIGN,
        "quantization.kv_cache_quant_algo",
    ),
    ("experts", "llama trtllm", {"moe": {"num_experts": 8}}, FOREIGN, "moe.num_experts"),
    ("heads of two widths", "llama trtllm", {"head_size": 8, "rotary_embedding_dim": 4}, DIFFERENT, "rotary_embedding_dim"),
    (
        "experts cut otherwise than the rest",
        "llama trtllm",
        {"mapping": {"tp_size": 2, "moe_tp_size": 1}},
        DIFFERENT,
        "mapping.moe_tp_size",
    ),
    ("a context cut among ranks", "llama trtllm", {"mapping": {"cp_size": 2}}, FOREIGN, "mapping.cp_size"),
    (
        "an embedding cut along a third axis",
        "llama trtllm",
        {"use_parallel_embedding": True, "embedding_sharding_dim": 2},
        COMBINED,
        "use_parallel_embedding, embedding_sharding_dim",
    ),
    ("an unknown key of TensorRT-LLM", "llama trtllm", {"has_partial_lora_mask": True}, UNKNOWN, "has_partial_lora_mask"),
    ("two epsilons", "llama megatron", {"layernorm_epsilon": 1e-5, "norm_epsilon": 1e-6}, CONTRADICTS, ""),
    ("a norm of another kind", "llama megatron", {"normalization": "L2Norm"}, STRANGE, "normalization"),
    (
        "positions as a bias on the scores",
        "llama megatron",
        {"position_embedding_type": "relative"},
        STRANGE,
        "position_embedding_type",
    ),
    (
        "two stretchings of rope at once",
        "llama megatron",
        {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2},
        COMBINED,
        "position_embedding_type, use_rope_scaling, rotary_seq_len_interpolation_factor",
    ),
    (
        "a squared ReLU and a SwiGLU",
        "gpt2 megatron",
        {"squared_relu": True, "swiglu": True},
        COMBINED,
        ACTIVATIONS,
    ),
    # what megatron-core computes is exact, what the argument says is the tanh form
    (
        "OpenAI's GELU without the kernel that has it",
        "gpt2 megatron",
        {"openai_gelu": True, "bias_gelu_fusion": False},
        COMBINED,
        ACTIVATIONS,
    ),
    (
        "the kernel of the tanh form without a bias",
        "gpt2 megatron",
        {"bias_gelu_fusion": True, "add_bias_linear": False},
        COMBINED,
        "add_bias_linear",
    ),
    ("a score that is nobody's and fixed", "llama megatron", {"softmax_type": "off-by-one"}, STRANGE, "softmax_type"),
    ("a window that looks ahead", "llama megatron", {"window_size": [4, 4]}, SENSELESS, "window_size"),
    ("a window that begins nowhere and looks ahead", "llama megatron", {"window_size": [-1, 4]}, SENSELESS, "window_size"),
    ("a window of a text", "llama megatron", {"window_size": "(4, 0)"}, SENSELESS, "window_size"),
    (
        "windows in another number of layers",
        "llama megatron",
        {**WINDOW, "window_attn_skip_freq": [1]},
        SENSELESS,
        "window_attn_skip_freq",
    ),
    ("YaRN in a part of a head", "llama megatron", {**YARN, "rotary_percent": 0.5}, COMBINED, "rotary_percent"),
    ("YaRN stretched as Llama 3", "llama megatron", {**YARN, "use_rope_scaling": True}, STRANGE, "position_embedding_type"),
    ("latent attention without norms", "llama megatron", {**MLA, "qk_layernorm": False}, COMBINED, "qk_layernorm"),
    (
        "plain rope whose scores are scaled as YaRN's",
        "llama megatron",
        {**MLA, "rope_type": "rope", "mscale_all_dim": 0.7},
        COMBINED,
        "mscale_all_dim, rotary_scaling_factor",
    ),
    (
        "a factor on what goes into several experts",
        "llama megatron",
        {**SIGMOID, "moe_apply_probs_on_input": True},
        COMBINED,
        "moe_router_topk",
    ),
    (
        "scores of another form",
        "llama megatron",
        {"num_experts": 8, "moe_router_score_function": "sqrtsoftplus"},
        STRANGE,
        "moe_router_score_function",
    ),
    (
        "norms that are and are not stored less one",
        "llama megatron",
        {"layernorm_zero_centered_gamma": True, "apply_layernorm_1p": False},
        CONTRADICTS,
        "",
    ),
    ("a text for the number of experts", "llama megatron", {"num_experts": "8"}, NO_INT, "num_experts"),
    ("latent attention of no width", "llama megatron", {"multi_latent_attention": True}, SILENT, "kv_lora_rank"),
    (
        "marks for another number of layers",
        "llama megatron",
        {"num_experts": 8, "moe_layer_freq": [1]},
        SENSELESS,
        "moe_layer_freq",
    ),
    ("training in eight bits", "llama megatron", {"params_dtype": "torch.float8_e4m3fn"}, STRANGE, "params_dtype"),
]


@pytest.mark.parametrize(("remark", "kind", "more", "refusal", "key"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_config_is_refused_for(remark, kind, more, refusal, key):
    error, what = refusal
    with pytest.raises(error) as caught:
        said_by(kind, {**BASE[kind], **more})
    assert caught.value.what == what.format(key)
    assert caught.value.facts["where"] == "a config"


KNOWN_FAULTS = [
    pytest.param("llama hf", {"eos_token_id": [128001, 128009]}, id="Llama 3.1 has several ends of a text"),
    pytest.param(
        "llama hf", {"rope_theta": 10000, "rope_parameters": {"rope_theta": 1e4}}, id="10000 and 10000.0 are no contradiction"
    ),
    pytest.param(
        "llama hf",
        {"rope_theta": 10000, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        id="as transformers 5 may write both",
    ),
]


@pytest.mark.parametrize(("kind", "more"), KNOWN_FAULTS)
def test_a_config_is_read_though(kind, more):
    said_by(kind, {**BASE[kind], **more})


UNREFUSED = [
    pytest.param("llama hf", {"rope_theta": 10**400}, id="a number that no float can hold"),  # OverflowError
    pytest.param("llama hf", {"rope_scaling": {"factor": 2.0}}, id="a factor of rope without a type"),  # lost in silence
    pytest.param("llama hf", {"num_key_value_heads": 0}, id="no KV heads at all"),  # ZeroDivisionError in model.sizes
    pytest.param("llama hf", {"hidden_size": -32}, id="a negative width"),
    pytest.param("mixtral hf", {"num_hidden_layers": 1 << 60}, id="more layers than a list can hold"),
    pytest.param("qwen3_moe hf", {"decoder_sparse_step": 0}, id="every layer of none"),
    pytest.param("qwen3_moe hf", {"mlp_only_layers": 3}, id="a number for a list"),
    pytest.param("deepseek_v3 hf", {"rope_interleave": False}, id="halves of a head rotated together where pairs are"),
    pytest.param("deepseek_v3 hf", {"q_lora_rank": -1}, id="queries of a negative width"),
    pytest.param("deepseek_v3 hf", {"n_shared_experts": "2"}, id="a text for a number of experts"),
    pytest.param("deepseek_v3 hf", {"first_k_dense_replace": 1.5}, id="a layer and a half"),
    pytest.param("deepseek_v2 hf", {"norm_topk_prob": True}, id="weights that are normed and scaled"),
    pytest.param("deepseek_v2 hf", {"topk_method": "noaux_tc"}, id="V3's choice of experts in V2"),
    pytest.param("olmoe hf", {"clip_qkv": 8.0}, id="queries that are clipped"),
    pytest.param("deepseek_v32 hf", {"q_lora_rank": None}, id="an indexer that has no compressed queries to read"),
    pytest.param("deepseek_v32 hf", {"index_n_heads": 0}, id="an indexer without heads"),
    pytest.param("deepseek_v32 hf", {"index_topk_freq": 2}, id="choices that V3.2 cannot share"),
    pytest.param("deepseek_v32 hf", {"indexer_rope_interleave": True}, id="GLM's rotation in DeepSeek's indexer"),
    pytest.param("glm_moe_dsa hf", {"indexer_rope_interleave": False}, id="DeepSeek's rotation in GLM's indexer"),
    pytest.param("glm_moe_dsa hf", {"indexer_types": ["shared", *["full"] * 5]}, id="a choice of nobody's"),
    pytest.param("glm_moe_dsa hf", {"indexer_types": ["full"] * 5}, id="a word too few"),
    pytest.param("glm_moe_dsa hf", {"indexer_types": ["full"] * 5 + ["half"]}, id="an indexer of another kind"),
    pytest.param("glm_moe_dsa hf", {"index_topk_pattern": "FFFFFX"}, id="a letter of nobody's"),
    pytest.param("glm_moe_dsa hf", {"index_topk_freq": 2, "index_topk_pattern": "FFFFFF"}, id="two words for the same layers"),
    pytest.param("glm_moe_dsa hf", {"num_experts": 7}, id="experts that are counted twice"),
    pytest.param("llama megatron", {**DSA, "dsa_indexer_scoring_relu": False}, id="scores below zero that count"),
    pytest.param("llama megatron", {**DSA, "dsa_indexer_topk_freq": 0}, id="no step at all"),
    pytest.param("llama megatron", {**DSA, "q_lora_rank": None}, id="compressed queries that are not there"),
    pytest.param("llama4 hf", {"attention_chunk_size": None}, id="chunks of nobody knows what"),
    pytest.param("llama4 hf", {"moe_layers": [7]}, id="a mixture that is not a layer"),
    pytest.param("llama4 hf", {"no_rope_layers": [1]}, id="one mark for two layers"),
    pytest.param("gpt_oss hf", {"layer_types": ["sliding_attention"]}, id="one kind for two layers"),
    pytest.param("gpt_oss hf", {"swiglu_alpha": 1.0}, id="another gate"),
    pytest.param("gpt_oss hf", {"quantization_config": {"quant_method": "mxfp4"}}, id="packed weights"),
    pytest.param("llama trtllm", {"mapping": {"tp_size": 2, "world_size": 8}}, id="a world that is not tp times pp"),
    pytest.param("llama trtllm", {"mapping": {"tp_size": 0}}, id="ranks by none"),  # read as 1
]


@pytest.mark.parametrize(("kind", "more"), UNREFUSED)
def test_a_config_should_be_refused_for(kind, more):
    with pytest.raises(CarnetError):
        said_by(kind, {**BASE[kind], **more})


@pytest.mark.parametrize("key", [key for key, values in GUARDS.items() if not values])
def test_a_guard_says_what_it_expects(key):
    with pytest.raises(NotSupported) as caught:
        said("llama", "megatron", {**LLAMA_MEGATRON, key: "x"})
    assert caught.value.facts["expected"]


REQUIRED = [
    *(
        ("llama hf", key)
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        )
    ),
    *(("gpt2 hf", key) for key in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")),
    *(
        ("llama megatron", key)
        for key in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "max_position_embeddings",
            "position_embedding_type",
            "params_dtype",
        )
    ),
    *(
        ("llama trtllm", key)
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "max_position_embeddings",
            "hidden_act",
            "dtype",
        )
    ),
]


@pytest.mark.parametrize("absent", [False, True], ids=["null", "absent"])
@pytest.mark.parametrize(("kind", "key"), REQUIRED, ids=[" ".join(row) for row in REQUIRED])
def test_a_key_that_must_be_there_is_named_where_it_is_missing_or_null(kind, key, absent):
    raw = {name: value for name, value in BASE[kind].items() if name != key} if absent else {**BASE[kind], key: None}
    with pytest.raises(BadCheckpoint) as caught:
        said_by(kind, raw)
    assert caught.value.what == f"the config does not say {key!r}"


def test_megatron_without_a_vocabulary_is_refused_by_the_names_of_key_and_field():
    with pytest.raises(BadCheckpoint) as caught:
        said("llama", "megatron", {**LLAMA_MEGATRON, "vocab_size": None})
    assert "'vocab_size'" in str(caught.value)
    assert "true size of the vocabulary, without padding" in str(caught.value)


def test_a_flag_that_is_null_is_not_set():
    assert said("gpt2", "hf", {**GPT2_HF, "scale_attn_by_inverse_layer_idx": None}) == said("gpt2", "hf", GPT2_HF)
    with pytest.raises(NotSupported, match="scale_attn_weights"):
        said("gpt2", "hf", {**GPT2_HF, "scale_attn_weights": None})


# a value of each guard under which the weights mean something else
GUARDED = {
    "qk_l2_norm": True,
    "rotary_interleaved": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "mrope_section": [16, 24, 24],
    "gated_linear_unit": True,
    "activation_func": "fast_gelu",
    "softmax_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 224,
    "interleaved_attn_pattern": [5, 1],
    "embedding_multiplier": 12.0,
    "use_mup": True,
    "enable_mhc_connections": True,
    "moe_mlp_glu_interleave_size": 32,
    "moe_shared_expert_glu_interleave_size": 32,
    "mla_down_proj_fusion": True,
    "moe_single_grouped_weight": True,
    "moe_single_grouped_bias": True,
    "gdp_num_householder": 2,
    "moe_expert_capacity_factor": 0.5,
    "moe_router_force_load_balancing": True,
    "moe_router_force_biased": 0.1,
    "moe_router_topk_limited_devices": 2,
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
}


def test_the_table_below_names_every_guard():
    assert set(GUARDED) == set(GUARDS)


@pytest.mark.parametrize("key", GUARDED)
def test_megatron_is_refused_by_name_where_it_sets(key):
    # beside rotary positions of plain heads it is read
    beside = {"position_embedding_type": "none"} if key == "rotary_interleaved" else {}
    with pytest.raises(NotSupported) as caught:
        said("llama", "megatron", {**LLAMA_MEGATRON, **beside, key: GUARDED[key]})
    assert caught.value.what == f"the config sets {key!r} to a value that carnet cannot carry over"
    assert caught.value.facts["found"] == repr(GUARDED[key])


def test_arguments_of_other_programs_that_train_with_megatron_are_read():
    found = said("llama", "megatron", {**LLAMA_MEGATRON, "rotary_interleaved": True})
    assert found["rope_interleaved"] is True
    both = {"post_self_attn_layernorm": True, "post_mlp_layernorm": True}
    assert said("llama", "megatron", {**LLAMA_MEGATRON, **both})["norm_after"] is True
    with pytest.raises(BadCheckpoint, match="both, or neither"):
        said("llama", "megatron", {**LLAMA_MEGATRON, "post_mlp_layernorm": True})


@pytest.mark.parametrize("key", GUARDED)
def test_megatron_crosses_where_a_guard_is_null_or_at_rest(key):
    for value in (None, *GUARDS[key]):
        assert said("llama", "megatron", {**LLAMA_MEGATRON, key: value}) == said("llama", "megatron", LLAMA_MEGATRON)


OSS_YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}}
# what Megatron must be told, and what it must not be: it takes a number of experts or of layers to be there for a mixture or a layer
DELTA = [("full_attention", "linear_attention")[mark] for mark in (0, 1, 1, 0, 1, 0)]
WRITTEN = [
    ("no experts", "llama hf", {}, "num_experts", None),
    ("no further tokens", "llama hf", {}, "mtp_num_layers", None),
    ("no shared experts", "mixtral hf", {}, "moe_shared_expert_intermediate_size", None),
    ("a mixture in every layer", "mixtral hf", {}, "moe_layer_freq", 1),
    ("no linear attention", "mixtral hf", {}, "linear_attention_freq", None),
    ("none of any kind", "mixtral hf", {}, "experimental_attention_variant", None),
    ("every third layer attends", "qwen3_next hf", {}, "linear_attention_freq", 3),
    ("others have Gated DeltaNet", "qwen3_next hf", {}, "experimental_attention_variant", "gated_delta_net"),
    ("layers of any kind", "qwen3_next hf", {"layer_types": DELTA}, "linear_attention_freq", [0, 1, 1, 0, 1, 0]),
    ("value heads", "qwen3_next hf", {}, "linear_num_value_heads", 48),
    ("an attention with a gate", "qwen3_next hf", {}, "attention_output_gate", True),
    ("no groups of experts", "mixtral hf", {}, "moe_router_num_groups", None),
    ("no window", "llama hf", {}, "window_size", None),
    ("a window", "mistral hf", {"sliding_window": 128}, "window_size", [127, 0]),
    ("in every layer", "mistral hf", {"sliding_window": 128}, "window_attn_skip_freq", None),
    ("in every other layer", "gpt_oss hf", {}, "window_attn_skip_freq", [1, 0]),
    ("scores that go to no token", "gpt_oss hf", {}, "softmax_type", "learnable"),
    ("a gate of its own", "gpt_oss hf", {}, "quick_geglu", True),
    ("and an offset", "gpt_oss hf", {}, "glu_linear_offset", 1.0),
    ("and a limit", "gpt_oss hf", {}, "activation_func_clamp_value", 7.0),
    ("plain positions", "gpt_oss hf", {}, "position_embedding_type", "rope"),
    ("positions that are stretched", "gpt_oss hf", OSS_YARN, "position_embedding_type", "yarn"),
    ("by a factor", "gpt_oss hf", OSS_YARN, "rotary_scaling_factor", 32.0),
    ("the kernel of the tanh form", "gpt2 hf", {}, "bias_gelu_fusion", True),
    ("not that of the exact one", "gpt2 hf", {"activation_function": "gelu"}, "bias_gelu_fusion", False),
    ("nor beside another activation, where Megatron stops", "nemotron hf", {}, "bias_gelu_fusion", False),
    ("a squared ReLU", "nemotron hf", {}, "squared_relu", True),
    ("norms inside of latent attention", "deepseek_v3 hf", {}, "qk_layernorm", True),
    ("queries that are whole", "deepseek_v3 hf", {"q_lora_rank": None}, "q_lora_rank", None),
    ("queries that are compressed", "deepseek_v3 hf", {"q_lora_rank": 6}, "q_lora_rank", 6),
    ("sparse attention", "deepseek_v32 hf", {}, "experimental_attention_variant", "dsa"),
    ("its indexer's rotation", "deepseek_v32 hf", {}, "dsa_indexer_rope_interleaved", False),
    ("as GLM has it", "glm_moe_dsa hf", {}, "dsa_indexer_rope_interleaved", True),
    ("the norm of its keys", "glm_moe_dsa hf", {}, "dsa_indexer_k_norm_epsilon", 1e-6),
    ("an indexer in every layer", "glm_moe_dsa hf", {}, "dsa_indexer_topk_freq", 1),
    ("in every third", "glm_moe_dsa hf", {"indexer_types": ["full", "shared", "shared"] * 2}, "dsa_indexer_topk_freq", 3),
    (
        "behind two",
        "glm_moe_dsa hf",
        {"indexer_types": ["full", *["full", "shared"] * 2, "full"]},
        "dsa_indexer_skip_topk_offset",
        2,
    ),
]


@pytest.mark.parametrize(("remark", "kind", "more", "key", "expected"), WRITTEN, ids=[row[0] for row in WRITTEN])
def test_megatron_is_told(remark, kind, more, key, expected):
    family, dialect = kind.split()
    found = respelled(family, "megatron", said(family, dialect, {**BASE[kind], **more}))
    assert found.get(key) == expected


# as NVIDIA's bridge for it fills its provider: src/megatron/bridge/models/gpt_oss/gpt_oss_bridge.py
BRIDGE_GPT_OSS = {
    **{
        name: LLAMA_MEGATRON[name]
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "normalization")
    },
    "seq_length": 128,
    "ffn_hidden_size": 48,
    "num_moe_experts": 4,
    "add_bias_linear": True,
    "share_embeddings_and_output_weights": False,
    "gated_linear_unit": True,
    "activation_func": {"_target_": "megatron.core.fusions.fused_bias_geglu.quick_gelu", "_call_": False},
    "bias_activation_fusion": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "softmax_type": "learnable",
    "window_size": [127, 0],
    "window_attn_skip_freq": 2,
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": False,
    "moe_router_load_balancing_type": "none",
    "params_dtype": "torch.bfloat16",
}


def test_a_gpt_oss_of_megatron_bridge_is_one_for_hugging_face():
    family, config = recognise("megatron", translate(BRIDGE_GPT_OSS, "a config"), "a config", {})
    assert family.name == "gpt_oss"
    found = respelled("gpt_oss", "hf", config)
    assert found["layer_types"] == ["sliding_attention", "full_attention"]
    assert found["sliding_window"] == 128
    assert found["swiglu_limit"] == 7.0
    assert found["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }


UNSAYABLE = [
    (
        "biases of q, k and v alone",
        "llama megatron",
        {"add_qkv_bias": True},
        "hf",
        "the target's config cannot say what the model needs of 'attention_bias'",
    ),
    (
        "biases of q, k and v alone",
        "llama megatron",
        {"add_qkv_bias": True},
        "trtllm",
        "the target's config cannot say what the model needs of 'attn_bias'",
    ),
    (
        "half of a head rotated",
        "llama megatron",
        {"rotary_percent": 0.5},
        "hf",
        "the target's config has no place for 'rope_percent'",
    ),
    (
        "half of a head rotated",
        "llama megatron",
        {"rotary_percent": 0.5},
        "trtllm",
        "the target's config has no place for 'rope_percent'",
    ),
    (
        "an MLP of a Llama without biases",
        "llama hf",
        {"attention_bias": True},
        "megatron",
        "the target's config cannot say what the model is",
    ),
    ("a gated exact GELU", "llama hf", {"hidden_act": "gelu"}, "megatron", "the target's config cannot say what the model is"),
    (
        "Llama 3's rope with other constants",
        "llama hf",
        {"rope_scaling": {**ROPE_LLAMA3, "low_freq_factor": 2.0}},
        "megatron",
        "the target's config has no place for 'rope_low'",
    ),
    (
        "a GPT-2 with fewer KV heads",
        "gpt2 megatron",
        {"group_query_attention": True, "num_query_groups": 2},
        "hf",
        "the target's config has no place for 'kv_heads'",
    ),
    ("a GPT-2 with wide heads", "gpt2 megatron", {"kv_channels": 64}, "hf", "the target's config has no place for 'head_dim'"),
    ("a gated GPT-2", "gpt2 megatron", {"swiglu": True}, "hf", "the target's config cannot say activation = 'silu'"),
]


@pytest.mark.parametrize(
    ("remark", "kind", "more", "other", "what"), UNSAYABLE, ids=[f"{row[0]} to {row[3]}" for row in UNSAYABLE]
)
def test_what_another_program_cannot_say_is_refused(remark, kind, more, other, what):
    family, dialect = kind.split()
    config = said(family, dialect, {**BASE[kind], **more})
    with pytest.raises(NotSupported) as caught:
        respelled(family, other, config)
    assert caught.value.what == what


def test_arguments_that_no_family_has_name_the_nearest_and_what_stands_against_it():
    with pytest.raises(NotSupported) as caught:
        recognise("megatron", {**LLAMA_MEGATRON, "rotary_percent": 0.5, "qk_layernorm": True}, "a config", {})
    assert str(caught.value).splitlines() == [
        "no known family has the features that the training arguments describe",
        "  where       a config",
        "  nearest     qwen3",
        "  against it  rope_percent 0.5 (part of a head that is rotated)",
        "  try: name the config.json of the model's own class with --config, if docs/families.md has that class",
    ]


def test_of_many_things_against_a_family_two_or_three_are_named():
    said = {"rotary_percent": 0.5, "softmax_type": "learnable", "add_qkv_bias": True, "qk_layernorm": True, "mtp_num_layers": 1}
    said["rotary_interleaved"] = True
    with pytest.raises(NotSupported) as caught:
        recognise("megatron", {**LLAMA_MEGATRON, **said}, "a config", {})
    assert [*caught.value.facts] == ["where", "nearest", "against it", "and", "and also", "others"]


def test_further_token_layers_that_a_family_has_no_room_for_can_be_left_behind():
    with pytest.raises(NotSupported) as caught:
        recognise("megatron", {**LLAMA_MEGATRON, "mtp_num_layers": 1}, "a config", {})
    assert caught.value.facts["nearest"] == "llama"
    assert caught.value.remedy == "--drop 'mtp.*' leaves them behind; what the others compute stays the same"


# --- what the real programs wrote -----------------------------------------------------------------------------------------------


def test_rope_scaling_stands_in_tensorrts_config_word_for_word():
    config = said("llama", "hf", {**LLAMA_HF, "rope_scaling": ROPE_LLAMA3, "rope_theta": 500000.0})
    found = respelled("llama", "trtllm", config)
    assert found["rotary_scaling"] == ROPE_LLAMA3
    assert found["rotary_base"] == 500000.0


GOLDEN_TARGETS = sorted(path.parent for path in GOLDENS.glob("*/trtllm-*/config.json"))


@pytest.mark.parametrize("target", GOLDEN_TARGETS, ids=[f"{path.parent.name} {path.name}" for path in GOLDEN_TARGETS])
def test_a_config_for_tensorrt_is_the_one_that_its_own_converter_wrote(target):
    golden = json.loads((target / "config.json").read_text())
    family, config = recognise("hf", json.loads((target.parent / "hf" / "config.json").read_text()), "hf", {})
    tp, pp = golden["mapping"]["tp_size"], golden["mapping"]["pp_size"]
    ep = golden["mapping"].get("moe_ep_size", 1)
    ranks = {"tp": tp, "pp": pp, "ep": ep, "moe_tp": tp // ep, "world": tp * pp}
    ranks["embedding"] = said(family.name, "trtllm", golden)["embedding"]
    found = respelled(family.name, "trtllm", {**config, **ranks})
    assert {key: found.get(key) for key in golden} == golden
    assert set(found) - set(golden) <= {"tie_word_embeddings"}


# --- the engine, on tables of its own -------------------------------------------------------------------------------------------


def test_a_key_of_a_closed_table_must_be_named_somewhere_and_of_an_open_one_not():
    rows = (place("layers", "n"),)
    assert read(Table(rows, closed=False), {"n": 1, "m": 2}, "x") == {"layers": 1}
    assert read(Table(rows, ignored=frozenset({"m"})), {"n": 1, "m": {"deep": 2}}, "x") == {"layers": 1}
    with pytest.raises(NotSupported, match=r"'m\.deep'"):
        read(Table(rows), {"n": 1, "m": {"deep": 2}}, "x")


def test_a_null_that_nobody_knows_says_nothing():
    assert read(Table((place("layers", "n"),)), {"n": 1, "m": None, "o": {"p": None}}, "x") == {"layers": 1}


def test_a_place_that_is_the_default_may_be_left_out():
    row = place("rope_type", "scaling.type", default="default", omit=True)
    assert write(Table((row,)), {"rope_type": "default"}, {}, "x") == {}
    assert write(Table((row,)), {"rope_type": "linear"}, {}, "x") == {"scaling": {"type": "linear"}}


def test_a_place_for_some_models_is_silent_about_the_others():
    row = place("rope_factor", "factor", only={"rope_type": "linear"})
    table = Table((place("rope_type", "type"), row), closed=False)
    assert read(table, {"type": "default", "factor": 4.0}, "x") == {"rope_type": "default"}
    with pytest.raises(NotSupported, match="no place for 'rope_factor'"):
        write(Table((place("rope_type", "type"), row)), {"rope_type": "default", "rope_factor": 4.0}, {}, "x")


def test_a_choice_takes_the_first_line_that_fits_and_writes_no_key_that_it_does_not_look_at():
    row = Choice(("tied", "gated"), (("a", False), ("b", 0)), (((True, True), (True, ANY)), ((False, True), (False, 1))))
    assert read(Table((row,)), {"a": True, "b": 7}, "x") == {"tied": True, "gated": True}
    assert write(Table((row,)), {"tied": True, "gated": True}, {}, "x") == {"a": True}
    with pytest.raises(NotSupported, match="combination of a, b is not known"):
        read(Table((row,)), {"b": True}, "x")  # True is not 1


def test_one_key_cannot_say_two_things():
    rows = (place("qkv_bias", "bias"), place("out_bias", "bias"))
    assert write(Table(rows), {"qkv_bias": True, "out_bias": True}, {}, "x") == {"bias": True}
    with pytest.raises(NotSupported, match="cannot say what the model needs of 'bias'"):
        write(Table(rows), {"qkv_bias": True, "out_bias": False}, {}, "x")


def test_a_field_without_a_place_is_refused_unless_it_is_soft_neutral_or_a_trait():
    table = Table(())
    assert write(table, {"bos": 1, "rope_theta": 10000.0, "norm": "rms"}, {"norm": "rms"}, "x") == {}
    with pytest.raises(NotSupported, match="no place for 'norm'"):
        write(table, {"norm": "rms"}, {}, "x")
    with pytest.raises(NotSupported, match="no place for 'rope_theta'"):
        write(table, {"rope_theta": 5e5}, {}, "x")


def test_a_dotted_key_is_looked_up_and_written_level_by_level():
    assert lookup({"a": {"b": {"c": 1}}}, "a.b.c") == 1
    assert lookup({"a": 1}, "a.b") is None
    assert write(Table((place("layers", "a.b.c"),), written={"a.d": None}), {"layers": 1}, {}, "x") == {
        "a": {"d": None, "b": {"c": 1}}
    }


def test_every_row_of_every_table_names_a_field_that_exists():
    tables = [MEGATRON.table, *(dialect_of(family, name).table for family in (LLAMA, GPT2) for name in ("hf", "trtllm"))]
    for table in tables:
        for row in table.rows:
            named = row.fields if isinstance(row, Choice) else (row.field,)
            assert set(named) <= set(BY_NAME)
            if isinstance(row, Place):
                assert set(row.only) <= set(BY_NAME)


@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("kind", BASE)
@given(data=st.data())
def test_a_config_with_one_strange_value_is_read_or_refused_and_never_breaks(kind, data):
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2),
        st.text(max_size=3),
        st.floats(),
        st.lists(st.integers(), max_size=2),
        st.dictionaries(
            st.sampled_from(("rope_type", "factor", "tp_size", "x")), st.one_of(st.none(), st.integers(), st.text(max_size=2))
        ),
    )
    family, dialect = kind.split()
    table = dialect_of(FAMILY[family], dialect).table
    keys = sorted({key.split(".")[0] for row in table.rows for key in _keys(row)} | set(BASE[kind]))
    raw = {**BASE[kind], data.draw(st.sampled_from(keys)): data.draw(values)}
    try:
        said(family, dialect, raw)
    except CarnetError as error:
        assert error.facts["where"] == "a config"


def _keys(row):
    if isinstance(row, Choice):
        return [key for key, _ in row.keys]
    if isinstance(row, Flagged):
        return [row.key, row.flag]
    return row.keys if isinstance(row, Place) else [row.key]
