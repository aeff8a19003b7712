"""Sums of checkpoints as they are defined: each operation exact in f64, which holds any product of two f32, then rounded to f32.

It is carried out for a few numbers at a time, through the same small buffers, which stay in the processor's cache.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME, array_type

Array = NDArray[np.generic]
Bits = NDArray[np.unsignedinteger[Any]]

FEW = 1 << 15
HALF = 0x8000  # of the lower half of an f32's bits, which bf16 lacks
SAFE = 3.3e38  # smaller magnitudes stay finite in bf16


class Summed:
    """The numbers of a sum, which grows by one checkpoint after the other."""

    def __init__(self, count: int, *, differences: bool) -> None:
        """Begin with nothing; of ``differences`` the first that is added is what all others are held against."""
        self._total = np.zeros(count, np.float32)
        self._first: NDArray[np.float32] | None = None
        self._differences = differences
        self._wide, self._own = np.empty(min(count, FEW), np.float64), np.empty(min(count, FEW), np.float32)

    def add(self, bits: Array, dtype: str, factor: float) -> None:
        """Add what a checkpoint has, as bits of a type, times its factor."""
        if self._differences and self._first is None:
            self._first = np.empty_like(self._total)
            for low, own in self._numbers(bits, dtype):
                self._first[low : low + len(own)] = own
            return
        with np.errstate(over="ignore", invalid="ignore"):
            for low, own in self._numbers(bits, dtype):
                wide, total = self._wide[: len(own)], self._total[low : low + len(own)]
                if self._first is not None:
                    np.subtract(own, self._first[low : low + len(own)], out=wide, dtype=np.float64)
                    np.copyto(own, wide, casting="same_kind")
                np.multiply(own, factor, out=wide, dtype=np.float64)
                np.copyto(own, wide, casting="same_kind")
                np.add(total, own, out=wide, dtype=np.float64)
                np.copyto(total, wide, casting="same_kind")

    def _numbers(self, bits: Array, dtype: str) -> Iterable[tuple[int, NDArray[np.float32]]]:
        """Yield the numbers of a checkpoint in f32, some at a time."""
        for low in range(0, len(bits), FEW):
            some = bits[low : low + FEW]
            own = self._own[: len(some)]
            if dtype == "bf16":
                np.copyto(own.view(np.uint32), some, casting="unsafe")
                np.left_shift(own.view(np.uint32), np.uint32(16), out=own.view(np.uint32))
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    np.copyto(own, some.view(array_type(dtype)), casting="unsafe")
            yield low, own

    def bits(self, wanted: str) -> tuple[Array, NDArray[np.bool_] | None]:
        """Return the bits of the sum in a type, rounded to nearest even, and which numbers are beyond its range: None for none."""
        total = self._total
        with np.errstate(over="ignore", invalid="ignore"):
            if self._first is not None:
                for low in range(0, len(total), FEW):
                    some = total[low : low + FEW]
                    wide = self._wide[: len(some)]
                    np.add(self._first[low : low + FEW], some, out=wide, dtype=np.float64)
                    np.copyto(some, wide, casting="same_kind")
            if wanted == "f32":
                return total.view(np.uint32), None
            if wanted == "bf16" and self._largest() < SAFE:
                return _halves(total.view(np.uint32)), None
            cast: Array = total.astype(array_type(wanted))
            infinite = np.isinf(cast)
            beyond = infinite & np.isfinite(total) if infinite.any() else None
        return cast.view(f"u{BY_NAME[wanted].nbytes}"), beyond

    def _largest(self) -> float:
        """Return the largest magnitude, NaN where one is."""
        each = (self._total[low : low + FEW] for low in range(0, len(self._total), FEW))
        return float(np.max([np.abs(some, out=self._own[: len(some)]).max() for some in each]))


def _halves(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Round bits of f32 to those of bf16: up where the lower half is more than half of one, or as much and the upper is odd."""
    made = np.empty(bits.shape, np.uint16)
    upper, lower = np.empty(min(len(bits), FEW), np.uint32), np.empty((2, min(len(bits), FEW)), np.uint16)
    for low in range(0, len(bits), FEW):
        some, into = bits[low : low + FEW], made[low : low + FEW]
        held, rest, least = upper[: len(some)], *lower[:, : len(some)]
        np.right_shift(some, np.uint32(16), out=held)
        np.copyto(into, held, casting="unsafe")
        np.copyto(rest, some, casting="unsafe")
        np.bitwise_and(into, np.uint16(1), out=least)
        np.subtract(np.uint16(HALF), least, out=least)
        np.add(into, rest > least, out=into)
    return made
