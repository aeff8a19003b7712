"""Mistral, Qwen2 and Qwen3: what transformers saved comes back tensor by tensor, and computes the same bits."""

import json

import pytest
from transformers import (
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    Glm4Config,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo3Config,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
)

import carnet
from carnet.errors import BadCheckpoint, NotSupported
from tests.referees.sizes import HEADS, TOKENS

pytestmark = pytest.mark.referee

# Qwen2's heads are as wide as their part of the stream
QWEN2 = {name: value for name, value in HEADS.items() if name != "head_dim"}
STABLE = {**QWEN2, "hidden_size": 96}  # a quarter of a head is rotated
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
FULL = ["full_attention"] * 5
# queries grow within the text, in the words that the hub has
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
STRETCHED = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
}
MODELS = {
    "mistral": MistralConfig(**HEADS, **TOKENS, intermediate_size=56, sliding_window=None),
    "mistral, a window": MistralConfig(**HEADS, **TOKENS, intermediate_size=56, sliding_window=8),
    "qwen2": Qwen2Config(**QWEN2, **TOKENS, intermediate_size=56),
    "qwen2, tied": Qwen2Config(**{**QWEN2, "tie_word_embeddings": True}, **TOKENS, intermediate_size=56),
    "qwen3": Qwen3Config(**HEADS, **TOKENS, intermediate_size=56),
    "seed_oss": SeedOssConfig(**HEADS, **TOKENS, intermediate_size=56),
    "smollm3": SmolLM3Config(**QWEN2, **TOKENS, intermediate_size=56),
    "smollm3, a window where there are no positions": SmolLM3Config(
        **QWEN2, **TOKENS, intermediate_size=56, use_sliding_window=True, sliding_window=8
    ),
    "smollm3, a window as listed": SmolLM3Config(
        **QWEN2, **TOKENS, intermediate_size=56, use_sliding_window=True, sliding_window=8, layer_types=KINDS
    ),
    "ernie4_5": Ernie4_5Config(**HEADS, **TOKENS, intermediate_size=56, use_bias=True),
    "glm4": Glm4Config(**HEADS, **TOKENS, intermediate_size=56),
    "olmo3": Olmo3Config(**QWEN2, **TOKENS, intermediate_size=56, sliding_window=8),
    "olmo3, stretched where all is seen": Olmo3Config(
        **QWEN2, **TOKENS, intermediate_size=56, sliding_window=8, layer_types=KINDS, rope_parameters=STRETCHED
    ),
    "exaone4": Exaone4Config(**HEADS, **TOKENS, intermediate_size=56, sliding_window=8),
    "exaone4, no window": Exaone4Config(**HEADS, **TOKENS, intermediate_size=56, sliding_window=None, layer_types=FULL),
    "exaone4, a window in no layer": Exaone4Config(**HEADS, **TOKENS, intermediate_size=56, sliding_window=8, layer_types=FULL),
    "cohere": CohereConfig(**QWEN2, **TOKENS, intermediate_size=56, logit_scale=0.8333333333333334),
    "cohere, biases": CohereConfig(**QWEN2, **TOKENS, intermediate_size=56, attention_bias=True, logit_scale=2.0),
    "cohere, norms of queries and keys": CohereConfig(
        **QWEN2, **TOKENS, intermediate_size=56, use_qk_norm=True, logit_scale=0.8333333333333334
    ),
    "cohere2": Cohere2Config(**QWEN2, **TOKENS, intermediate_size=56, sliding_window=8, logit_scale=1.25),
    "cohere2, windows as listed": Cohere2Config(
        **QWEN2, **TOKENS, intermediate_size=56, sliding_window=8, layer_types=KINDS, logit_scale=1.0
    ),
    "hunyuan_v1_dense": HunYuanDenseV1Config(**HEADS, **TOKENS, intermediate_size=56, attention_bias=True),
    "hunyuan_v1_dense, a base that grows with alpha": HunYuanDenseV1Config(
        **HEADS,
        **TOKENS,
        intermediate_size=56,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 1.0, "alpha": 100.0},
    ),
    "stablelm": StableLmConfig(**STABLE, **TOKENS, intermediate_size=56),
    "stablelm, norms of queries and keys": StableLmConfig(
        **STABLE, **TOKENS, intermediate_size=56, use_parallel_residual=True, qk_layernorm=True
    ),
    "stablelm, MLP beside attention, biases": StableLmConfig(
        **STABLE, **TOKENS, intermediate_size=56, use_parallel_residual=True, use_qkv_bias=True
    ),
    "ministral3": Ministral3Config(**HEADS, **TOKENS, intermediate_size=56, rope_parameters={**GROWING}),
    "ministral3, a window, another factor": Ministral3Config(
        **{**HEADS, "tie_word_embeddings": True},
        **TOKENS,
        intermediate_size=56,
        sliding_window=8,
        rope_parameters={
            **GROWING,
            "mscale": None,
            "mscale_all_dim": None,
            "attention_factor": 0.75,
            "max_position_embeddings": 128,
        },
    ),
    "qwen3, biases": Qwen3Config(**HEADS, **TOKENS, intermediate_size=56, attention_bias=True),
}


