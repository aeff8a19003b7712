"""An *entry* is one stored tensor that a dialect has for a model: its name, its shape, and the views of canonical tensors in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from carnet.algebra.box import Box
from carnet.algebra.layout import JOIN, Pattern, Share, View
from carnet.model.tensors import CARRIED, Canonical

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row says about a stored tensor, before it became views: a second opinion starts from here."""

    pattern: Pattern
    shares: Mapping[str, Share]  # of every axis
    parts: tuple[tuple[str, ...], ...]  # per part of the pattern: the axes of its canonical tensor
    cut: str  # what tensor parallelism cuts
    tensors: tuple[
        tuple[Canonical, ...], ...
    ]  # per index of the layer dimension (one, if there is none): the tensor in each part


@dataclass(frozen=True, slots=True)
class Like:
    """What the stored tensors of a row have in common that differ in their names alone: those of all layers of a kind."""

    shape: tuple[int, ...]  # elements
    stored: tuple[int, ...]  # the shape in the file: another view of the same elements, or the same
    views: tuple[View, ...]  # disjoint, of no name; together with the padding they are the whole tensor
    padding: tuple[Box, ...]  # stored boxes that hold no weight
    dtype: str  # element type whatever the others have; "" for the model's own
    pattern: Pattern  # the same once more, as the row says it
    shares: Mapping[str, Share]
    parts: tuple[tuple[str, ...], ...]
    cut: str
    joined: tuple[str, ...] = ()  # of an adapter's A, the weights that it is for, where they have one


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor."""

    unit: str  # the rank that holds it: "rank3"; "" where names are global
    name: str
    like: Like
    tensors: tuple[tuple[Canonical, ...], ...]  # per index of the layer dimension (one, if there is none): that in each part

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape, in elements."""
        return self.like.shape

    @property
    def stored(self) -> tuple[int, ...]:
        """Return its shape in the file."""
        return self.like.stored

    @property
    def dtype(self) -> str:
        """Return its element type whatever the others have; "" for the model's own."""
        return self.like.dtype

    @property
    def padding(self) -> tuple[Box, ...]:
        """Return the stored boxes that hold no weight."""
        return self.like.padding

    @property
    def padded(self) -> str:
        """Name the canonical tensor whose axis is padded; "" for none."""
        return self.tensors[0][0] if self.like.padding and len(self.tensors) == 1 else ""

    @property
    def names(self) -> tuple[Canonical, ...]:
        """Name the canonical tensor of each view."""
        return self.tensors[0] if len(self.tensors) == 1 else tuple([name for names in self.tensors for name in names])

    @property
    def views(self) -> tuple[View, ...]:
        """Return where the canonical tensors lie in it."""
        return tuple([View(n, v.box, v.origin, v.places) for n, v in zip(self.names, self.like.views, strict=True)])

    @property
    def reading(self) -> Reading:
        """Return what the row says of it."""
        return Reading(self.like.pattern, self.like.shares, self.like.parts, self.like.cut, self.tensors)


def turned(entry: Entry) -> Entry:
    """Return a matrix, or one for each expert, with rows and columns exchanged: another stored tensor of the same numbers."""
    like, (*alone, rows, columns) = entry.like, range(len(entry.shape))
    order = (*alone, columns, rows)

    def around(each: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(each[dim] for dim in order)

    views = tuple(
        replace(view, origin=around(view.origin), places=tuple((order[dim], stride) for dim, stride in view.places))
        for view in like.views
    )
    padding = tuple(Box(around(box.start), around(box.shape)) for box in like.padding)
    pattern = replace(like.pattern, dims=around(like.pattern.dims))
    stored = around(like.stored)
    return replace(
        entry, like=replace(like, shape=around(like.shape), stored=stored, views=views, padding=padding, pattern=pattern)
    )


def as_linear(entry: Entry) -> Entry:
    """Return a weight as a linear layer has it: [out, in]."""
    return turned(entry) if is_conv1d(entry) else entry


def is_conv1d(entry: Entry) -> bool:
    """Say whether the rows of a matrix are inputs, though its module has one weight as a linear layer has.

    The outputs are what a canonical weight begins with, after its experts.
    """
    axes = entry.like.parts[0]
    outputs = axes.index("expert") + 1 if "expert" in axes else 0
    return len(entry.shape) == 2 and len(axes) > outputs + 1 and entry.like.views[0].places[outputs][0] == 1


# what every folder keeps in one module with another, so that both have one scale
WITH = {"mla.k_rope": "mla.kv_a"}


def apart(entry: Entry) -> list[tuple[int, tuple[int, ...]]]:
    """Return the parts of a matrix, or of each expert's, that lie one after the other: rows, and the numbers of its views.

    What a folder keeps as one module is one part.
    """
    dim, like = len(entry.shape) - 2, entry.like
    if like.pattern.dims[-2] != (JOIN,):
        return [(entry.shape[dim], tuple(range(len(like.views))))]
    begins = [
        at for at, name in enumerate(entry.names) if WITH.get(name.tensor.part) not in {n.tensor.part for n in entry.names}
    ]
    ends = [*begins[1:], len(like.views)]
    rows = [like.views[at].origin[dim] for at in begins] + [entry.shape[dim]]
    return [(rows[n + 1] - rows[n], tuple(range(begins[n], ends[n]))) for n in range(len(begins))]


def is_matrix_beside(entry: Entry) -> bool:
    """Say whether it goes along as it is, and may be the weight of a linear layer to the program that reads it."""
    return entry.names[0].tensor.role == CARRIED and len(entry.shape) > 1 and entry.name.endswith(".weight")
