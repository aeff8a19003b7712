"""A *desk*: both sides of an examination and all of its tasks. Whoever has the same two folders has the same desk, and may do a part.

::

    tasks   |--- 1/3 ---|--- 2/3 ---|--- 3/3 ---|        of similar bytes, in their order; what was found is put together
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

from carnet.examiner.brought import by_rows
from carnet.examiner.compare import Side, is_judged, side
from carnet.examiner.judge import Judgement, judge
from carnet.examiner.matrix import amax, amax_names
from carnet.examiner.means import Means, Order, choose_means, each, processes
from carnet.examiner.naming import Clues
from carnet.examiner.order import Codes, Found, Job, jobs, nbytes, work_off
from carnet.formats.stored import Checkpoint, Key
from carnet.inventory.merged import named
from carnet.inventory.source_scales import read_source_scales
from carnet.inventory.survey import Inventory
from carnet.model.model import canonical_shapes

FACTORS = 16  # bytes that a thread holds for an element of an adapter's A and B: as they are stored, in f32, in f64
Elsewhere = Callable[[Callable[[int], None]], Found]  # does all tasks; takes what gets the bytes of those that are done


@dataclass(frozen=True, slots=True, eq=False)
class Desk:
    """Two understood checkpoints, and what is to be done."""

    ours: Side
    theirs: Side
    tasks: tuple[Job, ...]
    means: Means
    dtype: str | None  # that was asked for

    def nbytes(self, task: Job) -> int:
        """Return the bytes of a task."""
        return nbytes(self.ours, self.theirs, task)

    @property
    def codes(self) -> list[Key]:
        """Return the stored weights whose codes are held against numbers."""
        return [task.key for task in self.tasks if isinstance(task, Codes)]

    def part(self, number: int, of: int) -> "Desk":
        """Return the desk with one of so many parts of the tasks; the first is 1."""
        sizes = [*map(self.nbytes, self.tasks)]
        total = sum(sizes) or 1
        middles = (2 * end - size for end, size in zip(accumulate(sizes), sizes, strict=True))
        held = (
            task
            for task, middle in zip(self.tasks, middles, strict=True)
            if min(middle * of // (2 * total), of - 1) == number - 1
        )
        return replace(self, tasks=tuple(held))

    def work(self, add: Callable[[int], None], order: Order | None = None) -> Found:
        """Do the tasks; ``order`` says when what is read of the target is there, None where all is."""
        ours, theirs, threads = self.ours, self.theirs, self.means.threads
        target = theirs.inventory
        names = sorted({name for key in self.codes for name in amax_names(target.entries[key], target.coded[key], ours.shapes)})
        largest = each(
            names, lambda name: amax(ours, name, self.dtype), lambda name: prod(ours.shapes[name]), threads, lambda _: None
        )
        amaxes = dict(zip(names, largest, strict=True))
        apart = processes(threads, [*map(self.nbytes, self.tasks)])  # each holds a matrix, and knows of no other
        clues = Clues(self.means.whole // max(apart, 1))

        def judged(key: Key) -> Judgement:
            return judge(ours, theirs, key, self.dtype, amaxes, clues)

        return work_off(ours, theirs, self.tasks, judged, threads, add, order)

    def close(self) -> None:
        """Close the files."""
        for of in (self.ours, *(term for term, _ in self.ours.terms)):
            of.tensor_files.files.close()
        self.theirs.tensor_files.files.close()


def means_for(source: Inventory, target: Checkpoint, memory: int, threads: int | None) -> Means:
    """Return what an examination may use inside a budget of bytes, whatever adapters each thread holds."""
    tensors = len(source.checkpoint.tensors) + len(target.tensors)
    return choose_means(memory, tensors, threads, beside=FACTORS * source.changes.most)


def desk_of(
    source: Inventory, target: Inventory, means: Means, dtype: str | None, also: str | None, *, foreign: bool = False
) -> Desk:
    """Return the desk for two understood checkpoints; ``also`` is a digest beside xxh3, ``foreign``: it is another program's."""
    ours = _summed(side(source, means.block, also), means.block, also)
    theirs = replace(side(target, means.block, also), foreign=foreign)
    shapes = canonical_shapes(
        source.config, target.dialect.parts
    )  # with what the target computes, in the place of what it has not
    ours = replace(ours, kept=_kept(source, target), shapes=shapes)
    ours = replace(ours, source_scales=read_source_scales(source, by_rows)) if target.coded else ours
    codes = [key for key, coded in target.coded.items() if is_judged(ours, coded, target.entries[key])]
    return Desk(ours, theirs, (*jobs(ours, theirs), *map(Codes, codes)), means, dtype)


def _summed(ours: Side, block: int, also: str | None) -> Side:
    """Return the side of a source with those that are added to it."""
    merged = ours.inventory.merged
    if merged is None:
        return ours
    others = (ours, *(side(each, block, also) for each in merged.others))
    return replace(ours, terms=tuple(zip(others, merged.factors, strict=True)), differences=merged.differences)


def _kept(source: Inventory, target: Inventory) -> frozenset[str]:
    """Return the tensors of a sum that are those of the first alone."""
    return frozenset() if source.merged is None else source.merged.kept((*named(source), *named(target)))


def together(parts: Iterable[Found]) -> Found:
    """Return what was found in several parts."""
    whole = Found({}, {}, {}, {}, {})
    for found in parts:
        whole.compared.update(found.compared)
        whole.judged.update(found.judged)
        whole.source.update(found.source)
        whole.target.update(found.target)
        whole.others.update(found.others)
    return whole
