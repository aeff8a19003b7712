"""Files that are not what their name says, as broken downloads and copies leave them: named, with what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from carnet import api
from carnet.errors import BadCheckpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 4976698672\n"


@pytest.fixture
def model(tmp_path):
    """Have transformers save a small model in three files."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=96, num_hidden_layers=2, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def refused(folder):
    with pytest.raises(BadCheckpoint) as refusal:
        api.plan(folder, to="hf")
    return str(refusal.value).splitlines()[0], refusal.value.remedy


def as_pointer(path):
    path.write_text(POINTER)


def as_page(path):
    path.write_text("<!DOCTYPE html>\n<html><body>Access to this model is restricted</body></html>\n")


def as_archive(path):
    torch.save({"a": torch.zeros(1000)}, path)


def as_pickle(path):
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("write", "name", "what", "remedy"),
    [
        (as_pointer, SHARD, "a pointer of Git LFS", "git lfs pull"),
        (as_pointer, "config.json", "a pointer of Git LFS", "git lfs pull"),
        (as_pointer, "model.safetensors.index.json", "a pointer of Git LFS", "git lfs pull"),
        (as_page, SHARD, "a page of the web", "download it again"),
        (as_page, "config.json", "a page of the web", "download it again"),
        (as_archive, SHARD, "an archive (torch.save writes such)", "save_pretrained"),
        (as_pickle, SHARD, "a pickle", "save_pretrained"),
    ],
)
def test_what_stands_in_for_a_file_is_named(model, write, name, what, remedy):
    write(model / name)
    line, way_out = refused(model)
    assert line.startswith(f"{name} is {what}")
    assert remedy in way_out


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_cache_that_was_copied_without_its_blobs_is_named(model, tmp_path, name):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    api.plan(snapshot, to="hf")
    os.unlink(snapshot.parent / os.readlink(snapshot / name)[3:])
    line, way_out = refused(snapshot)
    assert line == f"{name} is a link to a file that is not there"
    assert "cp -rL" in way_out


def test_weights_of_another_save_are_told_from_missing_ones(model):
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    line, way_out = refused(model)
    assert line == "other weights lie beside the shards that model.safetensors.index.json names"
    assert "move them out of the folder" in way_out
    (model / "model.safetensors").rename(model.parent / "elsewhere")
    api.plan(model, to="hf")  # the way out is true
    (model / SHARD).unlink()
    assert refused(model) == (
        "the shards that model.safetensors.index.json names are not all here",
        "copy the checkpoint again",
    )


def test_weights_under_another_name_are_not_called_none(model):
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    assert refused(model)[0] == "the folder holds no weights"
    save_file({"tok_embeddings.weight": torch.zeros(2)}, model / "consolidated.safetensors")
    with pytest.raises(BadCheckpoint, match="no file here has a name that weights of transformers have") as refusal:
        api.plan(model, to="hf")
    assert refusal.value.facts["found"] == "consolidated.safetensors"


def test_a_head_that_was_trained_apart_is_no_copy_of_a_tied_model(model, tmp_path):
    """transformers takes the stored head whatever the config says, other programs the embedding; untied, all take the head."""
    text = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**text, "tie_word_embeddings": True}))
    with pytest.raises(BadCheckpoint, match="two copies of embed differ") as refusal:
        api.cross(model, tmp_path / "out", to="hf")
    assert "trained apart must not be tied by the config" in refusal.value.remedy
    tokens = torch.arange(0, 96, 5)[None]
    expected = AutoModelForCausalLM.from_pretrained(model)(tokens).logits
    (model / "config.json").write_text(json.dumps({**text, "tie_word_embeddings": False}))
    assert api.cross(model, tmp_path / "out2", to="hf").equal
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out2")(tokens).logits, expected)


def test_a_tracker_that_names_a_release_that_is_not_here_says_which_folder_that_is(tmp_path):
    golden = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"
    shutil.copytree(golden, tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text("release\n")
    with pytest.raises(BadCheckpoint) as refusal:
        api.plan(tmp_path / "copy", to="hf")
    assert refusal.value.facts["expected"] == "release"
