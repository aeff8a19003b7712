"""Sums of checkpoints: each is planned into the same target in f32, and a window is filled by what their plans would write, added up.

The order of the sum is that in which the checkpoints are named, and every operation is rounded to f32; the sum is rounded once::

    linear            0 + w0 * x0 + w1 * x1 + w2 * x2
    task_arithmetic   x0 + (0 + w1 * (x1 - x0) + w2 * (x2 - x0))

Boxes of canonical tensors that are kept, and what pads, are the first checkpoint's, as its own crossing would write them. What it would
only widen is read as it is stored, and widened a little at a time: temporaries stay in the processor's cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME, FLOATS, array_type
from carnet.errors import BadRequest
from carnet.executor.adapting import assemble
from carnet.executor.casts import cast, out_of_range, widen
from carnet.executor.files import sources
from carnet.executor.geometry import Tile, segments, volume
from carnet.executor.groups import writers_of
from carnet.executor.jobs import Check, Part
from carnet.executor.memory import choose_threads, choose_window
from carnet.executor.reading import nowhere, reader, writing
from carnet.executor.work import work
from carnet.executor.worker import Amaxes, Worker
from carnet.plans.columns import Plan
from carnet.steps import Fill, Move, Place, Same, Step, TargetTensor
from carnet.storage.protocol import Folder, Opened

Numbers = NDArray[np.float32]
Spot = tuple[str, int]  # a target tensor: its file, and its offset there

SHARE = 8  # windows of the target that what a worker of a sum holds is as large as, at most
BLOCK = 1 << 15  # numbers that are added up at a time
WIDE = np.dtype(np.uint32)


@dataclass(frozen=True, slots=True)
class Term:
    """One checkpoint of a sum."""

    plan: Plan  # of its crossing into the target, in f32
    source: Folder
    factor: float  # an f32
    tensors: Sequence[tuple[str, TargetTensor]]  # of that crossing, each with its file, in the order of those of the target
    writers: Mapping[Spot, list[tuple[int, int, int]]]  # the steps that write them, as ``writers_of`` has them

    @classmethod
    def of(cls, plan: Plan, source: Folder, factor: float) -> "Term":
        """Return a checkpoint with its factor."""
        return cls(plan, source, factor, tensors_of(plan), writers_of(plan))

    def part(self, number: int, tile: Tile) -> tuple[Part, str]:
        """Return what this crossing would write into a tile of a target tensor, by number, and the type of that."""
        file, tensor = self.tensors[number]
        ours = replace(tile, base=tensor.offset, item=BY_NAME[tensor.dtype].nbytes)
        first, lines, width, pitch = segments(ours)
        low, high = first - tensor.offset, first - tensor.offset + (lines - 1) * pitch + width
        steps = writing(self.plan, self.writers[file, tensor.offset], low, high)
        if (
            tensor.dtype == "f32"
            and not self.plan.updates
            and all(isinstance(each, Move) and _is_widening(each) for each in steps)
        ):
            stored = [replace(each, target=_narrow(each.target, tensor.offset)) for each in steps if isinstance(each, Move)]
            return Part(file, replace(ours, item=BY_NAME["bf16"].nbytes), tuple(stored)), "bf16"
        return Part(file, ours, steps), tensor.dtype


def _is_widening(step: Move) -> bool:
    """Say whether a step does nothing but make f32 of bf16, which loses nothing and is soon done."""
    return (step.source.dtype, step.add, step.function) == ("bf16", 0.0, "")


def _narrow(place: Place, begin: int) -> Place:
    """Return a place in a tensor of f32 that begins somewhere as one in a tensor of bf16 that begins there."""
    return replace(place, offset=begin + (place.offset - begin) // 2, dtype="bf16")


@dataclass(frozen=True, slots=True)
class Sums:
    """What the tensors of a target are sums of."""

    terms: tuple[Term, ...]  # the first is the target's own source
    differences: bool  # whether the others count by what they differ from the first
    kept: frozenset[str]  # canonical tensors that are those of the first
    numbers: Mapping[Spot, int]  # which of all a target tensor is

    @classmethod
    def of(cls, plan: Plan, terms: Sequence[Term], kept: frozenset[str], *, differences: bool) -> "Sums":
        """Return the sums for the plan of a target; raise BadRequest where its tensors are not those of every term."""
        ours = tensors_of(plan)
        for term in terms:
            pairs = zip(ours, term.tensors, strict=False)
            odd = next((a for (_, a), (_, b) in pairs if (a.name, a.shape) != (b.name, b.shape)), None)
            if odd is not None or len(ours) != len(term.tensors):
                facts = {"where": term.source, "tensor": "" if odd is None else odd.name}
                raise BadRequest("the checkpoints would not become the same tensors", facts)
        for (_, ours_), *others in zip(ours, *(term.tensors for term in terms), strict=True):
            for _, each in others:
                if each.dtype == "f64" or (each.dtype in FLOATS) != (ours_.dtype in FLOATS):
                    raise BadRequest(f"{each.name} has no sum in f32", {"found": each.dtype}, remedy=f"--keep '{each.name}'")
        made = {(file, tensor.offset): number for number, (file, tensor) in enumerate(ours) if 0 not in tensor.shape}
        return cls(tuple(terms), differences, kept, made)

    def planned(self, plan: Plan) -> Plan:
        """Return the plan of the target with a window that leaves room for what is added up beside it."""
        more = sum(len(term.plan.steps) for term in self.terms)
        return replace(plan, window=choose_window(plan.memory, len(plan.steps) + more) // SHARE)

    def threads(self, plan: Plan, wanted: int | None) -> int:
        """Return how many work inside the plan's memory."""
        return choose_threads(plan.memory, *self.needs(plan), wanted, coding=True)

    def needs(self, plan: Plan) -> tuple[int, int]:
        """Return the bytes that one who works holds, as a window, and the steps of all plans."""
        return plan.window * SHARE, len(plan.steps) + sum(len(term.plan.steps) for term in self.terms)

    def check_copies(self, plan: Plan) -> None:
        """Compare the copies that sources have of one tensor, but for those of the first, which are the plan's own to compare."""
        for term in self.terms[1:]:
            worker = reader(term.plan, term.source, plan.window, lambda nbytes: None)
            try:
                for step in term.plan.steps.only(Same):
                    work(worker, Check(step, 0))
            finally:
                worker.sources.close()

    def integer(self, plan: Plan) -> str | None:
        """Return the name of a target tensor of integers that would be summed, None where there is none."""
        odd = {(file, tensor.offset): tensor.name for file, tensor in tensors_of(plan) if tensor.dtype not in FLOATS}
        writers = writers_of(plan) if odd else {}
        return next(
            (name for at, name in odd.items() for step, *_ in writers.get(at, ()) if self.is_summed(plan.steps[step])), None
        )

    def is_summed(self, step: Step) -> bool:
        """Say whether what a step writes is replaced by a sum."""
        return not isinstance(step, Fill) and step.tensor not in self.kept

    def adder(self, worker: Worker) -> "Adder":
        """Return what fills the windows of a worker."""
        return Adder(self, worker)


