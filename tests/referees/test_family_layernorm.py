"""Nemotron, StarCoder2, GPT-NeoX and Falcon, refereed by transformers: tiny random models go and come back with the same logits."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, GPTNeoXConfig, NemotronConfig, Starcoder2Config

import carnet
from carnet.errors import NotSupported

pytestmark = pytest.mark.referee

# no size of a matrix equals another; 97 tokens and 5 layers divide by nothing
SIZES = {"vocab_size": 97, "num_hidden_layers": 5, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"hidden_size": 40, "intermediate_size": 56, "max_position_embeddings": 128}
FALCON_SIZES = {"hidden_size": 48, "ffn_hidden_size": 56, "max_position_embeddings": 128}
GQA = {"num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def nemotron(**more):
    return NemotronConfig(**{**SIZES, **MLP, **GQA, "head_dim": 24, **more})


def starcoder2(**more):
    return Starcoder2Config(**{**SIZES, **MLP, **GQA, **more})


def neox(**more):
    return GPTNeoXConfig(**{**SIZES, **MLP, **more})


def falcon(**more):
    return FalconConfig(**{**SIZES, **FALCON_SIZES, **more})


BOTH = {  # for Hugging Face and TensorRT-LLM
    "nemotron": nemotron(),
    "nemotron, every linear layer with a bias": nemotron(attention_bias=True, mlp_bias=True),
    "nemotron, three quarters rotated, tied": nemotron(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}, tie_word_embeddings=True
    ),
    "nemotron, linear rotary scaling": nemotron(rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}),
    "starcoder2": starcoder2(),
    "starcoder2 without biases, untied": starcoder2(use_bias=False, tie_word_embeddings=False),
    "starcoder2 with wide heads": starcoder2(head_dim=24),
    "falcon 7b": falcon(),
    "falcon 7b, untied": falcon(tie_word_embeddings=False),
    "falcon 40b": falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2),
    "falcon2 11b": falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True),
    "falcon rw": falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon, rotary, one after the other": falcon(multi_query=False, parallel_attn=False),
}
ONLY_HF = {
    "nemotron with bias in the attention alone": nemotron(attention_bias=True),
    "nemotron with another activation": nemotron(hidden_act="silu"),
    "starcoder2 with a window": starcoder2(sliding_window=16),
    "starcoder2 with the exact gelu": starcoder2(hidden_act="gelu"),
    "pythia": neox(),
    "gpt-neox, one after the other": neox(use_parallel_residual=False),
    "gpt-neox, tied, no bias in the attention": neox(attention_bias=False, tie_word_embeddings=True),
    "gpt-neox, rotated whole, stretched": neox(rope_parameters={**LINEAR, "partial_rotary_factor": 1.0}),
    "falcon, stretched": falcon(rope_parameters=LINEAR),
}
MODELS = {**BOTH, **ONLY_HF}
MEGATRON = (
    *(name for name in BOTH if name.startswith(("nemotron", "starcoder2")) and "without biases" not in name),
    "starcoder2 with the exact gelu",
    "starcoder2 with a window",
    "gpt-neox, one after the other",
)
FOREIGN = (
    ("pythia", "parallel_residual"),
    ("falcon 7b", "parallel_residual"),
    ("falcon 40b", "new_decoder"),
    ("falcon rw", "alibi"),
    ("starcoder2 without biases, untied", "mlp_bias"),  # the tanh form is Megatron's fused kernel, which wants one
    ("nemotron with bias in the attention alone", "out_bias"),
)
TOKENS = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(5))
VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype"}
# of the three programs only transformers says them
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def loaded(folder):
    """Return the model that transformers makes of a folder, in float32, after asking it whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, said = asked
    assert {what: list(names) for what, names in said.items() if names} == {}
    return model.eval()


def saved(config, folder, dtype=torch.bfloat16):
    """Save a model with every parameter random; norms are multiples of 1/64, which stay what they are when one is added."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.data = (parameter.data.float().clamp(-0.5, 0.5) * 64).round().div(64).to(dtype)
    model.save_pretrained(folder)
    return loaded(folder)


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def numbers(folder):
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def meaning(folder, without) -> dict[str, object]:
    """Return what transformers understands a folder's config to say."""
    return {key: said for key, said in AutoConfig.from_pretrained(folder).to_dict().items() if key not in VOLATILE | without}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("which", MODELS)
def test_a_folder_comes_out_as_it_went_in(which, tmp_path):
    before = saved(MODELS[which], tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf").equal
    assert same(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "hf/model.safetensors"))
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(before))
    assert meaning(tmp_path / "again", set()) == meaning(tmp_path / "hf", set())


@pytest.mark.parametrize("which", BOTH)
def test_a_model_comes_back_from_four_tensorrt_ranks_as_it_went(which, tmp_path):
    before = saved(MODELS[which], tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2, pp=2).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    assert same(numbers(tmp_path / "back"), numbers(tmp_path / "hf"))
    assert torch.equal(logits(loaded(tmp_path / "back")), logits(before))
    assert meaning(tmp_path / "back", TOKEN_IDS) == meaning(tmp_path / "hf", TOKEN_IDS)


def test_tensorrt_s_nemotron_has_norms_that_are_one_more_and_rounded(tmp_path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(nemotron(), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2).equal
    theirs, ours = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "ranks/rank1.safetensors")
    norm = theirs["model.layers.2.post_attention_layernorm.weight"]
    assert torch.equal(ours["transformer.layers.2.post_layernorm.weight"], (norm.float() + 1).to(torch.bfloat16))
    bias = theirs["model.layers.2.post_attention_layernorm.bias"]
    assert torch.equal(ours["transformer.layers.2.post_layernorm.bias"], bias)


@pytest.mark.parametrize("which", ONLY_HF)
def test_what_tensorrt_has_no_class_or_no_word_for_is_refused(which, tmp_path):
    saved(MODELS[which], tmp_path / "hf")
    with pytest.raises(NotSupported):
        carnet.plan(tmp_path / "hf", to="trtllm")


@pytest.mark.parametrize(("which", "lacking"), FOREIGN)
def test_what_megatron_has_no_word_for_is_refused_by_its_name(which, lacking, tmp_path):
    saved(MODELS[which], tmp_path / "hf")
    with pytest.raises(NotSupported) as caught:
        carnet.plan(tmp_path / "hf", to="megatron")
    assert lacking in str(caught.value)


@pytest.mark.parametrize("which", MEGATRON)
def test_a_model_comes_back_from_megatron_as_it_went(which, tmp_path):
    before = saved(MODELS[which], tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "trained", to="megatron").equal
    assert carnet.cross(tmp_path / "trained", tmp_path / "back", to="hf").equal
    assert same(numbers(tmp_path / "back"), numbers(tmp_path / "hf"))
    assert torch.equal(logits(loaded(tmp_path / "back")), logits(before))
    assert meaning(tmp_path / "back", TOKEN_IDS) == meaning(tmp_path / "hf", TOKEN_IDS)
