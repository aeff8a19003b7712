"""Which steps touch which *extent*, the bytes of one chunk of a stored tensor: found in columns, by sorting.

::

    extents   |--- 0 ---|--- 1 ---|    |-- 2 --|      by file and offset
    touches   ^    ^    ^              ^              each belongs to the last extent that begins at it or before it

A *situation* is the form of an extent with all footprints in it: sixty layers alike are one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box
from carnet.dtypes import BY_NAME
from carnet.errors import CarnetError
from carnet.formats.stored import dense_strides
from carnet.plans.columns import Steps, fall_into
from carnet.steps import Place, Space, Step, TargetFile

Ints = NDArray[np.int64]
Footprint = tuple[
    tuple[int, ...], int, tuple[int, ...]
]  # shape; offset in elements from the extent's start; strides in elements
Use = tuple[tuple[int, ...], Place, str]  # shape and place of a box that a form touches, and the column that says where
DTYPES = {dtype: number for number, dtype in enumerate(BY_NAME)}
ITEMS = np.array([dtype.nbytes for dtype in BY_NAME.values()])


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes of one chunk of a stored tensor."""

    name: str  # for messages: the stored tensor
    file: str
    offset: int  # as a place counts it
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements
    dtype: str
    padding: tuple[Box, ...]  # boxes of this chunk that hold no weight
    space: Space = "file"


Named = tuple[str, Extent, str, int]  # name, form, file and offset of an extent


@dataclass(frozen=True, slots=True)
class Extents:
    """Extents as columns."""

    names: Sequence[str]
    forms: Sequence[Extent]  # without name, file and offset
    files: Sequence[str]
    form: Ints
    file: Ints
    offset: Ints

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> "Extents":
        """Return some extents as columns."""
        return cls.named([(each.name, replace(each, name="", file="", offset=0), each.file, each.offset) for each in extents])

    @classmethod
    def named(cls, extents: Sequence[Named]) -> "Extents":
        """Return extents of some forms as columns."""
        forms, files = dict[Extent, int](), dict[str, int]()
        # few forms are met often, and are known by their identity
        distinct = {id(form): form for _, form, _, _ in extents}
        known = {at: forms.setdefault(form, len(forms)) for at, form in distinct.items()}
        numbers = [known[id(form)] for _, form, _, _ in extents]
        where = [files.setdefault(file, len(files)) for _, _, file, _ in extents]
        columns = (np.array(column, np.int64) for column in (numbers, where, [offset for _, _, _, offset in extents]))
        return cls([name for name, _, _, _ in extents], [*forms], [*files], *columns)

    @classmethod
    def of_files(cls, files: Sequence[TargetFile]) -> "Extents":
        """Return the tensors of target files as columns."""
        known = dict[tuple[Space, tuple[int, ...], str], int]()
        spaces = [(file.space, file.tensors) for file in files]
        form = [known.setdefault((space, t.shape, t.dtype), len(known)) for space, tensors in spaces for t in tensors]
        forms = [Extent("", "", 0, shape, dense_strides(shape), dtype, (), space) for space, shape, dtype in known]
        number = np.repeat(np.arange(len(files)), [len(file.tensors) for file in files])
        offset = np.array([t.offset for file in files for t in file.tensors], np.int64)
        names = [t.name for file in files for t in file.tensors]
        return cls(names, forms, [file.name for file in files], np.array(form, np.int64), number, offset)

    def __getitem__(self, at: int) -> Extent:
        form, file, offset = self.forms[self.form[at]], self.files[self.file[at]], int(self.offset[at])
        found: Extent = replace(form, name=self.names[at], file=file, offset=offset)
        return found

    def sum(self, of: Callable[[Extent], int]) -> int:
        """Return the sum of what is said of each form."""
        return sum(of(self.forms[form]) * number for form, number in Counter(self.form.tolist()).items())


@dataclass(frozen=True, slots=True)
class Touches:
    """The boxes that steps touch: where each lies, and which *mark* it makes there."""

    marks: Sequence[tuple[tuple[int, ...], tuple[int, ...], str, Space]]  # shape, strides, element type, space
    names: Sequence[str]  # of files
    mark: Ints
    file: Ints
    offset: Ints


