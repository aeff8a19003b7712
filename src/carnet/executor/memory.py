"""What a crossing will need of private memory, said before it starts.

One worker holds a *window* (target bytes being assembled), a *block* (source bytes just read; small, so that it stays in the
processor's cache) and *temporary* memory for casts. Page cache is not private memory: the kernel takes it back when it wants.
"""

import os

from carnet.errors import BadRequest

# measured on CPython 3.11 with numpy 2: 15 MB of private memory with the executor imported; the rest is for its callers
BASE = 64 << 20
PER_STEP = 7 << 8  # bytes of plan rows, jobs and tensors, measured 1.3 KiB
PER_THREAD = 2 << 20  # stack, allocator's arena, open files
PER_FORK = 16 << 20  # what a process that was forked writes to of the memory that it shares at first
WINDOW = 8 << 20
LEAST = 64 << 10
BLOCK = 1 << 20
FEW, MOST = 4, 64  # while one waits for a disk another copies; beyond these, they wait for each other


def block_size(window: int) -> int:
    """Return the bytes of a worker's read buffer."""
    return min(window, BLOCK)


def promised_memory(window: int, threads: int, steps: int) -> int:
    """Return the peak of private memory in bytes for a window in bytes and a number of workers and steps.

    >>> promised_memory(8 << 20, 4, 1000) >> 20
    113
    """
    return BASE + threads * (window + 2 * block_size(window) + PER_THREAD) + steps * PER_STEP


def choose_window(budget: int, steps: int) -> int:
    """Return the window (bytes) of the fastest crossing that stays inside a budget of bytes, whatever the machine.

    >>> choose_window(1 << 30, 1000) >> 20
    8
    """
    for window, threads in ((WINDOW, FEW), (WINDOW // 4, FEW), (WINDOW // 4, 1), (WINDOW // 16, 1), (LEAST, 1)):
        if promised_memory(window, threads, steps) <= budget:
            return window
    facts = {"expected": f"at least {promised_memory(LEAST, 1, steps):,} bytes", "found": f"{budget:,} bytes"}
    raise BadRequest("the memory budget is too small for this crossing", facts, remedy="give more --memory")


def choose_halves(budget: int, window: int, steps: int, wanted: int | None = None, *, coding: bool = False) -> tuple[int, int]:
    """Return how many threads write while something else goes on in the same process, and the bytes that this may use.

    >>> choose_halves(512_000_000, 8 << 20, 1000, wanted=4)
    (4, 459876352)
    """
    threads = choose_threads(budget // 2, window, steps, wanted, coding=coding)
    taken = promised_memory(window, threads, steps) + (threads * PER_FORK if coding else 0)
    return threads, budget - taken + BASE  # which both have, once


def choose_threads(budget: int, window: int, steps: int, wanted: int | None = None, *, coding: bool = False) -> int:
    """Return how many threads, or processes, work on this machine inside a budget of bytes.

    What copies is bound by the kernel, which a few keep busy; what codes is bound by cores.

    >>> choose_threads(512_000_000, 8 << 20, 1000), choose_threads(512_000_000, 8 << 20, 1000, wanted=64, coding=True)
    (4, 15)
    """
    most = (min(max(len(os.sched_getaffinity(0)), 2), MOST) if coding else FEW) if wanted is None else wanted
    each = promised_memory(window, 1, 0) - promised_memory(window, 0, 0) + (PER_FORK if coding else 0)
    return max(1, min(most, (budget - promised_memory(window, 0, steps)) // each))
