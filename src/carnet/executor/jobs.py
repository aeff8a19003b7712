"""A *job* is what one worker does in one go and what the journal counts. The list is a pure function of the plan.

* ``Direct``: runs that are long on both sides; the kernel copies them from file to file.
* ``Windows``: bytes of target tensors, assembled in a buffer from all steps that touch them: ranges, or squares where the
  source runs along the target's rows. Parts that read the same rows of the source (the ranks of a column cut) share a
  job, so that the rows are read once.
* ``Check``: two places of the source that must hold the same bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import overload

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME
from carnet.executor.cutting import Cell, Writer, blocks_of, cells_of, runs_of
from carnet.executor.geometry import Piece, Tile, segments, volume
from carnet.executor.groups import Group, groups_of
from carnet.plans.columns import Plan, Rows, Steps
from carnet.steps import Make, Measure, Move, Same


@dataclass(frozen=True, slots=True)
class Direct:
    """A piece whose runs are long on both sides."""

    step: Move
    piece: Piece
    nbytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one target tensor."""

    file: str
    tile: Tile
    steps: tuple[Writer, ...]  # those that touch it


@dataclass(frozen=True, slots=True)
class Windows:
    """Bytes that one worker assembles together."""

    parts: tuple[Part, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Check:
    """Two places that must be equal."""

    step: Same
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gauge:
    """A box of the source whose largest magnitude is needed before anything can be coded."""

    step: Measure
    nbytes: int


@dataclass(frozen=True, slots=True)
class Encode:
    """A tile of a matrix that is assembled and written as codes."""

    step: Make  # that quantizes
    part: Part
    nbytes: int


Job = Direct | Windows | Check | Gauge | Encode
KINDS = DIRECT, WINDOWS, CHECK, GAUGE, ENCODE = range(5)
# which step (-1: none); which block of it, or the first of how many parts; where its source lies, and what it writes (-1: nothing)
JOB = np.dtype(
    [(name, np.int32) for name in ("kind", "step", "block", "first", "number", "file", "target")]
    + [("at", np.int64), ("place", np.int64), ("nbytes", np.int64)]
)
CELL = ("group", "tensor", "cell")
PART = np.dtype([(name, np.int32) for name in CELL])  # a cell of one of the tensors alike
# a part, the source that it reads and how far that goes, its bytes and where they lie in the target
SEEN = np.dtype(
    [(name, np.int32) for name in (*CELL, "file", "target")] + [(name, np.int64) for name in ("at", "wide", "nbytes", "place")]
)


@dataclass(frozen=True, slots=True, eq=False)
class Jobs(Sequence[Job]):
    """The jobs of a plan as columns, in the order of their source or of their target; each is made when it is asked for."""

    steps: Steps
    groups: Sequence[tuple[Group, Sequence[Cell]]]
    parts: Rows  # of PART
    rows: Rows  # of JOB
    in_order: bool  # of their target

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Job: ...
    @overload
    def __getitem__(self, at: slice) -> "Jobs": ...
    def __getitem__(self, at: "int | slice") -> "Job | Jobs":
        if isinstance(at, slice):
            return replace(self, rows=self.rows[at])
        kind, number, block, first, count, *_, nbytes = self.rows[at].item()
        parts = tuple([self._part(part) for part in range(first, first + count)])
        step = self.steps[number] if kind != WINDOWS else None
        match kind, step:
            case 0, Move():
                return Direct(step, next(islice(blocks_of(step), block, None)), nbytes)
            case 2, Same():
                return Check(step, nbytes)
            case 3, Measure():
                return Gauge(step, nbytes)
            case 4, Make():
                return Encode(step, parts[0], nbytes)
            case _:
                return Windows(parts, nbytes)

    def _part(self, at: int) -> Part:
        group, tensor, cell = self.parts[at].item()
        alike, cells = self.groups[group]
        steps = [self.steps[int(alike.steps[tensor, number])] for number in cells[cell].steps]
        tile = replace(cells[cell].tile, base=cells[cell].tile.base + int(alike.offsets[tensor]))
        return Part(self.steps.names[alike.files[tensor]], tile, tuple(steps))  # type: ignore[arg-type]  # all of them write


def jobs_of(plan: Plan, *, in_order: bool = False, direct: bool = True) -> Jobs:
    """Return the jobs of a plan, in the order in which their source lies on disk.

    ``in_order``: in that in which the target's files are written from their first byte to their last, one after the other. Then zeros
    are written, too, and what compares and measures comes first. Without ``direct`` nothing is left to the kernel to copy.
    """
    steps, groups = plan.steps, list[tuple[Group, list[Cell]]]()
    rows, parts, seen, coded_parts = [np.empty(0, JOB)], list[Rows](), [np.empty(0, SEEN)], 0
    for group in groups_of(plan):
        sample = [steps[number] for number in group.steps[0].tolist()]
        coded = None if group.coded is None else next(steps.at(group.coded[:1]).only(Make))
        runs = runs_of(sample, zeros=in_order) if coded is None and direct and not group.adapted else None
        if runs is not None:
            for run in runs:
                job = _reading(steps, group.steps[:, run.step], run.first, DIRECT, run.block, run.nbytes)
                rows.append(_writing(job, steps, group.steps[:, run.step], run.place))
            continue
        cells = [*cells_of(group.tensor, sample, coded, plan.window, zeros=in_order)]
        for number, cell in enumerate(cells):
            part = np.zeros(len(group.offsets), SEEN)
            part["group"], part["tensor"], part["cell"] = len(groups), np.arange(len(part)), number
            job = _reading(steps, group.steps[:, cell.reader], cell.first, ENCODE, 0, volume(cell.tile))
            part["file"], part["at"], part["wide"], part["nbytes"] = job["file"], job["at"], cell.wide, job["nbytes"]
            if group.coded is not None:
                job["step"], job["number"], job["first"] = group.coded, 1, coded_parts + np.arange(len(job))
                coded_parts += len(job)
                # no code is smaller than an eighth of the weight: this is in the order in which codes lie
                rows.append(_writing(job, steps, group.coded, segments(cell.tile)[0] // 8))
                parts.append(part[[*CELL]].astype(PART))
                continue
            part["target"], part["place"] = group.files, group.offsets + segments(cell.tile)[0]
            seen.append(part)
        groups.append((group, cells))
    rank = _ranks(steps)
    windows = np.concatenate(seen)
    by_target, by_source = (windows["place"], rank[windows["target"]]), (windows["at"], rank[windows["file"]])
    windows = windows[np.lexsort((*by_source, *by_target) if in_order else (*by_target, *by_source))]
    rows.append(_together(windows, plan.window, coded_parts, in_order=in_order))
    parts.append(windows[[*CELL]].astype(PART))
    rows += _looking(steps)
    made = np.concatenate(rows)
    by_source = made["at"], rank[made["file"]]
    by_target = made["place"], np.where(made["target"] < 0, -1, rank[made["target"]])
    return Jobs(steps, groups, np.concatenate(parts), made[np.lexsort(by_target if in_order else by_source)], in_order)


def _reading(steps: Steps, numbers: NDArray[np.int64], first: int, kind: int, block: int, nbytes: int) -> Rows:
    """Return a job for each of some steps, which reads from ``first`` on."""
    made, read = np.zeros(len(numbers), JOB), steps.rows[numbers]
    made["kind"], made["step"], made["block"], made["nbytes"] = kind, numbers, block, nbytes
    made["file"], made["at"], made["target"] = read["source"], read["source_at"] + first, -1
    return made


def _writing(jobs: Rows, steps: Steps, numbers: NDArray[np.int64], first: int) -> Rows:
    """Say of jobs what they write, from ``first`` on where their steps do."""
    jobs["target"], jobs["place"] = steps.rows["target"][numbers], steps.rows["target_at"][numbers] + first
    return jobs


def _ranks(steps: Steps) -> NDArray[np.int64]:
    """Return the place of each name among all of them, in their order."""
    rank = np.empty(len(steps.names), np.int64)
    rank[sorted(range(len(steps.names)), key=steps.names.__getitem__)] = np.arange(len(steps.names))
    return rank


def _looking(steps: Steps) -> Iterator[Rows]:
    """Yield the jobs that compare and measure."""
    for number, form in enumerate(steps.forms):
        if isinstance(form, Same | Measure) and 0 not in form.shape:
            kind, nbytes = CHECK if isinstance(form, Same) else GAUGE, prod(form.shape) * BY_NAME[form.source.dtype].nbytes
            yield _reading(steps, np.flatnonzero(steps.rows["form"] == number), 0, kind, 0, nbytes)


def _together(windows: Rows, window: int, first: int, *, in_order: bool) -> Rows:
    """Join parts that follow each other and read mostly the same source, as long as they fit one buffer; ``first`` is the first.

    ``in_order``: parts of one target file, wherever their source lies.
    """
    made = list[tuple[int, ...]]()
    begin, number, nbytes, file, at, until, target, to = first, 0, 0, -1, 0, 0, -1, 0
    rows = windows[["file", "at", "wide", "nbytes", "target", "place"]].tolist()
    for there, place, wide, size, name, where in rows:
        alike = name == target if in_order else there == file and place < until
        if number and not (alike and nbytes + size <= window):
            made.append((WINDOWS, -1, 0, begin, number, file, target, at, to, nbytes))
            begin, number, nbytes = begin + number, 0, 0
        if not number:
            file, at, until, target, to = there, place, place + wide // 2, name, where
        number, nbytes = number + 1, nbytes + size
    if number:
        made.append((WINDOWS, -1, 0, begin, number, file, target, at, to, nbytes))
    return np.array(made, JOB)


def touched(job: Job) -> set[str]:
    """Return the names of the target files that a job writes."""
    match job:
        case Direct():
            return {job.step.target.file}
        case Windows():
            return {part.file for part in job.parts}
        case Encode():
            encoding = job.step.encoding
            return {place.file for place in (job.step.target, encoding.scales, encoding.outer) if place is not None}
        case Check() | Gauge():
            return set()
