"""One door to the disk: nothing else opens a file, and nothing maps one."""

import os
from pathlib import Path

import pytest

import carnet
from carnet.errors import BadCheckpoint
from tools import check_doors

LLAMA = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"


def test_nothing_but_the_door_opens_lists_or_changes_a_file(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert check_doors.main() == 0


@pytest.mark.parametrize(
    "line",
    [
        "import mmap",
        "np.memmap('x')",
        "open('x')",
        "os.open('x', 0)",
        "path.read_bytes()",
        "os.path.getsize('x')",
        "shutil.copy(a, b)",
    ],
)
def test_the_check_can_fail(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    place = Path("src/carnet/formats/new.py")
    place.parent.mkdir(parents=True)
    place.write_text(line)
    assert check_doors.main() == 1


@pytest.mark.parametrize("alone", [True, False])
def test_a_target_that_is_truncated_while_it_is_verified_is_one_refusal(tmp_path, alone):
    out = tmp_path / "out"
    assert carnet.cross(LLAMA, out, to="hf").equal

    def truncate(done: int, total: int) -> None:
        os.truncate(out / "model.safetensors", 9000)

    with pytest.raises(BadCheckpoint, match="ends too early") as refused:
        carnet.verify(*([out] if alone else [LLAMA, out]), progress=truncate)
    assert refused.value.remedy == "copy the checkpoint again, and wait until nobody writes to it"
