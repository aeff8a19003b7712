"""Compare every element of a target with the source, and say in words what a difference looks like."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box, Rack, intersect, slices, subtract, uncovered, volume, whole
from carnet.dialects.entry import Entry
from carnet.dtypes import BY_NAME, FLOATS, array_type
from carnet.examiner.adapted import lengths, rounding_alike
from carnet.examiner.codes import MEANT, meant
from carnet.examiner.functions import is_wrong
from carnet.examiner.sums import Summed
from carnet.examiner.tensor_files import BLOCK, Hasher, TensorFiles, blocks, digest, region, tensor_files_of
from carnet.examiner.unfold import Array, share_box, unfold
from carnet.formats.stored import Coded, Stored, dense_strides
from carnet.inventory.source_scales import NOTHING, SourceScales
from carnet.inventory.survey import Inventory
from carnet.model.model import canonical_shapes
from carnet.model.tensors import Canonical
from carnet.quantize.recipes import BY_NAME as RECIPES

SHARE = 4  # of blocks that are compared, those of sums: there are numbers of 8 bytes for each


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
    tensor_files: TensorFiles
    parts: dict[Canonical, list[Part]]  # canonical tensor -> where it lies
    racks: dict[Canonical, Rack[Part]]  # the same, to be asked for what is near a box
    shapes: dict[Canonical, tuple[int, ...]]  # of every canonical tensor
    source_scales: SourceScales = NOTHING  # the scales that it brings along
    terms: tuple[tuple["Side", float], ...] = ()  # of a sum: itself and the others, each with its factor, in their order
    differences: bool = False  # the others count by what they differ from the first
    kept: frozenset[str] = frozenset()  # canonical tensors that are no sums
    foreign: bool = (
        False  # a target that another program wrote: what it computed is as near to the true result as its arithmetic goes
    )

    def is_sum(self, name: Canonical) -> bool:
        """Say whether a tensor is a sum."""
        return bool(self.terms) and name not in self.kept

    def is_adapted(self, name: Canonical) -> bool:
        """Say whether an adapter changes a tensor."""
        return name in self.inventory.changes.of


@dataclass(frozen=True, slots=True)
class Suspect:
    """A part of the target that differs from the source, and whose damage may still get a name."""

    part: Part
    name: Canonical
    finding: Finding  # what is known without looking any closer


@dataclass(slots=True)
class Compared:
    """What comparing a canonical tensor found."""

    elements: int = 0  # of the target, compared one by one
    found: list[Finding | Suspect] = field(default_factory=list)  # what is wrong
    digests: dict[str, str] = field(default_factory=dict)  # of stored tensors of the target that were read in their own order
    moved: dict[str, str] = field(default_factory=dict)  # of stored tensors of the source that lie in the target as they are


def side(inventory: Inventory, block: int = BLOCK, also: str | None = None) -> Side:
    """Index an inventory by canonical tensor."""
    found: dict[Canonical, list[Part]] = defaultdict(list)
    for key, entry in inventory.entries.items():
        coded, reading = inventory.coded.get(key), entry.reading
        stored = inventory.checkpoint.tensors[key] if coded is None else replace(coded.codes, dtype=MEANT, shape=coded.shape)
        label = stored.label
        for at, names in enumerate(reading.tensors):
            for part, name in enumerate(names):
                box = share_box(reading.parts[part], reading.shares)
                found[name].append(Part(label, stored, entry, part, at, box, coded))
    racks = {name: Rack(parts, lambda part: part.box) for name, parts in found.items()}
    shapes = canonical_shapes(inventory.config, inventory.dialect.parts)
    return Side(inventory, tensor_files_of(inventory.checkpoint, block, also), found, racks, shapes)


def read(of: Side, part: Part, box: Box, *, rounds: bool = True) -> Array:
    """Return the bits of a canonical box from one stored tensor; of codes what they mean, rounded to the type of their scales."""
    if part.coded is None:
        return unfold(part.entry.reading, part.part, part.at, box, partial(region, of.tensor_files, part.stored))
    return unfold(part.entry.reading, part.part, part.at, box, partial(meant, of.tensor_files, part.coded, rounds=rounds))


def is_judged(source: Side, coded: Coded | None, entry: Entry) -> bool:
    """Say whether codes are held against the source's numbers; those of its own kind, or that nobody makes, must mean the same."""
    if coded is None or not RECIPES[coded.recipe].is_made:
        return False
    parts = [part for names in entry.reading.tensors for name in names for part in source.parts.get(name, [])]
    return any(part.coded is None or part.coded.recipe != coded.recipe for part in parts)


