"""Say in words what happened to codes that are wrong, where it is one of the usual damages."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod

import numpy as np
import xxhash
from numpy.typing import NDArray

from carnet.examiner import scales as rules
from carnet.examiner.codes import codes_at, scales_of
from carnet.examiner.compare import Side
from carnet.examiner.diagnose import rearranged
from carnet.examiner.matrix import Matrix, Tile, assemble, matrix_of, quotients_of, right_scales, spread_divisors
from carnet.examiner.scales import Array
from carnet.formats.stored import Coded, Key
from carnet.quantize.recipes import PACKED

FEW = 16  # matrices whose codes are looked at as a whole
Kind = tuple[str, tuple[int, ...], int]  # recipe and shape of a weight, and which of its matrices


@dataclass(slots=True)
class Clues:
    """What was found out on the way to a name, for all threads; one at a time adds to it, and holds a whole matrix."""

    whole: int  # bytes of a matrix that may be looked at as a whole
    left: int = FEW  # matrices that may still be looked at so
    scales: dict[Kind, dict[str, list[Key]]] = field(default_factory=dict)  # digest -> who has these scales
    codes: dict[Kind, dict[str, list[Key]]] = field(default_factory=dict)  # and whose codes must be these
    lock: threading.Lock = field(default_factory=threading.Lock)


def _kind(of: Matrix) -> Kind:
    return of.coded.recipe, of.coded.shape, of.at[0] if of.at else 0


def _gathered(target: Side, kind: Kind, digest: Callable[[Key, Coded], str]) -> dict[str, list[Key]]:
    """Return who has what, by digest, among the weights of a kind."""
    found: dict[str, list[Key]] = {}
    for key, other in target.inventory.coded.items():
        if (other.recipe, other.shape) == kind[:2]:
            found.setdefault(digest(key, other), []).append(key)
    return found


def _digest(parts: Iterable[Array]) -> str:
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(np.ascontiguousarray(part).view(np.uint8).data)
    return hasher.hexdigest()


def lent_scales(target: Side, of: Matrix, clues: Clues) -> str | None:
    """Say that the scales are those that another weight has, where they are."""
    if of.scales.size < 2 or of.coded.scales is None:
        return None
    kind = _kind(of)
    with clues.lock:
        if kind not in clues.scales:
            clues.scales[kind] = _gathered(
                target, kind, lambda _, other: _digest([scales_of(target.tensor_files, other, kind[2])])
            )
        others = [key for key in clues.scales[kind].get(_digest([of.scales]), []) if key != of.key]
    return f"the scales of {target.inventory.coded[others[0]].codes.name}" if others else None


def expected_codes(source: Side, of: Matrix, tile: Tile) -> NDArray[np.uint8]:
    """Return the codes that a tile must have, under the scales that it must have."""
    values = assemble(source, of.entry, of.box(tile), of.own).astype(np.float32)
    block = of.recipe.block
    under = spread_divisors(of, right_scales(of, values, block), of.right_outer, values.shape, block)
    return rules.nearest(of.recipe.name).code(quotients_of(of, values, under))


def name_codes(source: Side, target: Side, of: Matrix, wrong: int, clues: Clues) -> str | None:
    """Name the damage of codes, where it is one of the usual ones and not too many were looked at."""
    with clues.lock:
        if not clues.left or 2 * prod(of.coded.shape[-2:]) > clues.whole:
            return None
        clues.left -= 1
        return _named(source, target, of, wrong, clues)


def _named(source: Side, target: Side, of: Matrix, wrong: int, clues: Clues) -> str | None:
    shape = of.coded.shape[-2:]
    found, right = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for tile in of.tiles():
        found[tile] = codes_at(target.tensor_files, of.coded, of.box(tile)).reshape(found[tile].shape)
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
    if not of.recipe.code.integer and ((found ^ flip) == right).all():
        return "signs inverted"
    other = _borrowed(source, target, of, found, clues)
    if other is not None:
        return f"holds {other}"
    for axis, word in enumerate(("rows", "columns")):
        moved = rearranged(np.moveaxis(right, axis, 0), np.moveaxis(found, axis, 0))
        if moved is not None:
            return f"{word}: {moved}"
    return None


def _borrowed(source: Side, target: Side, of: Matrix, found: NDArray[np.uint8], clues: Clues) -> str | None:
    """Name the canonical tensors whose codes these are."""
    kind = _kind(of)

    def expected(key: Key, other: Coded) -> str:
        scales = scales_of(target.tensor_files, other, kind[2])
        candidate = matrix_of(source, target, key, of.own, of.amaxes, scales, kind[2])
        return _digest(expected_codes(source, candidate, tile) for tile in candidate.tiles())

    if kind not in clues.codes:
        clues.codes[kind] = _gathered(target, kind, expected)
    others = [key for key in clues.codes[kind].get(_digest(found[tile] for tile in of.tiles()), []) if key != of.key]
    return ", ".join(target.inventory.entries[others[0]].reading.tensors[0]) if others else None
