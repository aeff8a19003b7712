"""The steps of a plan as columns: a row of numbers for each, under one of a few *forms*.

The layers and experts of a model differ in names and offsets alone. A form is a step in which these are left open ("", 0), and a
row says them: a hundred thousand steps take some ten megabytes, and what holds for a form is seen once::

    forms   Move("", (), (4, 2), Place("", 0, (2, 1), "bf16"), ...)      names   "layers.0.mlp.up", "a.safetensors", ...
    rows    form 0 | tensor 0, start 0 | source 1 at 704 | target ...    starts  (0, 0), ...
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import eq
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from carnet.steps import (
    NO_FACTORS,
    NO_SCRATCH,
    AssetFile,
    Encoding,
    Fill,
    Make,
    Measure,
    Move,
    Place,
    Product,
    Put,
    RawFile,
    Same,
    Step,
    TargetFile,
    TextFile,
    Update,
)

IDS = ("form", "tensor", "start", "more", "source", "target", "scales", "outer")  # numbers in the tables; -1 for none
OFFSETS = ("source_at", "target_at", "first", "scales_at", "outer_at")  # as a place counts them; 0 for none
ROW = np.dtype([(name, np.int32) for name in IDS] + [(name, np.int64) for name in OFFSETS])

Rows = NDArray[np.void]
More = tuple[str | float | None, ...]  # what else a step says: values, the names of magnitudes, a scale that is given
FAR = 1 << 62  # no offset is larger
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Steps(Sequence[Step]):
    """The steps of a plan, in an order."""

    forms: tuple[Step, ...]
    names: tuple[str, ...]  # of tensors and files
    starts: tuple[tuple[int, ...], ...]  # first indices of boxes
    more: tuple[More, ...]
    rows: Rows  # of ROW

    @classmethod
    def of(cls, steps: Iterable[Step]) -> "Steps":
        """Return some steps as columns."""
        gathered = Gathered()
        for step in steps:
            gathered.add(step)
        return gathered.steps()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Step: ...
    @overload
    def __getitem__(self, at: slice) -> "Steps": ...
    def __getitem__(self, at: int | slice) -> "Step | Steps":
        return self.at(at) if isinstance(at, slice) else self._step(self.rows[at].item())

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, self.rows.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # compared by what it holds

    def __repr__(self) -> str:
        return f"Steps({[*self]})"

    def at(self, rows: slice | NDArray[Any]) -> Self:
        """Return some of the steps."""
        return type(self)(self.forms, self.names, self.starts, self.more, self.rows[rows])

    def where(self, holds: Callable[[Step], bool]) -> Self:
        """Return the steps whose form is such; it is asked once a form."""
        return self.at(np.array([holds(form) for form in self.forms], bool)[self.rows["form"]])

    def only(self, kind: type[T]) -> Iterator[T]:
        """Yield the steps of a kind."""
        for step in self.where(lambda form: isinstance(form, kind)):
            assert isinstance(step, kind), "the form says so"
            yield step

    def count(self, of: Callable[[Step], T]) -> Counter[T]:  # type: ignore[override]  # of a sequence it counts what is equal
        """Return of how many steps this is said; a form is asked once."""
        found = Counter[T]()
        for form, number in zip(self.forms, np.bincount(self.rows["form"], minlength=len(self.forms)).tolist(), strict=True):
            if number:
                found[of(form)] += number
        return found

    def _step(self, row: tuple[int, ...]) -> Step:
        """Fill in what a form leaves open."""
        form, tensor, start, more, source, target, scales, outer, source_at, target_at, first, scales_at, outer_at = row
        names, step = self.names, self.forms[form]

        def place(open_: Place, file: int, offset: int) -> Place:
            return Place(names[file], offset, open_.strides, open_.dtype, open_.space)

        def encoding(open_: Encoding) -> Encoding:
            over = None if open_.outer is None else place(open_.outer, outer, outer_at)
            return Encoding(open_.recipe, open_.shape, first, place(open_.scales, scales, scales_at), over)

        box = names[tensor], self.starts[start], step.shape
        match step:
            case Move():
                return Move(
                    *box, place(step.source, source, source_at), place(step.target, target, target_at), step.add, step.function
                )
            case Make():
                given, *amax = self.more[more]
                here, there = place(step.source, source, source_at), place(step.target, target, target_at)
                return Make(step.function, *box, here, there, encoding(step.encoding), tuple(map(str, amax)), given)  # type: ignore[arg-type]
            case Product():
                ends = (place(step.source, source, source_at), place(step.factor, scales, scales_at))
                return Product(*box, *ends, place(step.target, target, target_at), step.along)
            case Same():
                return Same(*box, place(step.source, source, source_at), place(step.other, target, target_at))
            case Measure():
                coded = None if step.encoding is None else encoding(step.encoding)
                return Measure(*box, place(step.source, source, source_at), str(self.more[more][0]), coded)
            case Fill():
                return Fill(box[0], step.shape, place(step.target, target, target_at))
            case Put():
                return Put(box[0], step.shape, place(step.target, target, target_at), self.more[more])  # type: ignore[arg-type]


class Gathered:
    """Steps that are being gathered: tables in the order of what came first, and rows."""

    def __init__(self) -> None:
        self._forms: dict[Step, int] = {}
        self._names: dict[str, int] = {}
        self._texts: list[str] = []  # names by number, as far as they were asked for
        self._starts: dict[tuple[int, ...], int] = {}
        self._more: dict[object, tuple[int, More]] = {}
        self._rows: list[tuple[int, ...]] = []  # not yet in an array
        self._arrays: list[Rows] = []

    def form(self, step: Step) -> int:
        """Return the number of a step with nothing but its form."""
        return self._forms.setdefault(step, len(self._forms))

    def name(self, name: str) -> int:
        """Return the number of a tensor or a file."""
        return self._names.setdefault(name, len(self._names))

    def called(self, number: int) -> str:
        """Return the name that has a number."""
        while len(self._texts) <= number:
            self._texts += [*self._names][len(self._texts) :]
        return self._texts[number]

    def start(self, start: tuple[int, ...]) -> int:
        """Return the number of a first index."""
        return self._starts.setdefault(start, len(self._starts))

    def more(self, more: More) -> int:
        """Return the number of what else a step says; 0.0 and -0.0 are equal, and not the same."""
        return self._more.setdefault(repr(more) if 0.0 in more else more, (len(self._more), more))[0]

    def add(self, step: Step) -> None:
        """Take apart one step."""
        offsets = dict.fromkeys(("source", "target", "scales", "outer"), (-1, 0))
        first = 0

        def place(which: str, place: Place) -> Place:
            offsets[which] = self.name(place.file), place.offset
            return Place("", 0, place.strides, place.dtype, place.space)

        def encoding(encoding: Encoding) -> Encoding:
            nonlocal first
            first = encoding.first
            over = None if encoding.outer is None else place("outer", encoding.outer)
            return Encoding(encoding.recipe, encoding.shape, 0, place("scales", encoding.scales), over)

        start: tuple[int, ...] = ()
        more: More = ()
        form: Step
        match step:
            case Move():
                start, ends = step.start, (place("source", step.source), place("target", step.target))
                form = Move("", (), step.shape, *ends, step.add, step.function)
            case Make():
                start, more, ends = (
                    step.start,
                    (step.given, *step.amax),
                    (place("source", step.source), place("target", step.target)),
                )
                form = Make(step.function, "", (), step.shape, *ends, encoding(step.encoding))
            case Product():
                operands = (place("source", step.source), place("scales", step.factor))
                start, form = step.start, Product("", (), step.shape, *operands, place("target", step.target), step.along)
            case Same():
                start, form = step.start, Same("", (), step.shape, place("source", step.source), place("target", step.other))
            case Measure():
                coded = None if step.encoding is None else encoding(step.encoding)
                start, more = step.start, (step.amax,)
                form = Measure("", (), step.shape, place("source", step.source), "", coded)
            case Fill():
                form = Fill("", step.shape, place("target", step.target))
            case Put():
                more, form = step.values, Put("", step.shape, place("target", step.target), ())
        ids = self.form(form), self.name(step.tensor), self.start(start), self.more(more)
        self._rows.append((*ids, *(file for file, _ in offsets.values()), *_in_order(offsets, first)))

    def __len__(self) -> int:
        return sum(map(len, self._arrays)) + len(self._rows)

    def rows(self, rows: Rows) -> None:
        """Take rows whose numbers are those of this."""
        self._settle()
        self._arrays.append(rows)

    def row(self, row: tuple[int, ...]) -> None:
        """Take one row whose numbers are those of this."""
        self._rows.append(row)

    def take(self, steps: Steps) -> None:
        """Take steps from other columns."""
        made = steps.rows.copy()

        def renumber(columns: Sequence[str], table: Sequence[T], number: Callable[[T], int]) -> None:
            new = np.full(len(table) + 1, -1, np.int32)  # -1 is its last: it stays what it is
            for each in dict.fromkeys(chain.from_iterable(made[column].tolist() for column in columns)):
                if each >= 0:  # in the order in which rows name them: equal steps have equal tables, wherever they come from
                    new[each] = number(table[each])
            for column in columns:
                made[column] = new[made[column]]

        renumber(["form"], steps.forms, self.form)
        renumber(["source", "target", "scales", "outer", "tensor"], steps.names, self.name)
        renumber(["start"], steps.starts, self.start)
        renumber(["more"], steps.more, self.more)
        self.rows(made)

    def steps(self) -> Steps:
        """Return what was gathered."""
        self._settle()
        more = tuple([more for _, more in self._more.values()])
        rows = np.concatenate([np.empty(0, ROW), *self._arrays])
        return Steps(tuple(self._forms), tuple(self._names), tuple(self._starts), more, rows)

    def anew(self) -> "Gathered":
        """Return one without rows, whose tables are those of this."""
        other = Gathered()
        other._forms, other._names, other._starts, other._more = self._forms, self._names, self._starts, self._more
        return other

    def _settle(self) -> None:
        if self._rows:
            self._arrays.append(np.array(self._rows, ROW))
            self._rows = []


def _in_order(offsets: Mapping[str, tuple[int, int]], first: int) -> tuple[int, ...]:
    source, target, scales, outer = (offset for _, offset in offsets.values())
    return source, target, first, scales, outer


def fall_into(starts: tuple[Any, Any, Any], places: tuple[Any, Any]) -> NDArray[np.int64]:
    """Return for each place (file, offset) the last start at it or before it, -1 for none.

    A start is a file, an offset, and what comes first of those at one offset.

    >>> fall_into(([0, 0, 1], [8, 20, 8], [0, 0, 0]), ([0, 0, 1, 2], [19, 20, 0, 9])).tolist()
    [0, 1, -1, -1]
    """
    count, number = len(starts[0]), len(places[0])
    where, offset = (np.concatenate([starts[column], places[column]]).astype(np.int64) for column in range(2))
    order = np.lexsort((np.concatenate([np.asarray(starts[2], np.int64), np.full(number, FAR)]), offset, where))
    last = np.maximum.accumulate(np.where(order < count, np.arange(len(order)), -1))
    found = np.empty(len(order), np.int64)
    found[order] = np.where(last < 0, -1, order[last])
    found = found[count:]
    found[where[found] != where[count:]] = -1
    return found


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Everything that a crossing will do."""

    source: str  # absolute path of the checkpoint's root
    fingerprint: str  # of the source's headers, sizes and times: a run refuses another one
    request: Mapping[str, object]  # what was asked for: target dialect, tp, pp, dtype, drop ... as given
    family: str  # name of the family that ties both sides
    files: tuple[TargetFile, ...]
    texts: tuple[TextFile, ...]  # written last
    assets: tuple[AssetFile, ...]
    steps: Steps
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names of what is left behind
    proof: Mapping[str, int]  # counts that the coverage proof established
    memory: int  # bytes of private memory that the crossing may use: the budget, which says how many threads a machine starts
    window: int  # bytes of one buffer
    raws: tuple[RawFile, ...] = ()  # a store's metadata
    scratch: TargetFile = NO_SCRATCH  # the matrices that are quantized
    factors: TargetFile = NO_FACTORS  # the matrices of adapters, which moves assemble where a weight needs them
    updates: tuple[Update, ...] = ()  # the weights that adapters change
    notes: Mapping[str, str] = field(default_factory=dict)  # what a person should know before it is done: subject -> a line
    unused: Mapping[str, str] = field(
        default_factory=dict
    )  # argument of the source's -> what it says and the program did not do
    accepted: Mapping[str, str] = field(default_factory=dict)  # argument -> what the source does and the target need not
    needs: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the program that loads the target must be told, as plain values

    def __repr__(self) -> str:
        nbytes = sum(file.nbytes for file in self.files)
        target = f"to {self.request.get('to')!r}: {len(self.steps):,} steps, {len(self.files):,} files, {nbytes:,} bytes"
        return f"Plan({self.source!r} {target})"
