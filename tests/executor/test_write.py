"""Writing: complete or not there, resumable, and clear about who must act."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import xxhash

from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.executor.run import write
from carnet.executor.staging import owned
from carnet.plans.columns import Steps
from carnet.steps import AssetFile, Move, Same, TextFile
from carnet.storage import journal_lines as journals
from carnet.storage.drafts import staging_of
from carnet.storage.protocol import Crossing

SMALL = {"tensors": 6, "rows": 256, "width": 4096, "short": True, "window": 16 << 10}


@pytest.fixture
def case(halves, tmp_path):
    return halves(tmp_path, **SMALL)


def run(case, out, *, place=False, name="p", progress=None, threads=None, **changes):
    plan = replace(case.plan, **changes)
    with owned(plan, Crossing(name), case.source, out) as staging:
        found = write(plan, case.source, staging, progress=progress, threads=threads)
        if place:
            staging.publish()
    return found


def finished(case, out):
    return {path.name: path.read_bytes() for path in out.iterdir()} == case.expected | {"config.json": b"{}\n"}


def stopped_at(share):
    """Return a progress callback that presses Ctrl-C."""

    def progress(done, total):
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


def test_the_target_is_not_there_until_it_is_published(case, out):
    with owned(case.plan, Crossing("p"), case.source, out) as staging:
        write(case.plan, case.source, staging)
        assert not out.exists()
        staging.publish()
    assert finished(case, out)
    assert not staging_of(out).exists()


def test_an_empty_target_folder_is_taken_over(case, out):
    out.mkdir()
    run(case, out, place=True)
    assert finished(case, out)


@pytest.mark.parametrize("kind", ["file", "full folder", "link"])
def test_a_target_that_exists_is_refused_and_left_alone(case, out, kind):
    if kind == "file":
        out.write_text("mine")
    elif kind == "full folder":
        out.mkdir()
        (out / "mine").touch()
    else:
        out.symlink_to(case.source)
    with pytest.raises(BadRequest, match="exists"):
        run(case, out)
    assert not staging_of(out).exists()


def test_a_staging_folder_that_carnet_did_not_begin_is_refused_and_left_alone(case, out):
    staging_of(out).mkdir()
    (staging_of(out) / "mine").write_text("mine")
    with pytest.raises(BadRequest, match="no crossing of carnet began it"):
        run(case, out)
    assert (staging_of(out) / "mine").read_text() == "mine"


def test_ctrl_c_leaves_what_is_done_and_the_next_run_does_the_rest(case, out):
    with pytest.raises(KeyboardInterrupt):
        run(case, out, progress=stopped_at(0.1))
    assert not out.exists()
    assert not (staging_of(out) / "config.json").exists()
    staged = run(case, out, place=True)
    assert 0 < staged.resumed < staged.jobs
    assert finished(case, out)


def test_a_run_after_writing_and_before_publishing_has_nothing_left_to_do(case, out):
    run(case, out)
    staged = run(case, out, place=True)
    assert staged.resumed == staged.jobs
    assert finished(case, out)


def interrupted(case, out):
    with pytest.raises(KeyboardInterrupt):
        run(case, out, progress=stopped_at(0.1))
    return staging_of(out) / journals.NAME


def test_a_staging_folder_of_another_plan_is_refused_and_left_alone(case, out):
    before = interrupted(case, out).read_bytes()
    with pytest.raises(BadRequest, match=r"out\.partial belongs to another plan"):
        run(case, out, name="q")
    assert (staging_of(out) / journals.NAME).read_bytes() == before


def test_a_journal_of_another_boot_counts_for_nothing(case, out):
    journal = interrupted(case, out)
    journal.write_text(journal.read_text().replace(journals.boot_id() or "null", "another"))
    assert run(case, out).resumed == 0


def test_a_torn_last_line_of_the_journal_is_no_line(case, out):
    journal = interrupted(case, out)
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines, "1"]))
    staged = run(case, out, place=True)
    assert staged.resumed == sum(line.isdigit() for line in lines)
    assert finished(case, out)


def test_a_journal_that_is_no_journal_is_refused(case, out):
    interrupted(case, out).write_text("hello\n")
    with pytest.raises(BadRequest, match="not a journal of carnet"):
        run(case, out)


def test_a_file_that_somebody_removed_from_the_staging_folder_begins_anew(case, out):
    interrupted(case, out)
    (staging_of(out) / "model.safetensors").unlink()
    staged = run(case, out, place=True)
    assert staged.resumed == 0
    assert finished(case, out)


def test_two_runs_never_share_a_staging_folder(case, out):
    refused = []

    def second(done, total):
        if not refused:
            with pytest.raises(BadRequest, match="another run is writing") as caught:
                run(case, out)
            refused.append(caught)

    run(case, out, progress=second, place=True)
    assert refused
    assert finished(case, out)


@pytest.mark.parametrize("short", [True, False])
def test_a_source_that_vanished_is_named(halves, tmp_path, out, short):
    case = halves(tmp_path, **SMALL | {"short": short})
    (case.source / "all.bin").unlink()
    with pytest.raises(MachineFailed, match="vanished") as caught:
        run(case, out)
    assert str(case.source / "all.bin") in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("short", [True, False])
def test_a_source_that_shrinks_during_the_run_is_an_error_and_no_signal(halves, tmp_path, out, short):
    case = halves(tmp_path, **SMALL | {"short": short, "tensors": 20})
    with pytest.raises(BadCheckpoint, match="ends too early"):
        run(case, out, threads=1, progress=lambda *_: os.truncate(case.source / "all.bin", 9000))
    assert not out.exists()
    assert not (staging_of(out) / "config.json").exists()


@pytest.mark.parametrize("short", [True, False])
def test_a_file_that_may_not_grow_stops_the_run_which_then_resumes(halves, tmp_path, out, short):
    case = halves(tmp_path, **SMALL | {"short": short})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = case.plan.files[0].nbytes // 2

    def fill(done, total):  # first called when the files have their size and nothing is in them
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, hard))

    try:
        with pytest.raises(MachineFailed, match="may not grow"):
            run(case, out, threads=1, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (staging_of(out) / "config.json").exists()
    staged = run(case, out, place=True)
    assert staged.resumed > 0
    assert finished(case, out)


def test_a_disk_with_too_little_room_is_refused_before_a_byte_is_written(case, out):
    huge = replace(case.plan.files[0], nbytes=1 << 60)
    with pytest.raises(MachineFailed, match="too little room") as caught:
        run(case, out, files=(huge,))
    assert "needed    1,152,921,504,606,8" in str(caught.value)
    assert not any(out.parent.glob("out*"))


def test_copies_that_differ_stop_the_run_and_both_are_named(case, out):
    (case.source / "other.bin").write_bytes(bytes(5000))
    copy = case.plan.steps[0]
    assert isinstance(copy, Move)
    same = Same("t0", (0, 0), (2, 2048), copy.source, replace(copy.source, file="other.bin", offset=0))
    with pytest.raises(BadCheckpoint, match="two copies of t0 differ") as caught:
        run(case, out, steps=Steps.of([*case.plan.steps, same]))
    assert str(caught.value).splitlines()[1:3] == ["  where     all.bin", "  other     other.bin"]


def test_a_value_out_of_range_names_its_tensor(tmp_path, out, crossing):
    from carnet.plans.columns import Plan
    from carnet.steps import Move, Place, TargetFile, TargetTensor

    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(bytes.fromhex("000080470000803f"))  # 65536.0 and 1.0
    cast = Move("final.norm", (0,), (2,), Place("a", 0, (1,), "f32"), Place("o", 72, (1,), "f16"))
    file = TargetFile("o", 76, (TargetTensor("n", "f16", (2,), 72),), {})
    plan = Plan(str(source), "", {}, "toy", (file,), (), (), Steps.of([cast]), {}, {}, 1 << 20, 1 << 16)
    refused = pytest.raises(BadRequest, match=r"final\.norm is out of range for f16")
    with refused, owned(plan, Crossing("p"), source, out) as staging:
        write(plan, source, staging)


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../b", ""])
def test_no_name_leads_out_of_the_target(case, out, name):
    with pytest.raises(BadRequest, match="outside of its folder"):
        run(case, out, texts=(TextFile(name, ""),))
    with pytest.raises(BadRequest, match="outside of its folder"):
        run(case, out, files=(replace(case.plan.files[0], name=name),), steps=Steps.of([]))


def test_assets_are_taken_over_and_a_changed_one_is_refused(case, out, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"words")
    asset = AssetFile("sub/tokenizer.json", str(path), 5, xxhash.xxh3_128_hexdigest(b"words"))
    path.write_bytes(b"other")
    with pytest.raises(BadCheckpoint, match="changed after planning"):
        run(case, out, assets=(asset,))
    assert not (staging_of(out) / "sub/tokenizer.json").exists()
    path.write_bytes(b"words")
    run(case, out, assets=(asset,), place=True)
    assert (out / "sub/tokenizer.json").read_bytes() == b"words"


CHILD = """
import pickle, sys
from carnet.storage.protocol import Crossing
from carnet.executor.run import write
from carnet.executor.staging import owned
plan, folder = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[1]).parent
print("ready", flush=True)
with owned(plan, Crossing("p"), folder / "source", folder / "out") as staging:
    write(plan, folder / "source", staging)
    staging.publish()
"""


def test_kills_at_any_moment_leave_a_run_that_can_be_finished(halves, tmp_path, out):
    import pickle

    case = halves(tmp_path, tensors=40, rows=256, width=4096, short=True, window=16 << 10)
    (tmp_path / "plan").write_bytes(pickle.dumps(case.plan))
    noted, moments = [], random.Random(0)
    for _ in range(60):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "plan")], stdout=subprocess.PIPE)
        with child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(moments.uniform(0, 0.08))
            child.send_signal(signal.SIGKILL)
        if child.returncode == 0 or out.exists():
            break
        journal = staging_of(out) / journals.NAME
        noted.append(sum(line.isdigit() for line in journal.read_text().splitlines()) if journal.exists() else 0)
        assert not (staging_of(out) / "config.json").exists() or noted[-1] > 1
    else:
        run(case, out, place=True)
    assert finished(case, out)
    assert len(noted) > 1
    assert noted == sorted(noted)
