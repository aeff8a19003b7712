"""What is read of a tokenizer's files, held against the programs that wrote them."""

import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

from carnet.errors import BadCheckpoint
from carnet.formats import json_stream
from carnet.formats.json_stream import leaves
from carnet.formats.tokenizers import tokens_of
from carnet.storage.schemes import folder_at

WORDS = ["<s>", "</s>", "<pad>", 'quo"te', "back\\slash", "ü 語", "a", "b", "ab"]
MODELS = {
    "bpe": BPE({word: at for at, word in enumerate(WORDS)}, [("a", "b")]),
    "unigram": Unigram([(word, -1.0 * at) for at, word in enumerate(WORDS)], unk_id=0),
    "words": WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<s>"),
}


def saved(folder, model, added=(), **special):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(text) for text in added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("added", [(), ("<|end|>",), ("a", "<|end|>", "<|im|>")])
@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_counted_as_transformers_counts_them(tmp_path, model, added):
    fast = saved(tmp_path, MODELS[model], added, bos_token="<s>", eos_token=added[-1] if added else "</s>", pad_token="<pad>")
    found = tokens_of(folder_at(tmp_path))
    assert (found.count, found.reach) == (len(fast), len(fast))
    assert {end: said.get("the tokenizer") for end, said in found.ids.items()} == {
        "bos": (fast.bos_token_id,),
        "eos": (fast.eos_token_id,),
        "pad": (fast.pad_token_id,),
    }


def test_a_special_token_that_is_added_while_loading_leaves_the_number_open(tmp_path):
    saved(tmp_path, MODELS["bpe"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|new|>"}))
    assert tokens_of(folder_at(tmp_path)).count is None


def test_slow_files_are_counted(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(WORDS)}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": len(WORDS)}))
    assert tokens_of(folder_at(tmp_path)).count == len(WORDS) + 1


def test_pieces_of_a_sentencepiece_model_are_counted(tmp_path):
    # sentencepiece_model.proto: field 1 of the model is a piece, field 1 of a piece its text; 2 is the trainer's spec
    pieces = b"".join(bytes([10, len(each) + 2, 10, len(each)]) + each for each in map(str.encode, WORDS))
    (tmp_path / "tokenizer.model").write_bytes(pieces + b"\x12\x03abc")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = tokens_of(folder_at(tmp_path))
    assert (found.count, found.ids["eos"]) == (len(WORDS), {"the tokenizer": (1,)})


def test_tekken_says_how_many_of_its_tokens_it_uses(tmp_path):
    said = {"config": {"default_vocab_size": 12, "default_num_special_tokens": 2}, "vocab": [{"rank": at} for at in range(20)]}
    (tmp_path / "tekken.json").write_text(json.dumps(said))
    assert tokens_of(folder_at(tmp_path)).count == 12


@pytest.mark.parametrize("text", ["IQ== 0\nIg== 1\n", ""])
def test_a_list_of_ranks_leaves_the_number_open(tmp_path, text):
    (tmp_path / "tokenizer.model").write_text(text)
    assert (tokens_of(folder_at(tmp_path)).count, tokens_of(folder_at(tmp_path)).reach) == (None, 0)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def written_out(value, way=()):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from written_out(inner, (*way, key))
    else:
        yield way, value


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES, st.sampled_from((None, 1)), st.booleans())
def test_the_leaves_of_a_file_are_those_that_json_reads(tmp_path_factory, value, indent, plain):
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps(value, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    (folder / "x.json").write_bytes(text)
    if b"\xed" not in text:  # half of a surrogate pair, which is not UTF-8
        assert [*leaves(folder_at(folder), "x.json")] == [*written_out(value)]


@pytest.mark.parametrize("text", ["{", "]", '"abc', '{"a" 1', "nul", "[" * 99, ":", '{"a": tru}', "1" * 9999])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadCheckpoint):
        [*leaves(folder_at(tmp_path), "x.json")]


def test_a_text_without_end_is_not_read_into_memory(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.write(b'["')
        file.truncate(json_stream.LONGEST * 4)
    with pytest.raises(BadCheckpoint, match="holds a text that is too long"):
        [*leaves(folder_at(tmp_path), "x.json")]


logging.getLogger("transformers").setLevel(logging.ERROR)
