"""A *row* ties one stored name to the canonical tensors inside it; a *dialect* is all rows of one program.

Rows have no direction. A source is read by the rows whose names are there; a target is written by the rows of one spelling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from carnet.algebra.layout import Pattern, parse
from carnet.dialects.configs import Table
from carnet.dialects.kinds import RANKS, Kind
from carnet.model.fields import Condition, Config
from carnet.model.tensors import AXES


@dataclass(frozen=True, slots=True)
class Row:
    """One stored tensor of a dialect."""

    name: str  # without the dialect's prefix, "/" before one that never has it; ``{layer}`` and ``{expert}`` for their numbers
    pattern: Pattern
    cut: str  # what tensor parallelism cuts in a rank's file: an axis, "embedding" (as asked for), "" for a copy on every rank
    spelling: str  # "" in every spelling; else only in the named one ("te", "local")
    dtype: str  # element type whatever the others have; "" for the model's own
    only_further: bool  # only in layers that predict further tokens
    when: Condition  # what a layer must be for a target to have it; a source is read by what is there
    stored: Pattern | None  # the shape in the file, where the pattern's is another view of the same elements in the same order


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

    @property
    def name(self) -> str:
        """Return what options and documents call its kind."""
        return self.kind.name

    @property
    def ranked(self) -> bool:
        """Say whether every rank has its own file, with its share of each tensor and its own layer numbers."""
        return self.kind.files == RANKS


def modules_of(dialect: Dialect, tensor: str) -> list[str]:
    """Return what the module of a tensor outside the layers may be called; the first is written."""
    names = [row.name for row in dialect.rows if row.pattern.parts[0][0] == tensor and "{layer}" not in row.name]
    return [name.removesuffix(".weight").removeprefix("/") for name in names]


def row(
    name: str,
    text: str,
    tensor: str,
    *,
    cut: str = "",
    spelling: str = "",
    dtype: str = "",
    only_further: bool = False,
    when: Mapping[str, object] | None = None,
    stored: str = "",
) -> Row:
    """Write the row of a stored tensor that holds one canonical tensor, named within its layer."""
    part = {tensor: ""}
    return fuse(name, text, part, cut=cut, spelling=spelling, dtype=dtype, only_further=only_further, when=when, stored=stored)


def biased(module: str, text: str, tensor: str, *, when: Mapping[str, object] | None = None) -> tuple[Row, Row]:
    """Write the rows of a module's weight and of its bias, which is as long as the weight's first dimension."""
    bias = text.split(maxsplit=1)[0]
    return row(f"{module}.weight", text, tensor, when=when), row(f"{module}.bias", bias, f"{tensor}_bias", when=when)


def fuse(
    name: str,
    text: str,
    parts: Mapping[str, str],
    *,
    cut: str = "",
    spelling: str = "",
    dtype: str = "",
    only_further: bool = False,
    when: Mapping[str, object] | None = None,
    stored: str = "",
) -> Row:
    """Write the row of a stored tensor that joins several, in stored order: tensor, named within its layer -> axes."""
    shape = parse(stored, parts, AXES) if stored else None
    return Row(name, parse(text, parts, AXES), cut, spelling, dtype, only_further, when or {}, shape)
