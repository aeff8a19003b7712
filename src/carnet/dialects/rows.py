"""A *row* ties one stored name to the canonical tensors inside it; a *dialect* is all rows of one program.

Rows have no direction. A source is read by the rows whose names are there; a target is written by the rows of one spelling.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as having
from itertools import product

from carnet.algebra.layout import JOIN, BadPattern, Parts, Pattern, parse
from carnet.dialects.configs import Table
from carnet.dialects.kinds import RANKS, Kind
from carnet.model.fields import SET, Condition, Config, Value
from carnet.model.model import value
from carnet.model.tensors import AXES, BY_PART, NORM

# field -> its value, of the stored shapes by name and of the other fields
ToldBy = Mapping[str, Callable[[Mapping[str, tuple[int, ...]], Config], Value]]
PLACES = ("layer", "inner")  # numbers in a name that are of no axis
MODULE = {"spelling": "module"}  # a name inside the running module: read where a checkpoint has it, never written


@dataclass(frozen=True, slots=True)
class Row:
    """One stored tensor of a dialect."""

    # without the dialect's prefix, "/" before one that never has it; ``{layer}`` for its number, ``{expert}`` or other axes where each
    # index has a tensor of its own: ``{kv rep}`` for the number of a head
    name: str
    pattern: Pattern
    # what tensor parallelism cuts in a rank's file: an axis, "embedding" (as asked for), "" for a copy on every rank; "once": the
    # experts, and the first of the ranks that share each has it, where others have zeros
    cut: str
    dtype: str  # element type whatever the others have; "" for the model's own
    when: Condition  # what a layer must be for the name to mean this
    written: Condition  # of several names for one thing: where a target has this one; a source's names say themselves
    whole: bool  # a norm that is stored as it is where the dialect's others are stored less one
    stored: Pattern | None  # the shape in the file, where the pattern's is another view of the same elements in the same order
    # weights whose adapters have one A, or each its own: which of both is written says ``joined`` in ``written``
    joined: tuple[str, ...] = ()

    @property
    def inside(self) -> bool:
        """Say whether it is a layer's: its name has the number, or what it holds is there in one layer alone."""
        return "{layer}" in self.name or BY_PART[self.pattern.parts[0][0]].stage == "layer"


@dataclass(frozen=True, slots=True)
class TowerRow:
    """How a program stores a tensor of a tower; a "*" in both names is a number, "**" at their end whatever follows."""

    name: str  # in a Hugging Face folder
    stored: str  # here
    heads: int = 0  # of so many heads, each with three projections: a Hugging Face folder has the projections outermost
    order: tuple[tuple[int, ...], ...] = ()  # per dimension here the factors in it, outermost first; () as a folder has them


@dataclass(frozen=True, slots=True)
class Constant:
    """A stored tensor that holds no weight, and the same number in every place."""

    name: str
    dtype: str  # "own" for that of the weights
    shape: tuple[int, ...]
    value: float
    style: str = ""  # it is there beside codes of this style alone; "" always
    cached: str = ""  # a checkpoint's scale of cached keys ("k") or values ("v") takes its place


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one program stores one family."""

    kind: Kind  # of checkpoint
    architecture: str  # what its config calls the family; "" where one name serves all
    prefixes: tuple[str, ...]  # what may stand before every name; the first is written
    rows: tuple[Row, ...]
    stacked: bool  # a layer's tensors may be stored for all layers at once, the layer as first dimension
    writes_tied: bool  # stores the head of a tied model a second time
    further: tuple[str, ...]  # what ``{layer}`` names start with; what instead, or also, in layers that predict further tokens
    zero_centred: bool | None  # stores norms less one; None where the config says
    embedding: str  # how ranks share the embedding unless asked otherwise: none (a copy each), rows, columns
    table: Table  # config fields and their places
    dropped: Mapping[str, str]  # name pattern -> why tensors of this name are no weights
    optional: Mapping[
        str, Mapping[str, Callable[[object], object]]
    ]  # name pattern -> config keys, as they are without such tensors
    pads: Mapping[str, Callable[[Config], int]]  # field that is an axis -> its length with the zeros that the dialect needs
    # fields that stored shapes tell
    told_by: ToldBy = having(default_factory=dict)
    # end of a stored name -> what stands beside that tensor, named from its module's module
    constants: Mapping[str, tuple[Constant, ...]] = having(default_factory=dict)
    # part of the name under which a module is registered first -> the name that its file has
    aliases: Mapping[str, str] = having(default_factory=dict)
    on_all_stages: frozenset[str] = frozenset()  # canonical tensors outside the layers
    plain: bool = False  # its class loads no codes
    texts: bool = True  # its class makes texts by itself, and so wants a tokenizer
    tower: tuple[TowerRow, ...] = ()  # what of a tower has other names than in a Hugging Face folder, or another order

    def __post_init__(self) -> None:
        """Refuse rows of one name that could both apply, and rows that would both write one tensor."""
        for what, found in (("apply to one layer", _alike(self.rows)), ("write one tensor", _twice(self.rows))):
            unclear = dict.fromkeys(found)
            if unclear:
                raise ValueError(f"two rows of {self.name} {self.architecture} {what}: {', '.join(unclear)}")

    @property
    def name(self) -> str:
        """Return what options and documents call its kind."""
        return self.kind.name

    @property
    def parts(self) -> frozenset[str]:
        """Return the canonical tensors that its rows have, named within their layer."""
        return frozenset(part for row in self.rows for part, _ in row.pattern.parts)

    @property
    def ranked(self) -> bool:
        """Say whether every rank has its own file, with its share of each tensor and its own layer numbers."""
        return self.kind.files == RANKS


def _alike(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the names under which two rows mean different things of one layer: nothing would say which."""
    needs = {id(row): _needs(row) for row in rows}
    named: dict[str, list[Row]] = {}
    for row in rows:
        for other in named.setdefault(row.name, []):
            same = row.pattern == other.pattern and row.written != other.written  # one thing, written in one case or the other
            apart = any(_excludes(*pair) for pair in product(needs[id(row)], needs[id(other)]))
            if not same and not apart:
                yield row.name
        named[row.name].append(row)