def is_in_order(part: Part) -> bool:
    """Say whether a part is its stored tensor, element after element: then what is compared is digested on the way."""
    reading, chunks = part.entry.reading, part.stored.chunks
    stored = [axis for dim in reading.pattern.dims for axis in dim]
    return (
        part.coded is None
        and len(chunks) == len(reading.parts) == 1
        and chunks[0].strides == dense_strides(part.stored.shape)
        and volume(part.box) == prod(part.stored.shape)
        and stored == [axis for axis in reading.parts[0] if axis in stored]
    )


def moved(source: Side, target: Side, name: Canonical) -> Part | None:
    """Return the part of the source that is a stored tensor, and lies byte for byte in the target too, where that is equal.

    Both are one box of the canonical tensor, element after element, of one type: the digest of the one is that of the other.
    """
    if _shift(source, target, name) or source.is_sum(name) or source.is_adapted(name) or name.tensor.function:
        return None
    ours, theirs = (next(filter(is_in_order, of.parts.get(name, [])), None) for of in (source, target))
    if ours is None or theirs is None or (ours.box, ours.stored.dtype) != (theirs.box, theirs.stored.dtype):
        return None
    return ours


def _shift(source: Side, target: Side, name: Canonical) -> int:
    return (name.tensor.part in source.inventory.less_one) - (name.tensor.part in target.inventory.less_one)


