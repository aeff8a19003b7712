"""The model itself as referee: transformers runs what carnet wrote, and the logits are those of the model that was trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GPT2Config, LlamaConfig

import carnet
from tests.referees.sizes import GROUPED, LLAMA3

pytestmark = [
    pytest.mark.referee,
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]

GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
NAMES = (
    "deepseek_mtp_te_pp2",
    "gemma_te_tp2",
    "gpt_te_tp2",
    "llama_dist",
    "llama_legacy",
    "llama_te_pp2_vpp",
    "llama_tp2pp2",
    "mamba_te_tp2",
    "mixtral_ep2",
    "mixtral_gg_te_ep2_legacy",
    "qwen2_tp2",
    "v019_deepseek_te_ep2",
    "v019_llama_te_tp2",
    "v0192_nemotron3_tp2",
    "v0192_qwen3next_te_tp2",
)
TIED = {"gemma_te_tp2", "gpt_te_tp2"}
# transformers has no class for a layer that predicts a further token, and leaves it out
FURTHER = {"deepseek_mtp_te_pp2": "model.layers.4."}
# another cut than the golden's
CUTS = {
    "deepseek_mtp_te_pp2": {"tp": 2, "pp": 3, "ep": 2},
    "gemma_te_tp2": {"tp": 2, "pp": 3},  # one KV head
    "mixtral_ep2": {"tp": 2, "pp": 3, "ep": 4},
    "mixtral_gg_te_ep2_legacy": {"tp": 2, "ep": 2},
    "v019_deepseek_te_ep2": {"tp": 4, "ep": 4},
    "v0192_nemotron3_tp2": {"tp": 2, "pp": 2, "ep": 4},
    "v0192_qwen3next_te_tp2": {"tp": 2, "pp": 3, "ep": 2},
}


def tokens_of(name):
    """Return --vocab-size 250 and the end token, which NullTokenizer has besides up to 0.17; the rows after them are random."""
    return 250 if name.startswith("v019") else 251


LLAMA = {**GROUPED, "intermediate_size": 56, "head_dim": 24, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_head": 4, "n_layer": 5, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "plain llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama, rotary angles stretched": LlamaConfig(**LLAMA, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "llama, linear rotary scaling": LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, tie_word_embeddings=False
    ),
    "llama, a bias everywhere": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama, all at once and tied": LlamaConfig(**LLAMA, rope_parameters=LLAMA3, attention_bias=True, tie_word_embeddings=True),
    "llama, every head its own keys": LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 with a head of its own": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2 with a narrow MLP and the exact gelu": GPT2Config(**GPT2, n_inner=56, activation_function="gelu"),
}
# a TensorRT-LLM checkpoint has no place for them; Llama's class has these values for its own
NOT_IN_TRTLLM = {"gpt2": {"bos_token_id", "eos_token_id"}, "llama": set()}


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


@pytest.fixture(scope="module")
def model(crossed, loaded):
    """A golden as a model of transformers."""
    return lambda name, **given: loaded(crossed(name, **given), ignored=FURTHER.get(name, ()))


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_that_megatron_computed(name, model):
    reference = load_file(GOLDENS / name / "reference.safetensors")
    found = logits(model(name), reference["tokens"].long())
    expected = reference["logits"][..., : tokens_of(name)]
    assert found.shape == expected.shape
    assert expected.std() > 0.1  # a reference that is flat would prove nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_logits_of_the_further_token_are_those_that_megatron_computed(crossed, loaded):
    """Of its layer transformers runs the decoder layer, as a fifth one; what stands before it is three products here.

    The layer takes what the final norm gives, and the next token's embedding: megatron/core/transformer/multi_token_prediction.py.
    """
    name, prefix = "deepseek_mtp_te_pp2", FURTHER["deepseek_mtp_te_pp2"]
    reference = load_file(GOLDENS / name / "reference.safetensors")
    own = {
        key.removeprefix(prefix).removesuffix(".weight"): value.float()
        for key, value in load_file(crossed(name) / "model.safetensors").items()
        if key.startswith(prefix)
    }
    trunk = loaded(crossed(name), ignored=prefix)
    parts = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    branch = loaded(crossed(name), ignored=tuple(prefix + part for part in parts), num_hidden_layers=5)
    branch.model.layers = branch.model.layers[4:]
    branch.model.norm.weight.data = own["shared_head.norm"]
    branch.lm_head.weight.data = own["shared_head.head"]
    tokens = reference["tokens"].long()
    later = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    with torch.no_grad():
        states = trunk.model(tokens, use_cache=False).last_hidden_state
        normed = [
            torch.nn.functional.rms_norm(values, (64,), own[norm], trunk.config.rms_norm_eps)
            for norm, values in (("enorm", own["embed_tokens"][later]), ("hnorm", states))
        ]
        found = branch(inputs_embeds=torch.cat(normed, -1) @ own["eh_proj"].T, use_cache=False).logits
    expected = reference["mtp_logits_1"][..., : tokens_of(name)]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_has_the_true_number_of_rows_and_a_head_that_is_tied_or_not(name, model):
    made = model(name)
    embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    assert embedding.shape[0] == head.shape[0] == made.config.vocab_size == tokens_of(name)
    assert (embedding is head) == (name in TIED)


@pytest.mark.parametrize("name", NAMES)
def test_a_float32_target_computes_the_same_bits_as_the_bfloat16_one(name, crossed, model):
    tokens = load_file(GOLDENS / name / "reference.safetensors")["tokens"].long()
    wide = load_file(crossed(name, dtype="f32") / "model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert torch.equal(logits(model(name, dtype="f32"), tokens), logits(model(name), tokens))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "carnet.json"}


@pytest.mark.parametrize("start", ["the checkpoint", "the folder"])
@pytest.mark.parametrize("name", NAMES)
def test_by_way_of_another_cut_for_megatron_the_folder_is_the_same(name, start, crossed, tmp_path):
    source = GOLDENS / name if start == "the checkpoint" else crossed(name)
    assert carnet.cross(source, tmp_path / "cut", to="megatron", **CUTS.get(name, {"tp": 2, "pp": 3})).equal
    assert carnet.cross(tmp_path / "cut", tmp_path / "hf", to="hf").equal
    assert contents(tmp_path / "hf") == contents(crossed(name))


# Llama's config has no word for norms that are stored less one, which gemma's are: the checkpoint says it
@pytest.mark.parametrize("name", NAMES)
def test_the_folder_s_own_config_in_place_of_the_arguments_makes_the_same_folder(name, crossed, tmp_path):
    given = crossed(name) / "config.json"
    assert carnet.cross(GOLDENS / name, tmp_path / "hf", to="hf", config=given, vocab_size=tokens_of(name)).equal
    assert contents(tmp_path / "hf") == contents(crossed(name))


def otherwise(config):
    """Return what carnet says and transformers leaves to the reader: modeling_gpt2.py takes four times the width."""
    return {"n_inner"} if config.model_type == "gpt2" and config.n_inner is None else set()


@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_from_four_tensorrt_ranks_as_it_went(which, there_and_again):
    config = MODELS[which]
    left_behind = NOT_IN_TRTLLM[config.model_type]
    there_and_again(config, {"to": "trtllm", "tp": 2, "pp": 2}, spelled_otherwise=otherwise(config) | left_behind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_from_folder_to_folder_as_it_went(which, dtype, there_and_again):
    there_and_again(MODELS[which], spelled_otherwise=otherwise(MODELS[which]), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_folder_says_the_element_type_of_its_weights(dtype, saved, tmp_path):
    before = saved(MODELS["plain llama"], dtype)
    assert carnet.cross(before, tmp_path / "ranks", to="trtllm", tp=2).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == AutoConfig.from_pretrained(before).dtype == dtype
