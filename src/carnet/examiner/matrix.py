"""A matrix of codes under examination: its tiles, the source's numbers in their stored places, and what its scales must be.

A stored matrix is looked at in tiles of whole blocks. Where in it a source's number belongs is asked of ``unfold``, which knows
nothing of the writer's strides: it is given the row numbers in place of the matrix, and the column numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box, whole
from carnet.algebra.layout import clip
from carnet.dialects.entry import Entry
from carnet.dtypes import array_type
from carnet.examiner import scales as rules
from carnet.examiner.codes import outer_of
from carnet.examiner.compare import Side, adapted, read, sources
from carnet.examiner.scales import Array, Floats
from carnet.examiner.tensor_files import blocks
from carnet.examiner.unfold import unfold
from carnet.formats.stored import Coded, Key
from carnet.model.tensors import Canonical
from carnet.quantize.recipes import BY_NAME, PACKED, WHOLE, Recipe
from carnet.quantize.styles import STYLES

TILE = 1 << 19  # elements that are looked at together: larger ones leave the processor's cache, smaller ones let threads wait
LINED = (0, 4)  # a block of numbers that are lined up

Tile = tuple[slice, slice]  # rows and columns

Amaxes = Mapping[Canonical, Floats]  # canonical tensor -> the largest magnitude in it, or in each of its experts


@dataclass(slots=True)
class Matrix:
    """One matrix of codes under examination, and what is known of its scales."""

    key: Key
    entry: Entry
    coded: Coded
    own: str  # type of the weights that were coded
    at: tuple[int, ...]  # (expert,) where the stored tensor holds several matrices
    scales: Array  # rows and columns of blocks, as stored
    outer: np.float32 | None
    right_outer: np.float32 | None  # what it must be
    largest: float  # of all that shares the scale of a whole tensor; 0 where none is shared
    amaxes: Amaxes  # of every tensor that shares one
    given: float | None  # its scale, where the source has one from training
    tile: int  # elements that are read together

    @property
    def recipe(self) -> Recipe:
        """Return the rules of the codes."""
        return BY_NAME[self.coded.recipe]

    def tiles(self) -> Iterator[Tile]:
        """Cut the matrix into tiles of whole blocks."""
        rows, columns = self.coded.shape[-2:]
        return self.parts((rows, columns), self.tile)

    def parts(self, shape: tuple[int, int], size: int) -> Iterator[Tile]:
        """Cut a matrix of such a shape into tiles of whole blocks and about so many elements."""
        rows, columns = shape
        down, along = self.recipe.block
        step = max(along, PACKED[self.recipe.packing], 1)
        wide = columns if along == 0 and down == 1 else min(columns, max(size // max(down, 1) // step, 1) * step)
        tall = max(size // wide // max(down, 1), 1) * max(down, 1)
        for row in range(0, rows, tall):
            for column in range(0, columns, wide):
                yield slice(row, min(row + tall, rows)), slice(column, min(column + wide, columns))

    def blocks(self, tile: Tile) -> Tile:
        """Return the blocks of a tile."""
        found = []
        for part, block, count in zip(tile, self.recipe.block, self.scales.shape, strict=True):
            found.append(slice(part.start // block, -(-part.stop // block)) if block else slice(0, count))
        return found[0], found[1]

    def box(self, tile: Tile) -> Box:
        """Return a tile as a box of the stored weight."""
        shape = tuple(part.stop - part.start for part in tile)
        return Box((*self.at, *(part.start for part in tile)), ((1,) * len(self.at)) + shape)


def own_type(source: Side, target: Side, entry: Entry, asked: str | None) -> str:
    """Return the type that weights had when they were coded: as asked, the target's where it is another, else the source's own."""
    said, before = (str(side.inventory.config["dtype"]) for side in (target, source))
    part = source.parts[entry.reading.tensors[0][0]][0]
    return asked or (said if said != before or part.coded is not None else part.stored.dtype)


def assemble(source: Side, entry: Entry, box: Box, own: str) -> Array:
    """Return the source's numbers where a box of a stored matrix has them, rounded to the type that they are coded from."""
    made: Array = np.zeros(box.shape[-2:], array_type(own))
    for number, (view, name) in enumerate(zip(entry.views, entry.reading.tensors[0], strict=True)):
        for wanted in clip(view, box):
            for shared, values in _numbers(source, name, wanted, own):
                rows, columns = (indices(entry, number, shared, axis) for axis in (-2, -1))
                order = [axis for axis in range(values.ndim) if axis not in columns[0]] + columns[0]
                values = values.transpose(order).reshape(len(rows[1]), len(columns[1]))
                made[_inside(rows[1] - box.start[-2], columns[1] - box.start[-1])] = values
    return made


