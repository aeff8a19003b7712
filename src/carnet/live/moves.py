"""What travels: boxes of canonical tensors, each from one rank to another; and in which round.

A *transfer* is a move of the plan with its two ranks. On the wire a box is dense, its axes in canonical order, so that neither side
needs to know how the other stores it. Moves are gathered into *rounds*: in each, a rank sends no more than one bucket and receives
no more than one. All ranks compute the same rounds.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, assert_never

from carnet.algebra.box import Box
from carnet.algebra.layout import round_up
from carnet.dtypes import BY_NAME
from carnet.errors import NotSupported
from carnet.formats.stored import dense_strides
from carnet.live.virtual import Source
from carnet.plans.columns import Plan
from carnet.quantize.recipes import BY_NAME as RECIPES
from carnet.quantize.recipes import PACKED, WHOLE, Recipe
from carnet.steps import Fill, Make, Measure, Move, Place, Product, Put, Same, TargetTensor

NEARLY = 64  # a round is full where less than this part of a bucket is free: nobody looks for what would fit
ALIGN = 16  # bytes: each box begins at a multiple, so that it can be seen as elements of any type


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a box lies in a target tensor, and in which shape it goes there."""

    file: str
    name: str
    offset: int  # elements, from the tensor's first
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


@dataclass(frozen=True, slots=True)
class Coded:
    """What of a matrix goes that is coded on the way. Blocks of a row are never cut: their columns are one axis on the wire."""

    matrix: str  # a name for it, the same on all ranks
    recipe: Recipe
    part: Literal["codes", "scales"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One box on its way."""

    tensor: str  # canonical name
    box: Box
    sender: int  # global ranks
    receiver: int
    spot: Spot
    dtype: str  # on the wire and in the target
    add: float  # added on the way, in f32
    coded: Coded | None  # where it is
    function: str = ""  # what is computed of it instead of added to it

    @property
    def nbytes(self) -> int:
        """Return what it takes of a bucket."""
        return round_up(prod(self.spot.shape) * BY_NAME[self.dtype].nbytes, ALIGN)

    @property
    def in_blocks(self) -> bool:
        """Say whether the columns of its rows stay together."""
        return self.coded is not None and self.coded.recipe.block != WHOLE


class TargetIndex:
    """Find the tensor at a place of a target file."""

    def __init__(self, plan: Plan) -> None:
        self._files = {
            (file.space, file.name): ([t.offset for t in file.tensors], file.tensors) for file in (*plan.files, plan.scratch)
        }
        self._coded = {step.source.offset: step for step in plan.steps.only(Make) if step.function == "quantize"}
        # of each matrix its number, and the element type of its weights
        self.matrices = {matrix_name(step): (at, step.source.dtype) for at, step in enumerate(self._coded.values())}

    def _tensor(self, place: Place) -> TargetTensor:
        starts, tensors = self._files[place.space, place.file]
        return tensors[bisect_right(starts, place.offset) - 1]

    def at(self, place: Place, shape: tuple[int, ...]) -> Spot:
        """Return a place as one in a tensor."""
        tensor = self._tensor(place)
        inside = (place.offset - tensor.offset) // BY_NAME[place.dtype].nbytes
        return Spot(place.file, tensor.name, inside, shape, place.strides)

    def spots(self, step: Move) -> Iterator[tuple[Spot, str, Coded | None]]:
        """Yield where a step writes, as what type, and what of coding that is: codes, and the scales of blocks."""
        place = step.target
        if place.space == "file":
            yield self.at(place, step.shape), place.dtype, None
            return
        made = self._coded[self._tensor(place).offset]
        recipe = RECIPES[made.encoding.recipe]
        if not travels(recipe):
            known = ", ".join(sorted(name for name, recipe in RECIPES.items() if recipe.is_made and travels(recipe)))
            raise NotSupported(f"{recipe.name} has scales of blocks, which ranks may cut", {"on the way": known})
        first = (place.offset - made.source.offset) // BY_NAME[place.dtype].nbytes
        parts = {"codes": (made.target, PACKED[recipe.packing]), "scales": (made.encoding.scales, recipe.block[1])}
        for part, (there, by) in parts.items():
            if part == "codes" or recipe.block != WHOLE:
                spot = _within(step, made, self.at(there, ()), first, by)
                yield spot, there.dtype, Coded(matrix_name(made), recipe, part)  # type: ignore[arg-type]  # Literal


def travels(recipe: Recipe) -> bool:
    """Say whether ranks can code by themselves what they hold of a matrix: under a scale of all of it, or blocks of a row."""
    return recipe.block == WHOLE or (recipe.block[0] == 1 and recipe.block[1] > 0 and not recipe.code.integer)


def _within(step: Move, made: Make, base: Spot, first: int, by: int) -> Spot:
    """Return where a box of a matrix lies among its codes or scales, ``by`` weights of a row to one of them.

    ``first``: the place of its first weight in the matrix.
    """
    recipe, columns, (down, along) = RECIPES[made.encoding.recipe], made.encoding.shape[1], base.strides
    offset = base.offset + first // columns * down + first % columns // by * along
    strides = step.target.strides
    if recipe.block == WHOLE:
        there = tuple(stride // columns * down if stride >= columns else stride * along for stride in strides)
        return replace(base, offset=offset, shape=step.shape, strides=there)
    # an axis of one index, whose stride says nothing, goes with the rows
    rows = next((axis for axis, stride in enumerate(strides) if step.shape[axis] > 1 and stride < columns), len(strides))
    width, dense = prod(step.shape[rows:]), dense_strides(step.shape[rows:])
    apart = any(size > 1 and one != other for size, one, other in zip(step.shape[rows:], strides[rows:], dense, strict=True))
    if apart or first % columns % recipe.block[1] or width % recipe.block[1]:
        facts = {"tensor": step.tensor, "block": f"{recipe.block[1]} weights of a row", "box": f"{step.start}, {step.shape}"}
        raise NotSupported(f"ranks cut through blocks that have one scale in {recipe.name}", facts)
    there = (*(stride // columns * down for stride in strides[:rows]), along)
    return replace(base, offset=offset, shape=(*step.shape[:rows], width // by), strides=there)


def matrix_name(step: Make) -> str:
    """Return a name for a matrix that has a scale, the same on all ranks."""
    return f"{step.target.file}:{step.target.offset}"


def moves(
    plan: Plan, index: TargetIndex, source: Source, receivers: Callable[[Spot], Sequence[int]], bucket: int
) -> Iterator[Transfer]:
    """Yield all moves of a plan, in the order of the target; a box larger than a bucket (bytes) is cut.

    Where several ranks hold a box, the receiver itself is asked first, then who has sent least so far.
    """
    sent = defaultdict[int, int](int)
    for step in plan.steps:
        match step:
            case Move():
                pass
            case Make(function="dequantize"):
                raise NotSupported(f"{step.tensor!r} is stored as codes, and a running model holds none")
            case Product():
                raise NotSupported(f"the target holds a product of {step.tensor!r}, which no rank of a running model makes")
            case Make() | Same() | Measure() | Fill() | Put():  # a rank does these by itself
                continue
            case _:
                assert_never(step)
        holders = source.holders(step.source.file, step.source.offset)
        for spot, dtype, coded in index.spots(step):
            for receiver in receivers(spot):
                sender = receiver if receiver in holders else min(holders, key=lambda rank: (sent[rank], rank))
                box = Box(step.start, step.shape)
                move = Transfer(step.tensor, box, sender, receiver, spot, dtype, step.add, coded, step.function)
                if sender != receiver:
                    sent[sender] += move.nbytes
                    yield from _parts(move, bucket)
                else:
                    yield move


def _parts(move: Transfer, most: int) -> Iterator[Transfer]:
    """Cut a move into parts that fit into a bucket, along the first axis that can be cut; a row of blocks goes whole."""
    start, shape = move.box.start, move.box.shape
    axis = next((axis for axis in range(len(move.spot.shape) - move.in_blocks) if shape[axis] > 1), None)
    if move.nbytes <= most or axis is None:
        yield move
        return
    half = shape[axis] // 2
    for skip, length in ((0, half), (half, shape[axis] - half)):
        box = Box(
            (*start[:axis], start[axis] + skip, *start[axis + 1 :]),
            (*shape[:axis], length, *shape[axis + 1 :]),
        )
        there = (*move.spot.shape[:axis], length, *move.spot.shape[axis + 1 :])
        spot = replace(move.spot, offset=move.spot.offset + skip * move.spot.strides[axis], shape=there)
        yield from _parts(replace(move, box=box, spot=spot), most)


def rounds(groups: Iterable[Sequence[Transfer]], bucket: int, *, kept: bool = False) -> list[list[Transfer]]:
    """Return the moves of each round. What is in one group stays together, even where it is more than a bucket.

    A group goes into the first round in which all of its ranks have room. ``kept`` says that what stays on its rank needs room too,
    because it is handed on round by round.
    """
    filled: dict[Who, _Filled] = defaultdict(_Filled)
    found: list[list[Transfer]] = []
    for group in groups:
        need: dict[Who, int] = defaultdict(int)
        for move in group:
            if move.sender != move.receiver:
                need[move.sender, "sends"] += move.nbytes
                need[move.receiver, "receives"] += move.nbytes
            if kept:
                need[move.receiver, "holds"] += move.nbytes
        at = max((filled[who].first for who in need), default=0)
        while not all(filled[who].has_room(at, nbytes, bucket) for who, nbytes in need.items()):
            at += 1
        for who, nbytes in need.items():
            filled[who].fill(at, nbytes, bucket)
        found += [[] for _ in range(at + 1 - len(found))]
        found[at] += group
    return found


Who = tuple[int, str]  # a rank, and what it does


class _Filled:
    """How full the rounds of one rank are."""

    def __init__(self) -> None:
        self.first = 0  # round that is not nearly full
        self._used: dict[int, int] = {}

    def has_room(self, at: int, nbytes: int, bucket: int) -> bool:
        used = self._used.get(at, 0)
        return not used or used + nbytes <= bucket

    def fill(self, at: int, nbytes: int, bucket: int) -> None:
        self._used[at] = self._used.get(at, 0) + nbytes
        while self._used.get(self.first, 0) * NEARLY >= bucket * (NEARLY - 1):
            self.first += 1


def by_tensor(found: Iterable[Transfer]) -> list[list[Transfer]]:
    """Return the moves of each target tensor, those of its copies on other ranks included."""
    groups: dict[tuple[str, str], list[Transfer]] = {}
    for move in found:
        groups.setdefault((move.spot.file, move.spot.name), []).append(move)
    return list(groups.values())


def traffic(found: Sequence[Transfer]) -> Mapping[str, int]:
    """Return what moves amount to: bytes that travel, bytes that stay on their rank."""
    away = sum(move.nbytes for move in found if move.sender != move.receiver)
    return {"bytes sent": away, "bytes kept": sum(move.nbytes for move in found) - away}
