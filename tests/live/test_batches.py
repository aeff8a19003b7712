"""Tables of boxes that a GPU goes through: read as its programs read them, they are the copies that torch makes, each element once."""

import numpy as np
import pytest
import torch

from carnet.live.batches import TALL, WIDE, Job, batch, pairs


def walked(jobs, wide=WIDE):
    """Yield what programs read and write, as addresses: of a job the columns of one row of one tile."""
    made, left = batch(jobs, wide)
    assert not left
    for job, tile in made.tiles.tolist():
        read, written, which, rows, inner, width, *strides = made.jobs[job].tolist()
        across = -(-width // wide)
        top, first = tile // across * TALL, tile % across * wide
        for row in range(top, min(top + TALL, rows)):
            outer, second = divmod(row, inner)
            source, target = outer * strides[0] + second * strides[1], outer * strides[2] + second * strides[3]
            yield job, which, read, written, source + first, target, first, min(wide, width - first)


def words(*shape):
    return torch.arange(int(np.prod(shape)), dtype=torch.int32).view(shape)


BOXES = {
    "rows one after the other": (words(300, 64), words(300, 64)),
    "one long row": (words(5 * WIDE), words(5 * WIDE)),
    "one row that is no whole number of tiles": (words(1, 5 * WIDE + 8), words(1, 5 * WIDE + 8)),
    "columns of wider rows": (words(300, 1040)[:, 16:48], words(300, 32)),
    "into columns of wider rows": (words(130, 600), words(130, 2000)[:, 1200:1800]),
    "groups of rows": (words(4, 96, 64)[:, 32:64], words(4, 32, 64)),
    "groups of rows, one of each": (words(4, 3, 8, 64)[:, 1:2], words(4, 1, 8, 64)),
}


@pytest.mark.parametrize("name", BOXES)
def test_every_element_of_a_box_goes_once_to_its_place(name):
    view, out = BOXES[name]
    expected = {}
    for at in np.ndindex(*view.shape):
        place = [tensor.data_ptr() + 4 * sum(i * s for i, s in zip(at, tensor.stride(), strict=True)) for tensor in (view, out)]
        expected[place[1]] = place[0]
    found = {}
    for _, _, read, written, source, target, first, count in walked([Job(view, out)]):
        for column in range(count):
            to = written + 4 * (target + first + column)
            assert to not in found
            found[to] = read + 4 * (source + column)
    assert found == expected


def test_scales_of_blocks_have_narrower_rows():
    weights, scales = words(260, 128), torch.zeros((260, 8), dtype=torch.uint8)
    places = [(target + first // 16, count) for _, _, _, _, _, target, first, count in walked([Job(weights, scales)])]
    assert sum(count for _, count in places) == weights.numel()
    assert sorted(at + block for at, count in places for block in range(count // 16)) == list(range(scales.numel()))


def test_jobs_of_a_batch_keep_their_numbers_and_those_without_a_kernel_are_named():
    even, odd, scattered = words(16, 64), words(16, 65)[:, 1:], words(64, 16).T
    many = words(2, 3, 5, 7, 64)[:, ::2, ::2, ::2]
    jobs = [Job(even, even, 3), Job(odd, words(16, 64)), Job(even, even, 5), Job(scattered, words(16, 64)), Job(many, many)]
    made, left = batch(jobs)
    assert left == [1, 3, 4]
    assert made.jobs[:, 2].tolist() == [3, 5]
    assert batch([Job(odd, odd)]) == (None, [0])


def test_weights_are_read_two_by_two_only_on_gpus():
    assert pairs(torch.zeros((4, 8), dtype=torch.bfloat16)) is None
