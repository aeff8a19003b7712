"""Weights of the source that are stored as codes: where their matrices lie, and how they are read.

Until steps are made, such a matrix lies in a file of its own, in which every weight is one byte. So its pieces are met and cut as all
others are, and only what comes out of it is written with the places of the true file and a legend.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from carnet.box import Box, intersect, whole
from carnet.dtypes import BY_NAME as DTYPES
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.families.entries import Entry
from carnet.formats.stored import Chunk, Coded, Stored, dense_strides
from carnet.inventory import Inventory
from carnet.planner.pieces import Piece, pieces
from carnet.planner.proof import Extent, spread
from carnet.quantize.recipes import BY_NAME, PER_BYTE, WHOLE, grid
from carnet.steps import Dequantize, Legend, Measure, Place, Same, Step

CODES = "*codes*/"  # begins the name of a file that is none

Found = tuple[str, Legend]  # the file of a matrix, and how it is read


@dataclass(frozen=True, slots=True)
class Library:
    """The matrices of a source that are stored as codes."""

    legends: Mapping[str, Found]  # by the name of a file that is none
    pieces: Sequence[Piece]
    extents: Sequence[Extent]


def collect(source: Inventory, dtype: str | None) -> Library:
    """Return the coded matrices of a source; refuse them where nobody says what they are to become."""
    legends: dict[str, Found] = {}
    found: list[Piece] = []
    extents: dict[tuple[str, int], Extent] = {}
    if source.coded and dtype is None:
        (key, one), others = next(iter(source.coded.items())), len(source.coded) - 1
        facts = {"tensor": "/".join(filter(None, key)), "others": others, "quantized": one.recipe}
        remedy = "name the type that weights are to be dequantized to: --dtype bf16"
        raise BadRequest("the weights of the source are quantized", facts, remedy=remedy)
    for key, one in source.coded.items():
        entry = source.entries[key]
        for box, file, legend in _matrices(one, str(source.checkpoint.root)):
            name = f"{CODES}{len(legends)}"
            legends[name] = file, legend
            chunk = Chunk(box, name, 0, dense_strides(one.shape))
            for view in entry.views:
                found += pieces(view, chunk, "u8", one.shape)
            for extent in _extents(one, entry, box, file, legend):
                extents[extent.file, extent.offset] = extent
    return Library(legends, found, tuple(extents.values()))


def _matrices(one: Coded, where: str) -> Iterator[tuple[Box, str, Legend]]:
    """Yield the matrices of a coded weight: itself, or one for each expert in it."""
    recipe, (*experts, rows, columns) = BY_NAME[one.recipe], one.shape
    count, blocks = prod(experts), grid(recipe, (rows, columns))
    assert one.scales is not None, "codes stand under scales"
    codes, scales = _only_chunk(one.codes, where), _only_chunk(one.scales, where)
    outer = None if one.outer is None else _only_chunk(one.outer, where)
    each = prod(one.scales.shape) // count
    if each * count != prod(one.scales.shape) or each != prod(blocks) or len(experts) > 1:
        facts = {"where": where, "tensor": one.scales.name, "expected": list(blocks), "found": list(one.scales.shape)}
        raise BadCheckpoint("there is not one scale for each block of codes", facts)
    for number in range(count):
        first = codes.offset * PER_BYTE[recipe.packing] + number * rows * columns
        at = Place(scales.file, scales.offset + number * each * _size(one.scales), (blocks[1], 1), one.scales.dtype)
        over = None
        if outer is not None and one.outer is not None:
            own = number * _size(one.outer) if prod(one.outer.shape) == count else 0  # else one stands over all experts
            over = Place(outer.file, outer.offset + own, (1, 1), one.outer.dtype)
        legend = Legend(recipe.name, (rows, columns), first, at, over)
        box = Box((number, 0, 0), (1, rows, columns)) if experts else whole((rows, columns))
        yield box, codes.file, legend


def _size(stored: Stored) -> int:
    return DTYPES[stored.dtype].nbytes


def _only_chunk(stored: Stored, where: str) -> Chunk:
    chunk = stored.chunks[0]
    if len(stored.chunks) > 1 or chunk.strides != dense_strides(stored.shape):
        raise NotSupported("codes that are stored in several pieces cannot be read", {"where": where, "tensor": stored.name})
    return chunk


def _extents(one: Coded, entry: Entry, box: Box, file: str, legend: Legend) -> Iterator[Extent]:
    """Yield what must be used up of a matrix: its codes, the scales of its blocks, and the scale over them."""
    gone = [shared for padding in entry.padding if (shared := intersect(padding, box)) is not None]
    padding = tuple(Box(shared.start[-2:], shared.shape[-2:]) for shared in gone)
    blocks = grid(BY_NAME[legend.recipe], legend.shape)
    yield Extent(one.codes.name, spread(legend, file), legend.first, legend.shape, (legend.shape[1], 1), "u8", padding)
    for stored, place, shape in ((one.scales, legend.scales, blocks), (one.outer, legend.outer, (1, 1))):
        if stored is not None and place is not None:
            yield Extent(stored.name, place.file, place.offset, shape, place.strides, place.dtype, ())


def is_coded(place: Place) -> bool:
    """Say whether a place counts in the weights of a coded matrix."""
    return place.file.startswith(CODES)


def dequantize(library: Library, tensor: str, box: Box, here: Place, there: Place) -> Dequantize:
    """Return the step that makes numbers of a box of codes."""
    place, legend = _true(library, here)
    return Dequantize(tensor, box.start, box.shape, place, there, legend)


def alike(library: Library, tensor: str, box: Box, here: Place, there: Place) -> Iterator[Same]:
    """Yield the comparisons of a box that is there twice: its codes are the same and so is the scale of the whole."""
    sides = [_true(library, place) for place in (here, there) if is_coded(place)]
    (place, legend), (other, of) = sides[0], sides[-1]
    recipe = BY_NAME[legend.recipe]
    if len(sides) < 2 or of.recipe != legend.recipe or recipe.packing or recipe.block != WHOLE:
        facts = {"tensor": tensor, "where": place.file, "other": other.file, "quantized": legend.recipe}
        raise NotSupported(f"{tensor!r} is stored twice, and its codes cannot be compared", facts)
    yield Same(tensor, box.start, box.shape, place, other)
    yield Same(tensor, (0, 0), (1, 1), legend.scales, of.scales)


def measured(library: Library, step: Step) -> Step:
    """Return a step with the true place and the legend, where it measures codes."""
    if not isinstance(step, Measure) or not is_coded(step.source):
        return step
    place, legend = _true(library, step.source)
    return replace(step, source=place, legend=legend)


def _true(library: Library, place: Place) -> tuple[Place, Legend]:
    file, legend = library.legends[place.file]
    return replace(place, file=file, offset=legend.first + place.offset), legend


def aside(source: Inventory) -> dict[str, tuple[str, ...]]:
    """Return what stands beside codes and is no part of a weight, by what it is: it is left behind."""
    shapes = tuple("/".join(filter(None, key)) for key in source.scales if key[1].endswith(".weight_shape"))
    scales = tuple("/".join(filter(None, key)) for key in source.scales if not key[1].endswith(".weight_shape"))
    found = {"shapes of packed weights": shapes, "scales of activations and of the cache": scales}
    return {reason: tuple(sorted(names)) for reason, names in found.items() if names}
