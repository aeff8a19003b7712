"""Say in words what happened to codes that are wrong, where it is one of the usual damages."""

from math import prod

import numpy as np
from numpy.typing import NDArray

from carnet.examiner import scales as rules
from carnet.examiner.codes import codes_at, scales_of
from carnet.examiner.compare import Side, rearranged
from carnet.examiner.matrix import Matrix, assemble, bits_of, matrix_of, quotients_of, right_scales, spread_divisors
from carnet.quantize.recipes import PACKED

LIMIT = 1 << 26  # elements of a matrix whose damage is named


def lent_scales(target: Side, of: Matrix) -> str | None:
    """Say that the scales are those that another weight has, where they are."""
    if of.scales.size < 2:
        return None
    for key, other in target.inventory.coded.items():
        if key != of.key and other.recipe == of.coded.recipe and other.shape == of.coded.shape:
            theirs = scales_of(target.shelves, other)[of.at[0] if of.at else 0]
            if (theirs.view(bits_of(theirs)) == of.scales.view(bits_of(of.scales))).all():
                return f"the scales of {other.codes.name}"
    return None


def expected_codes(source: Side, of: Matrix, tile: tuple[slice, slice]) -> NDArray[np.uint8]:
    """Return the codes that a tile must have, under the scales that it must have."""
    values = assemble(source, of.entry, of.box(tile), of.own)
    under = spread_divisors(of, right_scales(of, values), of.right_outer, values.shape)
    return rules.nearest(of.recipe.name).code(quotients_of(of, values, under))


def name_codes(source: Side, target: Side, of: Matrix, wrong: int) -> str | None:
    """Name the damage of codes, where it is one of the usual ones."""
    shape = of.coded.shape[-2:]
    if prod(shape) > LIMIT:
        return None
    found, right = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for tile in of.tiles():
        found[tile] = codes_at(target.shelves, of.coded, of.box(tile)).reshape(found[tile].shape)
        right[tile] = expected_codes(source, of, tile)
    if not found.any():
        return "all codes zero"
    if wrong == 1:
        flipped = int(np.bitwise_xor(found, right)[found != right].sum()).bit_count() if (found != right).sum() == 1 else 0
        return f"{flipped} bit{'s' * (flipped > 1)} of one code flipped" if flipped else "one code is not the nearest"
    if of.recipe.packing:
        each = PACKED[of.recipe.packing]
        if (found.reshape(-1, 2)[:, ::-1] == right.reshape(-1, 2)).all():
            return "nibbles swapped"
        if (found.reshape(-1, each)[:, ::-1] == right.reshape(-1, each)).all():
            return "nibbles in reverse order"
        if of.recipe.packing == "words" and ((found ^ 8) == right).all():
            return "codes are not offset as they must be"
    flip = np.uint8(1 << (of.recipe.code.bits - 1))
    if not of.recipe.code.name.startswith("int") and ((found ^ flip) == right).all():
        return "signs inverted"
    other = _borrowed(source, target, of, found)
    if other is not None:
        return f"holds {other}"
    for axis, word in enumerate(("rows", "columns")):
        moved = rearranged(np.moveaxis(right, axis, 0), np.moveaxis(found, axis, 0))
        if moved is not None:
            return f"{word}: {moved}"
    return None


def _borrowed(source: Side, target: Side, of: Matrix, found: NDArray[np.uint8]) -> str | None:
    """Name the canonical tensors whose codes these are."""
    for key, other in target.inventory.coded.items():
        if key == of.key or other.recipe != of.coded.recipe or other.shape != of.coded.shape:
            continue
        number = of.at[0] if of.at else 0
        candidate = matrix_of(source, target, key, of.own, of.amaxes, scales_of(target.shelves, other)[number], number)
        if all((expected_codes(source, candidate, tile) == found[tile]).all() for tile in candidate.tiles()):
            return ", ".join(candidate.entry.reading.tensors[0])
    return None
