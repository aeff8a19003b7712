"""How many tokens a Megatron model has: what its arguments tell of it, held against what the program counts."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import carnet
from carnet.dialects.vocabulary import given, vocabulary
from carnet.errors import BadCheckpoint, BadRequest

NULL = {"tokenizer_type": "NullTokenizer", "make_vocab_size_divisible_by": 32, "num_attention_heads": 4}
OLD = {"tokenizer_hf_use_fast": True, "use_legacy_models": False}  # saved by 0.16 and 0.17 alone
NEW = {"pad_vocab_size": True}  # since 0.18
GOLDENS = Path(__file__).parents[1] / "goldens"
OTHERS = (
    "HuggingFaceTokenizer GPT2BPETokenizer SentencePieceTokenizer GPTSentencePieceTokenizer Llama2Tokenizer BertWordPieceCase "
    "BertWordPieceLowerCase SFTTokenizer MultimodalTokenizer SomeTokenizerOfTomorrow"
).split()


def arguments(**said):
    return {**NULL, "tensor_model_parallel_size": 2, **said}


def padded(tokens, multiple):
    """_vocab_size_with_padding in megatron/training/tokenizer/tokenizer.py."""
    return -(-tokens // multiple) * multiple


@pytest.mark.referee
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("typed", [60, 63, 64, 127, 250, 255, 256, 257])
def test_a_null_tokenizer_has_the_tokens_that_megatron_counts(typed, ranks):
    counted = NullTokenizer(typed).vocab_size  # megatron-core 0.16: the end token is one more
    said = arguments(vocab_size=typed, tensor_model_parallel_size=ranks, **OLD)
    found = vocabulary(said, padded(counted, 32 * ranks), "a test")
    assert (found.tokens, found.padding) == (counted, padded(counted, 32 * ranks) - counted)


@pytest.mark.parametrize(
    ("said", "rows", "tokens"),
    [
        (arguments(vocab_size=256), 320, 257),  # of the two readings one fits: 256 would be padded to 256
        (arguments(vocab_size=256), 256, 256),
        (arguments(vocab_size=250, **OLD), 256, 251),
        (arguments(vocab_size=250, **NEW), 256, 250),
        (arguments(vocab_size=256, **NEW), 320, 257),  # begun by 0.17, saved by 0.18
        (arguments(vocab_size=300, **OLD), 384, 301),  # begun with four ranks
        (arguments(vocab_size=256, tokenizer_type="NullMultimodalTokenizer"), 320, 257),
        (arguments(vocab_size=250, tokenizer_type="TikTokenizer"), 256, 250),
        (arguments(vocab_size=None, tokenizer_type="TikTokenizer"), 131072, 131072),
        (arguments(vocab_size=256, tokenizer_type="HuggingFaceTokenizer"), 256, 256),  # nothing is left out
        (arguments(vocab_size=250, tokenizer_type=None), 256, 250),  # of no program of Megatron's
        ({"vocab_size": 250}, 300, 250),
    ],
)
def test_the_size_follows_where_one_reading_fits_the_rows(said, rows, tokens):
    found = vocabulary(said, rows, "a test")
    assert (found.tokens, found.rows, found.padding) == (tokens, rows, rows - tokens)


def test_two_readings_that_fit_are_asked_about():
    with pytest.raises(BadRequest, match="leave two sizes of the vocabulary open") as refusal:
        vocabulary(arguments(vocab_size=250), 256, "a test")
    assert refusal.value.remedy == "--written-by megatron-lm==0.17, or ==0.18; or --vocab-size 251, or 250"


def test_who_wrote_it_tells_two_readings_apart(tmp_path):
    """A golden of 0.16 without the names that show it; megatron-core's own tokenizers count so, as the test of them says."""
    root = shutil.copytree(GOLDENS / "megatron/llama_te_pp2_vpp", tmp_path / "llama")
    common = next(root.rglob("common.pt"))
    state = torch.load(common, weights_only=False)
    state["args"] = argparse.Namespace(
        **{name: said for name, said in vars(state["args"]).items() if not name.startswith(("tokenizer_hf", "use_legacy"))}
    )
    torch.save(state, common)
    with pytest.raises(BadRequest, match="leave two sizes of the vocabulary open"):
        carnet.plan(root, to="hf")
    for release, tokens in (("0.17", 251), ("0.18", 250)):
        assert (
            carnet.plan(root, to="hf", written_by=f"megatron-lm=={release}").notes["vocabulary"].startswith(f"{tokens} of 256")
        )


