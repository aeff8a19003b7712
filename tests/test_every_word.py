"""Every word of a target's configs is compared with something, or the verdict says that it was not: nothing is equal in silence."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import verify_checkpoint_and_load_strategy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import carnet
from carnet.dialects.hf import GENERATION, IDLE
from carnet.errors import NotSupported

GOLDENS = Path(__file__).parent / "goldens/megatron"
LLAMA, GPT = GOLDENS / "llama_te_pp2_vpp", GOLDENS / "gpt_te_tp2"
PRESSED = {"to": "hf", "quantize": "fp8-channel", "style": "compressed-tensors"}
TARGETS = {
    "hf": (LLAMA, {"to": "hf"}),
    "shards": (LLAMA, {"to": "hf", "shard_size": 200_000}),
    "gpt": (GPT, {"to": "hf"}),
    "ranks": (LLAMA, {"to": "trtllm", "tp": 2}),
    "gpt ranks": (GPT, {"to": "trtllm", "tp": 2}),
    "compressed-tensors": (LLAMA, PRESSED),
    "modelopt": (LLAMA, {**PRESSED, "style": "modelopt"}),
}
# a word that nothing depends on, and why
MEANS_NOTHING = {
    "embedding_sharding_dim": "where the embedding is not shared",
    "quantization_config.ignore": "a module more that is not there",
    "quantization.exclude_modules": "a module more that is not there",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")

    def cross(which):
        source, options = TARGETS[which]
        if not (folder / which).exists():
            assert carnet.cross(source, folder / which, **options).equal
            (folder / which / "carnet.json").unlink()
        return source, folder / which

    return cross


def words(said, above=()):
    for key, value in said.items():
        if isinstance(value, dict):
            yield from words(value, (*above, key))
        elif key != "weight_map":
            yield (*above, key)


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, "nowhere" if not value or isinstance(value[0], str) else 77]
    return (
        value + "x"
        if isinstance(value, str)
        else 3
        if value is None
        else value + 1
        if isinstance(value, int)
        else 2 * value + 0.5
    )


def changed(said, path):
    found = copy.deepcopy(said)
    inside = found
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = other(inside[path[-1]])
    return found


def is_seen(source, target, file, key):
    """Say whether a verdict tells of a word: by a finding, by a refusal, or among what it did not examine."""
    try:
        verdict = carnet.verify(source, target)
    except carnet.CarnetError:
        return True
    return not verdict.equal or any(name.split()[0] == key for name in verdict.unexamined.get(file, ()))


@pytest.mark.parametrize("which", TARGETS)
def test_what_a_crossing_writes_is_compared_to_the_last_word(which, made):
    source, target = made(which)
    verdict = carnet.verify(source, target)
    assert verdict.equal
    assert verdict.unexamined == {}


@pytest.mark.parametrize("which", TARGETS)
def test_no_word_is_changed_in_silence(which, made, tmp_path):
    source, proven = made(which)
    target = shutil.copytree(proven, tmp_path / "target")
    for file in sorted(target.glob("*.json")):
        text = file.read_text()
        said = json.loads(text)
        silent = []
        for path in words(said):
            file.write_text(json.dumps(changed(said, path)))
            if ".".join(path) not in MEANS_NOTHING and not is_seen(source, target, file.name, ".".join(path)):
                silent.append(".".join(path))
        file.write_text(text)
        assert silent == []


def reconfigure(folder, file="config.json", **words):
    said = json.loads((folder / file).read_text()) | words
    (folder / file).write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def found(source, target):
    verdict = carnet.verify(source, target)
    assert not verdict.equal
    return {(finding.where, finding.stored) for finding in verdict.findings}


# --- how texts are generated -----------------------------------------------------------------------------------------------------


def test_the_words_of_generation_are_those_that_transformers_takes_from_a_config():
    known = GenerationConfig().to_dict().keys()
    assert IDLE & known == {"transformers_version"}
    for key, neutral in GENERATION.items():
        assert key in known
        if neutral is not None and not isinstance(neutral, bool):
            taken = GenerationConfig.from_model_config({"do_sample": True, "num_beams": 4, key: neutral + 1}).to_dict()
            assert taken[key] == neutral + 1


@pytest.fixture
def llama(tmp_path):
    """Save a model of transformers whose old config says how to sample; there is no generation_config.json."""
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    reconfigure(tmp_path / "hf", temperature=0.5, top_k=50, eos_token_id=2)
    return tmp_path / "hf"


def test_words_of_generation_go_along_and_are_compared(llama, tmp_path):
    target = tmp_path / "target"
    assert carnet.cross(llama, target, to="hf").equal
    ours, theirs = (LlamaForCausalLM.from_pretrained(folder).generation_config for folder in (llama, target))
    assert ours.temperature == theirs.temperature == 0.5
    (target / "carnet.json").unlink()
    assert carnet.verify(llama, target).equal
    for more in ({"temperature": 0.25}, {"temperature": ...}, {"suppress_tokens": [5]}, {"eos_token_id": ...}):
        (key,) = more
        before = (target / "config.json").read_text()
        reconfigure(target, **more)
        assert LlamaForCausalLM.from_pretrained(target).generation_config != ours or key == "eos_token_id"
        assert found(llama, target) == {(key, "config.json")}
        (target / "config.json").write_text(before)


def test_words_of_generation_that_nobody_else_says_are_named(made, tmp_path):
    source, proven = made("hf")
    target = shutil.copytree(proven, tmp_path / "target")
    reconfigure(target, temperature=0.5, suppress_tokens=[5])
    verdict = carnet.verify(source, target)
    assert verdict.equal
    assert verdict.unexamined == {"config.json": ("temperature", "suppress_tokens")}


@pytest.mark.parametrize("key", ["architectures", "model_type"])
@pytest.mark.parametrize("value", [..., None])
def test_a_config_that_does_not_name_its_class_is_no_copy(made, tmp_path, key, value):
    source, proven = made("hf")
    target = shutil.copytree(proven, tmp_path / "target")
    reconfigure(target, **{key: value})
    assert (key, "config.json") in found(source, target)


# --- ranks -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "key", "right", "wrong"),
    [
        ("ranks", "share_embedding_table", False, True),
        ("gpt ranks", "share_embedding_table", True, False),  # a tied model
        ("ranks", "tp_size", 2, 4),
        ("ranks", "pp_size", 1, 2),
    ],
)
def test_ranks_that_say_otherwise_what_they_are_are_no_copy(made, tmp_path, which, key, right, wrong):
    source, proven = made(which)
    target = shutil.copytree(proven, tmp_path / "target")
    reconfigure(target, **{key: right})
    assert carnet.verify(source, target).equal
    reconfigure(target, **{key: wrong})
    assert found(source, target)


# --- Megatron's store ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    assert carnet.cross(LLAMA, tmp_path / "store", to="megatron").equal
    (tmp_path / "store/carnet.json").unlink()
    assert carnet.verify(LLAMA, tmp_path / "store").unexamined == {}
    return tmp_path / "store"


@pytest.mark.parametrize("word", [{"common_backend": "zarr"}, {"common_backend_version": 2}, {"more": 1}])
def test_a_store_that_megatron_core_would_not_open_is_refused(store, word):
    iteration = store / "iter_0000001"
    reconfigure(iteration, "metadata.json", **word)
    with pytest.raises((CheckpointingException, TypeError)):
        verify_checkpoint_and_load_strategy(str(iteration))
    with pytest.raises(NotSupported, match="checkpoint format") as caught:
        carnet.verify(LLAMA, store)
    assert next(iter(word)) in str(caught.value.facts["found"])


def test_an_iteration_that_megatron_does_not_find_is_a_finding(store):
    (store / "latest_checkpointed_iteration.txt").unlink()
    assert found(LLAMA, store) == {("latest_checkpointed_iteration.txt", "latest_checkpointed_iteration.txt")}
    assert carnet.verify(LLAMA, store / "iter_0000001").equal


def test_another_tokenizer_among_the_arguments_is_a_finding_and_other_arguments_are_named(store, tmp_path):
    source = shutil.copytree(LLAMA, tmp_path / "source")
    tell(next(source.glob("iter_*")), tokenizer_model="one.model")
    tell(store / "iter_0000001", tokenizer_model="one.model", lr=0.5)
    assert carnet.verify(source, store).equal
    tell(store / "iter_0000001", tokenizer_model="other.model")
    assert found(source, store) == {("tokenizer_model", "the training arguments")}
    assert "lr" in carnet.verify(LLAMA, store).unexamined["the training arguments"]


def tell(iteration, **arguments):
    common = torch.load(iteration / "common.pt", weights_only=False)
    vars(common["args"]).update(arguments)
    torch.save(common, iteration / "common.pt")
