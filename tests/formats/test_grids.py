"""The quick check of chunks never says yes where the exact one says no."""

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from carnet.algebra.box import Box, tiles, whole
from carnet.formats.torch_dist import _is_grid

CUTS = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(
    lambda sizes: [sum(sizes[:end]) for end in range(len(sizes) + 1)]
)


def cells(cuts: list[list[int]]) -> list[Box]:
    """Return the cells between cuts, per axis."""
    corners = product(*(list(pairwise(axis)) for axis in cuts))
    return [Box(tuple(low for low, _ in cell), tuple(high - low for low, high in cell)) for cell in corners]


@given(st.lists(CUTS, max_size=3), st.randoms(use_true_random=False))
def test_the_cells_of_any_grid_are_one_in_any_order(cuts, chance):
    boxes = cells(cuts)
    chance.shuffle(boxes)
    shape = tuple(axis[-1] for axis in cuts)
    assert _is_grid(shape, boxes)
    assert tiles(whole(shape), boxes)


@given(st.lists(CUTS, min_size=1, max_size=3), st.data())
def test_a_grid_with_a_changed_cell_is_a_grid_only_if_it_tiles(cuts, data):
    boxes = cells(cuts)
    shape = tuple(axis[-1] for axis in cuts)
    number = data.draw(st.integers(0, len(boxes) - 1))
    sizes = st.tuples(*(st.integers(0, 4) for _ in shape))
    boxes[number] = Box(data.draw(sizes), data.draw(sizes))
    boxes = boxes[data.draw(st.integers(0, 1)) :]
    assert not _is_grid(shape, boxes) or tiles(whole(shape), boxes)


def test_bricks_that_are_no_grid_are_left_to_the_exact_check():
    bricks = [Box((0, 0), (1, 2)), Box((0, 2), (1, 2)), Box((1, 0), (1, 1)), Box((1, 1), (1, 3))]
    assert not _is_grid((2, 4), bricks)
    assert tiles(whole((2, 4)), bricks)
