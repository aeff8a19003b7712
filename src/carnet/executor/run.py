"""Running a plan: prepare the staging folder that is owned, do the jobs that no earlier run did, bring everything to the disk.

::

    OUT.partial/  journal.jsonl  model-00001.safetensors (full size, holes)  ...  then assets, then texts: config.json last
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from carnet import pool
from carnet.errors import BadCheckpoint, BadRequest
from carnet.executor.files import contained, sources
from carnet.executor.flusher import flushing
from carnet.executor.jobs import GAUGE, Gauge, Jobs, jobs_of, touched
from carnet.executor.memory import block_size, choose_threads
from carnet.executor.quantizing import put
from carnet.executor.staging import intact, prepare, put_asset, put_texts, written
from carnet.executor.work import work
from carnet.executor.worker import Amaxes, Worker
from carnet.plans.columns import Plan
from carnet.pool import Phase, Progress
from carnet.steps import Put
from carnet.storage.protocol import Draft, Folder, Opened
from carnet.storage.schemes import PathLike, folder_at


@dataclass(frozen=True, slots=True)
class Written:
    """How a target was written that is not yet published."""

    nbytes: int  # moved, cast and compared, by this run and by those before it
    jobs: int  # how many the plan has
    resumed: int  # how many of them an earlier run had done


def write(
    plan: Plan,
    source: PathLike | Folder,
    staging: Draft,
    *,
    progress: Progress | None = None,
    phase: Phase | None = None,
    threads: int | None = None,
) -> Written:
    """Write a plan's target into its staging folder; the caller may verify it and then publishes it.

    ``threads`` is how many do the jobs, None for what suits the machine, as far as the plan's memory has room for them.
    ``progress`` gets bytes done and bytes in all, ``phase`` the name of what begins, on this thread. Called again after any
    interruption, the function does what is left. Raises MachineFailed where the machine refused (the staging folder stays),
    BadCheckpoint where the source is not what the plan saw.
    """
    begin, root = phase or _unsaid, folder_at(source)
    jobs = jobs_of(plan)
    nbytes = int(jobs.rows["nbytes"].sum())
    if staging.whole:
        return Written(nbytes, len(jobs), len(jobs))
    done = _prepared(plan, staging)
    workers = choose_threads(plan.memory, plan.window, len(plan.steps), threads)
    try:
        _run(plan, root, staging, jobs, done, (progress or _silent, begin), workers)
    except (BadCheckpoint, BadRequest):
        staging.discard()  # trying again would end the same way
        raise
    _put_known(plan, root, staging)
    for raw in plan.raws:
        staging.put(raw.name, [raw.data])
    for asset in plan.assets:
        put_asset(asset, staging)
    put_texts(plan, staging)
    begin("flushing")
    _flush(plan, staging, workers)
    return Written(nbytes, len(jobs), len(done))


def _silent(done: int, total: int) -> None:
    """Show nothing."""


def _unsaid(name: str) -> None:
    """Show nothing."""


def _prepared(plan: Plan, staging: Draft) -> frozenset[int]:
    """Make the staging folder fit to be written, as an earlier run left it or from nothing; return the jobs that are done."""
    counts = not staging.fresh and intact(plan, staging)
    if not counts:
        staging.restart()
    prepare(plan, staging)
    return staging.done if counts else frozenset()


def _run(
    plan: Plan,
    source: Folder,
    staging: Draft,
    jobs: Jobs,
    finished: frozenset[int],
    tell: tuple[Progress, Phase],
    workers: int,
) -> None:
    progress, begin = tell
    nbytes = jobs.rows["nbytes"]
    total = int(nbytes.sum())
    done = sum(int(nbytes[number]) for number in finished if number < len(jobs))

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    @contextmanager
    def hire(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        worker = _worker(plan, source, staging, amaxes, tell)

        def serve(number: int) -> None:
            job = jobs[number]
            work(worker, job)
            if not isinstance(job, Gauge):  # what was measured is in memory alone
                staging.note(number)
            dirty(touched(job))

        try:
            yield serve
        finally:
            worker.sources.close()
            worker.targets.close()

    amaxes = Amaxes()
    gauges = np.flatnonzero(jobs.rows["kind"] == GAUGE).tolist()
    left = [number for number in np.flatnonzero(jobs.rows["kind"] != GAUGE).tolist() if number not in finished]
    phases = {"scales": gauges, "writing": left} if left else {}  # a scale is known before the first code is written
    progress(done if left else total, total)
    with flushing(staging) as dirty:
        for name, numbers in phases.items():
            if numbers:
                begin(name)
            pool.run(numbers, min(workers, len(numbers)), hire, add)


def _worker(plan: Plan, source: Folder, staging: Draft, amaxes: Amaxes, tell: pool.Tell) -> Worker:
    block = block_size(plan.window)
    window, read, temporary = (np.empty(size, np.uint8) for size in (plan.window, block, block))
    targets = Opened(lambda name: staging.open(contained(name)))
    return Worker(plan, sources(source), targets, window, read, temporary, amaxes, tell)


def _put_known(plan: Plan, source: Folder, staging: Draft) -> None:
    worker = _worker(plan, source, staging, Amaxes(), lambda nbytes: None)
    for step in plan.steps.only(Put):
        put(worker, step)
    worker.targets.close()


def _flush(plan: Plan, staging: Draft, workers: int) -> None:
    names = written(plan)

    @contextmanager
    def hire(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        def serve(number: int) -> None:
            tell(0)
            staging.flush(names[number])

        yield serve

    pool.run(range(len(names)), workers, hire, lambda nbytes: None)
