"""Axes folded into one dimension: which of their indices fall into an interval of it.

The dimension ``(kv * )`` of a fused weight holds, for the query part, the axes ``kv rep dim`` with strides that leave room for
the key and value rows::

    index = offset + kv * 6 + rep * 2 + dim        q q q q k v  q q q q k v ...

An interval of the dimension that cuts through this is not a box of (kv, rep, dim), but always a few boxes.
"""

from collections.abc import Sequence

Span = tuple[int, int]  # first index and number of indices along one axis


def within(extents: Sequence[int], strides: Sequence[int], offset: int, low: int, high: int) -> list[tuple[Span, ...]]:
    """Return the boxes of axes whose index ``offset + sum(i * stride)`` lies in ``[low, high)``.

    Extents count indices, strides and bounds are in indices of the dimension. Axes are nested: each stride is at least the reach of
    the axes after it in order of stride; their order in the arguments is free and kept in the answer.

    >>> within((2, 4), (6, 1), 0, 0, 8)
    [((0, 1), (0, 4)), ((1, 1), (0, 2))]
    >>> within((2, 4), (6, 1), 0, 4, 6)
    []
    """
    order = sorted(range(len(extents)), key=lambda axis: -strides[axis])
    boxes = _nested([(extents[axis], strides[axis]) for axis in order], offset, low, high)
    position = {axis: place for place, axis in enumerate(order)}
    return [tuple(box[position[axis]] for axis in range(len(extents))) for box in boxes]


def _nested(axes: list[tuple[int, int]], offset: int, low: int, high: int) -> list[tuple[Span, ...]]:
    reach = 1 + sum((extent - 1) * stride for extent, stride in axes)
    if any(extent == 0 for extent, _ in axes) or offset >= high or offset + reach <= low:
        return []
    if low <= offset and offset + reach <= high:
        return [tuple((0, extent) for extent, _ in axes)]
    (extent, stride), inner = axes[0], axes[1:]
    inner_reach = 1 + sum((n - 1) * s for n, s in inner)
    if stride == 0:  # one index along this axis: the interval is decided further inside
        return [((0, extent), *box) for box in _nested(inner, offset, low, high)]
    first = max(0, -((offset - low) // stride))  # first index that starts at or after low
    last = min(extent, (high - inner_reach - offset) // stride + 1)  # one past the last index that ends before high
    boxes = []
    for index in range(max(0, first - 1 - (inner_reach - 1) // stride), min(first, extent)):
        boxes += [((index, 1), *box) for box in _nested(inner, offset + index * stride, low, high)]
    if first < last:
        boxes.append(((first, last - first), *((0, n) for n, _ in inner)))
    for index in range(max(first, last), min(extent, -((offset - high) // stride))):
        boxes += [((index, 1), *box) for box in _nested(inner, offset + index * stride, low, high)]
    return boxes
