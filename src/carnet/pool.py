"""Threads that share one list of jobs. The first error stops all; so does Ctrl-C; what is done stays done."""

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from typing import TypeVar

Message = int | BaseException | None  # bytes done, why a worker failed, or: a worker left
Tell = Callable[[int], None]
Progress = Callable[[int, int], None]  # done and in all
Phase = Callable[[str], None]  # the name of what begins
T = TypeVar("T")
Maker = Callable[[Tell], AbstractContextManager[Callable[[int], T]]]
After = Callable[[int, T], None]  # takes the number of a job that is done, and what it returned


# mallopt(3): numpy's arrays of some megabytes come from what was freed before, instead of from the kernel, page by page, each time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, LARGE = 16 << 20, 8 << 20  # bytes that a thread may keep, and of arrays that are given back


def silent(done: int, total: int) -> None:
    """Show no progress."""


def unsaid(name: str) -> None:
    """Show no phase."""


class Stopped(Exception):
    """Another worker failed, or the person pressed Ctrl-C."""


def run(
    numbers: Iterable[int], threads: int, maker: Maker[T], progress: Callable[[int], None], after: After[T] | None = None
) -> None:
    """Do jobs by number on some threads and raise the first error.

    ``maker`` gives each worker its function; it gets a callback that takes bytes done and raises ``Stopped`` when it is
    time to leave. ``after`` is called by the worker that did the job. ``progress`` gets the bytes done since the last call, always on
    the calling thread.
    """
    keep_memory()
    messages: SimpleQueue[Message] = SimpleQueue()
    stop, shared = threading.Event(), _Shared(numbers)
    workers = [threading.Thread(target=_serve, args=(shared, maker, messages, stop, after)) for _ in range(threads)]
    failed: BaseException | None = None
    left = 0
    try:
        started = _start(workers)
        if not started:
            _serve(shared, maker, messages, stop, after)  # the machine has no room for threads: this one does the work
        while left < max(started, 1):
            message = messages.get()
            if isinstance(message, int):
                progress(message)
            elif message is None:
                left += 1
            else:
                failed = failed or message
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if failed is not None:
        raise failed


def keep_memory() -> None:
    """Ask the C library not to give back to the kernel what the next tile needs again, where it is one that can be asked."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)


def _start(workers: Sequence[threading.Thread]) -> int:
    """Start as many threads as the machine lets, and return how many these are."""
    for number, worker in enumerate(workers):
        try:
            worker.start()
        except RuntimeError as error:
            if "new thread" not in str(error):  # what an interrupt breaks is another one
                raise
            return number
    return len(workers)


class _Shared:
    """An iterator that threads may share."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = iter(numbers)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            return next(self._numbers)


def _serve(
    shared: _Shared, maker: Maker[T], messages: "SimpleQueue[Message]", stop: threading.Event, after: After[T] | None
) -> None:
    def tell(nbytes: int) -> None:
        if nbytes:
            messages.put(nbytes)
        if stop.is_set():
            raise Stopped

    try:
        with maker(tell) as work:
            for number in shared:
                tell(0)
                found = work(number)
                if after is not None:
                    after(number, found)
    except Stopped:
        pass
    except BaseException as error:  # noqa: BLE001  whatever it is, the caller must see it and the others must stop
        stop.set()
        messages.put(error)
    finally:
        messages.put(None)
