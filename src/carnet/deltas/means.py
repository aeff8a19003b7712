"""How many work on a delta, and on how large pieces, inside a budget of memory; and how they are started."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from carnet import forks, pool
from carnet.deltas.sides import Side
from carnet.errors import BadRequest
from carnet.executor.memory import BASE, PER_FORK, PER_STEP, PER_THREAD
from carnet.pool import Progress
from carnet.storage.protocol import AT_ONCE, Draft

WINDOWS = (2 << 20, 512 << 10, 64 << 10)  # bytes of each side that are looked at together: what fits a core's cache is fastest
MOST = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Means:
    """What work may use."""

    window: int  # bytes
    workers: int
    threads: bool  # and not processes: what lies in the memory of this one may be a GPU's


def choose(budget: int, sides: Sequence[Side], more: Callable[[int], int], wanted: int | None) -> Means:
    """Return the means inside a budget of bytes for reading some sides; ``more`` is what a worker else takes for a window.

    Who reads what is far waits most of the time. Raises BadRequest where the budget is too small for one worker.
    """
    far = any(side.folder is not None and side.folder.far for side in sides)
    cores = max(len(os.sched_getaffinity(0)), AT_ONCE if far else 1)
    most = min(cores, MOST) if wanted is None else wanted
    room = budget - BASE - sum(side.steps for side in sides) * PER_STEP

    def each(window: int) -> int:
        return more(window) + sum(side.memory(window) for side in sides) + PER_THREAD + PER_FORK

    for window in WINDOWS:
        workers = min(most, room // each(window))
        if workers >= min(most, 2) or (workers > 0 and window == WINDOWS[-1]):
            return Means(window, workers, threads=any(side.checkpoint is None for side in sides))
    facts = {
        "expected": f"at least {budget - room + each(WINDOWS[-1]):,} bytes",
        "found": f"{budget:,}",
    }
    raise BadRequest("the memory budget is too small for this delta", facts, remedy="give more --memory")


@contextmanager
def begun(draft: Draft) -> Iterator[None]:
    """Write a target from its beginning, and leave nothing where it does not come about: nobody goes on where it stopped."""
    draft.restart()
    try:
        yield
    except BaseException:
        draft.discard()
        raise


def work(
    count: int,
    nbytes: int,
    means: Means,
    maker: pool.Maker[T],
    progress: Progress | None,
    after: Callable[[int], None] = lambda number: None,
) -> list[T]:
    """Do jobs 0, 1, ... and return what each returned; ``progress`` gets bytes done, and these in all, ``after`` a job that is done."""
    found, done, show = dict[int, T](), 0, progress or pool.silent

    def add(moved: int) -> None:
        nonlocal done
        done += moved
        show(done, nbytes)

    def keep(number: int, result: T) -> None:
        found[number] = result
        after(number)

    show(0, nbytes)
    workers = max(1, min(means.workers, count))
    (forks if not means.threads and forks.pay(workers, nbytes) else pool).run(range(count), workers, maker, add, keep)
    return [found[number] for number in range(count)]


def largest_first(sizes: Iterable[tuple[str, int]]) -> list[str]:
    """Return names in the order in which their work is begun: what takes longest may not begin last."""
    return [name for name, _ in sorted(sizes, key=lambda each: -each[1])]