def touches(steps: Steps, uses: Callable[[Step], Iterator[Use]]) -> Touches:
    """Return what steps touch; each form is asked once."""
    marks = dict[tuple[tuple[int, ...], tuple[int, ...], str, Space], int]()
    of_form = [
        [(marks.setdefault((shape, at.strides, at.dtype, at.space), len(marks)), column) for shape, at, column in uses(form)]
        for form in steps.forms
    ]
    parts = [np.empty((3, 0), np.int64)]
    for which in range(max(map(len, of_form), default=0)):
        for column in ("source", "target", "scales", "outer"):
            table = np.array([use[which][0] if use[which:] and use[which][1] == column else -1 for use in of_form])
            mark = table[steps.rows["form"]]
            rows = steps.rows[mark >= 0]
            parts.append(np.array([mark[mark >= 0], rows[column], rows[f"{column}_at"]], np.int64))
    return Touches([*marks], steps.names, *np.concatenate(parts, axis=1))


def situations(extents: Extents, touched: Touches, *, distinct: bool) -> Iterator[tuple[Extent, tuple[Footprint, ...]]]:
    """Yield each different situation once, in the order of the extents; ``distinct``: of equal footprints in one count one."""
    extent, skip = _found(extents, touched)
    plain = dict[tuple[tuple[int, ...], tuple[int, ...]], int]()
    mark = np.array([plain.setdefault(mark[:2], len(plain)) for mark in touched.marks], np.int64)[touched.mark]
    order = np.lexsort((skip, mark, extent))
    extent, mark, skip = extent[order], mark[order], skip[order]
    if distinct:
        new = np.ones(len(extent), bool)
        new[1:] = (np.diff(extent) != 0) | (np.diff(mark) != 0) | (np.diff(skip) != 0)
        extent, mark, skip = extent[new], mark[new], skip[new]
    number = np.bincount(extent, minlength=len(extents.names))
    begin = np.cumsum(number) - number
    firsts = list[int]()
    for count in sorted(set(number.tolist())):
        alike = np.flatnonzero(number == count)
        inside = begin[alike, None] + np.arange(count)
        whole = np.concatenate([extents.form[alike, None], mark[inside], skip[inside]], axis=1)
        order = np.lexsort(whole.T)  # in which equal ones stay as they were
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(whole[order], axis=0) != 0).any(axis=1)
        firsts += alike[order[new]].tolist()
    shapes = [*plain]
    for at in sorted(firsts):
        held = slice(begin[at], begin[at] + number[at])
        yield (
            extents[at],
            tuple(
                (shapes[form][0], gap, shapes[form][1])
                for form, gap in zip(mark[held].tolist(), skip[held].tolist(), strict=True)
            ),
        )


def _found(extents: Extents, touched: Touches) -> tuple[Ints, Ints]:
    """Return for each touch the extent that it falls into, and how many elements after its start."""
    spaces: dict[Space, int] = {"file": 0, "packed": 1, "scratch": 2, "factors": 3}
    known = {name: number for number, name in enumerate(extents.files)}
    form_space = np.array([spaces[form.space] for form in extents.forms], np.int64)
    mark_space = np.array([spaces[mark[3]] for mark in touched.marks], np.int64)
    file = np.array([known.get(name, -1) for name in touched.names], np.int64)
    # an empty tensor starts where the next one does: it comes first, so that nothing is counted for it
    full = np.array([0 not in form.shape for form in extents.forms], np.int64)
    here = extents.file * len(spaces) + form_space[extents.form]
    there = np.where(file[touched.file] < 0, -1, file[touched.file] * len(spaces) + mark_space[touched.mark])
    extent = fall_into((here, extents.offset, full[extents.form]), (there, touched.offset))
    types = [np.array([DTYPES[dtype] for dtype in found], np.int64) for found in _types(extents, touched)]
    lost = extent < 0
    inside = ~lost
    lost[inside] = types[0][extents.form[extent[inside]]] != types[1][touched.mark[inside]]
    if lost.any():
        at = int(np.argmax(lost))
        facts = {"file": touched.names[touched.file[at]], "offset": int(touched.offset[at])}
        raise CarnetError("a step of the plan touches bytes that belong to no tensor", facts)
    skip, rest = np.divmod(touched.offset - extents.offset[extent], ITEMS[types[1]][touched.mark])
    if rest.any():
        found = extents[int(extent[np.argmax(rest != 0)])]
        raise CarnetError("a step of the plan starts between two elements", {"tensor": found.name, "file": found.file})
    return extent, skip


def _types(extents: Extents, touched: Touches) -> tuple[list[str], list[str]]:
    return [form.dtype for form in extents.forms], [mark[2] for mark in touched.marks]


def nbytes(extent: Extent, elements: int | None = None) -> int:
    """Return the bytes of an extent, or of so many of its elements."""
    count = prod(extent.shape) if elements is None else elements
    return count * BY_NAME[extent.dtype].nbytes // (2 if extent.space == "packed" else 1)
