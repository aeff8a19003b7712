"""A head that guesses tokens, as others publish one: with what follows from the rest, and in either engine's words."""

import json
from random import Random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import carnet
from carnet.errors import BadCheckpoint, NotSupported
from tests.families import samples


@pytest.fixture
def head(tmp_path):
    """A folder with a head that reads the states that leave layers 1, 4 and 7 of its model."""
    config = {"layers": 1, "hidden": 8, "vocab": 40, "positions": 9, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 6}
    drawn = samples.draw("eagle3", Random(1), ("hf",))
    config = {**drawn.config, **config, "dtype": "f32", "aux": 3, "aux_layers": (1, 4, 7), "draft_vocab": 10, "tied": False}
    return samples.save(samples.Model("eagle3", config, 1), tmp_path / "head", "hf", Random(2), {}, finite=True)


def said(folder, **more):
    """Change the config of a folder; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_what_follows_from_the_tokens_is_left_behind(head, tmp_path):
    held = load_file(head / "model.safetensors")
    save_file(held | {"t2d": np.zeros(40, np.bool_)}, head / "model.safetensors")
    assert carnet.cross(head, tmp_path / "out", to="hf").equal
    assert load_file(tmp_path / "out/model.safetensors").keys() == held.keys()
    assert {*carnet.plan(head, to="hf").dropped} == {"what follows from d2t"}


def test_an_embedding_of_its_own_is_left_behind_where_a_person_says_so(head, tmp_path):
    """vLLM would compute with it, SGLang would not, and nothing in the folder says whether it is the model's."""
    held = load_file(head / "model.safetensors")
    save_file(held | {"embed_tokens.weight": np.zeros((40, 8), np.float32)}, head / "model.safetensors")
    with pytest.raises(NotSupported, match=r"embed_tokens\.weight") as refused:
        carnet.cross(head, tmp_path / "out", to="hf")
    assert "--drop" in str(refused.value)
    assert carnet.cross(head, tmp_path / "out", to="hf", drop=["embed_tokens.weight"]).equal
    assert load_file(tmp_path / "out/model.safetensors").keys() == held.keys()


@pytest.mark.parametrize(
    "words",
    [
        {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [2, 5, 8]},  # vLLM's: what enters
        {
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 7]},
            "eagle_aux_hidden_state_layer_ids": None,
        },  # SGLang's: what leaves
    ],
)
def test_the_layers_may_be_said_in_either_engines_words_and_are_written_in_both(words, head, tmp_path):
    said(head, **words)
    assert carnet.cross(head, tmp_path / "out", to="hf").equal
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["eagle_aux_hidden_state_layer_ids"] == [2, 5, 8]
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 4, 7]


def test_words_that_mean_different_layers_are_refused(head):
    said(head, eagle_aux_hidden_state_layer_ids=[1, 4, 7])
    with pytest.raises(BadCheckpoint, match="makes no sense"):
        carnet.plan(head, to="hf")


def test_three_states_are_taken_for_granted_where_nothing_is_said(head, tmp_path):
    said(head, eagle_config=None, eagle_aux_hidden_state_layer_ids=None)
    assert carnet.cross(head, tmp_path / "out", to="hf").equal
    assert "eagle_aux_hidden_state_layer_ids" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("key", ["eagle_config", "eagle_aux_hidden_state_layer_ids"])
def test_a_target_that_tells_one_engine_alone_its_layers_is_not_that_head(key, head, tmp_path):
    assert carnet.cross(head, tmp_path / "out", to="hf").equal
    (tmp_path / "out/carnet.json").unlink()
    said(tmp_path / "out", **{key: None})
    assert {finding.where for finding in carnet.verify(head, tmp_path / "out").findings} == {"aux_layers"}
