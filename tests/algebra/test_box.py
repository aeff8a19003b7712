"""Boxes against a counting oracle: an array of integers in which every box adds one to its own elements."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.algebra.box import Box, intersect, overlap, subtract, tiles, uncovered, volume, whole

SIDE = 7  # the oracle's array reaches this far along every axis


def counted(boxes, rank):
    count = np.zeros((SIDE,) * rank, np.int64)
    for box in boxes:
        count[tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))] += 1
    return count


@st.composite
def a_box(draw, rank, smallest=0):
    spans = []
    for _ in range(rank):
        start = draw(st.integers(0, SIDE - 1))
        spans.append((start, draw(st.integers(smallest, SIDE - start))))
    return Box(tuple(start for start, _ in spans), tuple(length for _, length in spans))


def boxes_of_one_rank(number):
    """Give tuples of boxes; ``number`` is how many, or a strategy of lists."""
    ranks = st.integers(0, 3)
    return ranks.flatmap(lambda rank: st.tuples(*[a_box(rank)] * number))


def list_of_boxes():
    return st.integers(0, 3).flatmap(lambda rank: st.tuples(st.just(rank), a_box(rank), st.lists(a_box(rank), max_size=6)))


@st.composite
def a_tiling(draw):
    """A container cut by random edges along every axis: the pieces in any order."""
    container = draw(st.integers(0, 3).flatmap(lambda rank: a_box(rank, smallest=1)))
    spans = []
    for start, length in zip(container.start, container.shape, strict=True):
        inner = draw(st.sets(st.integers(start + 1, start + length - 1), max_size=3)) if length > 1 else set()
        spans.append(list(itertools.pairwise([start, *sorted(inner), start + length])))
    pieces = [Box(tuple(a for a, _ in each), tuple(b - a for a, b in each)) for each in itertools.product(*spans)]
    return container, draw(st.permutations(pieces))


GEOMETRY = [
    ("b lies within a", Box((0, 0), (6, 6)), Box((2, 3), (2, 1)), Box((2, 3), (2, 1))),
    ("b encloses a", Box((2, 3), (2, 1)), Box((0, 0), (6, 6)), Box((2, 3), (2, 1))),
    ("b spans the start of a", Box((2,), (4,)), Box((0,), (3,)), Box((2,), (1,))),
    ("b spans the stop of a", Box((2,), (4,)), Box((5,), (3,)), Box((5,), (1,))),
    ("b is a", Box((1, 2), (3, 4)), Box((1, 2), (3, 4)), Box((1, 2), (3, 4))),
    ("b touches a and shares nothing", Box((0,), (2,)), Box((2,), (2,)), None),
    ("b lies elsewhere", Box((0,), (2,)), Box((5,), (2,)), None),
    ("they share a range along one axis only", Box((0, 0), (4, 2)), Box((0, 2), (4, 2)), None),
    ("rank 0: both are the one element", Box((), ()), Box((), ()), Box((), ())),
    ("an empty box lies inside a", Box((0,), (4,)), Box((2,), (0,)), None),
    ("a is empty along one of two axes", Box((0, 0), (0, 4)), Box((0, 0), (4, 4)), None),
    ("spans the start of one axis and the stop of the other", Box((2, 2), (4, 4)), Box((0, 5), (3, 9)), Box((2, 5), (1, 1))),
]


@pytest.mark.parametrize(("remark", "a", "b", "shared"), GEOMETRY, ids=[row[0] for row in GEOMETRY])
def test_two_boxes_share_what_was_drawn_on_paper(remark, a, b, shared):
    assert intersect(a, b) == shared
    assert intersect(b, a) == shared


REMAINDERS = [
    ("b lies within a", Box((0,), (6,)), Box((2,), (1,)), [Box((0,), (2,)), Box((3,), (3,))]),
    ("b encloses a", Box((2,), (1,)), Box((0,), (6,)), []),
    ("b spans the start of a", Box((2,), (4,)), Box((0,), (3,)), [Box((3,), (3,))]),
    ("b spans the stop of a", Box((2,), (4,)), Box((5,), (3,)), [Box((2,), (3,))]),
    ("they share nothing", Box((0,), (2,)), Box((2,), (2,)), [Box((0,), (2,))]),
    ("rank 0 takes itself away", Box((), ()), Box((), ()), []),
    ("an empty box takes nothing away", Box((0,), (4,)), Box((2,), (0,)), [Box((0,), (4,))]),
]


@pytest.mark.parametrize(("remark", "a", "b", "rest"), REMAINDERS, ids=[row[0] for row in REMAINDERS])
def test_taking_a_box_away_leaves_what_was_drawn_on_paper(remark, a, b, rest):
    assert subtract(a, b) == rest


def test_a_box_in_the_middle_of_a_cube_leaves_six_pieces():
    assert len(subtract(whole((3, 3, 3)), Box((1, 1, 1), (1, 1, 1)))) == 6


VOLUMES = [
    ("rank 0 holds one element", Box((), ()), 1),
    ("an empty axis empties the box", Box((3, 3), (4, 0)), 0),
    ("the start does not count", Box((9, 9), (2, 5)), 10),
]


@pytest.mark.parametrize(("remark", "box", "elements"), VOLUMES, ids=[row[0] for row in VOLUMES])
def test_a_volume_counts_elements(remark, box, elements):
    assert volume(box) == elements


def test_boxes_of_different_rank_are_never_compared_in_silence():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        intersect(Box((0,), (2,)), Box((0, 0), (2, 2)))


def test_rank_0_twice_is_an_overlap_and_once_is_a_tiling():
    one = Box((), ())
    assert overlap([one, one]) == (one, one)
    assert overlap([one]) is None
    assert tiles(one, [one])
    assert not tiles(one, [one, one])
    assert not tiles(one, [])
    assert uncovered(one, []) == one


def test_nothing_tiles_an_empty_container():
    assert tiles(Box((0,), (0,)), [])
    assert uncovered(Box((0,), (0,)), []) is None


def test_two_wrongs_of_the_right_volume_are_no_tiling():
    assert not tiles(Box((0,), (4,)), [Box((0,), (2,)), Box((4,), (2,))])  # one box outside
    assert not tiles(Box((0,), (4,)), [Box((0,), (3,)), Box((0,), (1,))])  # one element twice, one never


def test_a_box_that_reaches_past_the_sweep_is_still_compared():
    long, short, late = Box((0, 0), (7, 1)), Box((1, 1), (1, 1)), Box((6, 0), (1, 1))
    assert overlap([late, short, long]) == (long, late)


@given(boxes_of_one_rank(2))
def test_an_intersection_is_the_elements_that_both_count(pair):
    a, b = pair
    shared = intersect(a, b)
    expected = (counted([a], len(a.start)) * counted([b], len(a.start))).astype(bool)
    assert (shared is None) == (not expected.any())
    if shared is not None:
        assert (counted([shared], len(a.start)) == expected).all()


@given(boxes_of_one_rank(2))
def test_a_subtraction_is_the_elements_of_one_that_the_other_does_not_count_each_once(pair):
    a, b = pair
    rank = len(a.start)
    assert (counted(subtract(a, b), rank) == np.where(counted([b], rank) > 0, 0, counted([a], rank))).all()


@given(list_of_boxes())
def test_an_overlap_is_found_exactly_where_an_element_counts_twice(case):
    rank, _, boxes = case
    found = overlap(boxes)
    assert (found is not None) == bool((counted(boxes, rank) > 1).any())
    if found is not None:
        assert (counted(found, rank) == 2).any()


@given(list_of_boxes())
def test_an_uncovered_part_is_found_exactly_where_an_element_of_the_container_counts_nothing(case):
    rank, container, boxes = case
    hole = uncovered(container, boxes)
    missing = (counted([container], rank) == 1) & (counted(boxes, rank) == 0)
    assert (hole is not None) == bool(missing.any())
    if hole is not None:
        assert volume(hole) == (counted([hole], rank).astype(bool) & missing).sum() > 0


@given(list_of_boxes())
def test_boxes_tile_a_container_exactly_where_each_element_counts_once_and_none_outside(case):
    rank, container, boxes = case
    assert tiles(container, boxes) == bool((counted(boxes, rank) == counted([container], rank)).all())


@given(a_tiling())
def test_a_container_cut_along_its_axes_is_tiled_in_any_order(case):
    container, pieces = case
    assert tiles(container, pieces)
    assert uncovered(container, pieces) is None


@given(a_tiling(), st.randoms(use_true_random=False))
def test_a_tiling_that_lost_or_doubled_a_piece_is_none(case, random):
    container, pieces = case
    at = random.randrange(len(pieces))
    assert not tiles(container, pieces[:at] + pieces[at + 1 :])
    assert not tiles(container, [*pieces, pieces[at]])
    assert uncovered(container, pieces[:at] + pieces[at + 1 :]) is not None
    assert overlap([*pieces, pieces[at]]) is not None
