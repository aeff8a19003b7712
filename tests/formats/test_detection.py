"""Which kind of checkpoint a folder is, and what makes it the same one."""

import os
import shutil
from pathlib import Path

import pytest

from carnet.errors import BadRequest
from carnet.formats.detect import fingerprint, open_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDENS / "megatron/llama_tp2pp2", tmp_path / "copy"))


def test_an_unknown_folder_is_an_error_that_lists_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(BadRequest) as error:
        open_checkpoint(tmp_path)
    assert str(error.value).splitlines() == [
        "no checkpoint of a known kind is here",
        f"  where       {tmp_path}",
        "  Megatron's  would have latest_checkpointed_iteration.txt, iter_* folders or .metadata",
        "  any other   would have config.json",
        "  try: name the folder in which one of these lies",
    ]


def test_a_folder_of_checkpoints_names_them(tmp_path):
    shutil.copytree(GOLDENS / "megatron/llama_tp2pp2", tmp_path / "llama")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    with pytest.raises(BadRequest) as error:
        open_checkpoint(tmp_path)
    assert str(error.value).splitlines()[-2:] == ["  inside      gpt, llama", f"  try: name a checkpoint: {tmp_path / 'gpt'}"]


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(BadRequest) as error:
        open_checkpoint(tmp_path / "nowhere")
    assert str(error.value).splitlines()[0] == f"{tmp_path}/nowhere does not exist"


def test_a_release_is_an_iteration_too(copy):
    (copy / "iter_0000001").rename(copy / "release")
    (copy / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert open_checkpoint(copy).root.name == "release"


def test_a_config_for_other_programs_does_not_hide_the_iteration(copy):
    (copy / "iter_0000001" / "config.json").write_text("{}")
    assert open_checkpoint(copy / "iter_0000001").dialect == "megatron"


def test_a_single_iteration_needs_no_tracker(copy):
    (copy / "latest_checkpointed_iteration.txt").unlink()
    assert open_checkpoint(copy).root.name == "iter_0000001"


def test_the_digest_does_not_depend_on_which_tensors_were_located(copy):
    everything, nothing = open_checkpoint(copy, lambda name: True), open_checkpoint(copy, lambda name: False)
    assert fingerprint(everything) == fingerprint(nothing)


def test_a_relative_path_gives_an_absolute_root(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert str(open_checkpoint(Path("copy")).root) == str(copy / "iter_0000001")


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "common.pt"])
def test_the_fingerprint_changes_with_the_time_of_any_file(copy, file):
    before = fingerprint(open_checkpoint(copy))
    path = copy / "iter_0000001" / file
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert fingerprint(open_checkpoint(copy)) != before


def test_the_digest_is_of_headers_and_not_of_times_or_places(copy):
    assert open_checkpoint(copy).digest == open_checkpoint(GOLDENS / "megatron/llama_tp2pp2").digest


def test_the_digest_changes_with_the_training_arguments(copy):
    import torch

    before = open_checkpoint(copy).digest
    path = copy / "iter_0000001" / "common.pt"
    common = torch.load(path, weights_only=False)
    common["iteration"] = 2
    torch.save(common, path)
    assert open_checkpoint(copy).digest != before
