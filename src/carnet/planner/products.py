"""What a target holds of several canonical tensors, or of a part of one: where its boxes meet pieces of the operands.

::

    product   kv kv_lora q_lora   <-   mla.q_b, the first of   kv qk q_lora,   and   mla.k_b   kv nope kv_lora
    tail      kv rope    q_lora   <-   mla.q_b, the last of    kv qk q_lora
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from carnet.algebra.box import Box, intersect
from carnet.errors import NotSupported
from carnet.model.tensors import Canonical
from carnet.planner.decoding import begun
from carnet.planner.pieces import Piece, cut
from carnet.steps import Place, Product

INNER = 1  # the axis that is summed over, or of which the last indices are taken
# form, first index, elements, piece and offset of both operands, offset in the target
Found = tuple[Product, tuple[int, ...], int, tuple[int, int], tuple[int, int], int]


def tail(target: Piece, held: Sequence[Piece], size: int) -> Piece:
    """Return a piece of the last indices of an axis, so many of them, as one of the whole axis, whose pieces are ``held``."""
    start = list(target.box.start)
    start[INNER] += max(piece.box.start[INNER] + piece.box.shape[INNER] for piece in held) - size
    return replace(target, box=Box(tuple(start), target.box.shape))


def products(made: Canonical, target: Piece, right: Sequence[Piece], left: Sequence[Piece]) -> Iterator[Found]:
    """Yield the steps that write a piece of products; ``right`` and ``left`` are the pieces of the operands."""
    (batch, row, column), (heads, rows, columns) = target.box.start, target.box.shape
    depth = max(piece.box.start[INNER] + piece.box.shape[INNER] for piece in left)
    for at, right_ in enumerate(right):
        inside = intersect(right_.box, Box((batch, 0, column), (heads, depth, columns)))
        for number, left_ in enumerate(left) if inside is not None else ():
            assert inside is not None, "there is no other to meet"
            (first, _, begin), (count, deep, wide) = inside.start, inside.shape
            shared = intersect(left_.box, Box((first, 0, row), (count, depth, rows)))
            if shared is None:
                continue
            if right_.encoding or left_.encoding or deep < depth or shared.shape[INNER] < depth:
                why = "is stored as codes" if right_.encoding or left_.encoding else "is cut through its sums"
                facts = {"of": ", ".join(made.origins), "because": f"one of them {why}"}
                raise NotSupported(
                    f"carnet cannot make {made!r} of this source", facts, remedy="cross it first: --to hf --dtype bf16"
                )
            start = shared.start[0], shared.start[2], begin
            shape = shared.shape[0], shared.shape[2], wide
            ends = (
                cut(right_, Box((start[0], 0, begin), (shape[0], depth, wide))),
                cut(left_, Box((start[0], 0, start[1]), (shape[0], depth, shape[1]))),
                cut(target, Box(start, shape)),
            )
            along = depth, ends[0].strides[INNER], ends[1].strides[INNER]
            source, factor = _strided(ends[0], 0, None, 2), _strided(ends[1], 0, 2, None)
            form = Product("", (), shape, begun(source), begun(factor), begun(ends[2]), along)
            yield form, start, prod(shape), (at, ends[0].offset), (number, ends[1].offset), ends[2].offset


def _strided(place: Place, *axes: int | None) -> Place:
    """Return a place with the strides of some of its axes, 0 for none."""
    return replace(place, strides=tuple(0 if axis is None else place.strides[axis] for axis in axes))