def _twice(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the tensors that a target would hold under two names of one layer, or of the model."""
    writers: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        for part, _ in row.pattern.parts if row.written.get("spelling") != MODULE["spelling"] else ():
            others = writers.setdefault((part, row.inside), [])
            for other in (each for each in others if each is not row):
                facts = ([*_needs(each), *each.written.items()] for each in (row, other))
                if not any(_excludes(*pair) for pair in product(*facts)):
                    yield f"{part} ({other.name}, {row.name})"
            others.append(row)


def _needs(row: Row) -> list[tuple[str, object]]:
    """Return the facts that a layer has wherever a row applies: its own, and those of the tensors in it."""
    of_tensors = [fact for part, _ in row.pattern.parts for fact in BY_PART[part].when.items()]
    return [*row.when.items(), *of_tensors]


def _excludes(one: tuple[str, object], other: tuple[str, object]) -> bool:
    (name, wanted), (again, found) = one, other
    return name == again and (not found if wanted is SET else not wanted if found is SET else wanted != found)


def modules_of(dialect: Dialect, tensor: str) -> list[str]:
    """Return what the module of a tensor outside the layers may be called; the first is written."""
    names = [row.name for row in dialect.rows if row.pattern.parts[0][0] == tensor and not row.inside]
    return [name.removesuffix(".weight").removeprefix("/") for name in names]


def row(
    name: str,
    text: str,
    tensor: str,
    *,
    cut: str = "",
    dtype: str = "",
    when: Condition | None = None,
    written: Condition | None = None,
    whole: bool = False,
    stored: str = "",
) -> Row:
    """Write the row of a stored tensor that holds one canonical tensor, named within its layer."""
    part = {tensor: ""}
    return fuse(name, text, part, cut=cut, dtype=dtype, when=when, written=written, whole=whole, stored=stored)


def biased(module: str, text: str, tensor: str, *, when: Mapping[str, object] | None = None) -> tuple[Row, Row]:
    """Write the rows of a module's weight and of its bias, which is as long as the weight's first dimension."""
    bias = text.split(maxsplit=1)[0]
    return row(f"{module}.weight", text, tensor, when=when), row(f"{module}.bias", bias, f"{tensor}_bias", when=when)


def fuse(
    name: str,
    text: str,
    parts: Parts,
    *,
    cut: str = "",
    dtype: str = "",
    when: Condition | None = None,
    written: Condition | None = None,
    whole: bool = False,
    stored: str = "",
) -> Row:
    """Write the row of a stored tensor that joins several, in stored order: tensor, named within its layer -> axes.

    Raises BadPattern where a pattern says nothing, or has other axes than its tensors.
    """
    pattern, shape = parse(text, parts, AXES), parse(stored, parts, AXES) if stored else None
    for each in (pattern, shape or pattern):
        _check_axes(name, each, cut)
    return Row(name, pattern, cut, dtype, when or {}, written or {}, whole, shape)


def numbered(name: str) -> tuple[str, ...]:
    """Return the axes whose indices a name has, outermost first.

    >>> numbered("layers.{layer}.norms.{kv rep}.weight")
    ('kv', 'rep')
    """
    found = [text.split() for text in re.findall(r"{([^}]*)}", name) if text not in PLACES]
    return tuple(axis for axes in found for axis in axes)


def _check_axes(name: str, pattern: Pattern, cut: str) -> None:
    """Raise BadPattern where it has other axes than its tensors have: some place of theirs would be nowhere, or of another one."""
    outside = [axis for axes in pattern.dims for axis in axes if axis != JOIN] + [*numbered(name)]
    for part, inner in pattern.parts:
        if part not in BY_PART:
            raise BadPattern(f"{name}: there is no tensor {part!r}", pattern.text, 0)
        wanted = BY_PART[part].axes
        found = (*outside, *(axis for axis in inner if axis != JOIN))
        if sorted(found) != sorted(wanted):
            what = f"{name}: {part} has the axes {' '.join(wanted)}, not {' '.join(found)}"
            raise BadPattern(what, pattern.text, len(pattern.text))
        if cut not in ("", "embedding", "once", *wanted):
            raise BadPattern(f"{name}: ranks cannot cut {cut!r}, which {part} does not have", pattern.text, 0)


def is_zero_centred(dialect: Dialect, config: Config) -> bool:
    """Say whether a dialect stores the norms of a model less one."""
    return bool(value(config, "zero_centred")) if dialect.zero_centred is None else dialect.zero_centred


def less_one(dialect: Dialect, config: Config, names: Iterable[str] = ()) -> frozenset[str]:
    """Return the norms that a dialect stores less one, named within their layer: all, or none, but for those of rows that say so.

    Of rows that a norm has under several names those count that a source has: ``names``.
    """
    rows = dialect.rows if is_zero_centred(dialect, config) else ()
    tails = {row.name.rpartition("}.")[2]: row.pattern.parts[0][0] for row in rows if row.whole}
    there = {tails[tail] for name in names for tail in tails if name.endswith(tail)}
    parts = (part for row in rows if not row.whole for part, _ in row.pattern.parts)
    return frozenset(part for part in parts if BY_PART[part].role == NORM and part not in there)
