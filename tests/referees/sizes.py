"""Sizes of small models: no size of a matrix equals another, so that no two axes can be taken for each other.

97 tokens and 5 layers divide by nothing.
"""

SIZES = {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 5, "max_position_embeddings": 128}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 24, "tie_word_embeddings": False}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
DENSE = {**GROUPED, **TOKENS, "pad_token_id": 0, "intermediate_size": 56}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
