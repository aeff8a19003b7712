"""Batches: many boxes in one launch, from tables that say where each lies. A launch costs a processor what a GPU copies 50 MB in.

::

    job   source, target, which, rows, rows of the inner axis, columns, strides of both axes in source and in target
    tile  its job, its number: TALL rows of WIDE columns, or what is left of them
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TALL, WIDE = 128, 512  # rows and columns of a tile, of pairs of weights
WORDS = 256  # columns of one that is copied, of eight bytes
ALIGN = 16  # bytes: a thread reads as many at once


@dataclass(frozen=True, slots=True)
class Batch:
    """Boxes that are read, and what is written of them, on one GPU."""

    jobs: torch.Tensor  # [count, fields], i64
    tiles: torch.Tensor  # [count, 2], i32

    @property
    def count(self) -> int:
        """Return how many tiles there are."""
        return len(self.tiles)


@dataclass(frozen=True, slots=True)
class Job:
    """One box."""

    view: torch.Tensor  # what is read
    out: torch.Tensor  # what is written: of the shape of what is read, but that its last axis may be narrower
    which: int = 0  # of several numbers


def batch(jobs: Iterable[Job], wide: int = WIDE) -> tuple[Batch | None, list[int]]:
    """Return a batch of those jobs that a kernel takes, and the numbers of the others."""
    rows, tiles, others, device = list[tuple[int, ...]](), list[int](), list[int](), torch.device("cpu")
    for number, job in enumerate(jobs):
        laid = _laid(job.view, job.out, wide)
        if laid is None:
            others.append(number)
            continue
        (outer, inner, width), strides = laid
        rows.append((job.view.data_ptr(), job.out.data_ptr(), job.which, outer * inner, inner, width, *strides))
        tiles.append(-(-outer * inner // TALL) * -(-width // wide))
        device = job.view.device
    if not rows:
        return None, others
    count = np.array(tiles)
    of = np.repeat(np.arange(len(rows)), count)
    table = np.stack([of, np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)], 1).astype(np.int32)
    return Batch(torch.tensor(rows, dtype=torch.int64).to(device), torch.from_numpy(table).to(device)), others


def pairs(view: torch.Tensor) -> torch.Tensor | None:
    """Return weights in bf16 two by two; None where they are in another type or no pairs."""
    return view.view(torch.int32) if view.is_cuda and view.dtype == torch.bfloat16 and is_even(view, 4) else None


def is_even(tensor: torch.Tensor, nbytes: int) -> bool:
    """Say whether a tensor can be seen as items of so many bytes."""
    each = nbytes // tensor.element_size()
    if not each or not tensor.dim() or tensor.stride(-1) != 1:
        return False
    sizes = (tensor.storage_offset(), tensor.size(-1), *tensor.stride()[:-1])
    return all(size % each == 0 for size in sizes) and tensor.data_ptr() % nbytes == 0


def _laid(view: torch.Tensor, out: torch.Tensor, wide: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]] | None:
    """Return a box as two axes of rows and one of columns, with the strides of the rows in source and in target.

    None where it has more axes, columns that are not neighbours, or begins where a thread cannot read at once.
    """
    if not view.numel() or not view.dim() or view.stride(-1) != 1 or out.stride(-1) != 1:
        return None
    width, narrow = view.shape[-1], out.shape[-1]
    by = width // narrow
    axes: list[tuple[int, int, int]] = []
    for size, source, target in zip(view.shape[:-1], view.stride()[:-1], out.stride()[:-1], strict=True):
        if axes and axes[-1][1:] == (size * source, size * target):
            axes[-1] = (axes[-1][0] * size, source, target)
        elif size > 1:
            axes.append((size, source, target))
    count = axes[-1][0] if axes and axes[-1][1:] == (width, narrow) else 1
    if (
        count * width % wide == 0 and len(axes) - (count > 1) < 2
    ):  # one row after the other: cut anew, so that no tile is narrower
        axes[len(axes) - (count > 1) :] = [(count * width // wide, wide, wide // by)]
        width = wide
    if len(axes) > 2 or not _fits(view, width, [stride for _, stride, _ in axes], ALIGN):
        return None
    even = ALIGN * out.element_size() // view.element_size() if by == 1 else 1
    if not _fits(out, width // by, [stride for *_, stride in axes], even):
        return None
    (outer, *first), (inner, *second) = [(1, 0, 0)] * (2 - len(axes)) + axes
    return (outer, inner, width), (first[0], second[0], first[1], second[1])


def _fits(tensor: torch.Tensor, width: int, strides: Sequence[int], nbytes: int) -> bool:
    """Say whether all rows begin, and end, at a multiple of so many bytes."""
    return tensor.data_ptr() % nbytes == 0 and all(each * tensor.element_size() % nbytes == 0 for each in (width, *strides))
