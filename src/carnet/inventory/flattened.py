"""An optimizer's state in intervals of each rank's own part of a weight, ``fully_sharded_model_space``: megatron-core before 0.14.

::

    weight (512, 32), a rank has 256 rows    a plane of it (2, 1, 8192): which part along each axis, and its elements one after another

That is what _reformulate_global_shape in dist_checkpointing/strategies/resharding.py makes of parts that are flattened.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import prod

from carnet.algebra.box import Box
from carnet.dialects.planes import STATE, is_of_plane
from carnet.errors import BadCheckpoint
from carnet.formats.stored import Chunk, Key, Stored, run_in_box

FORM = "fully_sharded_model_space"


def are_flattened(tensors: Mapping[Key, Stored]) -> bool:
    """Say whether planes lie so."""
    return any(is_of_plane(key[1]) and _is_flattened(stored, tensors.get(_weight(key))) for key, stored in tensors.items())


def as_weights_lie(tensors: Mapping[Key, Stored]) -> dict[Key, Stored]:
    """Return tensors, each plane that lies so in the shape of its weight."""
    weights = {key: tensors.get(_weight(key)) if is_of_plane(key[1]) else None for key in tensors}
    return {
        key: _unflattened(stored, weight) if weight is not None and _is_flattened(stored, weight) else stored
        for (key, stored), weight in zip(tensors.items(), weights.values(), strict=True)
    }


def _weight(plane: Key) -> Key:
    return plane[0], plane[1].removeprefix(STATE).partition(".")[2]


def _is_flattened(stored: Stored, weight: Stored | None) -> bool:
    return weight is not None and len(stored.shape) == len(weight.shape) + 1


def _unflattened(stored: Stored, weight: Stored) -> Stored:
    *grid, size = stored.shape
    part = tuple(length // parts for length, parts in zip(weight.shape, grid, strict=True))
    if prod(part) != size or any(length % parts for length, parts in zip(weight.shape, grid, strict=True)):
        facts = {"tensor": stored.name, "shape": list(stored.shape), "weight": list(weight.shape)}
        raise BadCheckpoint("the parts of an optimizer's tensor do not make up its weight", facts)
    cells = defaultdict[tuple[int, ...], list[Chunk]](list)
    for chunk in stored.chunks:
        *before, low = chunk.box.start
        cells[tuple(before)].append(Chunk(Box((low,), chunk.box.shape[-1:]), chunk.file, chunk.offset, chunk.strides[-1:]))
    found = list[Chunk]()
    for cell, chunks in cells.items():
        box = Box(tuple(at * length for at, length in zip(cell, part, strict=True)), part)
        found += run_in_box(Stored("", stored.name, stored.dtype, (size,), tuple(chunks)), 0, box)
    found.sort(key=lambda chunk: chunk.box.start)
    return Stored(stored.unit, stored.name, stored.dtype, weight.shape, tuple(found))
