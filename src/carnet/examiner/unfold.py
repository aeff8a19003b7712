"""Read a block of a canonical tensor out of a stored one by reshaping, as a person would with numpy.

The planner turns a pattern into strides; here the same pattern is carried out: slice the stored dimension, split it into its axes,
pick the part that is asked for, put the axes in order. A mistake in one of the two shows as a difference between them.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box
from carnet.algebra.layout import JOIN, Share
from carnet.dialects.entry import Reading

Array = NDArray[np.generic]
TURN = "turn"
Region = Callable[[Box], Array]  # returns a box of the stored tensor, as an array of its shape


def unfold(reading: Reading, part: int, at: int, box: Box, region: Region) -> Array:
    """Return a box of the canonical tensor in one part of a stored tensor.

    ``at`` is the index along the layer dimension, where there is one. The box is in canonical indices and must lie within the shares.
    """
    pattern, axes = reading.pattern, reading.parts[part]
    wanted = {axis: (s - reading.shares[axis].start, n) for axis, s, n in zip(axes, box.start, box.shape, strict=True)}
    wanted["layer"] = (at, 1)
    lengths = {axis: share.stop - share.start for axis, share in reading.shares.items()}
    # of parts that take turns each is one index of an axis between theirs
    which, many = pattern.turns()[part]
    wanted[TURN], lengths[TURN] = (which, 1), many
    inner = [TURN if axis == JOIN else axis for axis in pattern.parts[part][1]]
    widths = [math.prod(lengths[axis] for axis in axes if axis != JOIN) for _, axes in pattern.parts]
    lengths[JOIN], before, width = sum(widths), sum(widths[: part - which]), widths[part] * many
    start, shape, atoms = [], [], list[tuple[str, int]]()
    for dim in pattern.dims:
        first, length, left = _narrowed(dim, inner, before, wanted, lengths)
        start.append(first)
        shape.append(length)
        atoms += left
    stored = region(Box(tuple(start), tuple(shape))).reshape([length for _, length in atoms])
    names = [name for name, _ in atoms]
    if JOIN in names:
        stored, names = _pick(stored, names, inner, before, width, lengths)
    return _ordered(stored, names, axes, wanted)


def _narrowed(
    dim: Sequence[str],
    inner: Sequence[str],
    before: int,
    wanted: Mapping[str, tuple[int, int]],
    lengths: Mapping[str, int],
) -> tuple[int, int, list[tuple[str, int]]]:
    """Slice a stored dimension along its first axis of which more than one index is wanted.

    Returns the first index, the number of indices, and the axes that are left in it with their lengths.
    """
    waiting, kept, start = [*dim], list[tuple[str, int]](), 0
    while waiting:
        axis = waiting.pop(0)
        trailing = math.prod(lengths[other] for other in waiting)
        if axis == JOIN:  # from here on there is this part alone
            start += before * trailing
            waiting = [*inner, *waiting]
            continue
        first, count = wanted.get(axis, (0, lengths[axis]))
        start += first * trailing
        kept.append((axis, count))
        if count != 1:
            return start, count * trailing, kept + [(other, lengths[other]) for other in waiting]
    return start, 1, kept


def _pick(
    stored: Array, names: list[str], inner: Sequence[str], before: int, width: int, lengths: Mapping[str, int]
) -> tuple[Array, list[str]]:
    """Pick one part out of a join that is still folded: its indices, split into its own axes."""
    place = names.index(JOIN)
    stored = stored[(slice(None),) * place + (slice(before, before + width),)]
    shape = (*stored.shape[:place], *(lengths[axis] for axis in inner), *stored.shape[place + 1 :])
    return stored.reshape(shape), [*names[:place], *inner, *names[place + 1 :]]


def _ordered(stored: Array, names: list[str], axes: Sequence[str], wanted: Mapping[str, tuple[int, int]]) -> Array:
    """Restrict the axes that are still whole, drop those of other tensors, and put the rest in canonical order."""
    for place, name in reversed(list(enumerate(names))):
        first, count = wanted[name]
        if stored.shape[place] != count:
            stored = stored[(slice(None),) * place + (slice(first, first + count),)]
        if name not in axes:
            stored = stored[(slice(None),) * place + (0,)]
    kept = [name for name in names if name in axes]
    stored = stored.transpose([kept.index(axis) for axis in axes if axis in kept])
    for place, axis in enumerate(axes):
        if axis not in kept:  # an axis that only the name shows has one index here
            stored = np.expand_dims(stored, place)
    return stored


def share_box(axes: Sequence[str], shares: Mapping[str, Share]) -> Box:
    """Return the canonical box that the shares of a stored tensor give."""
    return Box(tuple(shares[axis].start for axis in axes), tuple(shares[axis].held for axis in axes))
