"""The proof that a plan loses nothing, doubles nothing and invents nothing, made from its rows alone.

For every target tensor the boxes that steps write are recomputed from the rows' offsets and strides, and must tile the tensor:
inside, disjoint, no hole. For every extent of the source the boxes that steps read, with the padding that is dropped by name, must
cover it. Equal situations (the same layer, sixty times) are proven once.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from carnet.algebra.box import Box, tiles, uncovered, volume, whole
from carnet.algebra.layout import View, stored_boxes
from carnet.dtypes import BY_NAME, FLOATS
from carnet.errors import BadRequest, CarnetError
from carnet.formats.safetensors import layout_file
from carnet.formats.stored import dense_strides
from carnet.formats.torch_dist_files import frames_of
from carnet.quantize.recipes import BY_NAME as RECIPES
from carnet.quantize.recipes import PACKED, PER_BYTE, codes_shape, grid
from carnet.steps import Encoding, Fill, Make, Measure, Move, Place, Plan, Put, Same, Space, Step, TargetFile
from carnet.storage.schemes import is_place


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes of one chunk of a stored tensor."""

    name: str  # for messages: the stored tensor
    file: str
    offset: int  # as a place counts it
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements
    dtype: str
    padding: tuple[Box, ...]  # boxes of this chunk that hold no weight
    space: Space = "file"


Footprint = tuple[
    tuple[int, ...], int, tuple[int, ...]
]  # shape, offset in elements from the extent's start, strides in elements
Rule = Callable[[Extent, Sequence[Footprint]], bool]


def prove(files: Sequence[TargetFile], extents: Sequence[Extent], steps: Sequence[Step]) -> Mapping[str, int]:
    """Return the counts that were established, or raise naming the first tensor that is not whole."""
    written = [extent for extent in _prove_written(files, steps) if extent.space == "file"]
    _every(
        extents,
        (read for step in steps for read in _reads(step)),
        _is_covered,
        "the plan does not use every element of a source tensor",
    )
    return {
        "source tensors": len({e.name for e in extents}),
        "source bytes": sum(_nbytes(e) for e in extents),
        "source padding bytes": sum(_bytes_of(e, volume(box)) for e in extents for box in e.padding),
        "copies checked equal": sum(isinstance(step, Same) for step in steps),
        "target tensors": len(written),
        "target bytes": sum(_nbytes(e) for e in written),
        "target padding bytes": sum(
            prod(step.shape) * BY_NAME[step.target.dtype].nbytes for step in steps if isinstance(step, Fill)
        ),
    }


def reprove(plan: Plan, sizes: Mapping[str, int]) -> None:
    """Prove what can be proven of a plan that was read from a file: its targets, and that it reads inside files of these sizes."""
    if not (0 < plan.window <= plan.memory < 1 << 62 and 0 < plan.threads <= 256):
        raise BadRequest("the plan promises a memory that cannot be", {"memory": plan.memory, "window": plan.window})
    for path in (plan.source, *(asset.path for asset in plan.assets)):
        if not is_place(path) or "\0" in path:
            raise BadRequest("the plan names a place that is none", {"path": path})
    names = [file.name for file in plan.files] + [raw.name for raw in plan.raws]
    names += [text.name for text in plan.texts] + [asset.name for asset in plan.assets]
    if len(set(names)) != len(names) or any("\0" in name for name in names):
        raise BadRequest("files of the plan have one name, or what is none", {"files": len(names)})
    for file in plan.files:
        if not _is_laid_out(file):
            raise BadRequest("a file of the plan is not laid out as its tensors are", {"file": file.name})
    measured = {step.amax for step in plan.steps if isinstance(step, Measure)}
    for step in plan.steps:
        _prove_alone(step, sizes, measured)
    _prove_written((*plan.files, plan.scratch), plan.steps)


