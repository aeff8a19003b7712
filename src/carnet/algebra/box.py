"""A *box* is an N-d interval of indices: where it starts and how far it reaches along each axis.

::

              0   2       6
            0 +---+-------+
              |   |       |        Box(start=(0, 2), shape=(3, 4)): rows 0-2, columns 2-5
            3 +---+-------+

Everything that is cut (a rank's share, a chunk of a checkpoint, one step of a plan) is a box. Nothing here knows what the
axes mean. Boxes of rank 0 hold one element.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(frozen=True, slots=True)
class Box:
    """An N-d interval."""

    start: tuple[int, ...]  # first index, per axis
    shape: tuple[int, ...]  # number of indices, per axis


def whole(shape: Sequence[int]) -> Box:
    """Return the box that covers a shape."""
    return Box((0,) * len(shape), tuple(shape))


def volume(box: Box) -> int:
    """Return the number of elements in a box (1 for rank 0).

    >>> volume(Box((0, 2), (3, 4)))
    12
    """
    return math.prod(box.shape)


def intersect(a: Box, b: Box) -> Box | None:
    """Return what two boxes share, or None where they share nothing.

    >>> intersect(Box((0, 0), (4, 4)), Box((2, 3), (4, 4)))
    Box(start=(2, 3), shape=(2, 1))
    >>> intersect(Box((0,), (2,)), Box((2,), (2,))) is None
    True
    """
    if a.start == b.start and a.shape == b.shape:
        return None if 0 in a.shape else a
    start, shape = [], []
    for a0, an, b0, bn in zip(a.start, a.shape, b.start, b.shape, strict=True):
        low = a0 if a0 > b0 else b0
        high = min(a0 + an, b0 + bn)
        if high <= low:
            return None
        start.append(low)
        shape.append(high - low)
    return Box(tuple(start), tuple(shape))


def subtract(a: Box, b: Box) -> list[Box]:
    """Return disjoint boxes that cover what is in ``a`` and not in ``b``.

    >>> subtract(Box((0, 0), (4, 4)), Box((1, 0), (2, 2)))
    [Box(start=(0, 0), shape=(1, 4)), Box(start=(3, 0), shape=(1, 4)), Box(start=(1, 2), shape=(2, 2))]
    """
    shared = intersect(a, b)
    if shared is None:
        return [a]
    rest, start, shape = [], list(a.start), list(a.shape)
    for axis in range(len(start)):
        low, high = shared.start[axis], shared.start[axis] + shared.shape[axis]
        for begin, end in ((start[axis], low), (high, start[axis] + shape[axis])):
            if begin < end:
                rest.append(Box((*start[:axis], begin, *start[axis + 1 :]), (*shape[:axis], end - begin, *shape[axis + 1 :])))
        start[axis], shape[axis] = low, high - low
    return rest


def overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Return two boxes that share an element, or None where all are disjoint.

    Sweeps along the axis that tells them apart best, so that thousands of slices of one tensor meet their neighbours only.
    """
    filled = [box for box in boxes if volume(box)]
    if filled and not filled[0].start:
        return (filled[0], filled[1]) if len(filled) > 1 else None
    active: list[Box] = []
    axis = _telling(filled)
    for box in sorted(filled, key=lambda box: box.start[axis]):
        active = [other for other in active if other.start[axis] + other.shape[axis] > box.start[axis]]
        for other in active:
            if intersect(other, box) is not None:
                return other, box
        active.append(box)
    return None


def _telling(boxes: Sequence[Box]) -> int:
    """Return the axis along which boxes begin at the most places."""
    axes = range(len(boxes[0].start)) if boxes else range(0)
    return max(axes, key=lambda axis: len({box.start[axis] for box in boxes}), default=0)


def uncovered(container: Box, boxes: Sequence[Box]) -> Box | None:
    """Return a part of ``container`` that no box covers, or None where everything is covered.

    >>> uncovered(Box((0,), (4,)), [Box((0,), (1,)), Box((2,), (2,))])
    Box(start=(1,), shape=(1,))
    """
    rest = [container] if volume(container) and container not in boxes else []
    axis = _telling(boxes)
    for box in sorted(boxes, key=lambda box: box.start[axis : axis + 1]):  # what is left then lies before or around the next
        rest = [piece for part in rest for piece in subtract(part, box)]
        if not rest:
            return None
    return rest[0] if rest else None


def tiles(container: Box, boxes: Sequence[Box]) -> bool:
    """Say whether the boxes cover the container exactly once: inside, disjoint, nothing left.

    >>> tiles(Box((0,), (4,)), [Box((0,), (2,)), Box((2,), (2,))])
    True
    >>> tiles(Box((0,), (4,)), [Box((0,), (3,)), Box((2,), (1,))])
    False
    """
    if sum(volume(box) for box in boxes) != volume(container):
        return False
    inside = all(not volume(box) or intersect(container, box) == box for box in boxes)
    return inside and overlap(boxes) is None


def slices(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return where a box lies in an array of an outer one.

    >>> slices(Box((2, 5), (1, 3)), Box((2, 4), (4, 8)))
    (slice(0, 1, None), slice(1, 4, None))
    """
    return tuple(slice(s - o, s - o + n) for s, o, n in zip(box.start, outer.start, box.shape, strict=True))


def along(box: Box, axis: int) -> tuple[int, int]:
    """Return where a box begins along an axis, and how far it goes; a box of rank 0 has one place."""
    return (box.start[axis], box.shape[axis]) if box.start else (0, 1)


T = TypeVar("T")


class Line(Generic[T]):
    """Things that lie along one axis, in the order of their starts, so that thousands of them are not all compared."""

    def __init__(self, found: Iterable[T], interval: Callable[[T], tuple[int, int]]) -> None:
        self._interval = interval  # of a thing: its first index, and how many there are
        self.things = sorted(found, key=lambda thing: interval(thing)[0])
        self._starts = [interval(thing)[0] for thing in self.things]
        self._longest = max((interval(thing)[1] for thing in self.things), default=0)

    def add(self, thing: T) -> None:
        """Put a thing into its place."""
        start, length = self._interval(thing)
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self.things.insert(at, thing)
        self._longest = max(self._longest, length)

    def between(self, start: int, length: int) -> list[T]:
        """Return the things that may share an index with an interval."""
        low = bisect_left(self._starts, start - self._longest + 1)
        return self.things[low : bisect_left(self._starts, start + length)]


class Rack(Generic[T]):
    """Things that have boxes, of which those near a box are found along the axis that tells them apart best.

    >>> Rack(["a", "b", "c"], lambda thing: Box(("abc".index(thing), 0), (1, 4))).near(Box((1, 2), (2, 2)))
    ['b', 'c']
    """

    def __init__(self, things: Sequence[T], box_of: Callable[[T], Box]) -> None:
        boxes = [box_of(thing) for thing in things]
        self._things, self._axis = things, _telling(boxes)
        self._line = Line(range(len(boxes)), lambda at: along(boxes[at], self._axis))

    def near(self, box: Box) -> list[T]:
        """Return the things that may share something with a box, in the order in which they were given."""
        return [self._things[at] for at in sorted(self._line.between(*along(box, self._axis)))]
