"""``within`` against brute force: every index of every axis is tried."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.algebra.strided import within


def by_trying(extents, strides, offset, low, high):
    indices = itertools.product(*map(range, extents))
    return sorted(i for i in indices if low <= offset + sum(a * s for a, s in zip(i, strides, strict=True)) < high)


def elements(boxes):
    """Return every index of every box; an index that two boxes hold appears twice."""
    return sorted(i for box in boxes for i in itertools.product(*(range(first, first + count) for first, count in box)))


@st.composite
def nested_axes(draw):
    """Axes of random extents; each stride is at least the reach of those inside it; an axis may stand still (stride 0)."""
    extents, strides, reach = [], [], 1
    for _ in range(draw(st.integers(0, 4))):
        extent = draw(st.integers(0 if draw(st.integers(0, 9)) == 9 else 1, 5))
        still = draw(st.integers(0, 9)) == 0
        stride = 0 if still else reach + draw(st.integers(0, 3))
        extents.append(extent)
        strides.append(stride)
        reach += max(0, extent - 1) * stride
    order = draw(st.permutations(range(len(extents))))
    offset = draw(st.integers(0, 5))
    low = draw(st.integers(0, offset + reach + 2))
    return [extents[a] for a in order], [strides[a] for a in order], offset, low, draw(st.integers(low, offset + reach + 4))


@given(nested_axes())
def test_the_boxes_hold_each_index_that_falls_into_the_interval_once_and_no_other(case):
    assert elements(within(*case)) == by_trying(*case)


@given(nested_axes())
def test_no_box_is_empty_and_each_names_every_axis(case):
    for box in within(*case):
        assert len(box) == len(case[0])
        assert all(count > 0 for _, count in box)


def spans_of_query_rows(low, high):
    """Megatron's fused rows: 2 KV heads, 2 query heads each, heads of 2 rows; a group is 4 query, 2 key and 2 value rows."""
    return within((2, 2, 2), (8, 2, 1), 0, low, high)


CUTS = [
    ("the whole dimension is one box", 0, 16, [((0, 2), (0, 2), (0, 2))]),
    ("past the query rows there is nothing", 4, 8, []),
    ("one whole group", 8, 16, [((1, 1), (0, 2), (0, 2))]),
    ("through the middle of a head", 0, 3, [((0, 1), (0, 1), (0, 2)), ((0, 1), (1, 1), (0, 1))]),
    ("from the middle of a head", 11, 16, [((1, 1), (1, 1), (1, 1))]),
    ("a single row", 9, 10, [((1, 1), (0, 1), (1, 1))]),
    ("an empty interval", 5, 5, []),
    ("an interval before everything", -4, 0, []),
    ("an interval behind everything", 16, 32, []),
]


@pytest.mark.parametrize(("remark", "low", "high", "boxes"), CUTS, ids=[row[0] for row in CUTS])
def test_an_interval_of_fused_rows_holds_these_query_heads(remark, low, high, boxes):
    assert spans_of_query_rows(low, high) == boxes


def test_whole_indices_of_an_outer_axis_come_as_one_box():
    assert within((1000, 4), (4, 1), 0, 2, 3998) == [((0, 1), (2, 2)), ((1, 998), (0, 4)), ((999, 1), (0, 2))]


def test_the_order_of_the_arguments_is_kept_in_the_answer():
    assert within((4, 2), (1, 6), 0, 0, 4) == [((0, 4), (0, 1))]


def test_no_axes_are_one_element_that_is_inside_or_not():
    assert within((), (), 3, 0, 4) == [()]
    assert within((), (), 4, 0, 4) == []
    assert within((), (), 3, 3, 3) == []


def test_an_axis_that_stands_still_is_held_whole():
    assert within((3, 4), (0, 1), 0, 2, 4) == [((0, 3), (2, 2))]


def test_an_axis_without_indices_has_no_boxes():
    assert within((2, 0), (4, 1), 0, 0, 8) == []
