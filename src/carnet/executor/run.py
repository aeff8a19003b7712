"""Running a plan: prepare the staging folder, do the jobs that no earlier run did, bring everything to the disk.

::

    OUT.partial/  journal.jsonl  model-00001.safetensors (full size, holes)  ...  then assets, then texts: config.json last
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carnet.errors import BadCheckpoint, BadRequest
from carnet.executor import journal as journals
from carnet.executor import pool, staging
from carnet.executor.desk import Desk
from carnet.executor.files import Folder, close, explained
from carnet.executor.flusher import flushing
from carnet.executor.jobs import Job, jobs_of, touched
from carnet.executor.journal import Journal
from carnet.executor.memory import block_size
from carnet.executor.work import work
from carnet.steps import Plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Staged:
    """A target that is written and not yet published."""

    folder: Path  # the staging folder, every byte of it on the disk
    nbytes: int  # moved, cast and compared, by this run and by those before it
    jobs: int  # how many the plan has
    resumed: int  # how many of them an earlier run had done


def write(plan: Plan, source: Path, out: Path, *, plan_digest: str, progress: Progress | None = None) -> Staged:
    """Write a plan's target into the staging folder beside ``out``; the caller may verify it and then publishes it.

    ``progress`` gets bytes done and bytes in all, on this thread. Called again after any interruption, the function does what
    is left. Raises BadRequest where the target exists or the staging folder belongs to another plan, MachineFailed where
    the machine refused (the staging folder stays), BadCheckpoint where the source is not what the plan saw.
    """
    staging.refuse_taken(out)
    folder = staging.staging_of(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, str(folder)) from error
    jobs = jobs_of(plan)
    with journals.held(folder / journals.NAME, plan_digest) as found:
        journal = _prepared(plan, folder, found, plan_digest)
        try:
            _run(plan, source, folder, jobs, journal, progress or _silent)
        except (BadCheckpoint, BadRequest):
            staging.remove(folder)  # trying again would end the same way
            raise
        for raw in plan.raws:
            staging.write_raw(raw, folder)
        for asset in plan.assets:
            staging.write_asset(asset, folder)
        for text in sorted(plan.texts, key=lambda text: text.name == "config.json"):
            staging.write_text(text.name, text.text, folder)
        _flush(staging.written(plan, folder), plan.threads)
    return Staged(folder, sum(job.nbytes for job in jobs), len(jobs), len(journal.done))


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


def _run(plan: Plan, source: Path, folder: Path, jobs: Sequence[Job], journal: Journal, progress: Progress) -> None:
    total = sum(job.nbytes for job in jobs)
    done = sum(jobs[number].nbytes for number in journal.done if number < len(jobs))

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        desk = _desk(plan, source, folder, tell)

        def serve(number: int) -> None:
            work(desk, jobs[number])
            journals.note(journal, number)
            dirty(touched(plan, jobs[number]))

        try:
            yield serve
        finally:
            close(desk.sources)
            close(desk.targets)

    progress(done, total)
    left = [number for number in range(len(jobs)) if number not in journal.done]
    with flushing(folder) as dirty:
        pool.run(left, min(plan.threads, max(1, len(left))), worker, add)


def _desk(plan: Plan, source: Path, folder: Path, tell: pool.Tell) -> Desk:
    block = block_size(plan.window)
    window, read, scratch = (np.empty(size, np.uint8) for size in (plan.window, block, block))
    return Desk(plan, Folder(source, os.O_RDONLY), Folder(folder, os.O_WRONLY), window, read, scratch, tell)


def _flush(paths: Sequence[Path], threads: int) -> None:
    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        def serve(number: int) -> None:
            tell(0)
            staging.flush(paths[number])

        yield serve

    pool.run(range(len(paths)), threads, worker, lambda nbytes: None)
