"""What adapters add to weights: a window of the target is assembled in f32, the products are added to it, and it is rounded once.

For an element of a weight W with factors A (rank | inputs) and B (outputs | rank), all in f32 and every operation rounded to f32::

    p = B[o, 0] * A[0, j];  p = p + B[o, 1] * A[1, j];  ...  in the order of the rank, no two operations rounded as one
    W[o, j] + scale * p                                      then rounded to nearest even to the type of the target

That is the order of peft's ``get_delta_weight`` and ``merge`` (peft 0.21, tuners/lora/layer.py), but that its product is BLAS's, whose
order is a machine's. Nothing here depends on windows, blocks or processes: every element is computed by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import isfinite, prod

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box, uncovered, whole
from carnet.errors import BadCheckpoint, BadRequest
from carnet.executor.casts import cast, out_of_range
from carnet.executor.cutting import Writer, reach
from carnet.executor.geometry import Spot, linear, spots, volume
from carnet.executor.jobs import Part
from carnet.executor.memory import choose_window
from carnet.executor.placing import place
from carnet.executor.worker import Worker
from carnet.formats.stored import dense_strides
from carnet.plans.columns import Plan
from carnet.steps import Make, Move, Place, TargetTensor, Update

Numbers = NDArray[np.float32]
Axes = Sequence[tuple[int, int]]  # number of indices; elements from one to the next

SHARE = 8  # windows of the target that what a worker holds beside factors is as large as, at most
BLOCK = 1 << 15  # elements that are added at a time: they and their products stay in the processor's cache
KEPT = 4  # weights whose rows' lengths a worker remembers
BUFFER = 64  # elements of numpy's own buffers: with larger ones it copies factors before it multiplies short rows


class Known:
    """What a plan says of adapters, by the names that are asked for."""

    def __init__(self, plan: Plan) -> None:
        self.updates = {each.tensor: each for each in plan.updates}
        self.factors = {tensor.name: tensor for tensor in plan.factors.tensors}
        steps = plan.steps.where(lambda form: isinstance(form, Move) and form.target.space == "factors")
        self._steps = steps.at(np.argsort(steps.rows["target_at"], kind="stable"))
        self._last: tuple[str, list[tuple[int, int, Move]]] = "", []
        self._whole: tuple[str, tuple[Writer, ...]] = "", ()

    def covering(self, plan: Plan, tensor: str, shape: Sequence[int]) -> tuple[Writer, ...]:
        """Return the steps that bring a weight from its source, each told where it would lie in the whole weight."""
        if self._whole[0] != tensor:
            number = plan.steps.names.index(tensor)
            strides, found = dense_strides(tuple(shape)), dict[tuple[tuple[int, ...], tuple[int, ...]], Move | Make]()
            for step in plan.steps.at(np.flatnonzero(plan.steps.rows["tensor"] == number)):
                if isinstance(step, Move) or (isinstance(step, Make) and step.function == "dequantize"):
                    at = 4 * sum(first * stride for first, stride in zip(step.start, strides, strict=True))
                    found[step.start, step.shape] = replace(step, target=Place("", at, strides, "f32"))
            if uncovered(whole(shape), [Box(*box) for box in found]) is not None:
                raise BadRequest(f"not all steps are here that bring {tensor}, whose rows are to be measured")
            self._whole = tensor, tuple(found.values())
        return self._whole[1]

    def assembling(self, tensor: TargetTensor, low: int, high: int) -> tuple[Move, ...]:
        """Return the steps that bring anything between two bytes of a factor."""
        if self._last[0] != tensor.name:
            begin, end = np.searchsorted(self._steps.rows["target_at"], [tensor.offset, tensor.offset + 4 * prod(tensor.shape)])
            spans = [(*reach(step), step) for step in self._steps.at(slice(int(begin), int(end))).only(Move)]
            self._last = tensor.name, spans
        low, high = tensor.offset + low, tensor.offset + high
        return tuple(step for begin, end, step in self._last[1] if begin < high and low < end)


def held(plan: Plan) -> int:
    """Return the bytes of factors that a worker holds at most: those of two weights, or of one expert of them."""
    shapes = {tensor.name: tensor.shape[1:] if by_expert else tensor.shape for tensor, by_expert in _factors(plan)}
    return 2 * max((4 * sum(prod(shapes[name]) for name in (each.a, each.b)) for each in plan.updates), default=0)


def fitting(plan: Plan) -> Plan:
    """Return a plan with the largest window that stays inside its memory, with what is held beside it."""
    window = choose_window(plan.memory - held(plan), len(plan.steps))
    return replace(plan, window=window // SHARE if plan.updates else window)


def held_window(plan: Plan) -> int:
    """Return the bytes of a window and of all that a worker holds beside it because of adapters."""
    return plan.window * SHARE + held(plan) if plan.updates else plan.window


def _factors(plan: Plan) -> Iterator[tuple[TargetTensor, bool]]:
    """Yield the factors, each with whether every expert has its own."""
    by_expert = {name: each.experts for each in plan.updates for name in (each.a, each.b, each.magnitude)}
    return ((tensor, by_expert[tensor.name]) for tensor in plan.factors.tensors)


def assemble(worker: Worker, parts: Sequence[Part]) -> None:
    """Bring the bytes of some parts side by side into the window, from its start, with what adapters add."""
    if not worker.plan.updates:
        place(worker, parts)
        return
    worker.room.known = known = worker.room.known or Known(worker.plan)
    changed = [any(isinstance(step, Move | Make) and step.tensor in known.updates for step in part.steps) for part in parts]
    place(worker, [replace(part, steps=()) if apart else part for part, apart in zip(parts, changed, strict=True)])
    base = 0
    for part, apart in zip(parts, changed, strict=True):
        size = volume(part.tile)
        if apart:
            _adapt(worker, part, known, worker.window[base : base + size])
        base += size


def _adapt(worker: Worker, part: Part, known: Known, into: NDArray[np.uint8]) -> None:
    """Fill a buffer with a part of a tensor that adapters change."""
    wide, item = _widened(part), part.tile.item
    if worker.room.window.size < volume(wide.tile):
        worker.room.window = np.empty(volume(wide.tile), np.uint8)
    place(replace(worker, window=worker.room.window), (wide,))
    total = worker.room.window[: volume(wide.tile)].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        np.setbufsize(BUFFER)  # ends with the context
        for step in wide.steps:
            if isinstance(step, Move | Make) and step.tensor in known.updates:
                for spot in spots(step.shape, step.target, wide.tile):
                    _add(worker, known, known.updates[step.tensor], step.start, spot, total)
    wanted = next(step.target.dtype for step in part.steps)
    names = ", ".join(dict.fromkeys(step.tensor for step in part.steps if step.tensor in known.updates))
    if total.size and not (isfinite(total.min()) and isfinite(total.max())):  # NaN is both
        what = f"{names} with its adapter is not finite"
        remedy = "look for NaN and Inf in the weight and in its adapter, and at the scale"
        raise BadCheckpoint(what, {"tensor": names, "found": "NaN, Inf or a sum beyond the largest of f32"}, remedy=remedy)
    if wanted == "f32":
        into[:] = total.view(np.uint8)
    elif not cast(total.view(np.uint32), into.view(f"u{item}"), ("f32", wanted), worker.temporary):
        raise out_of_range(f"{names} with its adapter", names, "a finite sum", wanted)


def _widened(part: Part) -> Part:
    """Return a part as it would be written in f32 at the beginning of a file."""

    def wide(at: Place) -> Place:
        return replace(at, offset=(at.offset - part.tile.base) // part.tile.item * 4, dtype="f32")

    steps: list[Writer] = [replace(step, target=wide(step.target)) for step in part.steps]
    return replace(part, tile=replace(part.tile, base=0, item=4), steps=tuple(steps))


def _add(
    worker: Worker, known: Known, update: Update, start: Sequence[int], spot: Spot, total: Numbers, *, made: bool = True
) -> None:
    """Add what an adapter adds to a box of its weight; its rows are ``made`` as long as it says then, or are still to be measured."""
    spans = [(first + begin, count, far) for begin, (first, count, far) in zip(start, spot.axes, strict=True)]
    experts, spans = (spans[:1], spans[1:]) if update.experts else ([], spans)
    outputs, inputs = spans[: update.outputs], spans[update.outputs :]
    first, number, far = experts[0] if experts else (0, 1, 0)
    rows_, columns_ = (tuple(slice(first, first + count) for first, count, _ in axes) for axes in (outputs, inputs))
    for expert in range(first, first + number):
        at = spot.at + (expert - first) * far
        a, b = (_factor(worker, known, update, name, expert) for name in (update.a, update.b))
        a, b = a[:, *columns_], b[*rows_]
        rank = len(a)
        left, right = b.reshape(-1, rank).T, a.reshape(rank, -1)  # rank | outputs, rank | inputs
        tall, wide = _joined(outputs), _joined(inputs)
        above: Numbers | None = None  # what rows are multiplied by
        beside: Numbers | None = None  # and columns
        if made and update.magnitude:
            above = stretches(worker, known, update, expert, outputs)
        if tall[-1][1] == 1 != wide[-1][1]:  # outputs lie beside each other: a product does not mind its order
            (left, right), (tall, wide), (above, beside) = (right, left), (wide, tall), (beside, above)
        left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        for (row, down), (column, along) in product(_outer(tall), _outer(wide)):
            (rows, pitch), (columns, each) = tall[-1], wide[-1]
            shape, strides = (rows, columns), (4 * pitch, 4 * each)
            into = np.ndarray(shape, np.float32, total.data, 4 * (at + down + along), strides)
            _multiply(worker, left[:, row : row + rows], right[:, column : column + columns], np.float32(update.scale), into)
            if above is not None:
                np.multiply(into, above[row : row + rows, None], out=into)
            if beside is not None:
                np.multiply(into, beside[None, column : column + columns], out=into)


def stretches(worker: Worker, known: Known, update: Update, expert: int, outputs: Sequence[tuple[int, int, int]]) -> Numbers:
    """Return what some rows of a weight, or of an expert's, are multiplied by: the magnitude of each over its norm.

    Rows are measured whole, wherever the target cuts them, once for a worker that needs them again.
    """
    magnitude = _factor(worker, known, update, update.magnitude, expert)
    rows = np.arange(magnitude.size).reshape(magnitude.shape)[tuple(slice(first, first + count) for first, count, _ in outputs)]
    kept, key = worker.room.stretches, (update.tensor, expert)
    found = kept.pop(key, None)
    if found is None:
        found = np.zeros(magnitude.size, np.float32)  # which no row has that was measured, but one of zeros
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
    kept[key] = found
    low, high = int(rows.min()), int(rows.max()) + 1
    if not found[low:high].all():
        found[low:high] = magnitude.reshape(-1)[low:high] / _norms(worker, known, update, expert, (low, high))
    chosen: Numbers = found[rows.reshape(-1)]
    return chosen


def _norms(worker: Worker, known: Known, update: Update, expert: int, rows: tuple[int, int]) -> Numbers:
    """Return for each of some rows the number of f32 that is nearest to its norm, with what is added to it and rounded to f32."""
    first, inputs = (
        known.factors[update.a].shape[:1] if update.experts else (),
        known.factors[update.a].shape[update.experts + 1 :],
    )
    shape = (*first, *known.factors[update.b].shape[update.experts : -1], *inputs)
    wide, tall = prod(inputs), known.factors[update.magnitude].shape
    dense, height = Place("", 0, dense_strides(shape), "f32"), prod(tall[update.experts :])
    steps, found = known.covering(worker.plan, update.tensor, shape), np.empty(rows[1] - rows[0], np.float32)
    each = max(1, 4 * BLOCK // wide)
    for low in range(rows[0], rows[1], each):
        high = min(low + each, rows[1])
        total = np.empty((high - low) * wide, np.float32)
        begin = (expert * height + low) * wide * 4
        tile = linear(0, 4, begin, begin + total.nbytes)
        place(replace(worker, window=total.view(np.uint8)), (Part("", tile, steps),))
        for spot in spots(shape, dense, tile):
            _add(worker, known, update, (0,) * len(shape), spot, total, made=False)
        for row, line in enumerate(total.reshape(high - low, wide), low - rows[0]):
            found[row] = norm(line)
    return found


def norm(numbers: Numbers) -> np.float32:
    """Return the number of f32 that is nearest to the length of a vector, in whatever order it is summed up.

    >>> float(norm(np.array([3, 4], np.float32)))
    5.0
    """
    wide = numbers.astype(np.float64)
    about = float(np.sqrt(np.dot(wide, wide)))  # squares are exact; the sum of n of them is off by less than n units of f64
    slack = about * (len(numbers) + 4) * 2.0**-53
    low, high = np.float32(about - slack), np.float32(about + slack)
    if low == high or not isfinite(about):
        return np.float32(about)
    total = sum((Fraction(each) ** 2 for each in wide.tolist()), Fraction(0))
    middle = (
        Fraction(float(low)) + Fraction(float(high))
    ) / 2  # between two that follow each other: even counts where it is hit
    if total == middle**2:
        return low if not int(low.view(np.uint32)) & 1 else high
    return low if total < middle**2 else high


def _joined(spans: Sequence[tuple[int, int, int]]) -> Axes:
    """Return axes with those as one that are walked in one stride; none is one of a single index."""
    found: list[tuple[int, int]] = []
    for _, count, far in spans:
        if found and found[-1][1] == count * far:
            found[-1] = found[-1][0] * count, far
        elif count > 1:
            found.append((count, far))
    return found or [(1, 1)]


def _outer(axes: Axes) -> Iterator[tuple[int, int]]:
    """Yield for each index of all axes but the last the first number of that, and where it lies."""
    inner = axes[-1][0]
    for at, index in enumerate(product(*(range(count) for count, _ in axes[:-1]))):
        yield at * inner, sum(each * far for each, (_, far) in zip(index, axes[:-1], strict=True))


def _multiply(worker: Worker, left: Numbers, right: Numbers, scale: np.float32, into: Numbers) -> None:
    """Add scale times the product of two factors, in blocks."""
    rows, columns = into.shape
    wide = min(columns, BLOCK)
    tall = min(rows, max(1, BLOCK // wide))
    if worker.room.block.shape[1] < tall * wide:
        worker.room.block = np.empty((2, BLOCK), np.float32)
    for top in range(0, rows, tall):
        ours = left[:, top : top + tall, None]
        for first in range(0, columns, wide):
            theirs, target = right[:, None, first : first + wide], into[top : top + tall, first : first + wide]
            sums, products = (each[: target.size].reshape(target.shape) for each in worker.room.block)
            np.multiply(ours[0], theirs[0], out=sums)
            for at in range(1, len(left)):
                np.multiply(ours[at], theirs[at], out=products)
                np.add(sums, products, out=sums)
            if scale != 1:
                np.multiply(sums, scale, out=sums)
            np.add(target, sums, out=target)


def _factor(worker: Worker, known: Known, update: Update, name: str, expert: int) -> Numbers:
    """Return a factor, or that of an expert: A with its rank first, B with its rank last."""
    tensor, key, kept = known.factors[name], (name, expert), worker.room.factors
    found = kept.pop(key, None)
    if found is None:
        shape = tensor.shape[1:] if update.experts else tensor.shape
        nbytes, most = 4 * prod(shape), worker.room.most or held(worker.plan)
        worker.room.most = most
        while kept and sum(each.nbytes for each in kept.values()) + nbytes > most:
            del kept[next(iter(kept))]
        found = np.empty(shape, np.float32)
        low = expert * nbytes
        tile = linear(tensor.offset, 4, low, low + nbytes)
        part = Part(worker.plan.factors.name, tile, known.assembling(tensor, low, low + nbytes))
        place(replace(worker, window=found.reshape(-1).view(np.uint8)), (part,))
    kept[key] = found
    return found