@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, there_and_again):
    # carnet says how wide a head is where a class leaves it to the reader, and the numbers of YaRN that are usual
    otherwise = {"head_dim"} if which.startswith(("qwen2", "smollm3")) else ()
    otherwise = {"rope_parameters"} if "stretched" in which or "another factor" in which else otherwise
    otherwise = {"use_qk_norm"} if which.startswith("hunyuan") else otherwise  # which vLLM asks for
    there_and_again(MODELS[which], spelled_otherwise=otherwise)


def test_a_window_that_is_listed_and_not_asked_for_is_refused(saved):
    """The class has it with one attention and has none with another."""
    source = saved(SmolLM3Config(**QWEN2, **TOKENS, intermediate_size=56, sliding_window=8, layer_types=KINDS))
    with pytest.raises(BadCheckpoint, match="sliding_window and sliding_window where a layer has the window"):
        carnet.plan(source, to="hf")


@pytest.mark.parametrize("said", [False, None])
def test_a_model_that_sees_what_comes_later_is_refused(said, saved):
    source = saved(MODELS["qwen3"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "is_causal": said}))
    with pytest.raises(NotSupported, match="'is_causal'"):
        carnet.plan(source, to="hf")


def test_positions_that_are_said_twice_are_refused_unless_they_are_the_same(saved, tmp_path):
    """The class reads rope_scaling alone where both are there: the base among the others is lost."""
    source = saved(MODELS["qwen3"])
    config = json.loads((source / "config.json").read_text())
    stretched = {"rope_type": "yarn", "factor": 4.0}
    for name, based in (("other", {**stretched, "rope_theta": 7.0}), ("same", stretched)):
        said = {**config, "rope_parameters": based, "rope_scaling": stretched}
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    with pytest.raises(BadCheckpoint, match="is not read beside rope_scaling"):
        carnet.plan(source, to="hf", config=tmp_path / "other.json")
    carnet.plan(source, to="hf", config=tmp_path / "same.json")


def test_a_window_that_no_sequence_reaches_is_none_for_a_target_without_windows(saved, tmp_path):
    source = saved(MistralConfig(**HEADS, intermediate_size=56, sliding_window=HEADS["max_position_embeddings"]))
    assert carnet.cross(source, tmp_path / "ranks", to="trtllm", tp=2).equal


def test_a_window_that_sequences_reach_is_refused_by_a_target_without_windows(saved, tmp_path):
    source = saved(MistralConfig(**HEADS, intermediate_size=56, sliding_window=HEADS["max_position_embeddings"] - 1))
    with pytest.raises(NotSupported, match="'window'"):
        carnet.cross(source, tmp_path / "ranks", to="trtllm", tp=2)


@pytest.mark.parametrize("tp", [4, 8])
def test_fewer_heads_of_keys_than_ranks_go_to_megatron_and_back(tp, there_and_again):
    there_and_again(LlamaConfig(**{**HEADS, "num_attention_heads": 8}, intermediate_size=56), {"to": "megatron", "tp": tp})
