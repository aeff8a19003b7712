"""The proof that a plan loses nothing, doubles nothing and invents nothing, made from its rows alone.

For every target tensor the boxes that steps write are recomputed from the rows' offsets and strides, and must tile the tensor:
inside, disjoint, no hole. For every extent of the source the boxes that steps read, with the padding that is dropped by name, must
cover it. Equal situations (the same layer, sixty times) are proven once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import gcd, prod

from carnet.algebra.box import Box, tiles, uncovered, volume, whole
from carnet.algebra.layout import View, stored_boxes
from carnet.dtypes import BY_NAME
from carnet.errors import CarnetError
from carnet.planner.touches import Extent, Extents, Footprint, Use, nbytes, situations, touches
from carnet.plans.columns import Steps
from carnet.quantize.recipes import BY_NAME as RECIPES
from carnet.quantize.recipes import codes_shape, grid
from carnet.steps import Encoding, Fill, Make, Measure, Move, Product, Put, Same, Step, TargetFile


def prove(files: Sequence[TargetFile], extents: Extents, steps: Steps) -> Mapping[str, int]:
    """Return the counts that were established, or raise naming the first tensor that is not whole."""
    written = prove_written(files, steps)
    for extent, marks in situations(extents, touches(steps, reads), distinct=True):
        if not all(is_inside(extent, mark) for mark in marks) or not _is_covered(extent, marks):
            raise _not_whole("the plan does not use every element of a source tensor", extent)
    return {
        "source tensors": len(set(extents.names)),
        "source bytes": extents.sum(nbytes),
        "source padding bytes": extents.sum(lambda form: nbytes(form, sum(map(volume, form.padding)))),
        "copies checked equal": len(steps.where(lambda form: isinstance(form, Same))),
        "target tensors": written.sum(lambda form: form.space == "file"),
        "target bytes": written.sum(lambda form: nbytes(form) if form.space == "file" else 0),
        "target padding bytes": sum(filled * number for filled, number in steps.count(_filled).items()),
    }


def prove_written(files: Sequence[TargetFile], steps: Steps) -> Extents:
    """Return the extents of some files, or raise where steps do not write every element of one exactly once."""
    extents = Extents.of_files(files)
    for extent, marks in situations(extents, touches(steps, writes), distinct=False):
        if not all(is_inside(extent, mark) for mark in marks) or not _is_tiled(extent, marks):
            raise _not_whole("the plan does not write every element of a target tensor exactly once", extent)
    return extents


def _not_whole(what: str, extent: Extent) -> CarnetError:
    return CarnetError(what, {"tensor": extent.name, "file": extent.file, "shape": list(extent.shape)})


def _filled(step: Step) -> int:
    """Return the bytes that a step fills with zeros."""
    return prod(step.shape) * BY_NAME[step.target.dtype].nbytes if isinstance(step, Fill) else 0


def reads(step: Step) -> Iterator[Use]:
    """Yield the boxes of the source that a step uses up; to measure is no use.

    Of codes all scales that belong to their matrix are: each stands over a code at least, and every code is used by some step.
    """
    match step:
        case Move():
            yield step.shape, step.source, "source"
        case Same():
            yield step.shape, step.source, "source"
            yield step.shape, step.other, "target"
        case Product():
            (batch, rows, columns), (depth, far, wide) = step.shape, step.along
            source, factor = (replace(at, strides=(at.strides[0], stride, at.strides[axis])) for at, stride, axis in (
                (step.source, far, 2), (step.factor, wide, 1)
            ))  # fmt: skip
            yield (batch, depth, columns), source, "source"
            yield (batch, depth, rows), factor, "scales"
        case Make(function="dequantize"):
            yield step.shape, step.source, "source"
            yield from _scales(step.encoding)
        case Make() | Measure() | Fill() | Put():
            pass


def writes(step: Step) -> Iterator[Use]:
    """Yield the boxes of the target that a step writes."""
    match step:
        case Make(function="quantize"):
            yield codes_shape(RECIPES[step.encoding.recipe], step.encoding.shape), step.target, "target"
            yield from _scales(step.encoding)
        case Move() | Make() | Product() | Fill() | Put():
            yield step.shape, step.target, "target"
        case Same() | Measure():
            pass


def _scales(encoding: Encoding) -> Iterator[Use]:
    yield grid(RECIPES[encoding.recipe], encoding.shape), encoding.scales, "scales"
    if encoding.outer is not None:
        yield (1, 1), encoding.outer, "outer"


def _is_tiled(extent: Extent, marks: Sequence[Footprint]) -> bool:
    extent = _in_steps(extent, marks)
    boxes = [_boxes(extent, mark) for mark in marks if 0 not in mark[0]]
    return all(boxes) and tiles(whole(extent.shape), [*chain(*boxes)])


def _is_covered(extent: Extent, marks: Sequence[Footprint]) -> bool:
    extent = _in_steps(extent, marks)
    boxes = sorted((box for mark in marks for box in _boxes(extent, mark)), key=lambda box: box.start)
    return uncovered(whole(extent.shape), [*boxes, *extent.padding]) is None


def _in_steps(extent: Extent, marks: Sequence[Footprint]) -> Extent:
    """Return an extent in which a dimension that every footprint goes along in steps is two: the steps, and what lies between them.

    Columns of gate and up that take turns are then two boxes, and not one for each column.
    """
    if extent.padding:
        return extent  # its boxes are those of the dimensions as they are
    sizes = list[tuple[int, int]]()
    for size, stride in zip(extent.shape, extent.strides, strict=True):
        along = (
            each for shape, _, strides in marks for length, each in zip(shape, strides, strict=True)
            if length > 1 and stride <= each < stride * size
        )  # fmt: skip
        step = gcd(*along) // stride if stride else 1
        sizes += [(size // step, stride * step), (step, stride)] if step > 1 and not size % step else [(size, stride)]
    shape, strides = zip(*sizes, strict=True) if sizes else ((), ())
    return replace(extent, shape=shape, strides=strides)


def _boxes(extent: Extent, mark: Footprint) -> list[Box]:
    """Return the boxes of an extent that a strided footprint covers."""
    shape, _, _ = mark
    origin, places = _taken_apart(extent, mark)
    if any(length > 1 and not stride for length, (_, stride) in zip(shape, places, strict=True)):
        return []  # one element written many times is not a box
    return stored_boxes(View("", Box((0,) * len(shape), shape), tuple(origin), tuple(places)), extent.shape)


def is_inside(extent: Extent, mark: Footprint) -> bool:
    """Say whether a footprint stays in its extent and goes along its dimensions in whole steps."""
    shape, _, strides = mark
    if 0 in shape:
        return True
    origin, places = _taken_apart(extent, mark)
    if not origin:
        return set(shape) <= {1} and not mark[1]
    last = list(origin)
    for length, stride, (dim, step) in zip(shape, strides, places, strict=True):
        if length > 1 and (stride < 0 or step * extent.strides[dim] != stride):
            return False
        if length > 1:
            last[dim] += (length - 1) * step
    return all(index < size for index, size in zip(last, extent.shape, strict=True))


def _taken_apart(extent: Extent, mark: Footprint) -> tuple[list[int], list[tuple[int, int]]]:
    """Take an offset and strides apart by the extent's own: the first stored index, and per axis (dimension, stride in it)."""
    shape, skip, strides = mark
    order = sorted(range(len(extent.shape)), key=lambda d: (-extent.strides[d], d))
    wide = [dim for dim in order if extent.shape[dim] > 1 and extent.strides[dim] > 0]
    origin = [0] * len(order)
    for dim in wide:
        origin[dim], skip = divmod(skip, extent.strides[dim])
    if skip and order:
        origin[order[-1]] += skip * extent.shape[order[-1]]  # past a tensor of one element: nowhere
    places = []
    for length, stride in zip(shape, strides, strict=True):
        dim = next((d for d in wide if extent.strides[d] <= stride), wide[-1] if wide else 0)
        places.append((dim, stride // extent.strides[dim] if length > 1 and wide else 0))
    return origin, places
