"""One door to the disk: nothing else opens a file, and nothing maps one."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

import carnet
from carnet.errors import BadCheckpoint, CarnetError, MachineFailed
from carnet.storage import journal as journals
from carnet.storage.opening import explained, failed
from tools import check_doors

LLAMA = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"
DIST = LLAMA.with_name("llama_te_pp2_vpp")


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

    def truncate(at: carnet.Progress) -> None:
        if at.total:
            os.truncate(out / "model.safetensors", 9000)

    with pytest.raises(BadCheckpoint, match="ends too early") as refused:
        carnet.verify(*([out] if alone else [LLAMA, out]), progress=truncate)
    assert refused.value.remedy == "copy the checkpoint again, and wait until nobody writes to it"


@pytest.mark.parametrize("when", [0, 1])
def test_a_document_that_changes_while_its_target_is_compared_with_it_is_no_proof(tmp_path, when):
    out = tmp_path / "out"
    assert carnet.cross(LLAMA, out, to="hf").equal
    calls = 0

    def exchange(at: carnet.Progress) -> None:
        nonlocal calls
        if at.total and calls == when:
            path = out / "carnet.json"
            path.write_text(path.read_text().replace("torch_dist", "torch_dusk"))
        calls += at.total > 0

    with pytest.raises(BadCheckpoint, match="a file changed while it was used"):
        carnet.verify(out, progress=exchange)


def dangling(path: Path) -> Path:
    path.symlink_to(path / "nowhere")
    return path / "out"


PLACES = {
    "a long name": (lambda tmp: tmp / ("a" * 250), "a name is too long for the disk"),
    "a long path": (lambda tmp: tmp.joinpath(*["a" * 200] * 30), "a name is too long for the disk"),
    "below a file": (lambda tmp: tmp / "file" / "out", "a file of its own is needed here"),
    "below a link that leads nowhere": (lambda tmp: dangling(tmp / "link"), "a file of its own is needed here"),
}


@pytest.mark.parametrize(("place", "what"), PLACES.values(), ids=PLACES)
def test_a_target_where_none_can_be_is_refused_with_a_way_out(tmp_path, place, what):
    (tmp_path / "file").write_text("mine")
    out = place(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CarnetError) as refused:
        carnet.cross(LLAMA, out, to="hf")
    assert (refused.value.what, bool(refused.value.remedy)) == (what, True)
    assert sorted(tmp_path.iterdir()) == before


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


STRANGE = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "an endless file": endless,
}


@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "iter_0000001/common.pt", "iter_0000001/.metadata"])
@pytest.mark.parametrize("put", STRANGE.values(), ids=STRANGE)
def test_what_is_no_file_of_a_checkpoint_is_refused_with_a_way_out(tmp_path, put, name):
    source = shutil.copytree(DIST, tmp_path / "source")
    (source / name).unlink()
    put(source / name)
    with pytest.raises(CarnetError) as refused:
        carnet.plan(source, to="hf")
    assert Path(name).name in str(refused.value).splitlines()[0]
    assert refused.value.remedy


def test_a_file_that_is_missing_is_named_with_a_way_out(tmp_path):
    source = shutil.copytree(DIST, tmp_path / "source")
    (source / "iter_0000001/.metadata").unlink()
    with pytest.raises(BadCheckpoint, match=r"\.metadata is missing") as refused:
        carnet.plan(source, to="hf")
    assert refused.value.remedy


@pytest.mark.parametrize("number", [*errno.errorcode, 10**6])
def test_whatever_the_machine_answers_there_is_a_way_out(number):
    assert explained(OSError(number, "no"), "here").remedy
    assert failed("it cannot be read", "here", OSError(number, "no")).remedy


def test_a_journal_that_takes_some_of_a_line_says_what_the_machine_says(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    descriptor = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(MachineFailed, match="a file may not grow that large"):
            journals.append(journals.File(descriptor, "journal"), b"x" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.close(descriptor)
