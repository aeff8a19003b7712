"""Running a plan: prepare the staging folder that is owned, do the jobs that no earlier run did, bring everything to the disk.

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

from carnet import pool
from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.executor import journal as journals
from carnet.executor.desk import Amaxes, Coder, Desk
from carnet.executor.files import Folder, close
from carnet.executor.flusher import flushing
from carnet.executor.jobs import Gauge, Job, jobs_of, touched
from carnet.executor.journal import Journal
from carnet.executor.memory import block_size
from carnet.executor.quantizing import put
from carnet.executor.staging import (
    Staging,
    clear,
    create,
    flush,
    intact,
    put_asset,
    put_file,
    refuse_full,
    remove,
    targets,
    written,
)
from carnet.executor.work import work
from carnet.pool import Phase, Progress
from carnet.steps import Plan, Put


@dataclass(frozen=True, slots=True)
class Written:
    """How a target was written that is not yet published."""

    nbytes: int  # moved, cast and compared, by this run and by those before it
    jobs: int  # how many the plan has
    resumed: int  # how many of them an earlier run had done


def write(
    plan: Plan,
    source: Path,
    staging: Staging,
    *,
    progress: Progress | None = None,
    phase: Phase | None = None,
    coder: Coder | None = None,
) -> Written:
    """Write a plan's target into its staging folder; the caller may verify it and then publishes it.

    ``coder`` is what codes matrices, None for this processor; the bytes are the same.
    ``progress`` gets bytes done and bytes in all, ``phase`` the name of what begins, on this thread. Called again after any
    interruption, the function does what is left. Raises MachineFailed where the machine refused (the staging folder stays),
    BadCheckpoint where the source is not what the plan saw.
    """
    begin = phase or _unsaid
    jobs = jobs_of(plan)
    nbytes = sum(job.nbytes for job in jobs)
    if staging.folder == staging.out:
        return Written(nbytes, len(jobs), len(jobs))
    journal = _prepared(plan, staging)
    try:
        _run(plan, source, staging, jobs, journal, (progress or _silent, begin), coder)
    except (BadCheckpoint, BadRequest):
        remove(plan, staging)  # trying again would end the same way
        raise
    _put_known(plan, source, staging)
    for raw in plan.raws:
        put_file(raw.name, [raw.data], staging)
    for asset in plan.assets:
        put_asset(asset, staging)
    for text in sorted(plan.texts, key=lambda text: text.name == "config.json"):
        put_file(text.name, [text.text.encode()], staging)
    begin("flushing")
    _flush(plan, staging)
    return Written(nbytes, len(jobs), len(journal.done))


def coder_on(device: str) -> Coder | None:
    """Return what codes on "cuda", None for "cpu"; the module that needs torch is imported here and nowhere else.

    Raises MachineFailed where there is no such device, or nothing to use it with.
    """
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


def _unsaid(name: str) -> None:
    """Show nothing."""


def _prepared(plan: Plan, staging: Staging) -> Journal:
    """Make the staging folder fit to be written: as an earlier run left it, or from nothing."""
    found = staging.journal
    if found.fresh or not intact(plan, staging):
        clear(plan, staging)
        journals.begin(found, staging.crossing)
        found = Journal(found.file, frozenset(), fresh=True)
    refuse_full(plan, staging)
    for file in plan.files:
        create(file, staging)
    return found


def _run(
    plan: Plan,
    source: Path,
    staging: Staging,
    jobs: Sequence[Job],
    journal: Journal,
    tell: tuple[Progress, Phase],
    coder: Coder | None,
) -> None:
    progress, begin = tell
    total = sum(job.nbytes for job in jobs)
    done = sum(jobs[number].nbytes for number in journal.done if number < len(jobs))

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        desk = replace(_desk(plan, source, staging, amaxes, tell), coder=coder)

        def serve(number: int) -> None:
            work(desk, jobs[number])
            if not isinstance(jobs[number], Gauge):  # what was measured is in memory alone
                journals.note(journal, number)
            dirty(touched(jobs[number]))

        try:
            yield serve
        finally:
            close(desk.sources)
            close(desk.targets)

    amaxes = Amaxes()
    gauges = [number for number, job in enumerate(jobs) if isinstance(job, Gauge)]
    left = [number for number, job in enumerate(jobs) if number not in journal.done and not isinstance(job, Gauge)]
    phases = {"scales": gauges, "writing": left} if left else {}  # a scale is known before the first code is written
    progress(done if left else total, total)
    with flushing(staging) as dirty:
        for name, numbers in phases.items():
            if numbers:
                begin(name)
            pool.run(numbers, min(plan.threads, max(1, len(numbers))), worker, add)


def _desk(plan: Plan, source: Path, staging: Staging, amaxes: Amaxes, tell: pool.Tell) -> Desk:
    block = block_size(plan.window)
    window, read, temporary = (np.empty(size, np.uint8) for size in (plan.window, block, block))
    sources, written = Folder(source, os.O_RDONLY), targets(staging.base, staging.folder)
    return Desk(plan, sources, written, window, read, temporary, amaxes, tell)


def _put_known(plan: Plan, source: Path, staging: Staging) -> None:
    desk = _desk(plan, source, staging, Amaxes(), lambda nbytes: None)
    for step in plan.steps:
        if isinstance(step, Put):
            put(desk, step)
    close(desk.targets)


def _flush(plan: Plan, staging: Staging) -> None:
    names = written(plan)

    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        def serve(number: int) -> None:
            tell(0)
            flush(staging.base, staging.folder, names[number])

        yield serve

    pool.run(range(len(names)), plan.threads, worker, lambda nbytes: None)