def tensors_of(plan: Plan) -> list[tuple[str, TargetTensor]]:
    """Return the target tensors of a plan with their files, in their order."""
    return [(file.name, tensor) for file in plan.files for tensor in file.tensors]


class Adder:
    """The buffers and open files of the sums of one worker."""

    def __init__(self, sums: Sums, of: Worker) -> None:
        """Have room for as many numbers as a window of the worker, whose small buffers serve here, too."""
        self._sums = sums
        most = of.window.size // 2  # no floating type that is summed has fewer bytes
        self._total, self._term = (np.empty(most, np.float32) for _ in range(2))
        self._first = np.empty(most if sums.differences else 0, np.float32)
        self._few = np.empty(BLOCK, np.float32)
        self._workers = [
            Worker(
                term.plan,
                sources(term.source),
                Opened(nowhere),
                self._term.view(np.uint8),
                of.block,
                of.temporary,
                Amaxes(),
                lambda nbytes: of.tell(0),  # who is asked for the sum tells of it
            )
            for term in sums.terms
        ]

    def fill(self, worker: Worker, parts: Sequence[Part]) -> None:
        """Bring the sums of some parts side by side into a worker's window, and what is kept in its place."""
        base = 0
        for part in parts:
            number, size = self._sums.numbers[part.file, part.tile.base], volume(part.tile)
            if any(self._sums.is_summed(step) for step in part.steps):
                self._sum(worker, part, number, worker.window[base : base + size])
            else:
                worker.window[base : base + size] = 0  # and every element of it that is no padding is kept
            base += size
        assemble(worker, [replace(part, steps=tuple(filter(self._is_kept, part.steps))) for part in parts])

    def _is_kept(self, step: Step) -> bool:
        return not isinstance(step, Fill) and not self._sums.is_summed(step)

    def _sum(self, worker: Worker, part: Part, number: int, into: NDArray[np.uint8]) -> None:
        """Fill a buffer with the sums of a part."""
        count = volume(part.tile) // part.tile.item
        total = self._total[:count]
        first: Numbers | None = None
        begun = False
        with np.errstate(over="ignore", invalid="ignore"):
            for term, by in zip(self._sums.terms, self._workers, strict=True):
                numbers = self._read(term, by, number, part.tile, count)
                if self._sums.differences and first is None:
                    first = self._first[:count]
                    for low, few in numbers:
                        first[low : low + len(few)] = few
                    continue
                for low, few in numbers:
                    inside = slice(low, low + len(few))
                    if first is not None:
                        np.subtract(few, first[inside], out=few)
                    np.multiply(few, np.float32(term.factor), out=few)
                    np.add(total[inside] if begun else np.float32(0), few, out=total[inside])
                begun = True
            if first is not None:
                np.add(first, total, out=total)
        wanted = part.steps[0].target.dtype
        if wanted == "f32":
            into.view(np.float32)[:] = total
            return
        bits, sums = into.view(f"u{BY_NAME[wanted].nbytes}"), total.view(WIDE)
        for low in range(0, count, BLOCK):
            if not cast(sums[low : low + BLOCK], bits[low : low + BLOCK], ("f32", wanted), worker.temporary):
                name = self._sums.terms[0].tensors[number][1].name
                raise out_of_range(f"a sum of {name}", name, "a finite sum", wanted)

    def _read(self, term: Term, by: Worker, number: int, tile: Tile, count: int) -> Iterator[tuple[int, Numbers]]:
        """Yield the numbers of a tile as one checkpoint has them, some at a time and which is their first; they may be changed."""
        part, dtype = term.part(number, tile)
        assemble(by, (part,))
        held = by.window[: count * BY_NAME[dtype].nbytes].view(array_type(dtype))
        for low in range(0, count, BLOCK):
            some = held[low : low + BLOCK]
            few: Numbers = self._few[: len(some)]
            if dtype == "f32":
                few = some
            elif dtype == "bf16":
                widen(some.view(np.uint16), few.view(WIDE))
            else:  # a tower's, which no crossing casts
                few[:] = some
            yield low, few

    def close(self) -> None:
        """Close the files."""
        for each in self._workers:
            each.sources.close()