def _numbers(source: Side, name: Canonical, wanted: Box, own: str) -> Iterator[tuple[Box, Array]]:
    """Yield disjoint boxes that make up a box, each with the source's numbers, rounded to a type."""
    if source.is_adapted(name):
        yield wanted, as_numbers(adapted(source, name, wanted, own).view(np.uint32), "f32", own)
        return
    for origin, shared in sources(source, name, wanted):
        yield shared, as_numbers(read(source, origin, shared), origin.stored.dtype, own)


def indices(entry: Entry, part: int, box: Box, axis: int) -> tuple[list[int], NDArray[np.int64]]:
    """Return which canonical axes run along an axis of the stored matrix, and the indices along it of a canonical box.

    ``unfold`` says so: it is given the indices in place of a tensor.
    """

    def numbers(stored: Box) -> NDArray[np.int64]:
        along = np.arange(stored.start[axis], stored.start[axis] + stored.shape[axis])
        return np.broadcast_to(along[:, None] if axis == -2 else along, stored.shape)

    found = np.asarray(unfold(entry.reading, part, 0, box, numbers), np.int64)
    corner = (0,) * found.ndim
    axes = [a for a in range(found.ndim) if found[(*corner[:a], -1, *corner[a + 1 :])] != found[corner]]
    return axes, found[tuple(slice(None) if a in axes else 0 for a in range(found.ndim))].reshape(-1)


def as_numbers(bits: Array, given: str, own: str) -> Array:
    """Return the numbers that bits mean, rounded to another type."""
    numbers = np.ascontiguousarray(bits).view(array_type(given))
    with np.errstate(over="ignore"):
        return numbers if given == own else numbers.astype(array_type(own))