def _prove_alone(step: Step, sizes: Mapping[str, int], measured: set[str]) -> None:
    """Prove what can be seen of one step: that its places are some, and that it reads inside files of these sizes."""
    reads: list[tuple[tuple[int, ...], Place]] = []
    match step:
        case Make(function="quantize"):
            recipe = step.encoding.recipe
            if recipe not in RECIPES or step.shape != step.encoding.shape or min(step.shape) < 1:
                raise BadRequest("a step of the plan makes codes that nobody reads", {"tensor": step.tensor, "recipe": recipe})
            for name in set(step.amax) - measured:
                raise BadRequest(
                    "a scale of the plan follows from what no step measures", {"tensor": step.tensor, "name": name}
                )
        case Make(encoding=Encoding() as encoding) | Measure(encoding=Encoding() as encoding):
            _prove_encoding(step, encoding, sizes)
        case Measure():
            reads = [(step.shape, step.source)]
        case Move() | Same() | Fill() | Put():
            reads = [*_reads(step)]
    assembled = [(step.shape, step.source)] if isinstance(step, Make) and step.function == "quantize" else []
    for shape, place in (*reads, *_writes(step), *assembled):
        if len(shape) != len(place.strides) or min(0, place.offset, *shape, *place.strides) < 0:
            raise BadRequest("a step of the plan is none", {"tensor": step.tensor, "file": place.file})
    for shape, place in reads:
        reach = 1 + sum((length - 1) * stride for length, stride in zip(shape, place.strides, strict=True))
        if 0 not in shape and place.offset + reach * BY_NAME[place.dtype].nbytes > sizes.get(place.file, 0):
            raise BadRequest("a step of the plan reads past the end of a file", {"tensor": step.tensor, "file": place.file})
        if prod(shape) > max(sizes.values()):
            raise BadRequest("a step of the plan is larger than its source", {"tensor": step.tensor, "file": place.file})


def _prove_encoding(step: Make | Measure, encoding: Encoding, sizes: Mapping[str, int]) -> None:
    """Prove that a box of codes lies in its matrix, and the matrix and its scales in their files."""
    recipe = RECIPES.get(encoding.recipe)
    rows, columns = encoding.shape
    if recipe is None or min(rows, columns) < 1 or columns % PACKED[recipe.packing]:
        raise BadRequest(
            "a step of the plan reads codes that nobody writes", {"tensor": step.tensor, "recipe": encoding.recipe}
        )
    each, scales, outer = PER_BYTE[recipe.packing], grid(recipe, encoding.shape), encoding.outer
    known = {"linear": FLOATS, "power": ("u8",), "two": ("f8_e4m3",)}[recipe.scale.kind]
    around = [(encoding.scales, scales, known)] + [(outer, (1, 1), ("f32",))] * (outer is not None)
    outside = (
        encoding.first < 0
        or encoding.first % each
        or (encoding.first + rows * columns) // each > sizes.get(step.source.file, 0)
    )
    for place, (down, along), dtypes in around:
        assert place is not None
        reach = 1 + (down - 1) * along + along - 1
        outside |= place.dtype not in dtypes or place.strides != (along, 1) or place.offset < 0
        outside |= place.offset + reach * BY_NAME[place.dtype].nbytes > sizes.get(place.file, 0)
    box = Extent(step.tensor, "", 0, encoding.shape, (columns, 1), "u8", ())
    mark = step.shape, step.source.offset - encoding.first, step.source.strides
    badly = len(step.shape) != len(step.source.strides) or min(0, mark[1], *step.shape, *step.source.strides) < 0
    if (
        outside
        or badly
        or (outer is None) == bool(recipe.scale.outer)
        or step.source.dtype != "u8"
        or not _is_inside(box, mark)
    ):
        raise BadRequest(
            "a step of the plan reads codes outside of their matrix", {"tensor": step.tensor, "file": step.source.file}
        )


def _is_laid_out(file: TargetFile) -> bool:
    if file.kind == "torch_dist":
        return sum(1 for _ in frames_of(file)) > 0
    return layout_file(file.name, [(t.name, t.dtype, t.shape) for t in file.tensors], file.metadata) == file


def _reads(step: Step) -> Iterator[tuple[tuple[int, ...], Place]]:
    """Yield the boxes of the source that a step uses up; to measure is no use.

    Of codes all scales that belong to their matrix are: each stands over a code at least, and every code is used by some step.
    """
    match step:
        case Move():
            yield step.shape, step.source
        case Same():
            yield step.shape, step.source
            yield step.shape, step.other
        case Make(function="dequantize"):
            yield step.shape, step.source
            yield from _scales(step.encoding)
        case Make() | Measure() | Fill() | Put():
            pass


