"""A crossing in parts: any processes, in any order and at once, write what one process writes; nothing is published too early."""

import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import carnet
from carnet.errors import BadOption, BadRequest, MachineFailed
from carnet.executor import parts
from carnet.executor.jobs import jobs_of
from carnet.executor.owning import held, proven
from carnet.executor.run import write_part
from carnet.plans import saved
from carnet.storage.drafts import staging_of
from carnet.storage.journal_lines import NAME, name_of
from carnet.storage.protocol import Part
from carnet.storage.schemes import folder_at

GOLDEN = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"
CODED = {"to": "hf", "dtype": "bf16", "quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic"}
ASKED = [{"to": "hf"}, {"to": "trtllm", "tp": 2, "pp": 2}, CODED]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*words):
    return subprocess.run([sys.executable, "-m", "carnet", *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_parts_in_any_order_write_the_bytes_of_one_run(asked, out, tmp_path):
    plan = carnet.plan(GOLDEN, **asked)
    carnet.run(plan, tmp_path / "whole")
    numbers = [*range(1, 6)]
    random.Random(0).shuffle(numbers)
    for number in numbers:
        carnet.run(plan, out, part=(number, 5))
        assert not out.exists()
    assert carnet.finish(plan, out) is None
    assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_parts_at_once_prepare_the_target_once_and_the_proven_one_is_that_of_cross(out, tmp_path):
    plan = tmp_path / "a.plan"
    saved.save(carnet.plan(GOLDEN, **CODED), plan)
    with ThreadPoolExecutor(6) as pool:
        done = [*pool.map(lambda number: command("run", plan, out, "--part", f"{number}/6"), range(1, 7))]
    assert [(each.returncode, each.stdout) for each in done] == [(0, "")] * 6
    assert done[2].stderr == f"carnet: part 3/6 is written; when all are: `carnet finish {plan} {out}`\n"
    end = command("finish", plan, out, "--verify")
    assert end.returncode == 0, end.stderr
    assert carnet.cross(GOLDEN, tmp_path / "whole", **CODED).equal
    assert content(out) == content(tmp_path / "whole")


def test_finish_names_the_parts_that_are_missing_and_goes_on_when_they_are_there(out):
    plan = carnet.plan(GOLDEN, to="hf")
    with pytest.raises(BadRequest, match="nothing of this target is written"):
        carnet.finish(plan, out)
    assert not staging_of(out).exists()
    for number in (1, 4):
        carnet.run(plan, out, part=(number, 6))
    with pytest.raises(BadRequest, match="not every part of the target is written") as caught:
        carnet.finish(plan, out)
    assert caught.value.facts["missing"] == "2-3, 5-6 of 6"
    assert "--part 2/6" in caught.value.remedy
    for number in (2, 3, 5, 6):
        carnet.run(plan, out, part=(number, 6))
    assert carnet.finish(plan, out, verify=True).equal
    with pytest.raises(BadRequest, match="exists"):
        carnet.run(plan, out, part=(1, 6))


@pytest.mark.parametrize("of", [1, 2, 7, 64, 1000, 10**12])
def test_a_job_is_of_the_part_that_its_bytes_lie_in(of):
    jobs = jobs_of(carnet.plan(GOLDEN, to="trtllm", tp=2))
    numbers = parts.writing(jobs).tolist()
    for number in numbers[::5]:
        (found,) = parts.parts_of(jobs, [number], of)
        assert number in parts.writing(jobs, Part(found, of))
    named = parts.parts_of(jobs, numbers, of)
    assert [each for part in named for each in parts.writing(jobs, Part(part, of)).tolist()] == numbers
    assert of > 64 or named == [each for each in range(1, of + 1) if len(parts.writing(jobs, Part(each, of)))]


def test_a_file_that_is_lost_between_parts_is_named_with_the_way_out(out):
    plan = carnet.plan(GOLDEN, to="hf")
    carnet.run(plan, out, part=(1, 2))
    os.truncate(staging_of(out) / "model.safetensors", 1000)
    with pytest.raises(BadRequest, match="lost or cut since parts were written"):
        carnet.finish(plan, out)
    carnet.clean(out)
    for number in (1, 2):
        carnet.run(plan, out, part=(number, 2))
    assert carnet.finish(plan, out, verify=True).equal


def test_a_run_of_the_whole_takes_over_what_parts_have_written(out, tmp_path):
    plan = carnet.plan(GOLDEN, to="hf")
    carnet.run(plan, tmp_path / "whole")
    carnet.run(plan, out, part=(2, 3))
    with held(proven(plan), folder_at(out)) as target:
        assert len(target.staging.done) == len(parts.writing(jobs_of(plan), Part(2, 3)))
    carnet.run(plan, out)
    assert content(out) == content(tmp_path / "whole")


def test_another_plan_another_state_of_the_source_and_a_part_that_cannot_be_are_refused(source, out):
    plan = carnet.plan(source, to="hf")
    carnet.run(plan, out, part=(1, 2))
    before = content(staging_of(out))
    for call in (lambda other: carnet.run(other, out, part=(2, 2)), lambda other: carnet.finish(other, out)):
        with pytest.raises(BadRequest, match="belongs to another plan"):
            call(carnet.plan(source, to="hf", dtype="bf16"))
    for part in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(BadOption, match="there is no part"):
            carnet.run(plan, out, part=part)
    assert command("run", "x", out, "--part", "half").returncode == 2
    assert {name: data for name, data in content(staging_of(out)).items() if name != NAME} == {
        name: data for name, data in before.items() if name != NAME
    }
    os.utime(source / "model.safetensors")
    with pytest.raises(BadRequest, match="not the one that was planned"):
        carnet.run(plan, out, part=(2, 2))
    with pytest.raises(BadRequest, match="belongs to another plan"):
        carnet.finish(carnet.plan(source, to="hf"), out)


def test_a_source_that_is_exchanged_between_two_parts_makes_what_was_written_worthless(source, out):
    plan = carnet.plan(source, to="hf")
    carnet.run(plan, out, part=(1, 2))
    file = source / "model.safetensors"
    look, other = file.stat(), source / "other"
    other.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    os.utime(other, ns=(look.st_atime_ns, look.st_mtime_ns))
    other.replace(file)  # as long and as old: it is the source that was planned
    with pytest.raises(BadRequest, match="the source changed since parts were written"):
        carnet.finish(plan, out)
    carnet.run(plan, out, part=(2, 2))
    with pytest.raises(BadRequest, match="not every part") as caught:
        carnet.finish(plan, out)
    assert caught.value.facts["missing"] == "1 of 2"
    carnet.run(plan, out, part=(1, 2))
    assert carnet.finish(plan, out, verify=True).equal


# --- several at once ---------------------------------------------------------------------------------------------------------

# begins a part, says so, and waits to be killed
STUCK = """
import sys, time
import carnet
def progress(at):
    if at.done > float(sys.argv[4]) * at.total:
        print("stuck", flush=True)
        time.sleep(600)
carnet.run(sys.argv[1], sys.argv[2], part=eval(sys.argv[3]), progress=progress)
"""


@pytest.fixture
def stuck(out, tmp_path):
    """Return what begins a part of a saved plan in a process of its own, and stands still when a share of it is done."""
    children = []

    def begin(plan, part, share=-1):
        words = [sys.executable, "-c", STUCK, plan, out, repr(part), str(share)]
        children.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert children[-1].stdout.readline() == "stuck\n"
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def test_while_a_part_is_written_only_other_parts_may_be_and_it_only_once(stuck, out, tmp_path):
    made = carnet.plan(GOLDEN, to="hf")
    saved.save(made, tmp_path / "a.plan")
    child = stuck(tmp_path / "a.plan", (1, 2))
    for refused in (
        lambda: carnet.run(made, out),
        lambda: carnet.finish(made, out),
        lambda: carnet.cross(GOLDEN, out, to="hf"),
    ):
        with pytest.raises(BadRequest, match=r"another run is writing out\.partial") as caught:
            refused()
        assert caught.value.facts["held by"].startswith(f"part 1/2 and others, begun by process {child.pid} on ")
    with pytest.raises(BadRequest, match="another run is writing part 1/2"):
        carnet.run(made, out, part=(1, 2))
    carnet.run(made, out, part=(2, 2))


@pytest.mark.parametrize("asked", [{"to": "hf"}, CODED], ids=str)
def test_a_part_that_is_killed_goes_on_where_it_stopped(asked, stuck, out, tmp_path):
    made = carnet.plan(GOLDEN, **asked)
    saved.save(made, tmp_path / "a.plan")
    child = stuck(tmp_path / "a.plan", (1, 2), 0.8)
    child.send_signal(signal.SIGKILL)
    child.wait()
    noted = (staging_of(out) / name_of(1, 2)).read_text().count("\n") - 2
    assert noted > 0
    first = Part(1, 2)
    with held(proven(made), folder_at(out), first) as target:
        found = write_part(made, target.source.root, target.staging, first)
    assert found.resumed > 0
    with pytest.raises(BadRequest) as caught:
        carnet.finish(made, out)
    assert caught.value.facts["missing"] == "2 of 2"
    carnet.run(made, out, part=(2, 2))
    assert carnet.finish(made, out, verify=True).equal


def another_machine(journal: Path) -> None:
    """Make a journal one that was written on another machine."""
    own = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    journal.write_text(journal.read_text().replace(own, "another"))


def test_what_another_machine_flushed_counts_here_and_what_it_did_not_flush_may_be_lost(out):
    plan = carnet.plan(GOLDEN, to="hf")
    for number in (1, 2, 3):
        carnet.run(plan, out, part=(number, 3))
    for journal in staging_of(out).glob("journal*"):
        another_machine(journal)
    second = staging_of(out) / name_of(2, 3)
    second.write_text(second.read_text().replace('{"flushed": true}\n', ""))
    with pytest.raises(BadRequest) as caught:
        carnet.finish(plan, out)
    assert caught.value.facts["missing"] == "2 of 3"
    carnet.run(plan, out, part=(2, 3))
    assert carnet.finish(plan, out, verify=True).equal


def test_a_scale_that_another_part_measured_is_not_measured_again(out):
    plan = carnet.plan(GOLDEN, **CODED)
    for number in (1, 2):
        part = Part(number, 2)
        with held(proven(plan), folder_at(out), part) as target:
            write_part(plan, target.source.root, target.staging, part, measures=True)
    phases = set()
    for number in (1, 2):
        carnet.run(plan, out, part=(number, 2), progress=lambda at: phases.add(at.phase))
    assert phases == {"preparing", "writing"}
    assert carnet.finish(plan, out, verify=True).equal


def test_a_part_that_joins_others_says_where_it_does_not_see_their_target(out):
    plan = carnet.plan(GOLDEN, to="hf")
    with (
        pytest.raises(MachineFailed, match="does not see the target that others write"),
        held(proven(plan), folder_at(out), Part(1, 2, joins=True)),
    ):
        pass
    assert not staging_of(out).exists()


# --- the cut -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [1, 2, 7, 64, 1000])
def test_every_job_is_of_one_part_and_parts_are_of_similar_bytes(halves, tmp_path, of):
    case = halves(tmp_path, tensors=64, rows=64, width=1024, short=True, window=4 << 10)
    jobs = jobs_of(case.plan)
    cut = [parts.writing(jobs, Part(number, of)) for number in range(1, of + 1)]
    assert np.array_equal(np.concatenate(cut), parts.writing(jobs))
    sizes = [int(jobs.rows["nbytes"][part].sum()) for part in cut]
    assert max(sizes) - min(sizes) <= 2 * int(jobs.rows["nbytes"].max())
    assert jobs_of(replace(case.plan)).rows.tobytes() == jobs.rows.tobytes()
