"""What carnet did not write it does not touch: no link is followed, nothing foreign is truncated, removed or waited for."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import carnet
from carnet.calibrate import calibrate
from carnet.errors import BadRequest, CarnetError, MachineFailed
from carnet.plans import saved
from carnet.storage.drafts import staging_of


def everything(folder: Path):
    """What is below a folder: kinds, contents, times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        look = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(look.st_mode) else os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = (stat.S_IFMT(look.st_mode), look.st_mtime_ns, look.st_ino, content)
    return found


@pytest.fixture
def left(source, out):
    """The staging folder of a crossing that was stopped in its midst."""

    def stop(at):
        if at.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carnet.cross(source, out, to="hf", progress=stop)
    return staging_of(out)


def plant(kind: str, path: Path, victim: Path) -> None:
    victim.write_bytes(b"mine, and long enough to be missed")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(victim.with_name("nowhere"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        path.write_bytes(b"mine")


PLANTS = ["link", "hard link", "dangling link", "fifo", "socket", "folder", "file"]


# --- the journal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{}\n", b"hello\n", b'{"plan": "p", "boot": null}\n', b'{"carnet-journal": 2, "plan": "p"}\n', b"[" * 9000],
)
@pytest.mark.parametrize("beside", ["weights.safetensors", "model.safetensors", None])
def test_a_journal_that_is_not_carnets_is_refused_by_name_and_nothing_beside_it_goes(source, out, content, beside):
    folder = staging_of(out)
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(content)
    if beside:
        (folder / beside).write_bytes(b"years of work")
    before = everything(folder)
    with pytest.raises(BadRequest, match=r"journal\.jsonl is not a journal of carnet"):
        carnet.cross(source, out, to="hf")
    assert everything(folder) == before


def test_the_source_stays_though_it_lies_where_the_target_is_staged(small_llama, tmp_path):
    source = small_llama(tmp_path / "out.partial")
    (source / "journal.jsonl").touch()
    before = everything(source)
    with pytest.raises(BadRequest, match="lie in each other"):
        carnet.cross(source, tmp_path / "out", to="hf")
    assert everything(source) == before


@pytest.mark.parametrize("kind", PLANTS[:-1])
@pytest.mark.parametrize("name", ["journal.jsonl", "journal.jsonl.new"])
def test_what_has_the_journals_name_and_is_no_file_is_refused_and_stays(source, out, tmp_path, kind, name):
    folder = staging_of(out)
    folder.mkdir()
    plant(kind, folder / name, tmp_path / "victim")
    before, victim = everything(folder), everything(tmp_path)["victim"]
    with pytest.raises(CarnetError):
        carnet.cross(source, out, to="hf")
    assert everything(folder) == before
    assert everything(tmp_path)["victim"] == victim
    assert not out.exists()


# --- files in the staging folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("name", ["carnet.json.tmp", "config.json", "notes.txt"])
def test_what_somebody_put_into_the_staging_folder_is_named_and_stays(source, out, left, tmp_path, kind, name):
    if kind == "file" and name != "notes.txt":
        pytest.skip("a name of the plan, and a file: it cannot be told from carnet's own")
    plant(kind, left / name, tmp_path / "victim")
    before, victim = everything(left), everything(tmp_path)["victim"]
    with pytest.raises(BadRequest, match="did not write") as refused:
        carnet.cross(source, out, to="hf")
    assert name in str(refused.value)
    changed = {path for path, facts in everything(left).items() if facts != before.get(path)}
    assert changed <= {"journal.jsonl"}
    assert everything(tmp_path)["victim"] == victim
    path = left / name
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "hard link":
        (tmp_path / "victim").unlink()
    assert carnet.cross(source, out, to="hf").equal


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_weights_that_became_something_else_are_not_written(source, out, left, tmp_path, kind):
    (left / "model-00001-of-00001.safetensors").unlink(missing_ok=True)
    name = next((path.name for path in left.glob("*.safetensors")), "model.safetensors")
    (left / name).unlink(missing_ok=True)
    plant(kind, left / name, tmp_path / "victim")
    with pytest.raises(BadRequest, match="did not write"):
        carnet.cross(source, out, to="hf")
    assert (tmp_path / "victim").read_bytes() == b"mine, and long enough to be missed"


@pytest.mark.parametrize("when", [0, 0.5, 1])
def test_a_folder_that_is_exchanged_for_a_link_while_it_is_written_leads_nobody_astray(source, out, tmp_path, when):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("model.safetensors", "config.json", "carnet.json", "carnet.json.tmp"):
        (victim / name).write_text("mine")
    before = everything(victim)

    def exchange(at):
        if at.total and at.done >= when * at.total and not staging_of(out).is_symlink():
            staging_of(out).rename(tmp_path / "away")
            staging_of(out).symlink_to(victim)

    plan = carnet.plan(source, to="hf")
    with pytest.raises(MachineFailed, match="was moved while it was written"):
        carnet.run(plan, out, progress=exchange)
    assert everything(victim) == before
    assert not out.exists()


def test_a_target_that_appears_while_it_is_written_stays_and_the_work_goes_on_later(source, out):
    def appear(at):
        if at.total:
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("mine")

    with pytest.raises(BadRequest, match="exists"):
        carnet.cross(source, out, to="hf", progress=appear)
    assert [path.name for path in out.iterdir()] == ["mine"]
    shutil.rmtree(out)
    assert carnet.cross(source, out, to="hf").equal


def test_a_target_of_another_owner_in_the_folder_is_never_published(source, out):
    def put(at):
        if at.total:
            (staging_of(out) / "modeling_evil.py").write_text("import os")

    with pytest.raises(BadRequest, match="did not write"):
        carnet.run(carnet.plan(source, to="hf"), out, progress=put)
    assert not out.exists()


# --- where source and target lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["source", "source/out", "source/deep/er/out", "link/out", "."])
def test_a_target_in_its_source_and_a_source_in_its_target_are_refused(source, tmp_path, place, monkeypatch):
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    before = everything(source)
    with pytest.raises(BadRequest):
        carnet.cross("source", place, to="hf")
    assert everything(source) == before


@pytest.mark.parametrize("place", ["/", "..", "source/.."])
def test_a_target_without_a_name_of_its_own_is_refused(source, tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest):
        carnet.cross("source", place, to="hf")


# --- files that stand alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANTS)
def test_a_saved_plan_replaces_a_plan_and_nothing_else(source, tmp_path, kind):
    path = tmp_path / "a.plan"
    plant(kind, path, tmp_path / "victim")
    before, victim = path.lstat(), (tmp_path / "victim").read_bytes()
    with pytest.raises(CarnetError):
        saved.save(carnet.plan(source, to="hf"), path)
    assert path.lstat() == before
    assert (tmp_path / "victim").read_bytes() == victim
    assert sorted(tmp_path.iterdir()) == sorted([path, source, tmp_path / "victim"])


@pytest.mark.parametrize("name", ["a.plan.partial", "a.plan.tmp"])
def test_a_file_that_could_be_the_beginning_of_a_plan_stays(source, tmp_path, name):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "victim")
    saved.save(carnet.plan(source, to="hf"), tmp_path / "a.plan")
    saved.save(carnet.plan(source, to="hf"), tmp_path / "a.plan")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("kind", PLANTS)
