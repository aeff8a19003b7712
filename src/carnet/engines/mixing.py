"""The hash that SGLang takes of a tensor on a GPU: 64 bits, of tiles that are hashed apart and summed.

sglang 0.5.23: sglang/kernels/ops/memory/gpu_tensor_hash.py. ``w`` are words of 32 bits, little endian, zeros after the last byte,
``i`` their numbers; every product and sum wraps::

    k = fmix(w ^ (i * scale + seed) ^ rotl(i, turn))     once with each of two seeds, scales and turns
    h = fmix(sum of k over a tile ^ bytes of all words)  the two are the halves of the tile's number
    the hash is the finaliser of splitmix64 of the sum of all tiles
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

SEED = 0x243F6A88
# seed, scale and turn: POS_C1, POS_C2
WAYS = ((SEED, 0x27D4EB2D, 15), ((SEED * 0x9E3779B1 & 0xFFFFFFFF) ^ 0xDEADBEEF, 0x165667B1, 13))
TILE = 8192  # words
TOGETHER = 4 * TILE  # words that are worked on at once: all that is needed stays in the processor's cache


class Mixed:
    """A hash that is told a tensor's bytes one after the other.

    >>> hashed = Mixed(5)
    >>> hashed.update(b"abc")
    >>> hashed.update(b"de")
    >>> hashed.hexdigest()
    'ba3f44b01a2a30fa'
    """

    def __init__(self, nbytes: int) -> None:
        """Begin the hash of so many bytes."""
        self._nbytes = -(-nbytes // 4) * 4
        self._next = np.arange(TOGETHER, dtype=np.uint32)  # the numbers of the words that come next
        self._mixed, self._turned = np.empty(TOGETHER, np.uint32), np.empty(TOGETHER, np.uint32)
        self._held = np.zeros(4 * TOGETHER, np.uint8)  # bytes that are not hashed yet
        self._filled, self._sum = 0, 0

    def update(self, data: bytes | memoryview) -> None:
        """Hear what comes next."""
        left = np.frombuffer(data, np.uint8)
        while left.size:
            size = min(left.size, self._held.size - self._filled)
            self._held[self._filled : self._filled + size] = left[:size]
            self._filled, left = self._filled + size, left[size:]
            if self._filled == self._held.size:
                self._mix(self._held.view(np.uint32))
                self._filled = 0

    def hexdigest(self) -> str:
        """Return the hash of everything."""
        if self._filled:
            until = -(-self._filled // 4) * 4
            self._held[self._filled : until] = 0
            self._mix(self._held[:until].view(np.uint32))
            self._filled = 0
        found = self._sum
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            found = (found ^ found >> shift) * factor % (1 << 64)
        return f"{found:016x}"

    def _mix(self, words: Words) -> None:
        """Add the tiles of some words, whole ones but for the last of all."""
        count = len(words)
        index, mixed, turned = self._next[:count], self._mixed[:count], self._turned[:count]
        halves = list[Words]()
        for seed, scale, turn in WAYS:
            np.multiply(index, np.uint32(scale), out=mixed)
            mixed += np.uint32(seed)
            for shift, way in ((turn, np.left_shift), (32 - turn, np.right_shift)):
                mixed ^= way(index, np.uint32(shift), out=turned)  # the two parts have no bit in common
            mixed ^= words
            _fmix(mixed, turned)
            sums = np.add.reduceat(mixed, np.arange(0, count, TILE), dtype=np.uint32) ^ np.uint32(self._nbytes & 0xFFFFFFFF)
            _fmix(sums, np.empty_like(sums))
            halves.append(sums)
        high, low = (half.astype(np.uint64) for half in halves)
        self._sum = (self._sum + int((high << np.uint64(32) | low).sum(dtype=np.uint64))) % (1 << 64)
        self._next += np.uint32(count)


def _fmix(words: Words, spare: Words) -> None:
    """Finish words as murmur3 does."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        words ^= np.right_shift(words, np.uint32(shift), out=spare)
        words *= np.uint32(factor)