def _inside(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[slice, slice] | tuple[Array, ...]:
    """Return an index of rows and columns: slices, which are fast, where they follow each other."""
    if all(each[0] >= 0 and (np.diff(each) == 1).all() for each in (rows, columns)):
        return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    assert min(rows.min(), columns.min()) >= 0, "a view leads out of the box that it was clipped to"
    return np.ix_(rows, columns)


def amax_names(entry: Entry, coded: Coded, present: Mapping[Canonical, object]) -> set[Canonical]:
    """Name the canonical tensors that share the scale of a whole tensor with a stored one, its own among them."""
    recipe = BY_NAME[coded.recipe]
    if recipe.block != WHOLE and not recipe.scale.outer:
        return set()
    style = STYLES[recipe.style]
    joint, found = style.joint.get(recipe.scheme, ()), set[Canonical]()
    for name in entry.reading.tensors[0]:
        shared = name.fellows() if name.tensor.reads in joint and name.tensor.part not in style.alone else []
        found |= {name, *(other for other in shared if other in present and other.tensor.part not in style.alone)}
    return found


def amax(source: Side, name: Canonical, asked: str | None) -> Floats:
    """Return the largest magnitude of a canonical tensor of the source; of experts, that of each.

    Of what an adapter changes it is right once it is rounded to the type that it is coded from: the one ``asked`` for, or its own.
    """
    shape = source.shapes[name]
    by_expert = name.tensor.each_expert
    found = np.zeros(shape[0] if by_expert else 1, np.float32)
    for box in blocks(whole(shape), source.tensor_files.block // 4):
        for stored, shared, bits in _bits(source, name, box, asked):
            magnitudes = bits & bits.dtype.type((1 << 8 * bits.dtype.itemsize - 1) - 1)  # they sort as their bits do
            largest = magnitudes.reshape(shared.shape[0] if by_expert else 1, -1).max(1)
            at = slice(shared.start[0], shared.start[0] + shared.shape[0]) if by_expert else slice(0, 1)
            found[at] = np.maximum(found[at], largest.view(array_type(stored)).astype(np.float32))
    return found


def _bits(source: Side, name: Canonical, box: Box, asked: str | None) -> Iterator[tuple[str, Box, Array]]:
    """Yield disjoint boxes that make up a box, each with the type and the bits of the source's numbers."""
    if source.is_adapted(name):
        part = source.parts[name][0]
        own = asked or (str(source.inventory.config["dtype"]) if part.coded is not None else part.stored.dtype)
        yield "f32", box, adapted(source, name, box, own).view(np.uint32)
        return
    for origin, shared in sources(source, name, box):
        yield origin.stored.dtype, shared, np.ascontiguousarray(read(source, origin, shared))


def matrix_of(source: Side, target: Side, key: Key, own: str, amaxes: Amaxes, stored: Array, number: int) -> Matrix:
    """Return one matrix of a stored weight, with what its scales follow from."""
    entry, coded = target.inventory.entries[key], target.inventory.coded[key]
    recipe = BY_NAME[coded.recipe]
    at = (number,) if len(coded.shape) == 3 else ()
    largest = 0.0
    marks = []
    for name in amax_names(entry, coded, source.shapes):
        shared = name.tensor.each_expert
        expert = entry.reading.shares["expert"].start + number if shared else 0
        # one scale stands over all experts that are kept turned round
        experts = range(len(amaxes[name])) if recipe.turned else range(expert, expert + 1)
        rounded = amaxes[name][experts].astype(array_type(own)).astype(np.float32)
        largest = max(largest, float(rounded.max()))
        marks += [(f"{name}[{expert}]" if shared else name, "weight") for expert in experts]
    brought = source.source_scales
    if marks and all(mark in brought.amaxes for mark in marks):  # what calibration saw takes the place of what is there
        seen = max(brought.amaxes[mark] for mark in marks)
        largest = float(np.array([seen], np.float32).astype(array_type(own)).astype(np.float32)[0])
    trained = recipe.scheme == "fp8" and bool(marks) and all(mark in brought.scales for mark in marks)
    given = max(brought.scales[mark] for mark in marks) if trained else None
    right = rules.outer_scale(recipe, largest, own) if recipe.scale.outer else None
    tile = target.tensor_files.block // 4
    return Matrix(key, entry, coded, own, at, stored, outer_of(target.tensor_files, coded), right, largest, amaxes, given, tile)


def lined(of: Matrix, matrix: Array, fours: int) -> Array:
    """Return what belongs to the numbers of a matrix whose blocks are short parts of rows, so that a block has a few columns to itself.

    A line has four numbers of every block: numpy's loops run along the blocks, and not inside of them. ``fours`` is the bytes of four::

        |aaaaAAAA|bbbbBBBB|       ->   |aaaa|bbbb|cccc|dddd|
        |ccccCCCC|ddddDDDD|            |AAAA|BBBB|CCCC|DDDD|
    """
    item = np.dtype(np.complex128 if fours == 16 else f"u{fours}")
    found: Array = np.ascontiguousarray(matrix).view(item).reshape(-1, of.recipe.block[1] // 4).T
    return np.ascontiguousarray(found).view(matrix.dtype)


def in_rows(lines: Array, shape: tuple[int, ...]) -> Array:
    """Return the matrix of such a shape whose elements are lined up."""
    return lines.reshape(len(lines), -1, 4).swapaxes(0, 1).reshape(shape)


def right_scales(of: Matrix, values: Floats, block: tuple[int, int]) -> Array:
    """Return the scales that the numbers of a tile ask for."""
    if of.given is not None:
        return rules.kept_scale(of.recipe, of.given, of.own).reshape(1, 1)
    if of.recipe.block == WHOLE:
        return rules.scales(of.recipe, np.full((1, 1), of.largest, np.float32), of.own, None)
    amax = rules.block_amax(block, values)
    kind = array_type(of.own)
    if kind.itemsize == 2:  # few are different, and each is asked for once
        bits = amax.astype(kind).view(np.uint16)
        first, last = int(bits.min()), int(bits.max())
        if last - first < bits.size:
            every = np.arange(first, last + 1, dtype=np.uint16).view(kind).astype(np.float32)
            few = rules.scales(of.recipe, every, of.own, of.right_outer)
            return few.view(bits_of(few)).take(bits - np.uint16(first), mode="clip").view(few.dtype)
    return rules.scales(of.recipe, amax, of.own, of.right_outer)


def spread_divisors(
    of: Matrix, stored: Array, outer: np.float32 | None, shape: tuple[int, ...], block: tuple[int, int]
) -> Floats:
    """Return what each element of a tile is divided by."""
    return rules.spread(block, rules.divisors(of.recipe, stored, outer), shape)


def quotients_of(of: Matrix, values: Floats, under: Floats, room: Floats | None = None) -> Floats:
    """Return what becomes codes, in ``room`` where that is given: rounded first where the recipe does so."""
    found: Floats = np.divide(values, under, out=None if room is None else room[: values.size].reshape(values.shape))
    if of.recipe.quotient == "own" and of.own != "f32":
        found[...] = found.astype(array_type(of.own))
    return found


def bits_of(array: Array) -> np.dtype[np.unsignedinteger]:
    """Return the type in which elements are compared bit by bit."""
    return np.dtype(f"u{array.dtype.itemsize}")
