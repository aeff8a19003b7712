"""Compare every element of a target with the source, and say in words what a difference looks like."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from carnet.box import Box, intersect, subtract, uncovered, volume, whole
from carnet.dtypes import BY_NAME, FLOATS, array_type
from carnet.examiner.codes import MEANT, meant
from carnet.examiner.shelves import Shelves, region
from carnet.examiner.unfold import Array, share_box, unfold
from carnet.families.entries import Entry
from carnet.formats.stored import Coded, Stored
from carnet.inventory import Inventory, canonical_shapes, norms
from carnet.seeds import NOTHING, Seeds

BLOCK = 4 << 20  # bytes of one side that are compared at a time


@dataclass(frozen=True, slots=True)
class Part:
    """One part of one stored tensor: a box of a canonical tensor."""

    label: str  # the stored tensor, for messages
    stored: Stored
    entry: Entry
    part: int  # which part of the pattern
    at: int  # index along the layer dimension
    box: Box  # canonical
    coded: Coded | None  # the same as codes, where it is stored so; ``stored`` is then what they stand for


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a target."""

    what: str  # in a few words: "bits differ", "missing", "config field differs"
    where: str  # the canonical tensor or config field
    stored: str  # the stored tensor of the target; "" where none is to blame
    detail: str  # what was expected and found


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint, ready to be read by canonical tensor."""

    inventory: Inventory
    shelves: Shelves
    parts: dict[str, list[Part]]  # canonical tensor -> where it lies
    shapes: dict[str, tuple[int, ...]]  # of every canonical tensor
    norms: frozenset[str]  # the canonical tensors that scale a norm
    seeds: Seeds = NOTHING  # the scales that it brings along


def side(inventory: Inventory) -> Side:
    """Index an inventory by canonical tensor."""
    found: dict[str, list[Part]] = defaultdict(list)
    for key, entry in inventory.entries.items():
        coded, reading = inventory.coded.get(key), entry.reading
        stored = inventory.checkpoint.tensors[key] if coded is None else replace(coded.codes, dtype=MEANT, shape=coded.shape)
        label = "/".join(filter(None, (stored.unit, stored.name)))
        for at, names in enumerate(reading.tensors):
            for part, name in enumerate(names):
                box = share_box(reading.parts[part], reading.shares)
                found[name].append(Part(label, stored, entry, part, at, box, coded))
    return Side(
        inventory, Shelves(inventory.checkpoint.root), found, canonical_shapes(inventory.config), norms(inventory.config)
    )


def read(of: Side, part: Part, box: Box) -> Array:
    """Return the bits of a canonical box from one stored tensor."""
    if part.coded is None:
        return unfold(part.entry.reading, part.part, part.at, box, partial(region, of.shelves, part.stored))
    return unfold(part.entry.reading, part.part, part.at, box, partial(meant, of.shelves, part.coded))


def is_judged(source: Side, coded: Coded | None, entry: Entry) -> bool:
    """Say whether codes are held against the source's numbers; codes of the source's own kind must mean the same as its own."""
    parts = [part for names in entry.reading.tensors for name in names for part in source.parts.get(name, [])]
    return coded is not None and any(part.coded is None or part.coded.recipe != coded.recipe for part in parts)


def compare(source: Side, target: Side, name: str) -> tuple[int, list[Finding]]:
    """Compare one canonical tensor everywhere the target has it: (elements compared, what is wrong)."""
    shape = source.shapes[name]
    found, compared = [], 0
    shift = source.inventory.zero_centred - target.inventory.zero_centred if name in source.norms else 0
    hole = uncovered(whole(shape), sorted((part.box for part in target.parts.get(name, [])), key=lambda box: box.start))
    if hole is not None:
        found.append(
            Finding("missing", name, "", f"nothing holds the part that starts at {list(hole.start)}, shape {list(hole.shape)}")
        )
    for part in target.parts.get(name, []):
        if is_judged(source, part.coded, part.entry):
            continue
        wrong, first = 0, None
        for box in blocks(part.box, BLOCK // BY_NAME[part.stored.dtype].nbytes):
            for origin, shared in sources(source, name, box):
                expected, beyond = _as(read(source, origin, shared), origin.stored.dtype, part.stored.dtype, shift)
                differs = (read(target, part, shared) != expected) | beyond
                compared += volume(shared)
                if differs.any():
                    wrong += int(differs.sum())
                    index = tuple(int(i) for i in np.argwhere(differs)[0])
                    first = first or tuple(s + i for s, i in zip(shared.start, index, strict=True))
        if wrong:
            found.append(_finding(source, target, part, name, wrong, first or ()))
    return compared, found


def blocks(box: Box, limit: int) -> Iterator[Box]:
    """Yield boxes of at most ``limit`` elements that make up a box, cutting its outermost axes first.

    >>> [b.shape for b in blocks(Box((0, 0), (3, 4)), 8)]
    [(2, 4), (1, 4)]
    """
    if volume(box) <= limit or not box.shape:
        if volume(box):
            yield box
        return
    inner = volume(box) // box.shape[0]
    step = max(1, limit // inner) if inner else box.shape[0]
    for at in range(0, box.shape[0], step):
        cut = Box((box.start[0] + at, *box.start[1:]), (min(step, box.shape[0] - at), *box.shape[1:]))
        if volume(cut) <= limit or len(cut.shape) == 1:
            yield cut
        else:
            for rest in blocks(Box(cut.start[1:], cut.shape[1:]), limit):
                yield Box((cut.start[0], *rest.start), (1, *rest.shape))


def sources(source: Side, name: str, box: Box) -> Iterator[tuple[Part, Box]]:
    """Yield disjoint boxes that make up a box, each with a stored tensor of the source that has it."""
    left = [box]
    for part in source.parts[name]:
        rest = []
        for piece in left:
            shared = intersect(piece, part.box)
            if shared is None:
                rest.append(piece)
                continue
            yield part, shared
            rest += subtract(piece, shared)
        left = rest
        if not left:
            return


def _as(bits: Array, given: str, wanted: str, shift: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return the bits that values have in another element type, rounded to nearest even, and which ones are beyond its range."""
    if (given == wanted and not shift) or not {given, wanted} <= set(FLOATS):
        return bits, np.zeros((), np.bool_)
    numbers = np.ascontiguousarray(bits).view(array_type(given))
    if shift:
        numbers = numbers.astype(np.float32) + np.float32(shift)
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = numbers.astype(array_type(wanted))
        beyond = np.isinf(cast.astype(np.float64)) & np.isfinite(numbers.astype(np.float64))
    return cast.view(np.dtype(f"u{BY_NAME[wanted].nbytes}")), beyond


