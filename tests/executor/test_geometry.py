"""Pieces, blocks and jobs: pure arithmetic."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.executor.cutting import cuts
from carnet.executor.geometry import Piece, blocks, count, merged, packed, piece_of, reads, run, runs, span, sparse
from carnet.executor.jobs import Check, Direct, Windows, jobs_of
from carnet.formats.stored import dense_strides
from carnet.plans.columns import Plan, Steps
from carnet.steps import Fill, Move, Place, Same, TargetFile, TargetTensor


def moves(piece):
    """Return every (source, target) offset of an element."""
    ranges = [range(extent) for extent, _, _ in piece.axes]
    return {
        (
            piece.source + sum(i * axis[1] for i, axis in zip(index, piece.axes, strict=True)),
            piece.target + sum(i * axis[2] for i, axis in zip(index, piece.axes, strict=True)),
        )
        for index in itertools.product(*ranges)
    }


@st.composite
def pieces(draw):
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    sides = []
    for _ in range(2):
        order = draw(st.permutations(range(len(shape))))
        strides, step = [0] * len(shape), 1
        for axis in order:
            strides[axis] = step
            step *= shape[axis] + draw(st.sampled_from((0, 0, 2)))
        sides.append(Place("f", draw(st.integers(0, 9)), tuple(strides), "bf16"))
    return shape, *sides


@given(pieces())
def test_merging_axes_moves_the_same_elements(drawn):
    shape, source, target = drawn
    plain = Piece(
        source.offset,
        target.offset,
        tuple((n, 2 * s, 2 * t) for n, s, t in zip(shape, source.strides, target.strides, strict=True)),
        (2, 2),
    )
    assert moves(piece_of(*drawn)) == moves(plain)


@given(pieces(), st.sampled_from((2, 8, 30, 100)), st.booleans())
def test_blocks_move_every_element_once_and_fit_the_buffer(drawn, budget, pack):
    piece = piece_of(*drawn)
    parts = list(blocks(piece, budget, pack=pack))
    assert sum(count(part) for part in parts) == count(piece)
    assert set().union(*(moves(part) for part in parts)) == moves(piece)
    assert all((count(part) * 2 if pack else span(part)) <= budget for part in parts)


@given(pieces())
def test_a_packed_piece_fills_its_buffer_without_gaps(drawn):
    piece = packed(piece_of(*drawn))
    assert sorted(source for source, _ in moves(piece)) == list(range(0, 2 * count(piece), 2))


@given(pieces())
def test_runs_times_their_length_are_all_bytes(drawn):
    piece = piece_of(*drawn)
    assert len(list(runs(piece))) * run(piece) == count(piece) * 2


def test_a_broadcast_axis_is_read_once():
    piece = piece_of((3, 4), Place("a", 0, (0, 1), "u8"), Place("b", 0, (4, 1), "u8"))
    assert (span(piece), reads(piece)) == (4, (0, 4))
    assert packed(piece).axes == piece.axes


@pytest.mark.parametrize(
    ("extent", "stride", "width", "alone"),
    [
        (8, 4096, 2048, False),  # half of a row: read it whole
        (8, 1 << 20, 2048, True),  # one run in a megabyte
        (1, 1, 2048, False),
    ],
)
def test_runs_far_apart_are_read_alone(extent, stride, width, alone):
    assert sparse(Piece(0, 0, merged([(extent, stride, width), (width, 1, 1)]), (1, 1))) is alone


@given(st.lists(st.integers(1, 9), max_size=3), st.sampled_from((1, 2, 8)), st.integers(1, 100))
def test_cuts_cover_an_array_in_ranges_within_the_limit(shape, item, limit):
    ranges = list(cuts(shape, item, limit))
    assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])]
    assert ranges[-1][1] == int(np.prod(shape, dtype=int)) * item
    assert all(low < high and high - low <= max(limit, item) and (high - low) % item == 0 for low, high in ranges)


def plan(steps, *tensors, window=1 << 20):
    rows, offset = [], 8
    for shape in tensors:
        rows.append(TargetTensor(f"t{len(rows)}", "u8", shape, offset))
        offset += int(np.prod(shape))
    return Plan("/s", "", {}, "toy", (TargetFile("o", offset, tuple(rows), {}),), (), (), Steps.of(steps), {}, {}, 0, window)


def copy(shape, source, strides, at, *, file="a"):
    return Move("t", (0,) * len(shape), shape, Place(file, source, strides, "u8"), Place("o", at, dense_strides(shape), "u8"))


def test_long_runs_are_the_kernels_and_cut_where_they_are_huge():
    found = jobs_of(plan([copy((200 << 20,), 0, (1,), 8)], (200 << 20,)))
    assert [type(job) for job in found] == [Direct] * 4
    assert sum(job.nbytes for job in found) == 200 << 20


def test_a_short_tensor_in_one_run_is_the_kernels_and_zeros_need_no_job():
    steps = [copy((100,), 0, (1,), 8), Fill("pad", (28,), Place("o", 108, (1,), "u8"))]
    assert [job.nbytes for job in jobs_of(plan(steps, (128,)))] == [100]


def test_both_halves_of_a_column_cut_share_jobs():
    left, right = copy((4096, 512), 0, (1024, 1), 8), copy((4096, 512), 512, (1024, 1), 8 + (2 << 20))
    found = jobs_of(plan([left, right], (4096, 512), (4096, 512)))
    assert all(isinstance(job, Windows) and len(job.parts) == 2 and job.nbytes <= 1 << 20 for job in found)
    assert sum(job.nbytes for job in found) == 4 << 20


def test_jobs_follow_the_source_on_disk():
    steps = [
        copy((10,), 500, (1,), 8),
        copy((10,), 0, (1,), 18, file="b"),
        copy((10,), 20, (1,), 28),
        Same("t", (0,), (5,), Place("a", 100, (1,), "u8"), Place("b", 0, (1,), "u8")),
    ]
    found = jobs_of(plan(steps, (10,), (10,), (10,)))
    assert [(type(job), job.step) for job in found if not isinstance(job, Windows)] == [
        (Direct, steps[2]),
        (Check, steps[3]),
        (Direct, steps[0]),
        (Direct, steps[1]),
    ]


def test_empty_steps_make_no_jobs():
    assert len(jobs_of(plan([copy((0, 3), 0, (3, 1), 8)], (0, 3)))) == 0
