"""Reading what a plan would write: bytes of its target are assembled in a window, and nothing is written."""

from collections.abc import Callable, Iterable

import numpy as np

from carnet.executor.cutting import Writer
from carnet.executor.files import sources
from carnet.executor.memory import block_size
from carnet.executor.worker import Amaxes, Worker
from carnet.plans.columns import Plan
from carnet.storage.protocol import Folder, Opened, Target


def reader(plan: Plan, source: Folder, window: int, tell: Callable[[int], None]) -> Worker:
    """Return a worker with a window of so many bytes that can assemble and compare, whose source files are to be closed."""
    block = block_size(window)
    target, read, temporary = (np.empty(size, np.uint8) for size in (window, block, block))
    return Worker(plan, sources(source), Opened(nowhere), target, read, temporary, Amaxes(), tell)


def nowhere(name: str) -> Target:
    """Refuse to open a target."""
    raise AssertionError(f"nothing is written into {name}")


def writing(plan: Plan, writers: Iterable[tuple[int, int, int]], low: int, high: int) -> tuple[Writer, ...]:
    """Return the steps that write a byte from ``low`` to ``high`` of a tensor, of those that ``writers_of`` has for it."""
    return tuple(plan.steps[at] for at, begin, end in writers if begin < high and low < end)  # type: ignore[misc]  # all of them write
