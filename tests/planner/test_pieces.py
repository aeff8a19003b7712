"""Pieces against counting: what is kept, what is a copy, and what a line may leave out."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.algebra.box import Box, intersect, overlap
from carnet.algebra.layout import View
from carnet.formats.stored import Chunk, dense_strides
from carnet.planner.pieces import Piece, PieceLine, cut, pieces, separate
from carnet.steps import Place

SIDE = 6


def region(box):
    return tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))


def piece(box, file="a.bin", offset=100):
    return Piece("w", box, Place(file, offset, dense_strides(box.shape), "bf16"))


@st.composite
def some_pieces(draw):
    """Pieces of one tensor of rank 0 to 3: each from a file of its own, dense, overlapping as it happens."""
    rank = draw(st.integers(0, 3))
    found = []
    for number in range(draw(st.integers(0, 7))):
        spans = []
        for _ in range(rank):
            start = draw(st.integers(0, SIDE - 1))
            spans.append((start, draw(st.integers(1, SIDE - start))))
        found.append(piece(Box(tuple(s for s, _ in spans), tuple(n for _, n in spans)), f"{number}.bin", 8 * number))
    return rank, found


def offsets(place, shape):
    """Return the byte in its file at which every element lies."""
    found = np.full(shape, place.offset)
    for axis, stride in enumerate(place.strides):
        found = found + np.indices(shape)[axis] * stride * 2
    return found


@given(some_pieces())
def test_every_element_is_kept_once_and_what_repeats_it_is_named_with_a_kept_one(case):
    rank, found = case
    kept, copies = separate(found)
    times = np.zeros((SIDE,) * rank, np.int64)
    for each in found:
        times[region(each.box)] += 1
    kept_times, compared = np.zeros_like(times), np.zeros_like(times)
    for each in kept:
        kept_times[region(each.box)] += 1
    for _, _, shared in copies:
        compared[region(shared)] += 1
    assert (kept_times == np.minimum(times, 1)).all()
    assert (compared == np.maximum(times - 1, 0)).all()
    assert overlap([each.box for each in kept]) is None
    for first, second, shared in copies:
        assert first in kept
        assert intersect(first.box, shared) == intersect(second.box, shared) == shared


@given(some_pieces())
def test_a_kept_piece_still_points_at_the_bytes_that_it_had(case):
    _, found = case
    whole = {each.place.file: each for each in found}
    for each in separate(found)[0]:
        before = whole[each.place.file]
        inner = tuple(slice(s - b, s - b + n) for s, b, n in zip(each.box.start, before.box.start, each.box.shape, strict=True))
        assert (offsets(each.place, each.box.shape) == offsets(before.place, before.box.shape)[inner]).all()


@given(some_pieces(), st.randoms(use_true_random=False))
def test_a_shelf_leaves_out_no_piece_that_shares_something(case, chance):
    rank, found = case
    line = PieceLine(found)
    start = tuple(chance.randrange(SIDE) for _ in range(rank))
    asked = Box(start, tuple(chance.randint(1, SIDE - s) for s in start))
    near = list(line.near(asked))
    touching = [each for each in found if intersect(each.box, asked) is not None]
    assert all(each in near for each in touching)
    assert len(near) <= len(found)


@given(some_pieces())
def test_a_shelf_keeps_every_piece_in_order_of_its_first_axis(case):
    rank, found = case
    line = PieceLine(found)
    assert sorted(map(repr, line.pieces)) == sorted(map(repr, found))
    if rank:
        starts = [each.box.start[0] for each in line.pieces]
        assert starts == sorted(starts)


def test_a_shelf_of_a_thousand_slices_looks_at_the_few_beside_the_box():
    slices = [piece(Box((2 * n, 0), (2, 4))) for n in range(1000)]
    random.Random(0).shuffle(slices)
    assert [each.box.start[0] for each in PieceLine(slices).near(Box((100, 0), (4, 4)))] in ([100, 102], [98, 100, 102])


def test_a_long_piece_is_near_what_lies_far_behind_its_start():
    long, short = piece(Box((0,), (100,))), piece(Box((50,), (1,)))
    assert long in PieceLine([short, long]).near(Box((99,), (1,)))


CUTS = [
    ("the whole piece starts where it starts", Box((4, 8), (2, 4)), 100),
    ("one row on is one row of elements", Box((5, 8), (1, 4)), 100 + 4 * 2),
    ("two columns on are two elements", Box((4, 10), (2, 2)), 100 + 2 * 2),
    ("the last element", Box((5, 11), (1, 1)), 100 + 7 * 2),
]


@pytest.mark.parametrize(("remark", "box", "offset"), CUTS, ids=[row[0] for row in CUTS])
def test_a_box_inside_a_piece_starts_at_this_byte(remark, box, offset):
    assert cut(piece(Box((4, 8), (2, 4))), box) == Place("a.bin", offset, (4, 1), "bf16")


def test_a_piece_of_rank_0_is_cut_to_itself():
    one = Piece("scale", Box((), ()), Place("a.bin", 12, (), "f32"))
    assert cut(one, Box((), ())) == one.place
    assert separate([one, one]) == ([one], [(one, one, Box((), ()))])


ITEMS = [("four bytes an element", "f32", 4), ("two", "bf16", 2), ("one", "f8_e4m3", 1)]


@pytest.mark.parametrize(("remark", "dtype", "nbytes"), ITEMS, ids=[row[0] for row in ITEMS])
def test_a_piece_counts_bytes_of_the_stored_element_type(remark, dtype, nbytes):
    last_row = View("q", Box((0, 0), (1, 3)), (2, 0), ((0, 1), (1, 1)))
    chunk = Chunk(Box((1, 0), (2, 3)), "a.bin", 1000, (8, 1))
    expected = Piece("q", Box((0, 0), (1, 3)), Place("a.bin", 1000 + 8 * nbytes, (8, 1), dtype))
    assert list(pieces(last_row, chunk, dtype, (4, 3))) == [expected]


def test_a_chunk_through_the_middle_of_a_head_holds_two_pieces_of_it():
    fused = View("q", Box((0, 0, 0), (2, 2, 2)), (0,), ((0, 8), (0, 2), (0, 1)))  # kv rep dim in rows of 8
    chunk = Chunk(Box((3,), (7,)), "a.bin", 0, (1,))
    assert [(found.box, found.place.offset) for found in pieces(fused, chunk, "bf16", (16,))] == [
        (Box((0, 1, 1), (1, 1, 1)), 0),
        (Box((1, 0, 0), (1, 1, 2)), 5 * 2),
    ]


def test_a_chunk_that_is_the_whole_tensor_holds_a_view_in_one_piece():
    fused = View("k", Box((4, 0), (2, 2)), (4,), ((0, 8), (0, 1)))
    chunk = Chunk(Box((0,), (16,)), "a.bin", 10, (3,))
    assert list(pieces(fused, chunk, "bf16", (16,))) == [Piece("k", Box((4, 0), (2, 2)), Place("a.bin", 34, (24, 3), "bf16"))]


def test_a_chunk_without_anything_of_a_view_has_no_piece():
    rows = View("k", Box((0, 0), (2, 2)), (4, 0), ((0, 1), (1, 1)))
    assert list(pieces(rows, Chunk(Box((0, 0), (4, 2)), "a.bin", 0, (2, 1)), "bf16", (6, 2))) == []


def test_a_view_without_elements_has_no_piece():
    nothing = View("embed", Box((6, 0), (0, 2)), (0, 0), ((0, 1), (1, 1)))
    assert list(pieces(nothing, Chunk(Box((0, 0), (2, 2)), "a.bin", 0, (2, 1)), "bf16", (2, 2))) == []
