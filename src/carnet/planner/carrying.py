"""Codes that go along as they are: a Hugging Face folder becomes another one, and nobody asks for other numbers.

Their tensors are moved as bytes under the names that they have; what the config says of them goes along, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from carnet.dialects.entry import Entry
from carnet.dialects.rows import Dialect
from carnet.errors import NotSupported
from carnet.formats.stored import Chunk, Key, Stored, dense_strides, label_of
from carnet.inventory.survey import Inventory
from carnet.planner.choosing import Coded
from carnet.planner.coding import Laid
from carnet.planner.decoding import TO_BF16, only_chunk
from carnet.planner.touches import Extent, Named
from carnet.plans.columns import Gathered
from carnet.plans.request import Request
from carnet.quantize.configs import BESIDE
from carnet.quantize.styles import Kept
from carnet.steps import Move, Place


def is_carried(source: Inventory, target: Dialect, request: Request) -> bool:
    """Say whether the codes of a source go along as they are, which they cannot where adapters change what they mean."""
    asked = request.dtype is not None or request.quantize is not None or bool(source.changes.of)
    same = source.dialect == target and not target.ranked
    return bool(source.coded) and same and target.kind.companions and not asked


def carried(source: Inventory, wanted: Sequence[Entry]) -> dict[Key, Coded]:
    """Return the coded entries of a source, with all that stands beside them; refuse a name that the target does not have."""
    lost = source.coded.keys() - {(entry.unit, entry.name) for entry in wanted}
    if lost:
        facts = {"tensor": label_of(min(lost)), "others": len(lost) - 1}
        what = "codes of a weight that has another name in the target cannot go along as they are"
        raise NotSupported(what, facts, remedy=f"name the type that weights are to be dequantized to: {TO_BF16}")
    held = {key: [*source.stored(key), *one.others] for key, one in source.coded.items()}
    beside = {(each.unit, each.name) for parts in held.values() for each in parts}
    first = next(iter(held))
    held[first] += [stored for key, stored in source.scales.items() if key not in beside]  # of the cache
    return {
        key: Coded(source.entries[key], "", "", tuple(_kept(source, part) for part in parts)) for key, parts in held.items()
    }


def _kept(source: Inventory, part: Stored) -> Kept:
    stored = source.checkpoint.tensors[part.unit, part.name]  # in the shape that it has there
    return Kept("carried", stored.name, stored.dtype, stored.shape)


def _stored(source: Inventory, coded: Mapping[Key, Coded]) -> Iterator[tuple[Stored, Chunk]]:
    for (unit, _), one in coded.items():
        for each in one.kept:
            stored = source.checkpoint.tensors[unit, each.name]
            yield stored, only_chunk(stored, str(source.checkpoint.root))


def extents(source: Inventory, coded: Mapping[Key, Coded]) -> Iterator[Named]:
    """Yield what must be used up of the source."""
    for stored, chunk in _stored(source, coded):
        form = Extent("", "", 0, stored.shape, dense_strides(stored.shape), stored.dtype, ())
        yield stored.label, form, chunk.file, chunk.offset


def move(source: Inventory, coded: Mapping[Key, Coded], laid: Laid, gathered: Gathered) -> None:
    """Gather the steps that move what is carried; ``laid`` is where it comes to lie."""
    places = (place for key in coded for place in laid[key])
    for (stored, chunk), (file, tensor) in zip(_stored(source, coded), places, strict=True):
        strides = dense_strides(stored.shape)
        here = Place(chunk.file, chunk.offset, strides, stored.dtype)
        gathered.add(
            Move(stored.name, (0,) * len(strides), stored.shape, here, replace(here, file=file.name, offset=tensor.offset))
        )


def records(source: Inventory) -> dict[str, object]:
    """Return what the config of a source says of its codes, and hf_quant_config.json, under the names of their places."""
    keys = (source.dialect.kind.codes_key, BESIDE)
    return {key: source.checkpoint.config[key] for key in keys if source.checkpoint.config.get(key) is not None}