def _writes(step: Step) -> Iterator[tuple[tuple[int, ...], Place]]:
    """Yield the boxes of the target that a step writes."""
    match step:
        case Make(function="quantize"):
            yield codes_shape(RECIPES[step.encoding.recipe], step.encoding.shape), step.target
            yield from _scales(step.encoding)
        case Move() | Make() | Fill() | Put():
            yield step.shape, step.target
        case Same() | Measure():
            pass


def _scales(encoding: Encoding) -> Iterator[tuple[tuple[int, ...], Place]]:
    yield grid(RECIPES[encoding.recipe], encoding.shape), encoding.scales
    if encoding.outer is not None:
        yield (1, 1), encoding.outer


def _prove_written(files: Sequence[TargetFile], steps: Sequence[Step]) -> list[Extent]:
    written = [
        Extent(t.name, file.name, t.offset, t.shape, dense_strides(t.shape), t.dtype, (), file.space)
        for file in files
        for t in file.tensors
    ]
    _every(
        written,
        (write for step in steps for write in _writes(step)),
        _is_tiled,
        "the plan does not write every element of a target tensor exactly once",
    )
    return written


def _every(extents: Sequence[Extent], touched: Iterable[tuple[tuple[int, ...], Place]], holds: Rule, what: str) -> None:
    """Group what is touched by extent, and check the rule once for each different situation."""
    by_file: dict[tuple[Space, str], list[Extent]] = defaultdict(list)
    for extent in extents:
        by_file[extent.space, extent.file].append(extent)
    starts = {}
    for file, found in by_file.items():
        # an empty tensor starts where the next one does: it comes first, so that nothing is counted for it
        found.sort(key=lambda e: (e.offset, _nbytes(e)))
        starts[file] = [extent.offset for extent in found]
    footprints: dict[int, list[Footprint]] = defaultdict(list)
    for shape, place in touched:
        where = place.space, place.file
        at = bisect_right(starts.get(where, []), place.offset) - 1
        if at < 0 or by_file[where][at].dtype != place.dtype:
            raise CarnetError(
                "a step of the plan touches bytes that belong to no tensor", {"file": place.file, "offset": place.offset}
            )
        extent = by_file[where][at]
        skip, rest = divmod(place.offset - extent.offset, BY_NAME[place.dtype].nbytes)
        if rest:
            raise CarnetError("a step of the plan starts between two elements", {"tensor": extent.name, "file": place.file})
        footprints[id(extent)].append((shape, skip, place.strides))
    proven: set[Hashable] = set()
    for extent in extents:
        marks = tuple(footprints[id(extent)])
        if len(marks) > 1:
            marks = tuple(sorted(set(marks) if holds is _is_covered else marks))
        situation = (extent.shape, extent.strides, extent.padding, marks)
        if situation in proven:
            continue
        if not all(_is_inside(extent, mark) for mark in marks) or not holds(extent, marks):
            raise CarnetError(what, {"tensor": extent.name, "file": extent.file, "shape": list(extent.shape)})
        proven.add(situation)


def _is_tiled(extent: Extent, marks: Sequence[Footprint]) -> bool:
    return tiles(whole(extent.shape), [box for mark in marks for box in _boxes(extent, mark)])


def _is_covered(extent: Extent, marks: Sequence[Footprint]) -> bool:
    boxes = sorted((box for mark in marks for box in _boxes(extent, mark)), key=lambda box: box.start)
    return uncovered(whole(extent.shape), [*boxes, *extent.padding]) is None


def _boxes(extent: Extent, mark: Footprint) -> list[Box]:
    """Return the boxes of an extent that a strided footprint covers."""
    shape, _, _ = mark
    origin, places = _taken_apart(extent, mark)
    if any(length > 1 and not stride for length, (_, stride) in zip(shape, places, strict=True)):
        return []  # one element written many times is no box
    return stored_boxes(View("", Box((0,) * len(shape), shape), tuple(origin), tuple(places)), extent.shape)


def _is_inside(extent: Extent, mark: Footprint) -> bool:
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


def _nbytes(extent: Extent) -> int:
    return _bytes_of(extent, prod(extent.shape))


def _bytes_of(extent: Extent, elements: int) -> int:
    return elements * BY_NAME[extent.dtype].nbytes // (2 if extent.space == "packed" else 1)