@pytest.mark.parametrize("typed", [None, 250, 300, "many"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_was_typed_beside_another_tokenizer_cuts_nothing(kind, typed):
    with pytest.raises(BadRequest, match="do not say how many tokens") as refusal:
        vocabulary(arguments(vocab_size=typed, tokenizer_type=kind), 256, "a test")
    assert "--vocab-size N" in refusal.value.remedy
    assert "--tokenizer" in refusal.value.remedy


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        (arguments(vocab_size=100, **OLD), 320),
        (arguments(vocab_size=400, **OLD), 320),
        (arguments(vocab_size=100, tokenizer_type="TikTokenizer"), 320),
        (arguments(vocab_size=100, tokenizer_type=None), 320),
        (arguments(vocab_size=256), 300),  # no multiple of 32
        ({"vocab_size": 301}, 300),
    ],
)
def test_a_size_that_the_rows_contradict_is_refused(said, rows):
    with pytest.raises(BadCheckpoint, match="contradicts the rows that are stored") as refusal:
        vocabulary(said, rows, "a test")
    assert re.fullmatch(rf"name the number of tokens, at most {rows}, with --vocab-size N", refusal.value.remedy)


@pytest.mark.parametrize(("counted", "tokens"), [(250, 250), (256, 256), (129, 129)])
def test_the_tokenizer_that_goes_along_answers(counted, tokens):
    said = arguments(vocab_size=100, tokenizer_type="HuggingFaceTokenizer")
    assert vocabulary(said, 256, "a test", counted=counted).tokens == tokens


@pytest.mark.parametrize("counted", [257, 64])
def test_a_tokenizer_that_the_rule_contradicts_does_not_answer(counted):
    with pytest.raises(BadRequest, match="do not say how many tokens"):
        vocabulary(arguments(vocab_size=None, tokenizer_type="HuggingFaceTokenizer"), 256, "a test", counted=counted)


def test_a_size_that_is_named_may_not_be_more_than_what_is_stored():
    assert given(256, 256, "a test").padding == 0
    with pytest.raises(BadRequest, match="--vocab-size 257 is more than the 256 rows that are stored"):
        given(257, 256, "a test")


def folder(path, rows):
    llama = LlamaConfig(vocab_size=rows, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    LlamaForCausalLM(llama).save_pretrained(path)
    return path


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_a_config_that_contradicts_the_rows_is_refused_and_a_size_that_is_named_cuts_them(ranks, tmp_path):
    source = folder(tmp_path / "m", 64)
    if ranks:
        carnet.cross(source, tmp_path / "ranks", to="trtllm", tp=ranks)
        source = tmp_path / "ranks"
        (source / "carnet.json").unlink()
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**said, "vocab_size": 50}))
    with pytest.raises(BadCheckpoint, match="the config's vocab_size contradicts the rows that are stored") as refusal:
        carnet.plan(source, to="hf")
    assert refusal.value.facts["vocab_size"] == 50
    assert refusal.value.facts["found"] == [64, 32]
    with pytest.raises(BadRequest, match="--vocab-size 65 is more than the 64 rows"):
        carnet.plan(source, to="hf", vocab_size=65)
    verdict = carnet.cross(source, tmp_path / "out", to="hf", vocab_size=60)
    assert (verdict.equal, verdict.vocabulary.padding) == (True, 4)
    whole = load_file(tmp_path / "m/model.safetensors")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, whole[name][:60] if tensor.shape[0] == 60 else whole[name]), name
    assert carnet.verify(source, tmp_path / "out", vocab_size=60).equal
