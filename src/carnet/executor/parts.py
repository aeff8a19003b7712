"""How the jobs of a plan are cut into parts for several processes, a function of the plan and of the number of parts alone.

Jobs stay in the order in which their source lies on disk, and a part is a run of them: as many bytes as another's, give or take half a
job at either end. What is measured is cut alike, in a list of its own, for those who measure everything first::

    jobs   |--- 1/3 ---|--- 2/3 ---|--- 3/3 ---|        what is measured   |- 1/3 -|- 2/3 -|- 3/3 -|

Where files are written in order, a part is whole files, and a job that writes into two of them (codes here, their scales there) is
in the part of either. What compares is in none then: nothing would tell that it was done.
"""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from carnet.executor.jobs import CHECK, ENCODE, GAUGE, Jobs
from carnet.steps import Make
from carnet.storage.protocol import Part

Numbers = NDArray[np.int64]


def writing(jobs: Jobs, part: Part | None = None) -> Numbers:
    """Return the numbers of the jobs that write and compare, of one part or of all."""
    numbers = np.flatnonzero(jobs.rows["kind"] != GAUGE)
    return _writing_into(jobs, numbers, files_of(jobs, part)) if jobs.in_order and part else _cut(jobs, numbers, part)


def comparing(jobs: Jobs) -> Numbers:
    """Return the numbers of the jobs that compare."""
    return np.flatnonzero(jobs.rows["kind"] == CHECK)


def files_of(jobs: Jobs, part: Part) -> list[str]:
    """Return the names of the files of a part, where a part is whole files."""
    targets = jobs.rows["target"]
    found, first = np.unique(targets[targets >= 0], return_index=True)
    files = found[np.argsort(first)]
    nbytes = np.bincount(targets[targets >= 0], jobs.rows["nbytes"][targets >= 0].astype(float))[files].astype(np.int64)
    return [jobs.steps.names[file] for file in files[_share(nbytes, part)].tolist()]


def _writing_into(jobs: Jobs, numbers: Numbers, names: Collection[str]) -> Numbers:
    """Return those of some jobs that write into files of these names."""
    steps, rows = jobs.steps, jobs.rows[numbers]
    sought = [number for number, name in enumerate(steps.names) if name in {*names}]
    ours, coding = np.isin(rows["target"], sought), rows["kind"] == ENCODE
    coded = steps.rows[rows["step"][coding]]
    over = np.array([isinstance(form, Make) and form.encoding.outer is not None for form in steps.forms], bool)[coded["form"]]
    ours[coding] |= np.isin(coded["scales"], sought) | (over & np.isin(coded["outer"], sought))
    return numbers[ours]


def measuring(jobs: Jobs, part: Part | None = None) -> Numbers:
    """Return the numbers of the jobs that measure, of one part or of all."""
    return _cut(jobs, np.flatnonzero(jobs.rows["kind"] == GAUGE), part)


def parts_of(jobs: Jobs, missing: Collection[int], of: int) -> list[int]:
    """Return the parts, of so many, that some writing jobs belong to; a part is not whole files here."""
    numbers = writing(jobs)
    middles, total = _middles(jobs.rows["nbytes"][numbers])
    sought = middles[np.isin(numbers, np.fromiter(missing, np.int64, len(missing)))].tolist()
    return sorted({min(middle * of // (2 * total), of - 1) + 1 if total else of for middle in sought})


def needed(jobs: Jobs, numbers: Numbers) -> Numbers:
    """Return the numbers of the jobs that measure what some jobs need before they can code."""
    gauges, rows = measuring(jobs), jobs.rows[numbers]
    more = jobs.steps.rows["more"]
    names = set[object]()
    for said in np.unique(more[rows["step"][rows["kind"] == ENCODE]]).tolist():
        given, *amaxes = jobs.steps.more[said]
        names |= set(amaxes) if given is None else set()
    return gauges[[name in names for name in names_of(jobs, gauges).values()]]


def names_of(jobs: Jobs, gauges: Numbers) -> Mapping[int, str]:
    """Return under which name each of some jobs measures, by its number."""
    said = jobs.steps.rows["more"][jobs.rows["step"][gauges]].tolist()
    return {number: str(jobs.steps.more[each][0]) for number, each in zip(gauges.tolist(), said, strict=True)}


def _cut(jobs: Jobs, numbers: Numbers, part: Part | None) -> Numbers:
    if part is None:
        return numbers
    return numbers[_share(jobs.rows["nbytes"][numbers], part)]


def _share(nbytes: Numbers, part: Part) -> slice:
    """Return which things of these sizes are of a part."""
    middles, total = _middles(nbytes)
    first, end = (np.searchsorted(middles, -(-2 * total * at // part.of)) for at in (part.number - 1, part.number))
    return slice(int(first), len(nbytes) if part.number == part.of else int(end))


def _middles(nbytes: Numbers) -> tuple[Numbers, int]:
    """Return twice the middle of each of some things that lie one after another, and the bytes of all: it is of the part with that."""
    ends = np.cumsum(nbytes)
    return 2 * ends - nbytes, int(ends[-1]) if len(ends) else 0
