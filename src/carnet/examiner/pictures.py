"""A tensor as a *picture*: a grid of cells over the whole of its matrix, each with how much of it is damaged, or lost to codes.

::

    rows     |..........|        a cell is at least 1/128 of the rows and of the columns; what lies in it is added up
             |....##....|        tile by tile, so that a picture takes no more memory than an examination
             |..........|
                columns
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import volume
from carnet.dtypes import BY_NAME
from carnet.examiner.codes import codes_at, meant, scales_of
from carnet.examiner.compare import Finding, Side, differences, read
from carnet.examiner.desk import Desk
from carnet.examiner.judge import Judgement
from carnet.examiner.matrix import (
    Amaxes,
    Matrix,
    amax,
    amax_names,
    assemble,
    matrix_of,
    own_type,
    right_scales,
    spread_divisors,
)
from carnet.examiner.naming import expected_codes
from carnet.examiner.tensor_files import blocks
from carnet.formats.stored import Coded, Key
from carnet.model.tensors import Canonical

SIDE = 128  # cells along an axis, at most
SHARE = 4  # of blocks that are looked at together: there are numbers of 8 bytes for each

Cells = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Picture:
    """One tensor."""

    name: str  # canonical
    label: str  # of the stored tensor
    shape: tuple[int, int]  # rows and columns of the matrix
    cells: Cells  # of damage the share of the elements that differ, 0 to 1; of codes the ratio of noise to signal


class Grid:
    """Sums over the cells of a matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = rows, columns
        self.cells: Cells = np.zeros((min(rows, SIDE), min(columns, SIDE)))

    def places(self, numbers: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
        """Return in which cells rows (axis 0) or columns (axis 1) lie."""
        found: NDArray[np.int64] = numbers * self.cells.shape[axis] // self.shape[axis]
        return found

    def add(self, row: int, column: int, values: NDArray[np.float64]) -> None:
        """Add a tile that begins at a row and a column."""
        spans = [
            self.places(np.arange(at, at + size), axis)
            for axis, (at, size) in enumerate(zip((row, column), values.shape, strict=True))
        ]
        (rows, tall), (columns, wide) = (np.unique(span, return_index=True) for span in spans)
        self.cells[np.ix_(rows, columns)] += np.add.reduceat(np.add.reduceat(values, tall, axis=0), wide, axis=1)

    def count(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Count elements."""
        tall, wide = self.cells.shape
        flat = self.places(rows, 0) * wide + self.places(columns, 1)
        self.cells += np.bincount(flat, minlength=tall * wide).reshape(tall, wide)

    def sizes(self) -> Cells:
        """Return the elements of every cell."""
        tall, wide = (np.bincount(self.places(np.arange(self.shape[axis]), axis)) for axis in (0, 1))
        return np.outer(tall, wide).astype(np.float64)


def damages(desk: Desk, findings: Sequence[Finding], most: int) -> list[Picture]:
    """Return where tensors differ that findings name, some of them, each once."""
    ours, theirs = desk.ours, desk.theirs
    coded = {part.label: key for key in desk.codes for part in theirs.inventory.coded[key].parts}
    names = {str(name): name for name in theirs.parts}
    found: dict[Key | Canonical, Picture] = {}
    for finding in findings:
        if len(found) == most:
            break
        key = coded.get(finding.stored)
        name = names.get(finding.where)
        if key is not None and key not in found:
            found[key] = _wrong_codes(desk, key)
        elif key is None and name is not None and name in ours.shapes and name not in found:
            found[name] = _differing(ours, theirs, name)
    return [each for each in found.values() if each.cells.any()]


def losses(desk: Desk, judged: Sequence[Judgement], most: int) -> list[Picture]:
    """Return what codes lose, of the stored weights that lose most."""
    by_label = {desk.theirs.inventory.coded[key].codes.label: key for key in desk.codes}
    worst = sorted(judged, key=lambda one: one.snr)[:most]
    return [_lost(desk, by_label[one.label]) for one in worst if one.noise]


def _differing(ours: Side, theirs: Side, name: Canonical) -> Picture:
    shape, outputs = ours.shapes[name], name.tensor.outputs
    outputs = outputs if 0 < outputs < len(shape) else min(1, len(shape) - 1)
    grid = Grid(prod(shape[:outputs]), prod(shape[outputs:]))
    parts = [part for part in theirs.parts[name] if not (part.coded is not None and name not in ours.parts)]
    for part in parts:
        for box in blocks(part.box, theirs.tensor_files.block // BY_NAME[part.stored.dtype].nbytes // SHARE):
            for shared, wrong in differences(ours, theirs, name, box, read(theirs, part, box, rounds=False), part):
                if wrong is not None and wrong.any():
                    at = [index + start for index, start in zip(np.nonzero(wrong), shared.start, strict=True)]
                    grid.count(_flat(at[:outputs], shape[:outputs]), _flat(at[outputs:], shape[outputs:]))
    held = max(sum(volume(part.box) for part in parts) / max(prod(shape), 1), 1)  # copies are counted, too
    return Picture(name, theirs.parts[name][0].label, grid.shape, grid.cells / grid.sizes() / held)


def _flat(at: Sequence[NDArray[np.int64]], shape: Sequence[int]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.ravel_multi_index(tuple(at), tuple(shape)) if at else np.zeros(1, np.int64)
    return found


def _wrong_codes(desk: Desk, key: Key) -> Picture:
    """Return which codes, or the scales that they stand under, are not those that the source's numbers ask for."""
    coded, grid = _stacked(desk.theirs, key)
    for above, matrix in _matrices(desk, key):
        for rows, columns in matrix.tiles():
            tile, box, block = (rows, columns), matrix.box((rows, columns)), matrix.recipe.block
            with np.errstate(all="ignore"):  # what damaged scales make of numbers
                right = expected_codes(desk.ours, matrix, tile)
                values = assemble(desk.ours, matrix.entry, box, matrix.own).astype(np.float32)
                wanted = spread_divisors(matrix, right_scales(matrix, values, block), matrix.right_outer, right.shape, block)
                under = spread_divisors(matrix, matrix.scales[matrix.blocks(tile)], matrix.outer, right.shape, block)
            held = codes_at(desk.theirs.tensor_files, coded, box).reshape(right.shape)
            wrong = np.broadcast_to((held != right) | (under != wanted), right.shape)
            grid.add(above + rows.start, columns.start, wrong.astype(np.float64))
    return Picture(desk.theirs.inventory.entries[key].names[0], coded.codes.label, grid.shape, grid.cells / grid.sizes())


def _lost(desk: Desk, key: Key) -> Picture:
    """Return the ratio of what codes lose to what there was."""
    (coded, noise), (_, signal) = _stacked(desk.theirs, key), _stacked(desk.theirs, key)
    for above, matrix in _matrices(desk, key):
        for rows, columns in matrix.tiles():
            box = matrix.box((rows, columns))
            with np.errstate(all="ignore"):
                numbers = assemble(desk.ours, matrix.entry, box, matrix.own).astype(np.float64)
                lost = meant(desk.theirs.tensor_files, coded, box).view(np.float32).reshape(numbers.shape) - numbers
                noise.add(above + rows.start, columns.start, np.square(lost))
                signal.add(above + rows.start, columns.start, np.square(numbers))
    with np.errstate(all="ignore"):
        cells = np.where(signal.cells > 0, noise.cells / signal.cells, 0.0)
    return Picture(desk.theirs.inventory.entries[key].names[0], coded.codes.label, noise.shape, np.nan_to_num(cells))


def _stacked(theirs: Side, key: Key) -> tuple[Coded, Grid]:
    """Return a weight and a grid over it; matrices of experts stand one below the other."""
    coded = theirs.inventory.coded[key]
    return coded, Grid(prod(coded.shape[:-1]), coded.shape[-1])


def _matrices(desk: Desk, key: Key) -> Iterator[tuple[int, Matrix]]:
    """Yield the matrices of a stored weight, each with the row that it begins at."""
    ours, theirs = desk.ours, desk.theirs
    entry, coded = theirs.inventory.entries[key], theirs.inventory.coded[key]
    amaxes: Amaxes = {name: amax(ours, name, desk.dtype) for name in amax_names(entry, coded, ours.shapes)}
    own = own_type(ours, theirs, entry, desk.dtype)
    for number in range(prod(coded.shape[:-2])):
        stored = scales_of(theirs.tensor_files, coded, number)
        yield number * coded.shape[-2], matrix_of(ours, theirs, key, own, amaxes, stored, number)
