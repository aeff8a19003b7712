"""A *worker* is what one worker has: its open files and its buffers, made once and used for every job."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from carnet.plans.columns import Plan
from carnet.storage.protocol import File, Opened, Target

if TYPE_CHECKING:
    from carnet.executor.adapting import Known
    from carnet.executor.jobs import Part

Bytes = NDArray[np.uint8]


class Amaxes:
    """The largest magnitudes that were measured, by name; workers share one."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, name: str, amax: float) -> None:
        """Remember a magnitude; NaN stays, whatever else is found."""
        with self._lock:
            before = self._found.get(name, 0.0)
            self._found[name] = amax if isnan(amax) or amax > before else before

    def largest(self, names: Iterable[str]) -> float:
        """Return the largest of some magnitudes; NaN where one of them is."""
        found = [self._found[name] for name in names]
        return next(filter(isnan, found), max(found, default=0.0))


class Room:
    """The numbers of adapters that a worker holds, and its buffers for what they add; nothing where there are no adapters."""

    def __init__(self) -> None:
        self.factors: dict[tuple[str, int], NDArray[np.float32]] = {}  # tensor and expert, the last used at the end
        self.stretches: dict[
            tuple[str, int], NDArray[np.float32]
        ] = {}  # of a weight and an expert: what its rows are multiplied by
        self.known: Known | None = None  # what the plan says of adapters
        self.most = 0  # bytes of factors that are held
        self.window = np.empty(0, np.uint8)  # numbers of the target in f32, being assembled
        self.block = np.empty((2, 0), np.float32)


class Adder(Protocol):
    """What fills windows in place of the steps of a plan alone."""

    def fill(self, worker: "Worker", parts: "Sequence[Part]") -> None:
        """Bring the bytes of some parts side by side into a worker's window, from its start."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker's belongings."""

    plan: Plan
    sources: Opened[File]
    targets: Opened[Target]
    window: Bytes  # bytes of the target being assembled
    block: Bytes  # bytes of the source just read
    temporary: Bytes  # temporaries of casts
    amaxes: Amaxes
    tell: Callable[[int], None]  # takes the bytes done since the last call; raises where the crossing was stopped
    adder: "Adder | None" = None  # what fills windows with sums, where other sources are added to this one
    room: Room = field(default_factory=Room)