def compare(source: Side, target: Side, name: Canonical) -> Compared:
    """Compare one canonical tensor everywhere the target has it."""
    shape = source.shapes[name]
    done = Compared()
    twin = moved(source, target, name)
    hole = uncovered(whole(shape), sorted((part.box for part in target.parts.get(name, [])), key=lambda box: box.start))
    if hole is not None:
        done.found.append(
            Finding("missing", name, "", f"nothing holds the part that starts at {list(hole.start)}, shape {list(hole.shape)}")
        )
    for part in target.parts.get(name, []):
        if is_judged(source, part.coded, part.entry):
            continue
        wrong, first = 0, None
        hasher = Hasher(target.tensor_files.also) if is_in_order(part) else None
        share = SHARE if source.is_sum(name) or source.is_adapted(name) or name.tensor.function else 1
        for box in blocks(part.box, target.tensor_files.block // BY_NAME[part.stored.dtype].nbytes // share):
            theirs = read(target, part, box, rounds=False)
            if hasher is not None:
                hasher.update(theirs.data)
            for shared, differs in differences(source, target, name, box, theirs, part):
                done.elements += volume(shared)
                if differs is not None and differs.any():
                    wrong += int(differs.sum())
                    index = tuple(int(i) for i in np.argwhere(differs)[0])
                    first = first or tuple(s + i for s, i in zip(shared.start, index, strict=True))
        if hasher is not None:
            done.digests[part.label] = hasher.hexdigest()
            if twin is not None:  # of the first part that is in order
                done.moved[twin.label] = hasher.hexdigest() if not wrong else digest(source.tensor_files, twin.stored)
                twin = None
        if wrong:
            detail = f"{wrong} of {volume(part.box)} elements, the first at {list(first or ())}"
            finding = Finding("elements differ", name, part.label, detail)
            done.found.append(finding if name.tensor.function else Suspect(part, name, finding))
    return done


def differences(
    source: Side, target: Side, name: Canonical, box: Box, theirs: Array, part: Part
) -> Iterator[tuple[Box, NDArray[np.bool_] | None]]:
    """Yield disjoint boxes that make up a box, each with what differs in it: None where nothing does."""
    if name.tensor.function:
        operands = [_operand(source, name, at, box) for at in range(len(name.origins))]
        yield (
            box,
            is_wrong(
                name.tensor.function, operands, box, source.shapes[name], theirs, part.stored.dtype, foreign=target.foreign
            ),
        )
        return
    for shared, (expected, beyond) in _expected(source, target, name, box, part):
        found = theirs if shared == box else theirs[slices(shared, box)]
        if beyond is None and _is_same(found, expected):
            yield shared, None
        else:
            yield shared, found != expected if beyond is None else (found != expected) | beyond


def _operand(source: Side, made: Canonical, at: int, box: Box) -> NDArray[np.float64]:
    """Return the numbers of an operand that a box of what is computed follows from: all along the axes that it does not have."""
    name, axes = made.origins[at], made.tensor.axes
    sizes = [
        max(part.box.start[dim] + part.box.shape[dim] for part in source.parts[name]) for dim in range(len(name.tensor.axes))
    ]
    spans = [
        (box.start[axes.index(axis)], box.shape[axes.index(axis)]) if axis in axes else (0, size)
        for axis, size in zip(name.tensor.axes, sizes, strict=True)
    ]
    box = Box(tuple(start for start, _ in spans), tuple(length for _, length in spans))
    numbers = np.empty(box.shape)
    for origin, shared in sources(source, name, box):
        bits = np.ascontiguousarray(read(source, origin, shared))
        numbers[slices(shared, box)] = bits.view(array_type(origin.stored.dtype))
    return numbers


def _expected(
    source: Side, target: Side, name: Canonical, box: Box, part: Part
) -> Iterator[tuple[Box, tuple[Array, NDArray[np.bool_] | None]]]:
    """Yield disjoint boxes that make up a box, each with the bits that it must have, and which are beyond the range of their type."""
    # codes that are the same have the same scales, in one type or another
    wanted, rounds = part.stored.dtype, part.coded is None
    if source.is_sum(name):
        yield box, _sum(source, target, name, box, wanted)
        return
    if source.is_adapted(name):
        yield box, _as(adapted(source, name, box, wanted).view(np.uint32), "f32", wanted, 0)
        return
    for origin, shared in sources(source, name, box):
        yield (
            shared,
            _as(read(source, origin, shared, rounds=rounds), origin.stored.dtype, wanted, _shift(source, target, name)),
        )


def _sum(source: Side, target: Side, name: Canonical, box: Box, wanted: str) -> tuple[Array, NDArray[np.bool_] | None]:
    """Return the bits of a sum, and which numbers are beyond the range of their type."""
    total = Summed(volume(box), differences=source.differences)
    for term, factor in source.terms:
        shift = _shift(term, target, name)
        parts = [*sources(term, name, box)]
        types = {origin.stored.dtype for origin, _ in parts}
        own = types.pop() if len(types) == 1 and not shift else "f32"
        bits: Array = np.empty(box.shape, f"u{BY_NAME[own].nbytes}")
        for origin, shared in parts:
            found, _ = _as(read(term, origin, shared), origin.stored.dtype, own, shift)
            if shared == box:
                bits = np.ascontiguousarray(found)
            else:
                bits[slices(shared, box)] = found
        total.add(bits.reshape(-1), own, factor)
    found, beyond = total.bits(wanted)
    return found.reshape(box.shape), None if beyond is None else beyond.reshape(box.shape)


def adapted(source: Side, name: Canonical, box: Box, wanted: str) -> NDArray[np.float32]:
    """Return f32 numbers that round to a type as those of a box do of a weight with what an adapter adds to it."""
    change, tensor = source.inventory.changes.of[name], name.tensor
    own, outputs, found = int(tensor.each_expert), tensor.outputs, np.empty(box.shape, np.float32)
    for expert in range(box.shape[0]) if own else (0,):
        head = Box((box.start[0] + expert,), (1,)) if own else Box((), ())
        down, along = (Box(box.start[span], box.shape[span]) for span in (slice(own, outputs), slice(outputs, None)))
        if change.magnitude is None:
            made = _added(source, name, (head, down, along), wanted)
        else:  # whole rows are measured, each number as f32 has it
            every = source.shapes[name][outputs:]
            rows = _added(source, name, (head, down, whole(every)), "f32")
            long = numbers(source, change.magnitude, _beside(head, down)).reshape(-1).astype(np.float32)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                rows *= (long / lengths(rows))[:, None]
            made = rows.reshape(len(rows), *every)[:, *slices(along, whole(every))]
        found[expert if own else ...] = made.reshape((*down.shape, *along.shape))
    return found


def _added(source: Side, name: Canonical, parts: tuple[Box, Box, Box], wanted: str) -> NDArray[np.float32]:
    """Return, as outputs | inputs, what the sum of a weight and a product rounds to; of an expert, some outputs and some inputs."""
    change = source.inventory.changes.of[name]
    head, down, along = parts
    whole_rank = whole(source.inventory.changes.factors[change.b][-1:])
    weight, b, a = (
        numbers(source, each, _beside(head, *axes))
        for each, axes in ((name, (down, along)), (change.b, (down, whole_rank)), (change.a, (whole_rank, along)))
    )
    tall, wide, rank = volume(down), volume(along), volume(whole_rank)
    return rounding_alike(weight.reshape(tall, wide), b.reshape(tall, rank), a.reshape(rank, wide), change.scale, wanted)


def _beside(*boxes: Box) -> Box:
    """Return the box that has the axes of some boxes, one after the other."""
    return Box(*(tuple(each for box in boxes for each in values(box)) for values in (attrgetter("start"), attrgetter("shape"))))


def numbers(source: Side, name: Canonical, box: Box) -> NDArray[np.float64]:
    """Return the numbers of a box as f32 has them."""
    found = np.empty(box.shape)
    for origin, shared in sources(source, name, box):
        bits, _ = _as(read(source, origin, shared), origin.stored.dtype, "f32", 0)
        found[slices(shared, box)] = bits.view(np.float32)
    return found


def _is_same(found: Array, expected: Array) -> bool:
    """Say whether two arrays have the same bits; where it is quick to say, eight bytes at a time."""
    if found.dtype != expected.dtype or found.nbytes % 8 or not (found.flags.c_contiguous and expected.flags.c_contiguous):
        return False
    return not (found.reshape(-1).view(np.uint64) != expected.reshape(-1).view(np.uint64)).any()


def sources(source: Side, name: Canonical, box: Box) -> Iterator[tuple[Part, Box]]:
    """Yield disjoint boxes that make up a box, each with a stored tensor of the source that has it."""
    left = [box]
    for part in source.racks[name].near(box):
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


def _as(bits: Array, given: str, wanted: str, shift: int) -> tuple[Array, NDArray[np.bool_] | None]:
    """Return the bits that values have in another element type, rounded to nearest even, and which ones are beyond its range."""
    if (given == wanted and not shift) or not {given, wanted} <= set(FLOATS):
        return bits, None
    numbers = np.ascontiguousarray(bits).view(array_type(given))
    if shift:
        numbers = numbers.astype(np.float32) + np.float32(shift)
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = numbers.astype(array_type(wanted))
    infinite = np.isinf(cast)
    beyond = infinite & np.isfinite(numbers) if infinite.any() else None
    return cast.view(np.dtype(f"u{BY_NAME[wanted].nbytes}")), beyond


def whole_of(source: Side, name: Canonical, box: Box) -> Array:
    """Return the bits of a canonical box, put together from the stored tensors that have it."""
    made = None
    for part, shared in sources(source, name, box):
        piece = read(source, part, shared)
        if shared == box:
            return piece
        made = np.zeros(box.shape, piece.dtype) if made is None else made
        made[slices(shared, box)] = piece
    assert made is not None, "a box of a canonical tensor has a source"
    return made