def test_magnitudes_replace_magnitudes_and_nothing_else(source, tmp_path, kind):
    path = tmp_path / "amax.safetensors"
    plant(kind, path, tmp_path / "victim")
    before = path.lstat()
    with pytest.raises(BadRequest, match="is not a file of magnitudes"):
        calibrate(source, tmp_path / "texts", path)
    assert path.lstat() == before


def test_the_document_of_a_target_is_not_written_through_a_link(source, out, tmp_path):
    carnet.run(carnet.plan(source, to="hf"), out)
    (tmp_path / "victim").write_text("mine")
    (out / "carnet.json.tmp").symlink_to(tmp_path / "victim")
    carnet.verify(source, out)
    assert (tmp_path / "victim").read_text() == "mine"


# --- what would hang or act ----------------------------------------------------------------------------------------------

READ = """
import sys
import carnet
from carnet.calibrate import read_texts
from carnet.errors import CarnetError
from carnet.plans import saved
from pathlib import Path
*words, first, second = sys.argv[1:]
ways = {
    "verify": lambda: carnet.verify(first, second),
    "recheck": lambda: carnet.verify(second),
    "inspect": lambda: carnet.inspect(first).refusal,
    "cross": lambda: carnet.cross(first, second + "2", to="hf"),
    "plan": lambda: saved.load(Path(first)),
    "texts": lambda: read_texts(Path(first), 1),
    "amax": lambda: carnet.plan(second, to="hf", quantize="fp8", amax=first),
    "config": lambda: carnet.plan(second, to="hf", config=first),
}
for word in words:
    try:
        ways[word]()
        print("done")
    except CarnetError as error:
        print("refused")
"""


def in_time(*words):
    child = subprocess.run(
        [sys.executable, "-c", READ, *map(str, words)], capture_output=True, text=True, timeout=100, check=False
    )
    assert not child.stderr, child.stderr
    return child.stdout.split()


@pytest.mark.parametrize("side", ["source", "out"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "carnet.json", "tokenizer.json", "hf_quant_config.json"])
def test_nothing_waits_for_a_fifo_in_a_source_or_a_target(source, out, side, name):
    carnet.cross(source, out, to="hf")
    path = {"source": source, "out": out}[side] / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert len(in_time("verify", "recheck", "inspect", "cross", source, out)) == 4


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_nothing_waits_for_a_fifo_that_is_named(source, tmp_path, kind):
    path = tmp_path / "odd"
    path.symlink_to("/dev/zero") if kind == "device" else plant(kind, path, tmp_path / "victim")
    assert in_time("plan", "texts", "amax", "config", path, source) == ["refused"] * 4


def test_a_mount_point_is_refused_before_anything_is_written(source):
    out = Path("/dev/shm")
    if not out.is_mount() or any(out.iterdir()):
        pytest.skip("no empty mount point on this machine")
    with pytest.raises(BadRequest, match="is a mount point"):
        carnet.cross(source, out, to="hf")
    assert not staging_of(out).exists()
