"""Hold codes and scales against the numbers that a source has: each code the nearest under its scale, each scale that of its block."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, log10, prod

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box
from carnet.algebra.layout import clip
from carnet.dialects.entry import Entry
from carnet.examiner import scales as rules
from carnet.examiner.brought import by_rows
from carnet.examiner.codes import scales_of, stored_at
from carnet.examiner.compare import Finding, Side
from carnet.examiner.matrix import (
    LINED,
    TILE,
    Amaxes,
    Matrix,
    Tile,
    assemble,
    bits_of,
    in_rows,
    lined,
    matrix_of,
    own_type,
    quotients_of,
    right_scales,
    spread_divisors,
)
from carnet.examiner.naming import Clues, lent_scales, name_codes
from carnet.examiner.scales import Array, Floats
from carnet.formats.stored import Coded, Key
from carnet.quantize.recipes import BY_NAME, PER_BYTE, WHOLE

SUMMED = 1 << 18  # squares that are added up in f32
SAMPLES = 1 << 12  # wrong scales that are kept to name what is wrong with them


@dataclass(slots=True)
class Judgement:
    """What was found in one stored weight."""

    label: str  # of the codes
    recipe: str
    elements: int = 0
    saturated: int = 0  # numbers more than half a step beyond the largest code
    signal: float = 0.0  # sum of squares of the numbers
    noise: float = 0.0  # and of what the codes lose of them
    octaves: Counter[int] = field(default_factory=Counter)  # power of two -> how many scales lie from it to the next
    findings: list[Finding] = field(default_factory=list)

    @property
    def snr(self) -> float:
        """Return the ratio of signal to noise in dB."""
        return ratio(self.signal, self.noise)


def ratio(signal: float, noise: float) -> float:
    """Return a ratio of powers in dB: infinite where nothing is lost, and minus that where all is, or no number is left.

    >>> ratio(1000.0, 1.0), ratio(1.0, 0.0), ratio(1.0, inf)
    (30.0, inf, -inf)
    """
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if 0 < signal < inf and noise < inf else -inf


def judge(source: Side, target: Side, key: Key, asked: str | None, amaxes: Amaxes, clues: Clues) -> Judgement:
    """Examine the codes and the scales of one stored weight."""
    entry, coded = target.inventory.entries[key], target.inventory.coded[key]
    done = Judgement(coded.codes.label, coded.recipe)
    own = own_type(source, target, entry, asked)
    done.findings += _type(coded, own) + _off(source, entry, done.label)
    with np.errstate(all="ignore"):  # what wrong scales make of numbers, and numbers of scales
        for number in range(prod(coded.shape[:-2])):
            stored = scales_of(target.tensor_files, coded, number)
            matrix = matrix_of(source, target, key, own, amaxes, stored, number)
            done.octaves += rules.octaves(matrix.recipe, stored, matrix.outer)
            _judge(source, target, matrix, done, clues)
    return done


def _type(coded: Coded, own: str) -> list[Finding]:
    if coded.scales is None or BY_NAME[coded.recipe].scale.stored != "own" or coded.scales.dtype == own:
        return []
    label = coded.scales.label
    return [Finding("scales of another type", label, label, f"the weights are {own}, their scales {coded.scales.dtype}")]


def _off(source: Side, entry: Entry, label: str) -> list[Finding]:
    off = source.source_scales.off & {tensor for tensor, what in by_rows(entry, ()) if what == "weight"}
    return [Finding("coded, and its quantizer was off", min(off), label, "it was trained as it is")] if off else []


@dataclass(slots=True)
class _Wrong:
    """What was wrong so far, and memory that is used for every tile: fresh memory is slow to touch, and lets threads wait."""

    room: Floats = field(default_factory=lambda: np.empty((5, 0), np.float32))  # of every row, as many as a tile has elements
    scales: int = 0
    first_scale: tuple[int, ...] = ()
    pairs: list[tuple[Floats, Floats]] = field(default_factory=list)  # stored, right
    codes: int = 0
    first_code: tuple[int, ...] = ()
    under_right: int = 0  # codes that are wrong under the right scales too


def _judge(source: Side, target: Side, of: Matrix, done: Judgement, clues: Clues) -> None:
    wrong = _Wrong()
    for tile in of.tiles():
        numbers = assemble(source, of.entry, of.box(tile), of.own)
        codes = stored_at(target.tensor_files, of.coded, of.box(tile)).reshape(len(numbers), -1)
        for rows, columns in of.parts((numbers.shape[0], numbers.shape[1]), TILE):
            at = _within(tile, (rows, columns))
            each = PER_BYTE[of.recipe.packing]
            _look(of, at, numbers[rows, columns], codes[rows, columns.start // each : columns.stop // each], done, wrong)
    done.findings += _findings(source, target, of, wrong, clues)


def _within(tile: Tile, part: Tile) -> Tile:
    rows, columns = (slice(a.start + b.start, a.start + b.stop) for a, b in zip(tile, part, strict=True))
    return rows, columns


def _look(of: Matrix, tile: Tile, numbers: Array, codes: NDArray[np.uint8], done: Judgement, wrong: _Wrong) -> None:
    """Look at the codes and the scales of a tile, the numbers of which are in the processor's cache."""
    shape, block, stored = numbers.shape, of.recipe.block, of.scales[of.blocks(tile)]
    if is_lined := block[0] == 1 and block[1] > 1:
        numbers = lined(of, numbers, 4 * numbers.dtype.itemsize)
        codes = lined(of, codes, 4 // PER_BYTE[of.recipe.packing])
        block, stored = LINED, np.ascontiguousarray(stored).reshape(1, -1)
    if wrong.room.shape[1] < numbers.size:
        wrong.room = np.empty((5, numbers.size), np.float32)
    nearest, (first, second, third) = rules.nearest_of_bytes(of.recipe.name), wrong.room[:3]
    values = first[: numbers.size].reshape(numbers.shape)
    places = wrong.room[3:].reshape(-1)[: 2 * codes.size].view(np.intp).reshape(codes.shape)
    values[...], places[...] = numbers, codes
    right = right_scales(of, values, block)
    under = spread_divisors(of, stored, of.outer, values.shape, block)
    quotients = quotients_of(of, values, under, second)
    good = nearest.is_right(codes, places, quotients, third)
    done.elements += values.size
    _measure(done, nearest.values(places, third), nearest, values, quotients, under)
    differs = (
        stored.view(bits_of(stored)) != right.view(bits_of(right))
        if stored.dtype == right.dtype
        else np.ones(stored.shape, np.bool_)
    )
    if differs.any():
        _note_scales(wrong, of, tile, stored, right, differs)
    if not good.all():
        wrong.codes += int((~good).sum())
        wrong.first_code = wrong.first_code or (
            *of.at,
            *_first(in_rows(~good, shape) if is_lined else ~good, (tile[0].start, tile[1].start)),
        )
        again = quotients_of(of, values, spread_divisors(of, right, of.right_outer, values.shape, block))
        wrong.under_right += int((~nearest.is_right(codes, places, again)).sum())


def _first(found: NDArray[np.bool_], start: tuple[int, int]) -> tuple[int, int]:
    row, column = np.argwhere(found)[0]
    return start[0] + int(row), start[1] + int(column)


def _measure(done: Judgement, lost: Floats, nearest: rules.Nearest, values: Floats, quotients: Floats, under: Floats) -> None:
    """Add up what is lost; ``lost`` has the values of the codes at first."""
    if quotients.max() > nearest.largest or quotients.min() < nearest.least:
        done.saturated += int(((quotients > nearest.largest) | (quotients < nearest.least)).sum())
    lost *= under
    lost -= values
    done.noise += _power(lost)
    done.signal += _power(values)


def _power(values: Floats) -> float:
    """Return the sum of squares: of few at a time in f32, of those in f64."""
    flat = values.reshape(-1)
    return sum(float(np.vdot(part, part)) for part in (flat[low : low + SUMMED] for low in range(0, flat.size, SUMMED)))


def _note_scales(wrong: _Wrong, of: Matrix, tile: Tile, stored: Array, right: Array, differs: NDArray[np.bool_]) -> None:
    parts = of.blocks(tile)
    if of.recipe.block == WHOLE and wrong.scales:
        return  # one scale, seen again
    wrong.scales += int(differs.sum())
    wrong.first_scale = wrong.first_scale or (
        *of.at,
        *_first(differs.reshape(of.scales[parts].shape), (parts[0].start, parts[1].start)),
    )
    if sum(len(pair[0]) for pair in wrong.pairs) < SAMPLES:
        found, expected = (rules.divisors(of.recipe, each, None)[differs] for each in (stored, right))
        wrong.pairs.append((found, expected))


def _findings(source: Side, target: Side, of: Matrix, wrong: _Wrong, clues: Clues) -> Iterator[Finding]:
    names = ", ".join(of.entry.reading.tensors[0])
    if of.right_outer is not None and of.outer != of.right_outer and of.coded.outer is not None:
        found, expected = np.array([of.outer], np.float32), np.array([of.right_outer], np.float32)
        detail = f"expected {of.right_outer:g}, found {of.outer:g}: one scale over all blocks"
        yield Finding(rules.name_scales(found, expected), names, of.coded.outer.label, detail)
    if wrong.scales and of.coded.scales is not None:
        found, expected = (np.concatenate(each) for each in zip(*wrong.pairs, strict=True))
        what = lent_scales(target, of, clues) or rules.name_scales(found, expected)
        detail = f"{wrong.scales} of {of.scales.size} scales, the first at {list(wrong.first_scale)}: "
        detail += f"expected {expected[0]:g}, found {found[0]:g}"
        yield Finding(what, names, of.coded.scales.label, detail)
    scaled = wrong.scales or of.outer != of.right_outer
    if wrong.codes and (wrong.under_right or not scaled):
        detail = f"{wrong.codes} of {prod(of.coded.shape[-2:])} codes, the first at {list(wrong.first_code)}"
        what = name_codes(source, target, of, wrong.codes, clues) or "codes are not the nearest"
        yield Finding(what, _canonical(of.entry, wrong.first_code), of.coded.codes.label, detail)


def _canonical(entry: Entry, index: tuple[int, ...]) -> str:
    """Name the canonical tensor that has an element of a stored one."""
    at = Box(index, (1,) * len(index))
    return next((view.tensor for view in entry.views if clip(view, at)), entry.reading.tensors[0][0])
