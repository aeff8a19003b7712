"""The model itself as referee: transformers runs what carnet wrote, and the logits are those of the model that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

import carnet

pytestmark = pytest.mark.referee

GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
NAMES = ("gpt_te_tp2", "llama_dist", "llama_te_pp2_vpp", "llama_tp2pp2", "v019_llama_te_tp2")
VOCAB = 250  # the goldens' padded rows, 250 to 255, hold random numbers

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# no size of a matrix equals another, so that no two axes can be taken for each other; 97 tokens and 5 layers divide by nothing
SIZES = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 5, "max_position_embeddings": 128}
LLAMA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_head": 4, "n_layer": 5, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "plain llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama, rotary angles stretched": LlamaConfig(**LLAMA, rope_parameters=ROPE, tie_word_embeddings=False),
    "llama, linear rotary scaling": LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, tie_word_embeddings=False
    ),
    "llama, a bias everywhere": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama, all at once and tied": LlamaConfig(**LLAMA, rope_parameters=ROPE, attention_bias=True, tie_word_embeddings=True),
    "llama, every head its own keys": LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 with a head of its own": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2 with a narrow MLP and the exact gelu": GPT2Config(**GPT2, n_inner=56, activation_function="gelu"),
}
# which program wrote a config and where it lies; the element type has a test of its own
VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype"}
# a TensorRT-LLM checkpoint has no place for them
NOT_IN_TRTLLM = {"bos_token_id", "eos_token_id", "pad_token_id"}


def loaded(folder):
    """Return the model that transformers makes of a folder, in float32, after asking it whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, said = asked
    assert {what: list(names) for what, names in said.items() if names} == {}
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A golden as a Hugging Face folder, made once."""
    folder, made = tmp_path_factory.mktemp("hf"), {}

    def cross(name, dtype=None):
        if (name, dtype) not in made:
            out = folder / f"{name}-{dtype}"
            assert carnet.cross(GOLDENS / name, out, to="hf", dtype=dtype).equal
            made[name, dtype] = out
        return made[name, dtype]

    return cross


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_that_megatron_computed(name, crossed):
    reference = load_file(GOLDENS / name / "reference.safetensors")
    found = logits(loaded(crossed(name)), reference["tokens"].long())
    expected = reference["logits"][..., :VOCAB]
    assert found.shape == expected.shape
    assert expected.std() > 0.1  # a reference that is flat would prove nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_has_the_true_number_of_rows_and_a_head_that_is_tied_or_not(name, crossed):
    model = loaded(crossed(name))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape[0] == head.shape[0] == model.config.vocab_size == VOCAB
    assert (embedding is head) == (name == "gpt_te_tp2")


@pytest.mark.parametrize("name", NAMES)
def test_a_float32_target_computes_the_same_bits_as_the_bfloat16_one(name, crossed):
    tokens = load_file(GOLDENS / name / "reference.safetensors")["tokens"].long()
    wide = crossed(name, "f32")
    assert {tensor.dtype for tensor in load_file(wide / "model.safetensors").values()} == {torch.float32}
    assert torch.equal(logits(loaded(wide), tokens), logits(loaded(crossed(name)), tokens))


def saved(config, folder, dtype=torch.float32):
    """Save a model with every parameter random, biases and norms too, and return it as it was saved."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return loaded(folder)


@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_from_four_tensorrt_ranks_as_it_went(which, tmp_path):
    before = saved(MODELS[which], tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2, pp=2).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    after = loaded(tmp_path / "back")
    tokens = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(5))
    assert torch.equal(logits(after, tokens), logits(before, tokens))
    assert {name: p.shape for name, p in after.named_parameters()} == {name: p.shape for name, p in before.named_parameters()}
    assert meaning(tmp_path / "back", NOT_IN_TRTLLM) == meaning(tmp_path / "hf", NOT_IN_TRTLLM)


@pytest.mark.parametrize("which", MODELS)
def test_every_config_field_survives_from_folder_to_folder(which, tmp_path):
    saved(MODELS[which], tmp_path / "hf", dtype=torch.bfloat16)
    assert carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf").equal
    assert meaning(tmp_path / "again", set()) == meaning(tmp_path / "hf", set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_folder_says_the_element_type_of_its_weights(dtype, tmp_path):
    saved(MODELS["plain llama"], tmp_path / "hf", dtype=dtype)
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == AutoConfig.from_pretrained(tmp_path / "hf").dtype == dtype


def meaning(folder, without) -> dict[str, object]:
    """Return what transformers understands a folder's config to say."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    said = {key: value for key, value in config.to_dict().items() if key not in VOLATILE | without}
    if config.model_type == "gpt2" and said["n_inner"] is None:
        said["n_inner"] = 4 * config.n_embd  # modeling_gpt2.py: what null means
    return said
