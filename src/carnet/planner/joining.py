"""Codes in blocks that go along as they are, joined and cut: a Hugging Face folder of FP8 becomes the files of an engine's ranks.

Codes lie as weights do. A scale is one number for a block of rows and columns, so scales lie as the weights of a smaller model would:
the same rows, folded with sizes that are divided by that of a block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.kinds import SHARDS
from carnet.dialects.rows import Dialect
from carnet.dialects.units import Unit
from carnet.errors import NotSupported
from carnet.inventory.survey import Inventory
from carnet.model.fields import Config, Value
from carnet.model.model import number
from carnet.model.tensors import STATE, Canonical
from carnet.plans.request import Request
from carnet.quantize.recipes import BY_NAME
from carnet.quantize.styles import STYLES

DENSE = ("attention.", "mlp.")  # what is joined with its scales: other programs call those of experts otherwise
SIZES = ("hidden", "head_dim", "ffn")  # of what blocks of a dense model's linear layers lie in


def is_joined(source: Inventory, target: Dialect, request: Request) -> bool:
    """Say whether codes go along under names of another program: square blocks, a scale for each, and nothing beside."""
    asked = request.dtype is not None or request.quantize is not None
    others = source.scales or any(one.others or one.outer is not None for one in source.coded.values())
    recipes = {BY_NAME[one.recipe] for one in source.coded.values()}
    square = len(recipes) == 1 and all(
        each.block[0] == each.block[1] > 1 and each.scheme not in STYLES[each.style].shapes for each in recipes
    )
    dense = all(name.tensor.part.startswith(DENSE) for key in source.coded for name in source.entries[key].names)
    return square and dense and not asked and not others and _between_folders(source, target)


def _between_folders(source: Inventory, target: Dialect) -> bool:
    """Say whether both have a config that says of codes in the same words, and other names or cuts."""
    kinds = source.dialect.kind, target.kind
    both = all(kind.companions and (kind.files == SHARDS or kind.loads_codes) for kind in kinds)
    return both and (source.dialect != target or target.ranked)


def scales_of(source: Inventory) -> Inventory:
    """Return the scales of a source as weights of a smaller model, of which other tensors have the parts' names."""
    tensors = {key: one.scales for key, one in source.coded.items() if one.scales is not None}
    config = smaller(source, source.config)
    found = {(entry.unit, entry.name): _marked(entry) for entry in entries(source.dialect, config, tensors.keys())}
    for key, stored in tensors.items():
        if key not in found or found[key].stored != stored.shape:
            raise _undivided(source, key[1])
    return replace(source, checkpoint=replace(source.checkpoint, tensors=tensors), config=config, entries=found, coded={})


def smaller(source: Inventory, config: Config) -> dict[str, Value]:
    """Return the fields of a model whose sizes are divided by that of a block."""
    key, one = next(iter(source.coded.items()))
    block = BY_NAME[one.recipe].block[0]
    if any(number(config, name) % block for name in SIZES):
        raise _undivided(source, key[1])
    return {**config, **{name: number(config, name) // block for name in SIZES}}


def joined_scales(
    source: Inventory, target: Dialect, config: Config, spelling: str, among: Sequence[Unit] | None
) -> Iterator[Entry]:
    """Yield the scales of a target, each beside the codes whose name it has."""
    coded = {name for key in source.coded for name in source.entries[key].names}
    style = STYLES[BY_NAME[next(iter(source.coded.values())).recipe].style]
    for entry in entries(target, smaller(source, config), None, spelling, among, coded=True):
        if coded.issuperset(entry.names):
            yield replace(_marked(entry), name=entry.name.removesuffix(style.weight) + style.scales)


def shapes_of(scales: Inventory, shapes: Mapping[Canonical, tuple[int, ...]]) -> dict[Canonical, tuple[int, ...]]:
    """Return the shapes of scales under their names, from those of the smaller model."""
    there = {name for entry in scales.entries.values() for name in entry.names}
    return {mark: shape for name, shape in shapes.items() if (mark := _mark(name)) in there}


def _marked(entry: Entry) -> Entry:
    return replace(entry, tensors=tuple(tuple(_mark(name) for name in names) for names in entry.tensors))


def _mark(name: Canonical) -> Canonical:
    return Canonical(replace(name.tensor, part=f"{name.tensor.part} scales", role=STATE), name.layer)


def _undivided(source: Inventory, name: str) -> NotSupported:
    sizes = {each: number(source.config, each) for each in SIZES}
    facts = {"tensor": name, **sizes, "because": "a block of its codes would not be whole on a rank, or lies in two heads"}
    return NotSupported("codes in these blocks cannot be joined and cut", facts, remedy="--dtype bf16 dequantizes them")
