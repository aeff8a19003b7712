"""The proof can fail: every way in which a plan can lose, double or invent something is refused by the name of the tensor."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from carnet.algebra.box import Box
from carnet.errors import CarnetError
from carnet.planner.proof import prove as prove_columns
from carnet.planner.touches import Extent, Extents
from carnet.plans.columns import Steps
from carnet.steps import Encoding, Fill, Make, Move, Place, Same, TargetFile, TargetTensor

# A is stored in two halves: its first two rows as they are, the others transposed; a second file repeats the first half.
# P is stored with a row of padding; the target has two of its own.
FIRST = Extent("A", "in0.bin", 16, (2, 6), (6, 1), "bf16", ())
SECOND = Extent("A", "in1.bin", 16, (2, 6), (1, 2), "bf16", ())
REPEATED = Extent("A again", "in1.bin", 40, (2, 6), (6, 1), "bf16", ())
PADDED = Extent("P", "in0.bin", 40, (3, 4), (4, 1), "bf16", (Box((2, 0), (1, 4)),))
SCALE = Extent("scale", "in0.bin", 64, (), (), "f32", ())
EXTENTS = (FIRST, SECOND, REPEATED, PADDED, SCALE)
OUT = TargetFile(
    "out.bin",
    168,
    (
        TargetTensor("a", "bf16", (4, 6), 80),
        TargetTensor("p", "f32", (4, 2), 128),
        TargetTensor("p.rest", "bf16", (2, 2), 160),
    ),
    {},
)
LAST = TargetFile("last.bin", 92, (TargetTensor("scale", "f32", (), 80), TargetTensor("b", "bf16", (4,), 84)), {})
FILES = (OUT, LAST)


def at(file, offset, strides, dtype="bf16"):
    return Place(file, offset, strides, dtype)


STEPS = (
    Move("a", (0, 0), (2, 6), at("in0.bin", 16, (6, 1)), at("out.bin", 80, (6, 1))),
    Move("a", (2, 0), (2, 6), at("in1.bin", 16, (1, 2)), at("out.bin", 104, (6, 1))),
    Same("a", (0, 0), (2, 6), at("in0.bin", 16, (6, 1)), at("in1.bin", 40, (6, 1))),
    Move("p", (0, 0), (2, 2), at("in0.bin", 40, (4, 1)), at("out.bin", 128, (2, 1), "f32")),
    Fill("p", (2, 2), at("out.bin", 144, (2, 1), "f32")),
    Move("p", (0, 2), (2, 2), at("in0.bin", 44, (4, 1)), at("out.bin", 160, (2, 1))),
    Move("scale", (), (), at("in0.bin", 64, (), "f32"), at("last.bin", 80, (), "f32")),
    Fill("b", (4,), at("last.bin", 84, (1,))),
)
WRITES = "the plan does not write every element of a target tensor exactly once"
READS = "the plan does not use every element of a source tensor"
NOWHERE = "a step of the plan touches bytes that belong to no tensor"


def prove(files, extents, steps):
    return prove_columns(files, Extents.of(extents), Steps.of(steps))


def without(number):
    return [*STEPS[:number], *STEPS[number + 1 :]]


def with_step(number, step):
    return [*STEPS[:number], step, *STEPS[number + 1 :]]


def moved(number, side, **fields):
    """Return the steps, one of them with another source or target."""
    step = STEPS[number]
    return with_step(number, replace(step, **{side: replace(getattr(step, side), **fields)}))


def test_the_whole_plan_is_proven_with_these_counts():
    assert prove(FILES, EXTENTS, STEPS) == {
        "source tensors": 4,
        "source bytes": 24 + 24 + 24 + 24 + 4,
        "source padding bytes": 8,
        "copies checked equal": 1,
        "target tensors": 5,
        "target bytes": 48 + 32 + 8 + 4 + 8,
        "target padding bytes": 16 + 8,
    }


def test_the_order_of_the_steps_proves_nothing():
    assert prove(FILES, EXTENTS, STEPS[::-1]) == prove(FILES, EXTENTS, STEPS)


FAULTS = [
    ("a step is removed", without(0), WRITES, "a"),
    ("a cast is removed", without(3), WRITES, "p"),
    ("a step of rank 0 is removed", without(6), WRITES, "scale"),
    ("a fill is missing", without(4), WRITES, "p"),
    ("the fill of a whole tensor is missing", without(7), WRITES, "b"),
    ("a step is doubled", [*STEPS, STEPS[1]], WRITES, "a"),
    ("a fill is doubled", [*STEPS, STEPS[4]], WRITES, "p"),
    ("a step of rank 0 is doubled", [*STEPS, STEPS[6]], WRITES, "scale"),
    (
        "a fill writes over what was copied",
        with_step(4, replace(STEPS[4], target=at("out.bin", 136, (2, 1), "f32"))),
        WRITES,
        "p",
    ),
    ("a step writes one element late", moved(0, "target", offset=82), WRITES, "a"),
    ("a step writes one element early", moved(1, "target", offset=102), WRITES, "a"),
    ("a step writes one row late", moved(0, "target", offset=92), WRITES, "a"),
    ("a step writes into the tensor before", moved(5, "target", offset=158 - 32, dtype="bf16"), WRITES, "a"),
    ("the rows that are written lie too close", moved(0, "target", strides=(5, 1)), WRITES, "a"),
    ("the rows that are written lie too far apart", moved(0, "target", strides=(12, 1)), WRITES, "a"),
    ("every other column is written", moved(0, "target", strides=(6, 2)), WRITES, "a"),
    ("one row is written twice", moved(0, "target", strides=(0, 1)), WRITES, "a"),
    ("one column is written many times", moved(0, "target", strides=(6, 0)), WRITES, "a"),
    ("a step more writes one column many times", [*STEPS, moved(0, "target", strides=(6, 0))[0]], WRITES, "a"),
    ("the axes that are written changed places", moved(0, "target", strides=(1, 6)), WRITES, "a"),
    (
        "one element is written twice by a step that stands still",
        with_step(
            6,
            replace(
                STEPS[6], start=(0,), shape=(2,), source=at("in0.bin", 64, (0,), "f32"), target=at("last.bin", 80, (0,), "f32")
            ),
        ),
        WRITES,
        "scale",
    ),
    ("a step writes a row less", with_step(0, replace(STEPS[0], shape=(1, 6))), WRITES, "a"),
    ("a step writes a row more", with_step(0, replace(STEPS[0], shape=(3, 6))), WRITES, "a"),
    ("a step writes a column more", with_step(0, replace(STEPS[0], shape=(2, 7))), WRITES, "a"),
    ("a step writes into another file", moved(1, "target", file="last.bin", offset=84), WRITES, "a"),
    ("a comparison is removed, and with it the use of a copy", without(2), READS, "A again"),
    ("a source is read a row less", with_step(2, replace(STEPS[2], shape=(1, 6))), READS, "A again"),
    ("a source is read one element late", moved(1, "source", offset=18), READS, "A"),
    ("a source is read one row late", moved(3, "source", offset=48), READS, "P"),
    ("the columns of a source are read twice", moved(5, "source", offset=40), READS, "P"),
    ("one row of a source is read twice", moved(1, "source", strides=(0, 2)), READS, "A"),
    ("the axes of a source changed places", moved(1, "source", strides=(2, 1)), READS, "A"),
    ("the wrong file is read", moved(1, "source", file="in0.bin"), READS, "A"),
    ("a copy is compared with itself", moved(2, "other", file="in0.bin", offset=16), READS, "A again"),
]


@pytest.mark.parametrize(("remark", "steps", "what", "tensor"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_plan_is_refused_by_the_name_of_the_tensor_where(remark, steps, what, tensor):
    with pytest.raises(CarnetError) as caught:
        prove(FILES, EXTENTS, steps)
    assert (caught.value.what, caught.value.facts["tensor"]) == (what, tensor)


ASTRAY = [
    ("a step writes into a file that nobody planned", moved(0, "target", file="more.bin"), "more.bin"),
    ("a step reads a file that nobody has", moved(0, "source", file="in9.bin"), "in9.bin"),
    ("a step writes into the header", moved(0, "target", offset=40), "out.bin"),
    ("a step reads before the first tensor", moved(0, "source", offset=0), "in0.bin"),
    ("a step writes another type than the tensor's", moved(7, "target", dtype="f16"), "last.bin"),
    ("a step reads another type than the tensor's", moved(0, "source", dtype="f16"), "in0.bin"),
]


@pytest.mark.parametrize(("remark", "steps", "file"), ASTRAY, ids=[row[0] for row in ASTRAY])
def test_a_plan_is_refused_by_the_name_of_the_file_where(remark, steps, file):
    with pytest.raises(CarnetError) as caught:
        prove(FILES, EXTENTS, steps)
    assert (caught.value.what, caught.value.facts["file"]) == (NOWHERE, file)


def test_a_source_that_no_step_reads_is_refused_unless_it_is_empty_or_padding():
    more = Extent("B", "in2.bin", 0, (2, 2), (2, 1), "bf16", ())
    with pytest.raises(CarnetError) as caught:
        prove(FILES, [*EXTENTS, more], STEPS)
    assert caught.value.facts["tensor"] == "B"
    prove(FILES, [*EXTENTS, replace(more, shape=(0, 2))], STEPS)
    prove(FILES, [*EXTENTS, replace(more, padding=(Box((0, 0), (2, 2)),))], STEPS)


def test_a_target_that_no_step_writes_is_refused_unless_it_is_empty():
    with pytest.raises(CarnetError) as caught:
        prove([*FILES, TargetFile("more.bin", 16, (TargetTensor("c", "bf16", (2,), 8),), {})], EXTENTS, STEPS)
    assert (caught.value.facts["tensor"], caught.value.facts["file"]) == ("c", "more.bin")
    prove([*FILES, TargetFile("more.bin", 8, (TargetTensor("c", "bf16", (0, 4), 8),), {})], EXTENTS, STEPS)


def test_an_empty_tensor_beside_a_full_one_takes_none_of_its_steps():
    file = TargetFile("last.bin", 92, (TargetTensor("none", "f32", (0,), 80), *LAST.tensors), {})
    prove((OUT, file), EXTENTS, STEPS)


def test_sixty_equal_layers_with_one_that_is_not_are_refused_by_its_name():
    tensors = tuple(TargetTensor(f"layer {number}", "bf16", (2,), 8 + 4 * number) for number in range(60))
    fills = [Fill("w", (2,), at("many.bin", tensor.offset, (1,))) for tensor in tensors]
    fills[41] = replace(fills[41], shape=(1,))
    with pytest.raises(CarnetError) as caught:
        prove([TargetFile("many.bin", 248, tensors, {})], [], fills)
    assert caught.value.facts["tensor"] == "layer 41"


TWINS = [
    (
        "what is padding in one",
        replace(PADDED, file="b.bin"),
        replace(PADDED, name="B", file="a.bin", padding=()),
        (2, 4),
        (4, 1),
    ),
    (
        "the order of bytes in one",
        replace(FIRST, file="b.bin"),
        replace(FIRST, name="B", file="a.bin", strides=(1, 2)),
        (2, 6),
        (6, 1),
    ),
]


@pytest.mark.parametrize(("remark", "first", "second", "shape", "strides"), TWINS, ids=[row[0] for row in TWINS])
def test_two_sources_that_are_read_alike_are_not_proven_by(remark, first, second, shape, strides):
    here, there = (at(extent.file, extent.offset, strides) for extent in (first, second))
    file = [TargetFile("out.bin", 200, (TargetTensor("w", "bf16", shape, 80),), {})]
    reads = [Move("w", (0, 0), shape, here, at("out.bin", 80, strides)), Same("w", (0, 0), shape, here, there)]
    with pytest.raises(CarnetError) as caught:
        prove(file, [first, second], reads)
    assert caught.value.facts["tensor"] == "B"


def test_two_tensors_of_one_shape_are_not_proven_by_each_other():
    tensors = (TargetTensor("x", "bf16", (2, 2), 8), TargetTensor("y", "bf16", (2, 2), 16))
    file = [TargetFile("two.bin", 24, tensors, {})]
    whole = Fill("w", (2, 2), at("two.bin", 8, (2, 1)))
    with pytest.raises(CarnetError) as caught:
        prove(file, [], [whole, whole])
    assert caught.value.facts["tensor"] == "x"
    with pytest.raises(CarnetError) as caught:
        prove(file, [], [whole])
    assert caught.value.facts["tensor"] == "y"


# --- against counting: any change of any number in any step --------------------------------------------------------------------

ITEM = {"bf16": 2, "f32": 4}


def touched(place, shape):
    """Return the first byte of every element, each as often as it is touched."""
    item = ITEM[place.dtype]
    return [
        (place.file, place.offset + item * sum(i * s for i, s in zip(index, place.strides, strict=True)), item)
        for index in itertools.product(*map(range, shape))
    ]


def elements(extent, boxes=None):
    """Return the first byte of every element of an extent, or of boxes of it."""
    found = set()
    for box in [Box((0,) * len(extent.shape), extent.shape)] if boxes is None else boxes:
        skip = ITEM[extent.dtype] * sum(i * s for i, s in zip(box.start, extent.strides, strict=True))
        found.update(touched(Place(extent.file, extent.offset + skip, extent.strides, extent.dtype), box.shape))
    return found


def is_whole(steps):
    """Say by counting bytes whether each target element is written once, and each source element that is not a padding is read."""
    written, read = Counter(), set()
    for step in steps:
        if not isinstance(step, Same):
            written.update(touched(step.target, step.shape))
        for side in ("source", "other"):
            if hasattr(step, side):
                read.update(touched(getattr(step, side), step.shape))
    wanted = Counter()
    for file in FILES:
        for tensor in file.tensors:
            dense = tuple(int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape)))
            wanted.update(elements(Extent(tensor.name, file.name, tensor.offset, tensor.shape, dense, tensor.dtype, ())))
    every = set().union(*map(elements, EXTENTS))
    needed = every - set().union(*(elements(extent, extent.padding) for extent in EXTENTS))
    return written == wanted and needed <= read <= every


@st.composite
def changed_plans(draw):
    number = draw(st.integers(0, len(STEPS) - 1))
    step = STEPS[number]
    side = draw(st.sampled_from([side for side in ("source", "target", "other") if hasattr(step, side)]))
    place = getattr(step, side)
    rank = len(step.shape)
    kind = draw(st.sampled_from(("offset", "file", *(("stride", "shape", "swap") if rank else ()))))
    axis = draw(st.integers(0, max(0, rank - 1)))
    if kind == "shape":
        shape = list(step.shape)
        shape[axis] = draw(st.integers(0, 7))
        return with_step(number, replace(step, shape=tuple(shape)))
    if kind == "stride":
        strides = list(place.strides)
        strides[axis] = draw(st.integers(0, 13))
        return moved(number, side, strides=tuple(strides))
    if kind == "swap":
        return moved(number, side, strides=place.strides[::-1])
    if kind == "file":
        return moved(number, side, file=draw(st.sampled_from(("in0.bin", "in1.bin", "out.bin", "last.bin"))))
    return moved(number, side, offset=max(0, place.offset + draw(st.integers(-60, 60))))


HOLES = [
    ("rows are written 7 elements apart in a tensor of 6", moved(0, "target", strides=(7, 1))),
    ("rows of a source are read 5 elements apart in one of 4", moved(3, "source", strides=(5, 1))),
    ("a step writes one byte late", moved(0, "target", offset=81)),
    ("a step reads one byte late", moved(3, "source", offset=41)),
    ("a step of rank 0 writes two of its four bytes late", moved(6, "target", offset=82)),
    ("what is read elsewhere too is read one element late", moved(0, "source", offset=18)),
    ("what is read elsewhere too is read past the end of the file", moved(0, "source", offset=70_000, dtype="f32")),
    ("what is read elsewhere too is read backwards", moved(0, "source", strides=(-6, 1))),
    ("a comparison reaches past its tensor", with_step(2, replace(STEPS[2], shape=(3, 6)))),
]
UNSEEN = (
    "the proof rounds offsets and strides down to whole elements and rows, and never asks whether a read stays in its tensor"
)


@pytest.mark.parametrize(("remark", "steps"), HOLES, ids=[row[0] for row in HOLES])
def test_a_plan_is_refused_where(remark, steps):
    with pytest.raises(CarnetError):
        prove(FILES, EXTENTS, steps)


@settings(deadline=None, max_examples=400)
@given(changed_plans())
def test_no_changed_plan_is_proven_that_counting_refuses(steps):
    assume(not is_whole(steps))
    with pytest.raises(CarnetError):
        prove(FILES, EXTENTS, steps)


def test_counting_accepts_the_plan_as_it_is():
    assert is_whole(STEPS)


# M is stored as codes of four bits, two a byte, under a scale for each 32 columns; two rows of it go to one tensor, two to another
PACKED = Extent("M codes", "in2.bin", 32, (4, 64), (64, 1), "u8", (), "packed")
BLOCKS = Extent("M scales", "in2.bin", 144, (4, 2), (2, 1), "u8", ())
ENCODING = Encoding("modelopt/mxfp4", (4, 64), 32, at("in2.bin", 144, (2, 1), "u8"), None)
HALVES = TargetFile(
    "m.bin", 80 + 512, (TargetTensor("m0", "bf16", (2, 64), 80), TargetTensor("m1", "bf16", (2, 64), 80 + 256)), {}
)
CODES = replace(at("in2.bin", 32, (64, 1), "u8"), space="packed")
DECODED = tuple(
    Make(
        "dequantize",
        "m",
        (row, 0),
        (2, 64),
        replace(CODES, offset=32 + row * 64),
        at("m.bin", 80 + row * 128, (64, 1)),
        ENCODING,
    )
    for row in (0, 2)
)


def test_codes_and_their_scales_are_proven_and_counted_as_the_bytes_they_are():
    counts = prove([HALVES], [PACKED, BLOCKS], DECODED)
    assert counts["source bytes"] == 4 * 64 // 2 + 8
    assert counts["target bytes"] == 512


LOST = [
    ("half of the codes is not read", 1, lambda step: replace(step, source=replace(step.source, offset=32)), READS, "M codes"),
    ("a row is read twice", 1, lambda step: replace(step, source=replace(step.source, offset=32 + 64)), READS, "M codes"),
    (
        "scales of nothing",
        0,
        lambda step: replace(step, encoding=replace(ENCODING, scales=at("in2.bin", 200, (2, 1), "u8"))),
        READS,
        "M sc",
    ),
    (
        "scales of another type",
        0,
        lambda step: replace(step, encoding=replace(ENCODING, scales=at("in2.bin", 144, (2, 1)))),
        NOWHERE,
        "",
    ),
    ("a row is written twice", 1, lambda step: replace(step, target=at("m.bin", 80 + 128, (64, 1))), WRITES, "m0"),
]


@pytest.mark.parametrize(("remark", "number", "change", "what", "tensor"), LOST, ids=[row[0] for row in LOST])
def test_of_codes_it_is_refused_that(remark, number, change, what, tensor):
    steps = [change(step) if place == number else step for place, step in enumerate(DECODED)]
    with pytest.raises(CarnetError, match=what) as refused:
        prove([HALVES], [PACKED, BLOCKS], steps)
    assert str(refused.value.facts.get("tensor", "")).startswith(tensor)


def test_scales_that_no_step_reads_are_refused():
    other = replace(BLOCKS, name="N scales", offset=152)
    with pytest.raises(CarnetError, match=READS) as refused:
        prove([HALVES], [PACKED, BLOCKS, other], DECODED)
    assert refused.value.facts["tensor"] == "N scales"
