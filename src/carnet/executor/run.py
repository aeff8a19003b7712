"""Running a plan: prepare the staging folder, do the jobs that no earlier run did, bring everything to the disk.

::

    OUT.partial/  journal.jsonl  model-00001.safetensors (full size, holes)  ...  then assets, then texts: config.json last
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.executor import journal as journals
from carnet.executor import pool, staging
from carnet.executor.desk import Amaxes, Coder, Desk
from carnet.executor.files import Folder, close, explained
from carnet.executor.flusher import flushing
from carnet.executor.jobs import Gauge, Job, jobs_of, touched
from carnet.executor.journal import Journal
from carnet.executor.memory import block_size
from carnet.executor.quantizing import put
from carnet.executor.work import work
from carnet.steps import Plan, Put

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Staged:
    """A target that is written and not yet published."""

    folder: Path  # the staging folder, every byte of it on the disk
    nbytes: int  # moved, cast and compared, by this run and by those before it
    jobs: int  # how many the plan has
    resumed: int  # how many of them an earlier run had done


def write(
    plan: Plan, source: Path, out: Path, *, plan_digest: str, progress: Progress | None = None, device: str = "cpu"
) -> Staged:
    """Write a plan's target into the staging folder beside ``out``; the caller may verify it and then publishes it.

    ``device`` is where matrices are coded: "cpu" or "cuda"; the bytes are the same.
    ``progress`` gets bytes done and bytes in all, on this thread. Called again after any interruption, the function does what
    is left. Raises BadRequest where the target exists or the staging folder belongs to another plan, MachineFailed where
    the machine refused (the staging folder stays), BadCheckpoint where the source is not what the plan saw.
    """
    staging.refuse_taken(out)
    coder = _coder(device)
    folder = staging.staging_of(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, str(folder)) from error
    jobs = jobs_of(plan)
    with journals.held(folder / journals.NAME, plan_digest) as found:
        journal = _prepared(plan, folder, found, plan_digest)
        try:
            _run(plan, source, folder, jobs, journal, progress or _silent, coder)
        except (BadCheckpoint, BadRequest):
            staging.remove(folder)  # trying again would end the same way
            raise
        _put_known(plan, source, folder)
        for raw in plan.raws:
            staging.write_raw(raw, folder)
        for asset in plan.assets:
            staging.write_asset(asset, folder)
        for text in sorted(plan.texts, key=lambda text: text.name == "config.json"):
            staging.write_text(text.name, text.text, folder)
        _flush(staging.written(plan, folder), plan.threads)
    return Staged(folder, sum(job.nbytes for job in jobs), len(jobs), len(journal.done))


def _coder(device: str) -> Coder | None:
    """Return what codes on a device; the module that needs torch is imported here and nowhere else."""
    if device == "cpu":
        return None
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        facts = {"missing": ", ".join(missing)}
        raise MachineFailed("the programs that use a GPU are not installed", facts, remedy="pip install 'carnet[cuda]'")
    from carnet.executor.device import Gpu

    return Gpu()


def _silent(done: int, total: int) -> None:
    """Show nothing."""


def _prepared(plan: Plan, folder: Path, found: Journal, plan_digest: str) -> Journal:
    """Make the staging folder fit to be written: as an earlier run left it, or from nothing."""
    if found.fresh or not staging.intact(plan, folder):
        staging.clear(folder)
        journals.begin(found, plan_digest)
        found = Journal(found.file, frozenset(), fresh=True)
    staging.refuse_full(plan, folder)
    for file in plan.files:
        staging.create(file, folder)
    return found


def _run(
    plan: Plan, source: Path, folder: Path, jobs: Sequence[Job], journal: Journal, progress: Progress, coder: Coder | None
) -> None:
    total = sum(job.nbytes for job in jobs)
    done = sum(jobs[number].nbytes for number in journal.done if number < len(jobs))

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        desk = replace(_desk(plan, source, folder, amaxes, tell), coder=coder)

        def serve(number: int) -> None:
            work(desk, jobs[number])
            if not isinstance(jobs[number], Gauge):  # what was measured is in memory alone
                journals.note(journal, number)
            dirty(touched(plan, jobs[number]))

        try:
            yield serve
        finally:
            close(desk.sources)
            close(desk.targets)

    amaxes = Amaxes()
    progress(done, total)
    gauges = [number for number, job in enumerate(jobs) if isinstance(job, Gauge)]
    left = [number for number, job in enumerate(jobs) if number not in journal.done and not isinstance(job, Gauge)]
    with flushing(folder) as dirty:
        for numbers in (gauges if left else [], left):  # a scale is known before the first code is written
            pool.run(numbers, min(plan.threads, max(1, len(numbers))), worker, add)


def _desk(plan: Plan, source: Path, folder: Path, amaxes: Amaxes, tell: pool.Tell) -> Desk:
    block = block_size(plan.window)
    window, read, scratch = (np.empty(size, np.uint8) for size in (plan.window, block, block))
    return Desk(plan, Folder(source, os.O_RDONLY), Folder(folder, os.O_WRONLY), window, read, scratch, amaxes, tell)


def _put_known(plan: Plan, source: Path, folder: Path) -> None:
    desk = _desk(plan, source, folder, Amaxes(), lambda nbytes: None)
    for step in plan.steps:
        if isinstance(step, Put):
            put(desk, step)
    close(desk.targets)


def _flush(paths: Sequence[Path], threads: int) -> None:
    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        def serve(number: int) -> None:
            tell(0)
            staging.flush(paths[number])

        yield serve

    pool.run(range(len(paths)), threads, worker, lambda nbytes: None)
