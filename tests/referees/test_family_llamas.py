"""Mistral, Qwen2 and Qwen3: what transformers saved comes back tensor by tensor, and computes the same bits."""

import pytest
from transformers import MistralConfig, Qwen2Config, Qwen3Config

pytestmark = pytest.mark.referee

SIZES = {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 5, "max_position_embeddings": 128}
HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": False}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
# Qwen2's heads are as wide as their part of the stream
QWEN2 = {name: value for name, value in HEADS.items() if name != "head_dim"}
MODELS = {
    "mistral": MistralConfig(**HEADS, **TOKENS, intermediate_size=56, sliding_window=None),
    "mistral, a window": MistralConfig(**HEADS, **TOKENS, intermediate_size=56, sliding_window=8),
    "qwen2": Qwen2Config(**QWEN2, **TOKENS, intermediate_size=56),
    "qwen2, tied": Qwen2Config(**{**QWEN2, "tie_word_embeddings": True}, **TOKENS, intermediate_size=56),
    "qwen3": Qwen3Config(**HEADS, **TOKENS, intermediate_size=56),
    "qwen3, biases": Qwen3Config(**HEADS, **TOKENS, intermediate_size=56, attention_bias=True),
}


@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, there_and_again):
    # carnet says how wide a head is where Qwen2's config leaves it to the reader
    there_and_again(MODELS[which], spelled_otherwise={"head_dim"} if which.startswith("qwen2") else ())
