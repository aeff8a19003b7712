"""Bringing files to the disk while others are still being written, so that the disk is never idle.

Left to the end, the last ``fsync`` is a third of a crossing between fast disks. The errors of a disk are told to whoever
syncs first, so one that comes up here must stop the crossing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from carnet.storage.protocol import Draft


@contextmanager
def flushing(draft: Draft) -> Iterator[Callable[[set[str]], None]]:
    """Give a function that takes names of files that have new bytes; raise what the disk said, at the end."""
    names: SimpleQueue[set[str] | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as thread:
        try:
            flushed = thread.submit(_serve, draft, names)
            yield names.put
        finally:
            names.put(None)
    flushed.result()


def _serve(draft: Draft, names: "SimpleQueue[set[str] | None]") -> None:
    while (first := names.get()) is not None:
        dirty = set(first)
        try:
            while (more := names.get_nowait()) is not None:
                dirty |= more
        except Empty:
            more = set()
        for name in sorted(dirty):
            draft.flush(name)
        if more is None:
            return
