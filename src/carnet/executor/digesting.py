"""The digests of a target's tensors, without a target: each is assembled window by window, from its first byte to its last, and hashed.

No tensor waits for another, so that as many are hashed at once as there are threads; they come in the order in which their source lies,
so that what several ranks read is read while the machine still has it in memory.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from carnet import pool
from carnet.dtypes import BY_NAME
from carnet.executor.adapting import assemble
from carnet.executor.cutting import Cell, cells_of
from carnet.executor.geometry import volume
from carnet.executor.groups import Group, groups_of
from carnet.executor.jobs import Check, Part
from carnet.executor.memory import choose_threads
from carnet.executor.quantizing import numbers
from carnet.executor.reading import reader
from carnet.executor.work import work
from carnet.executor.worker import Worker
from carnet.plans.columns import Plan
from carnet.pool import Progress, silent
from carnet.steps import Put, Same, TargetTensor
from carnet.storage.protocol import Folder

Spot = tuple[str, str]  # a tensor of a target: its file and its name
Digests = dict[Spot, tuple[str, ...]]  # one for each hash


class Hash(Protocol):
    """What is told bytes and says a digest, as hashlib's do."""

    def update(self, data: memoryview, /) -> None:
        """Hear what comes next."""

    def hexdigest(self) -> str:
        """Return the digest of everything."""


Hashes = Sequence[Callable[[int], Hash]]  # each begins one of so many bytes


@dataclass(frozen=True, slots=True)
class Task:
    """A tensor that is hashed."""

    spot: Spot
    nbytes: int
    offset: int  # of its first byte in its file
    cells: Sequence[Cell]  # of all tensors alike
    steps: NDArray[np.int64]  # that write it: numbers in the plan


def digests(
    plan: Plan,
    source: Folder,
    wanted: Collection[Spot],
    hashes: Hashes,
    *,
    progress: Progress = silent,
    threads: int | None = None,
) -> Digests:
    """Return the digests of some tensors of a plan's target, and compare the copies that the source must have equal.

    Nothing is written, and the memory is the plan's. Raises BadCheckpoint where copies differ or a file ends too early.
    """
    tensors = {
        (file.name, tensor.offset): ((file.name, tensor.name), tensor)
        for file in plan.files
        for tensor in file.tensors
        if (file.name, tensor.name) in wanted and 0 not in tensor.shape
    }
    found: Digests = {spot: digests_of(hashes, b"") for spot in wanted}
    for step in plan.steps.only(Put):
        if (step.target.file, step.target.offset) in tensors:
            found[tensors[step.target.file, step.target.offset][0]] = digests_of(hashes, numbers(step))
    jobs: list[Task | Check] = [task for group in groups_of(plan) for task in _tasks(plan, group, tensors)]
    jobs.sort(key=lambda task: _reads(plan, task))
    jobs += [Check(step, prod(step.shape) * BY_NAME[step.source.dtype].nbytes) for step in plan.steps.only(Same)]
    done, total = 0, sum(job.nbytes for job in jobs)

    @contextmanager
    def hire(tell: pool.Tell) -> Iterator[Callable[[int], tuple[str, ...]]]:
        worker = reader(plan, source, plan.window, tell)
        try:
            yield lambda number: _do(worker, jobs[number], hashes)
        finally:
            worker.sources.close()

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    def after(number: int, digest: tuple[str, ...]) -> None:
        job = jobs[number]
        if isinstance(job, Task):
            found[job.spot] = digest

    progress(0, total)
    workers = choose_threads(plan.memory, plan.window, len(plan.steps), threads, coding=True)
    pool.run(range(len(jobs)), max(1, min(workers, len(jobs))), hire, add, after)
    return found


def _tasks(plan: Plan, group: Group, tensors: dict[tuple[str, int], tuple[Spot, TargetTensor]]) -> Iterator[Task]:
    """Yield those tensors of a group that are wanted."""
    places = zip(map(plan.steps.names.__getitem__, group.files.tolist()), group.offsets.tolist(), strict=True)
    these = [(at, tensors[place]) for at, place in enumerate(places) if place in tensors]
    if not these:
        return
    sample = [plan.steps[number] for number in group.steps[0].tolist()]
    cells = [*cells_of(group.tensor, sample, None, plan.window, zeros=True, squares=False)]
    for at, (spot, tensor) in these:
        yield Task(spot, prod(tensor.shape) * BY_NAME[tensor.dtype].nbytes, tensor.offset, cells, group.steps[at])


def _reads(plan: Plan, job: Task | Check) -> tuple[str, int]:
    """Return where a tensor's source lies."""
    if isinstance(job, Check):
        return job.step.source.file, job.step.source.offset
    row = plan.steps.rows[job.steps[0]]
    return plan.steps.names[row["source"]], int(row["source_at"])


def _do(worker: Worker, job: Task | Check, hashes: Hashes) -> tuple[str, ...]:
    if isinstance(job, Check):
        work(worker, job)
        return ()
    made = [begin(job.nbytes) for begin in hashes]
    for cell in job.cells:
        steps = tuple(worker.plan.steps[int(job.steps[number])] for number in cell.steps)
        tile = replace(cell.tile, base=cell.tile.base + job.offset)
        assemble(worker, (Part(job.spot[0], tile, steps),))  # type: ignore[arg-type]  # all of them write
        for each in made:
            each.update(worker.window.data[: volume(tile)])
        worker.tell(volume(tile))
    return tuple(each.hexdigest() for each in made)


def digests_of(hashes: Hashes, data: bytes | memoryview) -> tuple[str, ...]:
    """Return the digests of some bytes, one for each hash."""
    made = [begin(len(data)) for begin in hashes]
    for each in made:
        each.update(memoryview(data))
    return tuple(each.hexdigest() for each in made)
