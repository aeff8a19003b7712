"""How a program stores the tensors of a tower: under which names, and in which order of their factors.

A program that stores a tensor of all layers at once does so here, too: the number in its name is an axis then.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from carnet.algebra.layout import Pattern, Share, fold, view
from carnet.dialects.entry import Entry, Like
from carnet.dialects.rows import Dialect, TowerRow
from carnet.dialects.units import Present
from carnet.errors import BadCheckpoint
from carnet.model.fields import Config
from carnet.model.tower import Carried, Dims, tower

Stacked = dict[str, list[tuple[int, Carried, TowerRow]]]  # name -> the tensors in it, with their places
NUMBER = ".*."  # in a name, where a stacked one has a dot
AS_IT_IS = TowerRow("**", "**")


def carried(dialect: Dialect, config: Config, present: Present) -> Iterator[Entry]:
    """Yield the entries of a tower: of a source those that are there, of a target all."""
    stacked: Stacked = {}
    for each in tower(config):
        row, stands = _row(dialect, each.name)
        name = _filled(row.stored, stands)
        if present is not None and ("", each.name) in present and name != each.name:  # lent by a folder, under its name there
            yield _entry(each.name, replace(row, order=()), [each], stacked=False)
            continue
        if dialect.stacked and NUMBER in row.stored:
            together = _filled(row.stored.replace(NUMBER, "."), stands[1:])
            if present is None or ("", together) in present:
                stacked.setdefault(together, []).append((int(stands[0]), each, row))
                continue
        if present is None or ("", name) in present:
            yield _entry(name, row, [each], stacked=False)
    for name, held in stacked.items():
        held.sort(key=lambda place: place[0])
        yield _entry(name, held[0][2], [each for _, each, _ in held], stacked=True)


def _entry(name: str, row: TowerRow, held: Sequence[Carried], *, stacked: bool) -> Entry:
    first = held[0]
    axes = first.tensor.tensor.axes
    order = row.order or _in_order(first.dims)
    dims = tuple(tuple(axes[at] for at in each) for each in order)
    shares = {axis: Share(0, length, length) for axis, length in zip(axes, first.shape, strict=True)}
    part = ((first.tensor.tensor.part, ()),)
    pattern = Pattern(name, dims, part)
    folded, ahead = fold(pattern, shares), dict[str, Share]()
    if stacked:
        ahead = {"layer": Share(0, len(held), len(held))}
        pattern = Pattern(name, (("layer",), *dims), part)
        folded = fold(pattern, {**shares, **ahead})
    views = tuple(view(folded.slots[0], "", axes, shares, {"layer": at} if stacked else {}) for at in range(len(held)))
    like = Like(folded.shape, folded.shape, views, (), first.dtype, pattern, {**shares, **ahead}, (axes,), "")
    return Entry("", name, like, tuple((each.tensor,) for each in held))


def _in_order(dims: Dims) -> tuple[tuple[int, ...], ...]:
    """Return for each dimension the numbers of its factors.

    >>> _in_order(((3, 2, 16), (32,)))
    ((0, 1, 2), (3,))
    """
    ends = [sum(map(len, dims[:at])) for at in range(len(dims) + 1)]
    return tuple(tuple(range(*pair)) for pair in pairwise(ends))


def found(dialect: Dialect, name: str, dtype: str, shape: tuple[int, ...], where: str) -> Iterator[Carried]:
    """Yield the tensors of a tower that a stored one holds; raise BadCheckpoint where its heads do not divide it."""
    for row in (*dialect.tower, AS_IT_IS):
        if (stands := _stands(row.stored, name)) is not None:
            own = replace(_row(dialect, name)[0], order=()) if row is AS_IT_IS else row
            yield Carried(_filled(row.name, stands), dtype, _dims(own, name, shape, where))
            return
        together = row.stored.replace(NUMBER, ".") if dialect.stacked and shape else row.stored
        if together != row.stored and (stands := _stands(together, name)) is not None:
            dims = _dims(row, name, shape[1:], where)
            yield from (Carried(_filled(row.name, (str(layer), *stands)), dtype, dims) for layer in range(shape[0]))
            return


def _dims(row: TowerRow, name: str, shape: tuple[int, ...], where: str) -> Dims:
    """Return the factors of a Hugging Face folder's dimensions, of the shape that is stored here."""
    if row.heads and shape:
        if shape[0] % (3 * row.heads):
            facts = {"where": where, "tensor": name, "found": [*shape], "heads": row.heads}
            raise BadCheckpoint(f"the heads of the tower do not divide {name!r}", facts)
        return ((3, row.heads, shape[0] // (3 * row.heads)), *((length,) for length in shape[1:]))
    if len(row.order) == len(shape):
        return tuple((length,) for _, length in sorted(zip(row.order, shape, strict=True)))
    return tuple((length,) for length in shape)


def _row(dialect: Dialect, name: str) -> tuple[TowerRow, tuple[str, ...]]:
    """Return the row of a tensor by the name that it has in a Hugging Face folder, and what stands for its stars."""
    return next((row, stands) for row in (*dialect.tower, AS_IT_IS) if (stands := _stands(row.name, name)) is not None)


def _stands(template: str, name: str) -> tuple[str, ...] | None:
    match = _expression(template).fullmatch(name)
    return None if match is None else match.groups()


@lru_cache(maxsize=256)
def _expression(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)"))


def _filled(template: str, stands: tuple[str, ...]) -> str:
    left = iter(stands)
    return re.sub(r"\*+", lambda _: next(left), template)
