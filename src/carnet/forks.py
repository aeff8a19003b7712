"""Workers that are processes: forked before the first job, so that they have all that was prepared, and told numbers through a pipe.

Threads take turns at Python; what is many short calls of numpy does not get faster with more of them than two or three. A thread here
stands for each process there, so that everything else is as ``pool`` has it::

    pool: thread 1  -- number -->  process 1: maker's function
                    <-- bytes done ... , what the function returned or raised --
"""

import ctypes
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from carnet import pool
from carnet.errors import MachineFailed

PR_SET_PDEATHSIG = 1  # prctl(2)
STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)  # what asks a process to end
WORTH = 128 << 20  # bytes of work: with fewer, threads are done before processes have begun
ALONE = ("grpc", "obstore", "ray")  # run threads of their own, which a process that is forked would wait for


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Raised:
    """What a function raised in its process."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Returned:
    """What it returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Fork:
    """A process that works for a thread of this one."""

    pid: int
    pipe: Connection


def pay(workers: int, nbytes: int) -> bool:
    """Say whether so many bytes of work are better done by processes than by threads."""
    return workers > 1 and nbytes >= WORTH and hasattr(os, "fork") and not any(name in sys.modules for name in ALONE)


def run(
    numbers: Iterable[int],
    count: int,
    maker: pool.Maker[T],
    progress: Callable[[int], None],
    after: pool.After[T] | None = None,
) -> None:
    """Do jobs by number as ``pool.run`` does them, in processes; ``after`` is called in this one."""
    forks = list[Fork]()
    pool.keep_memory()
    try:
        gc.freeze()  # what is there stays where it is: a collection would write into every page of it
        for _ in range(count):
            forks.append(_forked(maker, forks))
        free = iter(forks)

        @contextmanager
        def hire(tell: pool.Tell) -> Iterator[Callable[[int], Any]]:
            fork = next(free)
            yield lambda number: _asked(fork, number, tell)

        pool.run(numbers, count, hire, progress, after)
        for fork in forks:
            with suppress(OSError):
                fork.pipe.send(None)
    except BaseException:
        for fork in forks:
            os.kill(fork.pid, signal.SIGKILL)
        raise
    finally:
        gc.unfreeze()
        for fork in forks:
            fork.pipe.close()
            os.waitpid(fork.pid, 0)


def _asked(fork: Fork, number: int, tell: pool.Tell) -> Any:  # noqa: ANN401  what its function returns
    """Have a process do a job."""
    try:
        fork.pipe.send(number)
        while True:
            match fork.pipe.recv():
                case Returned(value):
                    return value
                case Raised(error):
                    raise error
                case nbytes:
                    tell(nbytes)
    except (EOFError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError | ConnectionResetError):
            raise
        remedy = "give less --memory or fewer --threads, if the machine ran out of memory; the same command goes on"
        raise MachineFailed("a worker process ended before its work was done", remedy=remedy) from error


def _forked(maker: pool.Maker[T], others: list[Fork]) -> Fork:
    ours, theirs = Pipe()
    parent = os.getpid()
    sys.stdout.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # a process that heard one now would unwind what this one does
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of threads: none of them is needed there
            pid = os.fork()
        if pid:
            theirs.close()
            return Fork(pid, ours)
        try:
            ours.close()
            for other in others:
                other.pipe.close()  # so that each ends with who asks it, whoever else still runs
            _depend_on(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _work(theirs, maker)
        finally:
            os._exit(0)  # nothing of what this process was copied from is run again: no exit handler, no open context
    except OSError as error:  # of fork(2): what the new process raises does not come here
        remedy = "raise the limit of processes (ulimit -u), or give fewer --threads; the same command goes on"
        raise MachineFailed("the machine starts no more processes", {"found": error.strerror}, remedy=remedy) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _depend_on(parent: int) -> None:
    """End with the process that asks, however that ends; Ctrl-C is its business."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _work(pipe: Connection, maker: pool.Maker[T]) -> None:
    with suppress(EOFError, BrokenPipeError), maker(pipe.send) as work:
        while (number := pipe.recv()) is not None:
            try:
                said: Returned | Raised = Returned(work(number))
            except (EOFError, BrokenPipeError):
                raise
            except BaseException as error:  # noqa: BLE001  whatever it is, who asked must see it
                said = Raised(error)
            pipe.send(said)
