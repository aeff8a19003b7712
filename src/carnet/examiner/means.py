"""What an examination may use: threads, and the bytes that each holds, out of a budget of memory whatever the number of cores."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from carnet import forks, pool
from carnet.errors import BadRequest

BASE = 64 << 20  # bytes: Python, numpy and what headers say
PER_TENSOR = 3 << 10
PER_THREAD = 2 << 20  # stack, allocator's arena
PER_FORK = 16 << 20  # what a process that was forked writes to of the memory that it shares at first
HELD = 20  # blocks that a thread holds at once, at worst: both sides, casts in f64, codes with their scales and quotients
BLOCKS = (4 << 20, 1 << 20, 256 << 10, 64 << 10)  # larger ones leave the processor's cache, and are slower
LEAST = BASE + PER_THREAD + HELD * BLOCKS[-1]  # bytes: with fewer nothing is examined
ENOUGH, MOST = 8, 64  # threads: blocks are smaller rather than fewer of them at work than ENOUGH

Spot = tuple[str, int]  # a file of a target, and the offset in it of something that is read, bytes
# takes for each of some tasks what it reads of the target; yields the number of each when that is there
Order = Callable[[Sequence[Iterable[Spot]]], Iterable[int]]

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Means:
    """What an examination may use."""

    threads: int
    block: int  # bytes of one side that a thread looks at together
    whole: int  # bytes of a tensor that may be looked at as a whole, one at a time, to name what is wrong with it


def choose_means(budget: int, tensors: int, wanted: int | None = None, *, beside: int = 0) -> Means:
    """Return what stays inside a budget of bytes for a number of stored tensors; raise BadRequest where nothing does.

    ``wanted`` is how many threads shall be at work, None for one a core; ``beside`` the bytes that each holds whatever its blocks are.

    >>> choose_means(512 << 20, 1000, wanted=64).threads, choose_means(72 << 20, 100, wanted=64).threads
    (11, 1)
    """
    cores = min(len(os.sched_getaffinity(0)), MOST) if wanted is None else wanted
    if budget < LEAST:
        facts = {"expected": f"at least {LEAST:,} bytes", "found": f"{budget:,} bytes"}
        raise BadRequest("the memory budget is too small to examine a target", facts, remedy="give more --memory")
    free = max(budget - BASE - tensors * PER_TENSOR, 0)
    fits = [(block, min(cores, free // (PER_THREAD + PER_FORK + beside + HELD * block))) for block in BLOCKS]
    block, threads = next((fit for fit in fits if fit[1] >= min(cores, ENOUGH)), fits[-1])
    return Means(max(threads, 1), block, free // 6)


def each(
    items: Sequence[S],
    do: Callable[[S], T],
    nbytes: Callable[[S], int],
    threads: int,
    add: Callable[[int], None],
    order: Iterable[int] | None = None,
) -> list[T]:
    """Return what a function makes of every item, by some threads, or as many processes where that pays.

    ``nbytes`` are those that an item is read for; ``add`` gets them, of each that is done, on the thread that called. ``order`` are the
    numbers of the items, in an order other than theirs; it may wait before it gives one.
    """
    found: dict[int, T] = {}
    sizes = [*map(nbytes, items)]

    @contextmanager
    def worker(tell: pool.Tell) -> Iterator[Callable[[int], T]]:
        def serve(number: int) -> T:
            value = do(items[number])
            tell(sizes[number])
            return value

        yield serve

    apart = processes(threads, sizes)
    numbers, count = range(len(items)) if order is None else order, apart or min(threads, len(items))
    (forks if apart else pool).run(numbers, count, worker, add, found.__setitem__)
    return [found[number] for number in range(len(items))]


def processes(threads: int, sizes: Sequence[int]) -> int:
    """Return in how many processes ``each`` works on items of some bytes, 0 where threads of this one do."""
    count = min(threads, len(sizes))
    return count if forks.pay(count, sum(sizes)) else 0


class Tally:
    """Bytes done of a total that is known from the start."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(0, total)

    def add(self, nbytes: int) -> None:
        """Count what was done."""
        self._done += nbytes
        self._progress(self._done, self._total)
