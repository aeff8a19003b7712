"""How a *run* went: bytes done and private memory over its time, in a bounded number of samples."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from carnet.progress import Callback, Progress

MOST = 400  # samples; when there are twice as many, every other one goes
EVERY = 0.05  # seconds between two samples, at first
REST = 20  # times as long as a look took nobody looks again: the kernel walks all pages of a process to tell its memory
ANONYMOUS = re.compile(r"Pss_Anon:\s+(\d+) kB")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look."""

    seconds: float  # since the beginning
    done: int  # bytes
    total: int
    memory: int | None  # bytes that are this process' and its children's alone, None where the machine does not say


@dataclass(slots=True)
class Run:
    """What is told how far a verb is, and tells whoever shows it."""

    listener: Callback | None = None
    clock: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    phases: list[tuple[float, str]] = field(default_factory=list)  # second -> what began
    every: float = EVERY
    due: float = 0.0  # second of the next sample

    def __call__(self, at: Progress) -> None:
        """Take how far it is, and look whether it is time for a sample."""
        if self.listener is not None:
            self.listener(at)
        now = time.monotonic() - self.clock
        if not self.phases or self.phases[-1][1] != at.phase:
            self.phases.append((now, at.phase))
        if not at.total or (now < self.due and at.done < at.total):
            return
        self.samples.append(Sample(now, at.done, at.total, private_memory()))
        looked = time.monotonic() - self.clock - now
        self.due = now + max(self.every, REST * looked)
        if len(self.samples) >= 2 * MOST:
            self.samples[:] = self.samples[::2]
            self.every *= 2


def private_memory() -> int | None:
    """Return the bytes of memory that no file backs of this process and those that it forked, None where the machine does not say.

    What several of them share is counted once.
    """
    found = [each for process in ("self", *_children()) if (each := _anonymous(process)) is not None]
    return sum(found) if found else None


def _children() -> list[str]:
    found = list[str]()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread may have ended
            found += task.read_text().split()
    return found


def _anonymous(process: str) -> int | None:
    with suppress(OSError):
        found = ANONYMOUS.search(Path(f"/proc/{process}/smaps_rollup").read_text())
        return None if found is None else int(found[1]) * 1024
    return None
