"""Running a plan: prepare the staging folder, do the jobs that no earlier run did, finish it. Any process may do a part of the jobs.

::

    OUT.partial/  journal.jsonl  model-00001.safetensors (full size, holes)  ...  assets, then tensors, then texts: config.json last
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from carnet import forks, pool
from carnet.errors import BadCheckpoint, BadRequest
from carnet.executor import parts
from carnet.executor.adapting import held_window
from carnet.executor.arrivals import Arrivals, heard
from carnet.executor.files import contained, sources
from carnet.executor.flusher import flushing
from carnet.executor.jobs import ENCODE, GAUGE, Jobs, jobs_of, touched
from carnet.executor.memory import block_size, choose_threads
from carnet.executor.parts import Numbers
from carnet.executor.staging import intact, prepare, put_asset, put_texts, written
from carnet.executor.summing import Sums
from carnet.executor.work import work
from carnet.executor.worker import Amaxes, Worker
from carnet.plans.columns import Plan
from carnet.pool import Phase, Progress, silent, unsaid
from carnet.steps import Make
from carnet.storage.protocol import Draft, Folder, Opened, Part
from carnet.storage.schemes import PathLike, folder_at


@dataclass(frozen=True, slots=True)
class Written:
    """How a target was written that is not yet published."""

    nbytes: int  # moved, cast and compared, by this run and by those before it
    jobs: int  # how many the plan has
    resumed: int  # how many of them an earlier run had done
    measured: Mapping[int, float] = field(default_factory=dict)  # what jobs found, by number


def write(
    plan: Plan,
    source: PathLike | Folder,
    staging: Draft,
    *,
    progress: Progress | None = None,
    phase: Phase | None = None,
    threads: int | None = None,
    begun: Callable[[Arrivals], None] | None = None,
    sums: Sums | None = None,
) -> Written:
    """Write a plan's target into its staging folder; the caller may verify it and then publishes it.

    ``threads`` is how many do the jobs, None for what suits the machine, as far as the plan's memory has room for them.
    ``progress`` gets bytes done and bytes in all, ``phase`` the name of what begins, on this thread. Called again after any
    interruption, the function does what is left. Raises MachineFailed where the machine refused (the staging folder stays),
    BadCheckpoint where the source is not what the plan saw. ``begun`` is told when all files of tensors are there, with what knows
    which tensors are whole; all else but texts is written then. ``sums`` says what else is added to the plan's source.
    """
    begin, root = phase or unsaid, folder_at(source)
    jobs = jobs_of(plan, in_order=staging.in_order, direct=sums is None)
    nbytes = int(jobs.rows["nbytes"].sum())
    if staging.whole:
        return Written(nbytes, len(jobs), len(jobs))
    workers = _threads(plan, threads) if sums is None else sums.threads(plan, threads)
    try:
        finished = prepared(plan, staging) | _done_with(jobs, staging.kept)
        _put_beside(plan, staging)
        with heard(plan, jobs, finished, begun) as hear:
            resumed, _ = _do(
                plan, root, staging, jobs, parts.writing(jobs), finished, (progress or silent, begin), workers, hear, sums=sums
            )
            for file in plan.files:
                staging.complete(file.name)
            put_texts(plan, staging)
    except (BadCheckpoint, BadRequest):
        staging.discard()  # trying again would end the same way
        raise
    _flush(plan, staging, begin, workers)
    return Written(nbytes, len(jobs), resumed)


def write_part(
    plan: Plan,
    source: PathLike | Folder,
    staging: Draft,
    part: Part,
    *,
    jobs: Jobs | None = None,
    measures: bool = False,
    measured: Mapping[int, float] | None = None,
    progress: Progress | None = None,
    phase: Phase | None = None,
    threads: int | None = None,
) -> Written:
    """Write a part of a target, beside other processes that write the other parts of it; or measure a part of what is measured.

    ``jobs`` are those of the plan, where they are known; ``measured`` is what all parts have measured, None to look what they noted.
    Nothing is published. Everything else is as ``write`` has it, but that the staging folder stays, whatever the error.
    """
    jobs = jobs_of(plan, in_order=staging.in_order) if jobs is None else jobs
    numbers = (parts.measuring if measures else parts.writing)(jobs, part)
    nbytes = int(jobs.rows["nbytes"][numbers].sum())
    if staging.whole:
        return Written(nbytes, len(numbers), len(numbers))
    own, tell = parts.files_of(jobs, part) if staging.in_order else None, (progress or silent, phase or unsaid)
    finished = prepared(plan, staging, own) | _done_with(jobs, staging.kept, own)
    resumed, found = _do(
        plan, folder_at(source), staging, jobs, numbers, finished, tell, _threads(plan, threads), given=measured
    )
    for name in own or () if not measures else ():
        staging.complete(name)
    return Written(nbytes, len(numbers), resumed, found)


def finish(
    plan: Plan, source: PathLike | Folder, staging: Draft, *, phase: Phase | None = None, threads: int | None = None
) -> None:
    """Write what is beside the tensors into a target whose every part is written; the caller may verify it and then publishes it.

    Raises BadRequest, which names the parts that are not.
    """
    if staging.whole:
        return
    jobs, begin, workers = jobs_of(plan, in_order=staging.in_order), phase or unsaid, _threads(plan, threads)
    _refuse_missing(plan, staging, jobs)
    if staging.in_order:  # what compares is no part's
        _do(plan, folder_at(source), staging, jobs, parts.comparing(jobs), frozenset(), (silent, begin), workers)
    else:
        prepare(plan, staging)
    _put_beside(plan, staging)
    put_texts(plan, staging)
    _flush(plan, staging, begin, workers)


def _refuse_missing(plan: Plan, staging: Draft, jobs: Jobs) -> None:
    """Raise BadRequest where not every part is written."""
    where, done = {"where": staging.where}, staging.done | _done_with(jobs, staging.kept)
    missing = {*parts.writing(jobs).tolist()} - done - ({*parts.comparing(jobs).tolist()} if staging.in_order else set())
    if missing and not done and not staging.parts:
        staging.discard()
        remedy = "run its parts first (--part 1/8 ...), where every machine sees the same disk or store under the same name"
        raise BadRequest("nothing of this target is written", where, remedy=remedy)
    if staging.fresh:
        raise BadRequest("the source changed since parts were written", where, remedy="run all parts again")
    if staging.done and not staging.in_order and not intact(plan, staging):
        remedy = "remove what is there (carnet clean OUT), and run all parts again"
        raise BadRequest("a file was lost or cut since parts were written", where, remedy=remedy)
    if missing or not intact(plan, staging):
        of = staging.parts
        found = parts.parts_of(jobs, missing, of) if of else []
        lost = [file.name for file in plan.files if file.name not in staging.kept]
        files = f"{lost[0]}{f' and {len(lost) - 1} more files' if lost[1:] else ''}" if staging.in_order and lost else ""
        what = f"{_spans(found)} of {of}" if found else files or f"{len(missing):,} of {len(jobs):,} jobs"
        remedy = f"run it again with --part {found[0]}/{of}" if found else "run all parts again: what is written is kept"
        raise BadRequest("not every part of the target is written", {**where, "missing": what}, remedy=remedy)


def _spans(numbers: list[int]) -> str:
    """Return numbers as a person writes them.

    >>> _spans([1, 3, 4, 5])
    '1, 3-5'
    """
    known = {*numbers}
    starts = [each for each in numbers if each - 1 not in known]
    ends = [each for each in numbers if each + 1 not in known]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def prepared(plan: Plan, staging: Draft, own: Collection[str] | None = None) -> frozenset[int]:
    """Make the staging folder fit to be written, as an earlier run left it or from nothing; return the jobs that are done.

    ``own`` are the files that this process writes, where a file has one writer; None for all.
    """
    if staging.ready:
        return staging.done
    counts = not staging.fresh and (staging.in_order or intact(plan, staging))
    if not counts:
        staging.restart()
    prepare(plan, staging, own)
    staging.share()
    return staging.done if counts else frozenset()


def _done_with(jobs: Jobs, kept: Collection[str], own: Collection[str] | None = None) -> frozenset[int]:
    """Return the jobs that write, of ``own`` files or of all, into those alone that are kept."""
    names = ((at, touched(job) if own is None else touched(job) & {*own}) for at, job in enumerate(jobs if kept else ()))
    return frozenset(at for at, found in names if found and found <= {*kept})


def _threads(plan: Plan, wanted: int | None) -> int:
    return choose_threads(plan.memory, held_window(plan), len(plan.steps), wanted, coding=codes(plan))


def codes(plan: Plan) -> bool:
    """Say whether a plan computes codes, or what they mean, or what adapters add: that is bound by cores."""
    return bool(plan.updates) or any(isinstance(form, Make) for form in plan.steps.forms)


def _put_beside(plan: Plan, staging: Draft) -> None:
    """Write what is taken over: all but the tensors, and the texts."""
    for raw in plan.raws:
        staging.put(raw.name, [raw.data])
    for asset in plan.assets:
        put_asset(asset, staging)


def _do(
    plan: Plan,
    source: Folder,
    staging: Draft,
    jobs: Jobs,
    numbers: Numbers,
    finished: frozenset[int],
    tell: tuple[Progress, Phase],
    workers: int,
    hear: Callable[[int], None] = lambda job: None,
    given: Mapping[int, float] | None = None,
    sums: Sums | None = None,
) -> tuple[int, Mapping[int, float]]:
    """Do some jobs, and first measure what they need; return how many of them an earlier run had done, and what is measured."""
    progress, begin = tell
    left = [number for number in numbers.tolist() if number not in finished]
    kinds = jobs.rows["kind"][left]
    wanted = np.union1d(parts.needed(jobs, np.array(left, np.int64)), np.array(left, np.int64)[kinds == GAUGE])
    amaxes, names = Amaxes(), parts.names_of(jobs, wanted)
    measured = dict(staging.measured if given is None else given)
    if given is None and staging.ready and (kinds == ENCODE).any():
        measured |= staging.measured_by_all()
    for number in names.keys() & measured.keys():
        amaxes.note(names[number], measured[number])
    phases = {  # a scale is known before the first code is written
        "scales": [number for number in names if number not in measured],
        "writing": [number for number, kind in zip(left, kinds, strict=True) if kind != GAUGE],
    }
    todo = sum(int(jobs.rows["nbytes"][each].sum()) for each in phases.values())
    total = int(jobs.rows["nbytes"][np.union1d(numbers, parts.needed(jobs, numbers))].sum())
    done = total - todo

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    @contextmanager
    def hire(tell: pool.Tell) -> Iterator[Callable[[int], tuple[float | None, set[str]]]]:
        worker = _worker(plan, source, staging, amaxes, tell)
        worker = worker if sums is None else replace(worker, adder=sums.adder(worker))

        def serve(number: int) -> tuple[float | None, set[str]]:
            job = jobs[number]
            return work(worker, job), touched(job)

        try:
            yield serve
        finally:
            worker.sources.close()
            if worker.adder is not None:
                worker.adder.close()
            worker.targets.close()

    def after(number: int, done: tuple[float | None, set[str]]) -> None:
        found, files = done
        if found is not None:
            amaxes.note(names[number], found)
            measured[number] = found
        staging.note(number, found)
        hear(number)
        dirty(files)

    progress(done, total)
    with flushing(staging) as dirty:
        for name, each in phases.items():
            if each:
                begin(name)
                count = min(workers, len(each))
                by = forks if (codes(plan) or sums is not None) and forks.pay(count, todo) else pool
                by.run(each, count, hire, add, after)
    staging.settle()
    return len({*numbers.tolist()}.difference(*phases.values())), {n: measured[n] for n in names}


def _worker(plan: Plan, source: Folder, staging: Draft, amaxes: Amaxes, tell: pool.Tell) -> Worker:
    block = block_size(plan.window)
    window, read, temporary = (np.empty(size, np.uint8) for size in (plan.window, block, block))
    targets = Opened(lambda name: staging.open(contained(name)))
    return Worker(plan, sources(source), targets, window, read, temporary, amaxes, tell)


def _flush(plan: Plan, staging: Draft, begin: Phase, workers: int) -> None:
    begin("flushing")
    names = written(plan)

    @contextmanager
    def hire(tell: pool.Tell) -> Iterator[Callable[[int], None]]:
        def serve(number: int) -> None:
            tell(0)
            staging.flush(names[number])

        yield serve

    pool.run(range(len(names)), workers, hire, lambda nbytes: None)
