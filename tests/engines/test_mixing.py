"""SGLang's hash of a tensor on a GPU: as its own kernel says it, and as the rule says it word by word."""

import random
from itertools import pairwise

import pytest

from carnet.engines.mixing import SEED, TILE, Mixed

MASK = 0xFFFFFFFF
# what the kernels of sglang 0.5.23 (sglang/kernels/ops/memory/gpu_tensor_hash.py) return of ``pattern``, in Triton's interpreter
RECORDED = {
    1: "3d93a6540b54ef2a",
    5: "321657ab05f5ac06",
    32768: "6879cd6080660f1d",
    32769: "9ebc1bcf26c4f61c",
    131076: "af2f25c95340d4a7",
    300001: "f6e592023dc594c0",
}


def pattern(nbytes):
    return bytes(at * 37 % 251 for at in range(nbytes))


def hashed(*chunks):
    made = Mixed(sum(map(len, chunks)))
    for chunk in chunks:
        made.update(chunk)
    return made.hexdigest()


def by_the_rule(data):
    """Return the hash as the rule says it, a word at a time, in Python's own numbers."""

    def fmix(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ x >> shift) * factor & MASK
        return x

    def rotated(x, by):
        return (x << by | x >> 32 - by) & MASK

    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    other, total = (SEED * 0x9E3779B1 ^ 0xDEADBEEF) & MASK, 0
    for first in range(0, len(words), TILE):
        one = two = 0
        for at, word in enumerate(words[first : first + TILE], first):
            one += fmix(word ^ (at * 0x27D4EB2D + SEED & MASK) ^ rotated(at, 15))
            two += fmix(word ^ (at * 0x165667B1 + other & MASK) ^ rotated(at, 13))
        total += fmix(one & MASK ^ len(data)) << 32 | fmix(two & MASK ^ len(data))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        total &= (1 << 64) - 1
        total = (total ^ total >> shift) * factor
    return f"{total & (1 << 64) - 1:016x}"


@pytest.mark.parametrize("nbytes", RECORDED)
def test_the_hash_is_that_of_sglangs_kernel(nbytes):
    assert hashed(pattern(nbytes)) == RECORDED[nbytes]


@pytest.mark.parametrize("nbytes", [0, 1, 4, 4 * TILE - 1, 4 * TILE, 4 * TILE + 4, 16 * TILE, 16 * TILE + 3])
def test_the_hash_is_that_of_the_rule(nbytes):
    data = random.Random(nbytes).randbytes(nbytes)
    assert hashed(data) == by_the_rule(data)


def test_it_does_not_matter_in_which_pieces_bytes_come():
    data, chosen = pattern(300_001), random.Random(0)
    for _ in range(5):
        cuts = sorted({0, len(data), *(chosen.randrange(len(data)) for _ in range(20))})
        assert hashed(*(data[low:high] for low, high in pairwise(cuts))) == RECORDED[len(data)]
