"""Nemotron, StarCoder2, GPT-NeoX and Falcon: what their configs mean, and which of them Megatron's arguments describe."""

import pytest

from carnet.architectures.known import recognise
from carnet.errors import CarnetError

SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97, "torch_dtype": "bfloat16"}
# as the hub has them, older keys included
FALCON = {
    **SIZES,
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "bias": False,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "multi_query": True,
    "num_kv_heads": 4,
    "layer_norm_epsilon": 1e-05,
}
NEOX = {
    **SIZES,
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}
NEMOTRON = {
    **SIZES,
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "head_dim": 16,
    "hidden_act": "relu2",
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "norm_eps": 1e-05,
    "num_key_value_heads": 2,
}
STARCODER2 = {
    **SIZES,
    "architectures": ["Starcoder2ForCausalLM"],
    "model_type": "starcoder2",
    "activation_function": "gelu",
    "attention_softmax_in_fp32": True,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "mlp_type": "default",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "num_key_value_heads": 2,
    "scale_attn_weights": True,
    "sliding_window": 4096,
    "use_bias": True,
}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
MEANINGS = [
    ("falcon: multi-query is one KV head, whatever num_kv_heads says", FALCON, {}, "kv_heads", 1),
    ("falcon: without it each head has its own", FALCON, {"multi_query": False, "num_kv_heads": None}, "kv_heads", 4),
    ("falcon: the newer decoder says how many", FALCON, NEW, "kv_heads", 2),
    ("falcon: one norm serves both branches", FALCON, {}, "one_norm", True),
    ("falcon: the newer decoder has two", FALCON, NEW, "one_norm", False),
    ("falcon: unless it says one", FALCON, {**NEW, "num_ln_in_parallel_attn": 1}, "one_norm", True),
    ("falcon: the MLP may follow the attention", FALCON, {"parallel_attn": False}, "parallel_residual", False),
    ("falcon: and then it has its own norm", FALCON, {"parallel_attn": False}, "one_norm", False),
    ("falcon: its MLP is four times as wide", FALCON, {}, "ffn", 192),
    ("falcon: tied without a word", FALCON, {}, "tied", True),
    ("falcon: no rotation beside ALiBi", FALCON, {"alibi": True}, "position", "alibi"),
    ("neox: a quarter is rotated", NEOX, {"rotary_pct": None}, "rope_percent", 0.25),
    ("neox: both branches at once without a word", NEOX, {"use_parallel_residual": None}, "parallel_residual", True),
    ("neox: every projection has a bias", NEOX, {}, "qkv_bias", True),
    ("nemotron: half is rotated", NEMOTRON, {}, "rope_percent", 0.5),
    (
        "nemotron: or what transformers 5 says",
        NEMOTRON,
        {"rope_parameters": {"partial_rotary_factor": 0.75}},
        "rope_percent",
        0.75,
    ),
    ("nemotron: a squared ReLU", NEMOTRON, {}, "activation", "relu2"),
    ("starcoder2: a window", STARCODER2, {}, "window", 4096),
    ("starcoder2: tied without a word", STARCODER2, {}, "tied", True),
]


@pytest.mark.parametrize(("remark", "raw", "more", "field", "value"), MEANINGS, ids=[row[0] for row in MEANINGS])
def test_a_config_means(remark, raw, more, field, value):
    found = recognise("hf", {**raw, **more}, "a config", {})[1][field]
    assert (type(found), found) == (type(value), value)


REFUSALS = [
    ("the newer decoder, one after the other", FALCON, {**NEW, "parallel_attn": False}, "num_ln_in_parallel_attn"),
    ("two norms in the older decoder", FALCON, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("a residual after the norm", FALCON, {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
    ("rope that changes as it runs", FALCON, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
    ("two parts that are rotated", NEOX, {"partial_rotary_factor": 0.5}, "contradicts itself"),
    ("a part of StarCoder2's heads", STARCODER2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("StarCoder2 with another norm", STARCODER2, {"norm_type": "rms_norm"}, "norm_type"),
    ("StarCoder2 with a gate", STARCODER2, {"mlp_type": "gated"}, "mlp_type"),
]


@pytest.mark.parametrize(("remark", "raw", "more", "said"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_config_is_refused_for(remark, raw, more, said):
    with pytest.raises(CarnetError) as caught:
        recognise("hf", {**raw, **more}, "a config", {})
    assert said in str(caught.value)


ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 192,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "normalization": "LayerNorm",
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "params_dtype": "torch.bfloat16",
}
SQUARED = {
    "squared_relu": True,
    "add_bias_linear": False,
    "rotary_percent": 0.5,
    "layernorm_zero_centered_gamma": True,
}
EVERY_HEAD = {"group_query_attention": False, "num_query_groups": 1}
TRAINED = [
    ("a squared ReLU", SQUARED, "nemotron"),
    ("NeMo's word for its norms", {**SQUARED, "layernorm_zero_centered_gamma": None, "apply_layernorm_1p": True}, "nemotron"),
    ("grouped heads and a fused gelu", {"bias_gelu_fusion": True}, "starcoder2"),
    ("grouped heads that are rotated in part", {"rotary_percent": 0.5, "openai_gelu": True}, "nemotron"),
    ("heads that are rotated in part", {**EVERY_HEAD, "rotary_percent": 0.25}, "gpt_neox"),
]


@pytest.mark.parametrize(("remark", "more", "family"), TRAINED, ids=[row[0] for row in TRAINED])
def test_training_arguments_describe(remark, more, family):
    assert recognise("megatron", {**ARGUMENTS, **more}, "arguments", {})[0].name == family


def test_norms_are_stored_less_one_where_the_arguments_say_so():
    assert recognise("megatron", {**ARGUMENTS, **SQUARED}, "arguments", {})[1]["zero_centred"] is True
    assert recognise("megatron", {**ARGUMENTS, "squared_relu": True}, "arguments", {})[1]["zero_centred"] is False
