"""Products of matrices: each element is the number of the target's type that is nearest to the true sum of products.

So no order of the sums can matter, nor who multiplies how. A product in f64 says the sum up to a bound, which follows from the lengths
of its row and its column; where numbers within the bound round differently, which of random weights is one element in milliards, the
sum is carried out in fractions. The operands are rounded to the target's type before, as they stand in the target beside the product::

    fused_q_proj[h] = k_b[h]^T q_b[h]          tensorrt_llm/models/deepseek_v2/convert.py: einsum("hdq,hdk->hkq"), in that type
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME, array_type
from carnet.executor.casts import out_of_range
from carnet.executor.dequantizing import region
from carnet.executor.geometry import Piece, Tile, clip
from carnet.executor.worker import Worker
from carnet.steps import Place, Product

Floats = NDArray[np.float64]

BLOCK = 1 << 15  # elements of a product, and of each operand, at a time
SLACK = 1.01  # for the rounding of the bound itself


def products_of(step: Product, tile: Tile) -> list[Piece]:
    """Return the pieces of a step that fall into a tile; their sources are indices, told apart by axes that nothing merges."""
    _, rows, columns = step.shape
    return clip(step.shape, Place("", 0, (4 * rows * columns, 2 * columns, 1), "u8"), step.target, tile)


def multiply(worker: Worker, step: Product, piece: Piece, base: int) -> None:
    """Bring a piece into the window, where its own target begins at ``base``."""
    _, rows, columns = step.shape
    wide = 4 * rows * columns, 2 * columns, 1
    first, reach, far = [], [1, 1, 1], [0, 0, 0]
    left = piece.source
    for axis, stride in enumerate(wide):
        index, left = divmod(left, stride)
        first.append(index)
        for extent, source, target in piece.axes:
            if stride <= source < (wide[axis - 1] if axis else source + 1):
                reach[axis], far[axis] = extent, target
    item = BY_NAME[step.target.dtype].nbytes
    for head, down, along in _boxes(reach, step.along[0]):
        found = _product(worker, step, first[0] + head, _moved(down, first[1]), _moved(along, first[2]))
        offset = base + piece.target + head * far[0] + down[0] * far[1] + along[0] * far[2]
        np.copyto(np.ndarray(found.shape, f"u{item}", worker.window.data, offset, (far[1], far[2])), found)


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def _boxes(reach: list[int], depth: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Yield a head, rows and columns that are multiplied together."""
    most = max(1, BLOCK // depth)
    wide = min(reach[2], most)
    tall = max(1, min(reach[1], most, BLOCK // wide))
    for head in range(reach[0]):
        for left in range(0, reach[2], wide):
            for top in range(0, reach[1], tall):
                yield head, (top, min(reach[1], top + tall)), (left, min(reach[2], left + wide))


def _product(worker: Worker, step: Product, head: int, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[Any]:
    """Return the bits of a product of a head: some rows and columns of it."""
    worker.tell(0)
    own = step.target.dtype
    depth, far, wide = step.along
    right = _operand(worker, step.source, head, (depth, far, step.source.strides[2]), columns, own)
    left = _operand(worker, step.factor, head, (depth, wide, step.factor.strides[1]), rows, own)
    found = nearest(left, right, own)
    with np.errstate(invalid="ignore"):
        if np.isinf(found).any() and np.isfinite(left).all() and np.isfinite(right).all():
            raise out_of_range(f"a product of {step.tensor}", step.tensor, "a finite product", own)
    return np.ascontiguousarray(found).view(f"u{BY_NAME[own].nbytes}")


def _operand(worker: Worker, place: Place, head: int, axes: tuple[int, int, int], span: tuple[int, int], own: str) -> Floats:
    """Return some rows or columns of an operand, rounded to a type; ``axes``: the length of the other axis, and both strides."""
    depth, far, near = axes
    item = BY_NAME[place.dtype].nbytes
    begin = place.offset + head * place.strides[0] * item
    found = region(worker, place.file, begin, (far * item, near * item), item, (0, depth), span)
    with np.errstate(over="ignore", invalid="ignore"):
        return found.view(array_type(place.dtype)).astype(array_type(own)).astype(np.float64)


def nearest(left: Floats, right: Floats, own: str) -> NDArray[Any]:
    """Return the numbers of a type that are nearest to ``left.T @ right``, whose operands are numbers of that type.

    >>> nearest(np.array([[1.0], [2.0]]), np.array([[3.0, 0.5], [4.0, 0.25]]), "f32").tolist()
    [[11.0, 1.0]]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = left.T @ right
        lengths = [np.sqrt(np.einsum("da,da->a", each, each)) for each in (left, right)]
        bound = np.outer(*lengths) * (SLACK * len(left) * 2.0**-53)
        low, high = rounded(found - bound, own), rounded(found + bound, own)
        unsure = (low != high) & np.isfinite(found)
    for row, column in np.argwhere(unsure):
        low[row, column] = rounded(np.array(_true(left[:, row], right[:, column])), own)
    return low


def _true(left: Floats, right: Floats) -> float:
    """Return a sum of products in f64, so that it rounds to any narrower type as the true sum does."""
    true = sum((Fraction(a) * Fraction(b) for a, b in zip(left.tolist(), right.tolist(), strict=True)), Fraction(0))
    near = float(true)
    if Fraction(near) == true:
        return near
    if abs(Fraction(near)) > abs(true):
        near = float(np.nextafter(near, 0.0))
    return float((np.array(near).view(np.uint64) | np.uint64(1)).view(np.float64))


def rounded(numbers: Floats, own: str) -> NDArray[Any]:
    """Round numbers of f64 once, to nearest even; those for bf16 go through f32, where what was cut off leaves an odd bit."""
    if own != "bf16":
        return numbers.astype(array_type(own))
    near = np.array(numbers, np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(numbers)
    bits |= near != numbers
    return near.astype(array_type("bf16"))
