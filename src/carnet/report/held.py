"""What one side of a crossing holds, as rows: a stored tensor each, with its bytes in every file and what they are of.

The rows come from an inventory, whose headers were read, or from the document that a crossing left, which knows no files.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from carnet.algebra.box import Box, intersect, subtract, volume, whole
from carnet.api import Inspection
from carnet.dtypes import BY_NAME
from carnet.examiner.unfold import share_box
from carnet.formats.stored import Stored, label_of
from carnet.inventory.survey import Inventory
from carnet.model.model import canonical_shapes

if TYPE_CHECKING:
    from carnet.model.tensors import Canonical


@dataclass(frozen=True, slots=True)
class Held:
    """One stored tensor."""

    label: str
    elements: Mapping[str, int]  # canonical tensor -> how many of its elements; of scales those of their weights
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    files: Mapping[str, int]  # file -> bytes; of a document the rank, or "" alone
    recipe: str = ""  # of codes and their scales
    beside: str = ""  # what it is beside the codes: "scales"
    padding: int = 0  # bytes that hold no weight
    again: int = 0  # bytes that another one holds, too: of a tied or a repeated tensor
    left: str = ""  # why it is left behind
    computed: bool = False  # no model has it by itself


def held_by(found: Inspection) -> list[Held]:
    """Return the rows of a checkpoint; where it is not understood, they are of nothing that is known."""
    inventory, tensors = found.inventory, found.checkpoint.tensors
    if inventory is None:
        return [_row(stored, {}) for stored in tensors.values()]
    rows = list[Held]()
    again = _again(inventory)
    for key, entry in inventory.entries.items():
        elements: dict[str, int] = defaultdict(int)
        for name, view in zip(entry.names, entry.like.views, strict=True):
            elements[str(name)] += volume(view.box)
        first, *scales = inventory.stored(key)
        coded = inventory.coded.get(key)
        padded = sum(map(volume, entry.padding)) / max(prod(entry.shape), 1)
        row = _row(first, elements, "" if coded is None else coded.recipe)
        copied = again.get(label_of(key), 0) / max(sum(elements.values()), 1)
        row = replace(
            row,
            padding=round(row.nbytes * padded),
            again=round((row.nbytes - round(row.nbytes * padded)) * copied),
            computed=any(name.tensor.function for name in entry.names),
        )
        rows += [row, *(replace(_row(each, elements, row.recipe), beside="scales") for each in scales)]
    rows += [replace(_row(each, {}), beside="scales") for each in inventory.scales.values()]
    reasons = {name: reason for reason, names in inventory.dropped.items() for name in names}
    known = {row.label for row in rows}
    for key, stored in tensors.items():
        label = label_of(key)
        if label not in known:
            rows.append(replace(_row(stored, {}), left=reasons.get(label, reasons.get(key[1], "not understood"))))
    objects = (
        Held(name, {}, "", (), nbytes, {"": nbytes}, left=reasons.get(name, "pickled state"))
        for name, nbytes in found.checkpoint.objects.items()
    )
    return [*rows, *objects]


def _row(stored: Stored, elements: Mapping[str, int], recipe: str = "") -> Held:
    item, files = BY_NAME[stored.dtype].nbytes, dict[str, int]()
    for chunk in stored.chunks:
        files[chunk.file] = files.get(chunk.file, 0) + volume(chunk.box) * item
    return Held(stored.label, elements, stored.dtype, stored.shape, stored.nbytes, files or {"": stored.nbytes}, recipe)


def _again(inventory: Inventory) -> dict[str, int]:
    """Return of stored tensors how many of their elements one before them holds: label -> elements."""
    shapes = canonical_shapes(inventory.config, inventory.dialect.parts)
    boxes: dict[Canonical, list[tuple[str, Box]]] = defaultdict(list)
    for key, entry in inventory.entries.items():
        for held_names in entry.tensors:
            for part, each in zip(entry.reading.parts, held_names, strict=True):
                boxes[each].append((label_of(key), share_box(part, entry.reading.shares)))
    found: dict[str, int] = defaultdict(int)
    for name, held in boxes.items():
        if sum(volume(box) for _, box in held) > prod(shapes.get(name, ())):
            left = [whole(shapes[name])] if name in shapes else []
            for label, box in held:
                new = sum(volume(shared) for part in left if (shared := intersect(part, box)) is not None)
                found[label] += volume(box) - new
                left = [piece for part in left for piece in subtract(part, box)]
    return found


SCALES = "scales of "  # before a name: what a document says of what stands beside codes
LAYOUT = re.compile(r"(?P<name>[^ ,()]+)(?: \([^()]*\))?")


def held_in(side: object) -> list[Held]:
    """Return the rows of one side of a document; what it does not say is not there."""
    said = side.get("tensors") if isinstance(side, Mapping) else None
    rows, coded = list[Held](), set[str]()
    for label, facts in said.items() if isinstance(said, Mapping) else ():
        if not isinstance(facts, Mapping):
            continue
        dtype, shape, layout = str(facts.get("dtype")), facts.get("shape"), str(facts.get("layout"))
        lengths = tuple(int(each) for each in shape if isinstance(each, int)) if isinstance(shape, list) else ()
        count = prod(lengths)
        nbytes = count * BY_NAME[dtype].nbytes if dtype in BY_NAME else 0
        names = names_of(layout)
        coded |= {layout.removeprefix(SCALES)} if layout.startswith(SCALES) else set()
        rows.append(
            Held(
                str(label),
                dict.fromkeys(names, count // max(len(names), 1)),
                dtype,
                lengths,
                nbytes,
                {_unit(str(label)): nbytes},
                beside="" if names else "scales" if layout.startswith((SCALES, "beside codes")) else "",
                left="" if names or layout.startswith((SCALES, "beside codes")) else layout,
            )
        )
    return [replace(row, recipe="codes") if row.label.removeprefix(f"{_unit(row.label)}/") in coded else row for row in rows]


def _unit(label: str) -> str:
    return label.split("/", 1)[0] if re.match(r"rank\d+/", label) else ""


def names_of(layout: str) -> list[str]:
    """Return the canonical tensors that a layout names.

    >>> names_of("(kv *) hidden: layers.0.attention.q (rep dim), layers.0.attention.k (dim)"), names_of("scales of model.w")
    (['layers.0.attention.q', 'layers.0.attention.k'], [])
    """
    _, said, names = layout.partition(": ")
    return [found["name"] for found in LAYOUT.finditer(names)] if said else []


def total(rows: Iterable[Held]) -> int:
    """Return the bytes of rows."""
    return sum(row.nbytes for row in rows)
