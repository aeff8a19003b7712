"""`carnet clean` removes what an unfinished crossing left on the disk, and nothing else."""

import shutil
from pathlib import Path

import pytest

import carnet

LLAMA = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"


@pytest.fixture
def interrupted(tmp_path):
    """A crossing that stopped in the midst."""

    def stop(at):
        if at.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carnet.cross(LLAMA, tmp_path / "out", to="hf", progress=stop)
    assert (tmp_path / "out.partial/journal.jsonl").exists()
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_a_crossing_left_goes_and_its_folder_with_it(interrupted, name):
    removed = carnet.clean(interrupted.with_name(name))
    assert {"journal.jsonl", "model.safetensors"} <= {*removed}
    assert list(interrupted.parent.iterdir()) == []


def test_what_carnet_did_not_write_stays(interrupted):
    folder = interrupted.with_name("out.partial")
    (folder / "mine").write_text("mine")
    assert "mine" not in carnet.clean(interrupted)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_target_and_a_folder_of_nobody_are_refused_untouched(tmp_path):
    assert carnet.cross(LLAMA, tmp_path / "out", to="hf").equal
    shutil.copytree(tmp_path / "out", tmp_path / "other.partial")
    before = sorted(tmp_path.rglob("*"))
    for place in ("out", "other", "nothing"):
        with pytest.raises(carnet.BadRequest, match="no unfinished crossing"):
            carnet.clean(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_another_run_holds_is_not_cleaned(tmp_path):
    refusals = []

    def clean(at):
        if at.total and not refusals:
            with pytest.raises(carnet.BadRequest, match="another run is writing") as refused:
                carnet.clean(tmp_path / "out")
            refusals.append(refused)

    assert carnet.cross(LLAMA, tmp_path / "out", to="hf", progress=clean).equal
    assert refusals
