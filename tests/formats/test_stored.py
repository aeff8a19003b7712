"""A tensor seen as another shape of the same elements: every element keeps its place in the file."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnet.algebra.box import Box, tiles, whole
from carnet.errors import NotSupported
from carnet.formats.stored import Chunk, Stored, dense_strides, reshaped

SHAPES = [(24,), (4, 6), (6, 4), (2, 3, 4), (3, 2, 4), (1, 24), (2, 1, 12), (2, 2, 2, 3)]


def content(stored: Stored, file: np.ndarray) -> np.ndarray:
    """Return what chunks say of a file of 16-bit items, by numpy's own strides."""
    made = np.full(stored.shape, 0xFFFF, np.uint16)
    for chunk in stored.chunks:
        strides = tuple(2 * stride for stride in chunk.strides)
        inside = tuple(slice(start, start + count) for start, count in zip(chunk.box.start, chunk.box.shape, strict=True))
        made[inside] = np.ndarray(chunk.box.shape, np.uint16, file, chunk.offset, strides)
    return made


@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES), st.lists(st.integers(0, 24), max_size=3))
def test_reshaping_does_what_numpy_does(before, after, cuts):
    length = before[0]
    bounds = sorted({0, length, *(cut % length for cut in cuts)})
    inner = int(np.prod(before[1:]))
    file = np.arange(100, 124, dtype=np.uint16)
    boxes = [Box((low, *(0,) * (len(before) - 1)), (high - low, *before[1:])) for low, high in pairwise(bounds)]
    chunks = tuple(Chunk(box, "f", 2 * inner * box.start[0], dense_strides(box.shape)) for box in boxes)
    stored = Stored("", "w", "bf16", before, chunks)
    seen = reshaped(stored, after)
    assert (seen.shape, seen.name, seen.dtype) == (after, "w", "bf16")
    assert tiles(whole(after), [chunk.box for chunk in seen.chunks])
    assert (content(seen, file) == content(stored, file).reshape(after)).all()


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(Box((0, 3), (4, 3)), "f", 0, (3, 1)),  # some columns
        Chunk(Box((0, 0), (4, 6)), "f", 0, (1, 4)),  # transposed
    ],
)
def test_what_is_no_run_of_elements_has_no_other_shape(chunk):
    with pytest.raises(NotSupported) as error:
        reshaped(Stored("", "w", "bf16", (4, 6), (chunk,)), (2, 2, 6))
    assert error.value.what == "a chunk is not one run of the tensor's elements"
    assert error.value.facts["tensor"] == "w"