def _finding(source: Side, target: Side, part: Part, name: str, wrong: int, first: Sequence[int]) -> Finding:
    detail = f"{wrong} of {volume(part.box)} elements, the first at {list(first)}"
    guess = diagnose(source, target, part, name)
    return Finding(guess or "elements differ", name, part.label, detail)


def diagnose(source: Side, target: Side, part: Part, name: str) -> str | None:
    """Name the damage, where it is one of the usual ones; the comparison has already said that there is one."""
    if volume(part.box) > 1 << 26 or part.stored.dtype != source.parts[name][0].stored.dtype:
        return None
    found = read(target, part, part.box)
    if not found.any():
        return "all zero"
    expected = whole_of(source, name, part.box)
    others = (other for other in source.parts if other != name)
    for other in others:
        if source.shapes.get(other) == source.shapes[name] and _equals(whole_of(source, other, part.box), found):
            return f"holds {other}"
    axes = part.entry.reading.parts[part.part]
    for place, axis in enumerate(axes):
        moved = rearranged(np.moveaxis(expected, place, 0), np.moveaxis(found, place, 0))
        if moved is not None:
            return f"{moved} along {axis}"
    for place in range(len(axes) - 1):  # query heads are numbered over kv and rep together
        folded = (*expected.shape[:place], -1, *expected.shape[place + 2 :])
        moved = rearranged(*(np.moveaxis(side.reshape(folded), place, 0) for side in (expected, found)))
        if moved is not None:
            return f"{moved} along {axes[place]} {axes[place + 1]}"
    if int((found != expected).sum()) == 1:
        flipped = int(found[found != expected][0]) ^ int(expected[found != expected][0])
        return f"{flipped.bit_count()} bit{'s' * (flipped.bit_count() > 1)} of one element flipped"
    return None


def whole_of(source: Side, name: str, box: Box) -> Array:
    """Return the bits of a canonical box, put together from the stored tensors that have it."""
    made = None
    for part, shared in sources(source, name, box):
        piece = read(source, part, shared)
        if shared == box:
            return piece
        made = np.zeros(box.shape, piece.dtype) if made is None else made
        made[tuple(slice(s - b, s - b + n) for s, b, n in zip(shared.start, box.start, shared.shape, strict=True))] = piece
    assert made is not None, "a box of a canonical tensor has a source"
    return made


def _equals(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def rearranged(expected: Array, found: Array) -> str | None:
    """Say how slices along the first axis were exchanged, if that is all that happened."""
    length = len(expected)
    differing = [i for i in range(length) if not _equals(expected[i], found[i])] if length <= 1 << 14 else []
    if len(differing) == 2 and _equals(expected[differing], found[differing[::-1]]):
        return f"{differing[0]} and {differing[1]} exchanged"
    if length % 2 == 0 and _equals(np.roll(expected, length // 2, 0), found):
        return "halves exchanged"
    rows = {expected[i].tobytes(): i for i in differing}
    if differing and sorted(rows.get(found[i].tobytes(), -1) for i in differing) == differing:
        return f"{len(differing)} indices rearranged"
    return None
