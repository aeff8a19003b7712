"""The model as a *column* of blocks: what stands before its layers, each kind of layer once, and what stands after them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from carnet.inventory.survey import Inventory
from carnet.model.model import canonical_shapes
from carnet.report.components import COMPONENTS, component_of, split
from carnet.report.held import Held

MOST = 40  # kinds of layers that are drawn
LINES = 60  # tensors of a block, of which a tower may have hundreds


@dataclass(frozen=True, slots=True)
class Line:
    """One canonical tensor of a block."""

    part: str  # its name within a layer
    component: str
    shape: tuple[int, ...]
    kind: str  # its element type, or the recipe of its codes
    computed: bool = False  # no model has it by itself


@dataclass(frozen=True, slots=True)
class Block:
    """What one layer holds, and all those that are like it; or what stands outside of layers."""

    layers: tuple[int, ...]  # () outside of layers
    title: str
    parameters: int  # of one layer
    nbytes: int  # of all, as they are stored
    lines: tuple[Line, ...]
    more: int = 0  # tensors that are not among the lines

    @property
    def groups(self) -> list[tuple[str, list[Line]]]:
        """Return the lines of each component, in the order in which a model computes."""
        return [(name, held) for name in COMPONENTS if (held := [line for line in self.lines if line.component == name])]


def column(inventory: Inventory, rows: Sequence[Held]) -> list[Block]:
    """Return the blocks of an understood checkpoint, in the order in which they compute."""
    kinds, nbytes = _stored(rows)
    shapes = canonical_shapes(inventory.config, inventory.dialect.parts)
    layers: dict[int | None, list[Line]] = defaultdict(list)
    before = True
    outside: dict[bool, list[Line]] = {True: [], False: []}
    sizes: dict[int | None, int] = defaultdict(int)
    weights: dict[bool, int] = {True: 0, False: 0}
    for name, shape in shapes.items():
        if str(name) not in kinds:
            continue
        layer, part = split(name)
        line = Line(part, component_of(name), shape, kinds[str(name)], bool(name.tensor.function))
        if layer is None:
            outside[before].append(line)
            weights[before] += nbytes[str(name)]
        else:
            before = False
            layers[layer].append(line)
            sizes[layer] += nbytes[str(name)]
    alike: dict[tuple[Line, ...], list[int]] = defaultdict(list)
    for layer, lines in layers.items():
        alike[tuple(lines)].append(layer or 0)
    found = [_block(outside[True], (), "before the layers", weights[True])] if outside[True] else []
    for each, numbers in [*alike.items()][:MOST]:
        found.append(_block(each, tuple(numbers), said(numbers), sum(sizes[number] for number in numbers)))
    for_more = [*alike.values()][MOST:]
    if for_more:
        numbers = [number for each in for_more for number in each]
        found.append(Block(tuple(numbers), f"{len(numbers)} more layers", 0, sum(sizes[each] for each in numbers), ()))
    return found + ([_block(outside[False], (), "after the layers", weights[False])] if outside[False] else [])


def _block(lines: Sequence[Line], layers: tuple[int, ...], title: str, nbytes: int) -> Block:
    count = sum(prod(line.shape) for line in lines if not line.computed)
    return Block(layers, title, count, nbytes, tuple(lines[:LINES]), max(len(lines) - LINES, 0))


def _stored(rows: Sequence[Held]) -> tuple[Mapping[str, str], Mapping[str, int]]:
    """Return how canonical tensors are stored, and in how many bytes."""
    kinds, nbytes = dict[str, str](), defaultdict[str, int](int)
    for row in rows:
        every = sum(row.elements.values()) or 1
        for name, elements in row.elements.items():
            if not row.beside:
                kinds.setdefault(name, row.recipe or row.dtype)
            nbytes[name] += round(row.nbytes * elements / every)
    return kinds, nbytes


def said(numbers: Sequence[int]) -> str:
    """Return which layers these are, as a person writes it.

    >>> said([3]), said([0, 1, 2, 5]), said([0, 2, 4, 6, 8, 10, 12, 14])
    ('layer 3', 'layers 0-2, 5', 'layers 0, 2, 4, 6, … 14')
    """
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    ordered, runs = sorted(numbers), list[list[int]]()
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(words) > 6:
        words = [*words[:4], f"… {words[-1]}"]
    return f"layers {', '.join(words)}"
