"""Which tensors of a target are whole while it is being written: a tensor is when the last job is done that writes a part of it.

Whoever examines them meanwhile is told by place, and reads the bytes from the file: it sees neither jobs nor buffers.
"""

import heapq
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from carnet.executor.jobs import DIRECT, ENCODE, WINDOWS, Jobs
from carnet.plans.columns import Plan, Steps

Spot = tuple[str, int]  # a file of the target, and an offset in it, bytes
SHIFT = 44  # bits of an offset: 16 TiB


class Unfinished(Exception):
    """The target will never be whole: who writes it stopped."""


class Arrivals:
    """The tensors of one target, by number: the first byte of each, and how many jobs it waits for. Threads may share it."""

    def __init__(self, plan: Plan, jobs: Jobs, done: Collection[int]) -> None:
        """Know the tensors of a plan's files; of its jobs some are done."""
        self._files = {file.name: number for number, file in enumerate(plan.files)}
        places = [(self._files[file.name] << SHIFT) + tensor.offset for file in plan.files for tensor in file.tensors]
        self._begins = np.array(sorted(places), np.int64)
        pairs = _written(jobs, self._files, self._begins)
        order = np.argsort(pairs[:, 0], kind="stable")
        self._jobs, self._tensors = pairs[order].T.copy()
        left = self._tensors[~np.isin(self._jobs, np.array([*done], np.int64))]
        self._left = np.bincount(left, minlength=len(self._begins)).tolist()
        self._tasks: dict[int, list[int]] = defaultdict(list)  # tensor -> tasks that wait for it
        self._waits: list[int] = []  # task -> tensors that it waits for
        self._ready: list[int] = []  # a heap
        self._changed = threading.Condition()
        self._ended: bool | None = None  # true where everything is written

    def note(self, job: int) -> None:
        """Hear that a job is done."""
        low, high = np.searchsorted(self._jobs, [job, job + 1])
        if low == high:
            return
        with self._changed:
            for tensor in self._tensors[low:high].tolist():
                self._left[tensor] -= 1
                if not self._left[tensor]:
                    for task in self._tasks.pop(tensor, ()):
                        self._waits[task] -= 1
                        if not self._waits[task]:
                            heapq.heappush(self._ready, task)
            self._changed.notify_all()

    def end(self, *, whole: bool) -> None:
        """Hear that nothing more will be written: the target is whole, or never will be."""
        with self._changed:
            self._ended = whole
            self._changed.notify_all()

    def order(self, needs: Sequence[Iterable[Spot]]) -> Iterator[int]:
        """Yield the numbers of tasks, each when the tensors are whole that hold the places that it needs; end when all is written.

        Raises Unfinished where the target will never be whole.
        """
        with self._changed:
            self._waits = [0] * len(needs)
            for task, spots in enumerate(needs):
                waits = {tensor for tensor in map(self._at, spots) if self._left[tensor]}
                self._waits[task] = len(waits)
                for tensor in waits:
                    self._tasks[tensor].append(task)
            self._ready = [task for task, waits in enumerate(self._waits) if not waits]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._ended is not None)
                if self._ended is False:
                    raise Unfinished
                if not self._ready:
                    return
                task = heapq.heappop(self._ready)
            yield task

    def _at(self, spot: Spot) -> int:
        file, offset = spot
        return int(np.searchsorted(self._begins, (self._files[file] << SHIFT) + offset, side="right")) - 1


@contextmanager
def heard(
    plan: Plan, jobs: Jobs, done: Collection[int], begun: Callable[[Arrivals], None] | None
) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the number of a job that is done; whoever examines meanwhile is told of the end, whatever it is."""
    if begun is None:
        yield lambda job: None
        return
    arrivals = Arrivals(plan, jobs, done)
    try:
        begun(arrivals)
        yield arrivals.note
    except BaseException:
        arrivals.end(whole=False)
        raise
    arrivals.end(whole=True)


def _written(jobs: Jobs, files: dict[str, int], begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (job, tensor) for every tensor that a job writes a part of."""
    steps, rows, kinds = jobs.steps, jobs.rows, jobs.rows["kind"]
    numbers = np.array([files.get(name, 0) for name in steps.names], np.int64)
    found = [np.empty((0, 3), np.int64)]  # job, file, offset
    direct = np.flatnonzero(kinds == DIRECT)
    found.append(_spots(steps, direct, rows["step"][direct], numbers, "target"))
    coding = np.flatnonzero(kinds == ENCODE)
    found += [_spots(steps, coding, rows["step"][coding], numbers, place) for place in ("target", "scales", "outer")]
    windows = np.flatnonzero(kinds == WINDOWS)
    counts = rows["number"][windows].astype(np.int64)
    ends = np.cumsum(counts)
    parts = np.repeat(rows["first"][windows].astype(np.int64) - (ends - counts), counts) + np.arange(
        ends[-1] if len(ends) else 0
    )
    owner = np.repeat(windows, counts)
    group, tensor = jobs.parts["group"][parts], jobs.parts["tensor"][parts]
    for number in np.unique(group).tolist():
        alike, _ = jobs.groups[number]
        of = group == number
        found.append(np.stack([owner[of], numbers[alike.files[tensor[of]]], alike.offsets[tensor[of]]], axis=1))
    job, file, offset = np.concatenate(found).T
    at = np.searchsorted(begins, (file << SHIFT) + offset, side="right") - 1
    return np.unique(np.stack([job, at], axis=1), axis=0)


def _spots(
    steps: Steps, jobs: NDArray[np.int64], numbers: NDArray[np.int32], files: NDArray[np.int64], place: str
) -> NDArray[np.int64]:
    """Return (job, file, offset) of one of the places that the steps of jobs write; not every step has each."""
    row = steps.rows[numbers]
    there = row[place] >= 0
    return np.stack([jobs[there], files[row[place][there]], row[f"{place}_at"][there]], axis=1)
