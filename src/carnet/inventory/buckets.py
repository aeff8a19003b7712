"""An optimizer's state in buckets, ``dp_reshardable``: each rank's parameters one after another, as tensors of the weights' shapes.

::

    bucket 0   | output_layer.weight of rank 0 | ... | decoder.layers.3...weight | ...     each begins at a multiple of 64 elements

Where a parameter lies follows from the order of the modules (``megatron/order.py``) and from the sizes of the buckets. That it is
right is seen: parameters begin where chunks do, and master weights are the weights, once they are rounded.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from carnet.algebra.box import Box
from carnet.dialects.entry import Entry
from carnet.dialects.megatron.order import Order, orders
from carnet.dialects.megatron.ranks import Pipeline, Ranks, boxes, placed
from carnet.dialects.planes import MASTER, STATE
from carnet.dtypes import BY_NAME, array_type
from carnet.errors import NotSupported
from carnet.formats.stored import Checkpoint, Chunk, Key, Stored, run_in_box
from carnet.model.fields import Config
from carnet.model.model import further, number, value
from carnet.model.tensors import Canonical
from carnet.storage.protocol import read_at

BUCKET = re.compile(
    r"(?:chained_(?P<chained>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)"
    r"\.dtype_\(torch\.(?P<dtype>\w+), .*\)\.bucket_idx_(?P<bucket>\d+)\.(?P<plane>\w+)"
)
ALIGNED = 64  # elements: _pad_start_of_param_if_needed in megatron/core/distributed/param_and_grad_buffer.py
LOOKED_AT = 4096  # boxes whose ends are compared with the weights
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LAYOUT = 10_000  # letters
UNLIKE = "the buckets of the optimizer's state are not those of these parameters"
LEAVE = "leave out --with optimizer"
REMEDY = f"save with --dist-ckpt-optim-fully-reshardable, or {LEAVE}"


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a rank holds of a stored tensor: the parameter of one module."""

    entry: Entry | None  # None for a copy of what another stage has
    name: str
    turn: int  # the virtual stage of its rank that it is in
    layer: int
    expert: int
    boxes: Sequence[Box]  # one after another

    @property
    def size(self) -> int:
        """Return how many elements it has."""
        return sum(prod(box.shape) for box in self.boxes)


Buckets = Mapping[int, Mapping[str, Stored]]  # number -> plane -> what is stored
Stages = Mapping[int | str, tuple[int, int]]  # layer, first or last -> rank, and which of its virtual stages


def in_buckets(name: str) -> str:
    """Return the plane that a stored tensor is a bucket of, "" where it is none."""
    found = BUCKET.fullmatch(name)
    return "" if found is None else found["plane"]


def unfolded(checkpoint: Checkpoint, weights: Sequence[Entry], config: Config) -> dict[Key, Stored]:
    """Return the planes of some weights as tensors of their shapes; raise NotSupported where buckets do not say them."""
    ranks, pipeline = _ranks(checkpoint)
    stages = placed(config, pipeline)
    if not stages:
        raise _unlike(checkpoint, "the layers are not shared evenly among the stages")
    held = _held(weights, config, ranks, stages)
    buffers = _buffers(checkpoint)
    if {where[:2] for where in buffers} != held.keys():
        raise _unlike(checkpoint, f"buffers of {len(buffers)} groups of ranks, parameters of {len(held)}")
    wrong = NotSupported(UNLIKE, {"where": checkpoint.root}, remedy=REMEDY)
    for order in orders():
        try:
            found = _unfolded(checkpoint, held, buffers, order)
            _check(checkpoint, weights, found)
        except NotSupported as error:
            wrong = error
        else:
            return found
    raise wrong


def _ranks(checkpoint: Checkpoint) -> tuple[Ranks, Pipeline]:
    """Return how the ranks of a run shared its model, as its arguments say; refuse what is told otherwise than by numbers."""
    said = checkpoint.config
    tp, pp, ep, vpp = (
        _count(said.get(f"{name}_model_parallel_size")) for name in ("tensor", "pipeline", "expert", "virtual_pipeline")
    )
    etp = _count(said.get("expert_tensor_parallel_size")) if said.get("expert_tensor_parallel_size") else tp
    layout = said.get("pipeline_model_parallel_layout") or ""
    if not isinstance(layout, str) or len(layout) > LAYOUT:
        raise _unlike(checkpoint, "pipeline_model_parallel_layout is no text")
    ends = (said.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
    first, last = (layers if isinstance(layers, int) else None for layers in ends)
    embedding, loss = (bool(said.get(f"account_for_{what}_in_pipeline_split")) for what in ("embedding", "loss"))
    return Ranks(tp, pp, ep, etp), Pipeline(pp, vpp if pp > 1 else 1, first, last, embedding, loss, layout)


def _count(said: object) -> int:
    return said if isinstance(said, int) and said > 0 else 1


def _unlike(checkpoint: Checkpoint, reason: str) -> NotSupported:
    return NotSupported(UNLIKE, {"where": checkpoint.root, "reason": reason}, remedy=REMEDY)


Place = tuple[int, int]  # 1 for what experts have of their own, where ranks share them; which rank
Buffer = tuple[int, int, str]  # the same, and the element type


def _held(weights: Sequence[Entry], config: Config, ranks: Ranks, stages: Stages) -> dict[Place, list[Parameter]]:
    """Return the parameters of each rank, in no order; those of experts that ranks share are an optimizer's of their own."""
    found = defaultdict[Place, list[Parameter]](list)
    for entry in weights:
        if not entry.names[0].trained:
            continue
        alone = ranks.ep > 1 and "expert" in entry.reading.shares and entry.reading.cut == "expert"
        parts = defaultdict[tuple[int, int, int, int], list[Box]](list)  # rank, its virtual stage, layer, expert
        for box, at in boxes(entry, ranks):
            name = entry.reading.tensors[at.get("layer", 0)][0]
            stage, turn = stages[_stage(name, config)]
            expert = next((box.start[dim] for dim, axes in enumerate(entry.reading.pattern.dims) if axes[:1] == ("expert",)), 0)
            expert = expert if entry.reading.cut == "expert" else 0
            for tp in [at["tp"]] if "tp" in at else range(ranks.etp if alone else ranks.tp):
                rank = tp + ranks.etp * (at.get("ep", 0) + ranks.ep * stage) if alone else tp + ranks.tp * stage
                parts[rank, turn, -1 if name.layer is None else name.layer, expert].append(box)
        for (rank, turn, layer, expert), held in parts.items():
            found[int(alone), rank].append(Parameter(entry, entry.name, turn, layer, expert, held))
        for copied, (stage, turn) in _copies(config, stages) if entry.names[0] == "embed" else ():
            for (rank, *_), held in parts.items():
                found[0, rank + ranks.tp * stage].append(Parameter(None, copied, turn, -1, 0, held))
    return dict(found)


def _stage(name: Canonical, config: Config) -> int | str:
    """Return by what a stage is known that has a tensor; the norm after all layers follows the last, where others come after it."""
    if name.layer is None and name.tensor.part.startswith("final_norm") and number(config, "mtp"):
        return number(config, "layers") - 1
    return name.tensor.stage if name.layer is None else name.layer


def _copies(config: Config, stages: Stages) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield what other stages call their copies of the embedding: a tied head, and what layers for further tokens read."""
    beyond = further(config)[:1]
    for name, where in ((HEAD, ["last"] if value(config, "tied") else []), (EMBEDDING, beyond)):
        yield from ((name, stages[at]) for at in where if stages[at] != stages["first"])


def _buffers(checkpoint: Checkpoint) -> dict[Buffer, list[Buckets]]:
    """Return the buckets of the buffers of each type, one for each virtual stage that has any: number -> plane -> what is stored."""
    found = defaultdict[Buffer, dict[int, dict[int, dict[str, Stored]]]](lambda: defaultdict(lambda: defaultdict(dict)))
    for (_, name), stored in checkpoint.tensors.items():
        said = BUCKET.fullmatch(name)
        if said is not None:
            buffer = int(said["chained"] or 0), int(said["group"]), said["dtype"]
            found[buffer][int(said["buffer"])][int(said["bucket"])][said["plane"]] = stored
    return {buffer: [numbered[at] for at in sorted(numbered)] for buffer, numbered in found.items()}


def _unfolded(
    checkpoint: Checkpoint, held: Mapping[Place, Sequence[Parameter]], buffers: Mapping[Buffer, Sequence[Buckets]], order: Order
) -> dict[Key, Stored]:
    """Return the planes of all weights, if parameters are in an order."""
    chunks = defaultdict[tuple[str, str], list[Chunk]](list)
    entries, seen = dict[str, Entry](), set[tuple[str, Box]]()
    for own, buckets in _paired(checkpoint, held, buffers):
        ordered = [(order.place(each.name, each.layer, each.expert), each) for each in own]
        if unknown := [each for place, each in ordered if place is None]:
            raise _unlike(checkpoint, f"nobody says where {unknown[0].name} stands among the parameters")
        ordered.sort(key=lambda pair: pair[0] or (), reverse=True)
        for parameter, bucket, start in _walk(checkpoint, [each for _, each in ordered], buckets):
            entry, offset = parameter.entry, start
            for box in parameter.boxes if entry is not None else ():
                if entry is not None and (entry.name, box) not in seen:  # of what all ranks have the first one's counts
                    entries[entry.name] = entry
                    for plane, stored in buckets[bucket].items():
                        chunks[plane, entry.name] += run_in_box(stored, offset, box)
                offset += prod(box.shape)
            seen |= {(parameter.name, box) for box in parameter.boxes if entry is not None}
    found = dict[Key, Stored]()
    for (plane, name), those in chunks.items():
        stored = Stored("", f"{STATE}{plane}.{name}", "f32", entries[name].stored, tuple(sorted(those, key=_start)))
        found["", stored.name] = stored
    return found


def _paired(
    checkpoint: Checkpoint, held: Mapping[Place, Sequence[Parameter]], buffers: Mapping[Buffer, Sequence[Buckets]]
) -> Iterator[tuple[list[Parameter], Buckets]]:
    """Yield the parameters that lie in each buffer: those of a type, in one virtual stage of a rank."""
    for (chained, group, dtype), each in sorted(buffers.items(), key=lambda pair: pair[0]):
        those = [parameter for parameter in held[chained, group] if _dtype(checkpoint, parameter) == dtype]
        turns = sorted({parameter.turn for parameter in those})
        if len(turns) != len(each):
            raise _unlike(checkpoint, f"{len(each)} buffers of a rank, parameters of {len(turns)} stages")
        for turn, buckets in zip(turns, each, strict=True):
            yield [parameter for parameter in those if parameter.turn == turn], buckets


def _start(chunk: Chunk) -> tuple[int, ...]:
    return chunk.box.start


def _dtype(checkpoint: Checkpoint, parameter: Parameter) -> str:
    key = ("", EMBEDDING if parameter.entry is None else parameter.name)
    return BY_NAME[checkpoint.tensors[key].dtype].torch


def _walk(checkpoint: Checkpoint, ordered: Sequence[Parameter], buckets: Buckets) -> Iterator[tuple[Parameter, int, int]]:
    """Yield each parameter with its bucket and where it begins there."""
    sizes = [next(iter(buckets[number].values())).shape[0] for number in sorted(buckets)]
    cuts = [
        {edge for chunk in next(iter(buckets[number].values())).chunks for edge in _edges(chunk)} for number in sorted(buckets)
    ]
    bucket, at = 0, 0
    for parameter in ordered:
        at += -at % ALIGNED
        if at + parameter.size > sizes[bucket]:
            if not at - ALIGNED < sizes[bucket] <= at or bucket + 1 == len(sizes):
                raise _unlike(checkpoint, f"{parameter.name} does not end where a bucket does")
            bucket, at = bucket + 1, 0
        if at not in cuts[bucket] or at + parameter.size not in cuts[bucket]:
            raise _unlike(checkpoint, f"{parameter.name} does not lie where chunks begin and end")
        yield parameter, sorted(buckets)[bucket], at
        at += parameter.size
    if bucket + 1 != len(sizes) or at != sizes[bucket]:
        raise _unlike(checkpoint, "the buckets hold more than the parameters")


def _edges(chunk: Chunk) -> tuple[int, int]:
    return chunk.box.start[0], chunk.box.start[0] + chunk.box.shape[0]


def _check(checkpoint: Checkpoint, weights: Sequence[Entry], found: Mapping[Key, Stored]) -> None:
    """Raise NotSupported where the ends of master weights are not those of the weights, rounded to their type."""
    pairs = [(stored, checkpoint.tensors["", entry.name]) for entry in weights if (stored := found.get(("", _master(entry))))]
    every = [(chunk, master, weight) for master, weight in pairs for chunk in master.chunks]
    for chunk, master, weight in every[:: max(1, len(every) // LOOKED_AT)]:
        last = tuple(start + length - 1 for start, length in zip(chunk.box.start, chunk.box.shape, strict=True))
        for index in (chunk.box.start, last):
            kept = np.frombuffer(_element(checkpoint, master, index), np.float32).astype(array_type(weight.dtype))
            if kept.tobytes() != _element(checkpoint, weight, index):
                raise _unlike(checkpoint, f"what should be the master weights of {weight.name} is not")


def _master(entry: Entry) -> str:
    return f"{STATE}{MASTER}.{entry.name}"


def _element(checkpoint: Checkpoint, stored: Stored, index: tuple[int, ...]) -> bytes:
    """Return the bytes of one element."""
    for chunk in stored.chunks:
        place = [at - start for at, start in zip(index, chunk.box.start, strict=True)]
        if all(0 <= at < length for at, length in zip(place, chunk.box.shape, strict=True)):
            nbytes = BY_NAME[stored.dtype].nbytes
            skip = sum(at * stride for at, stride in zip(place, chunk.strides, strict=True)) * nbytes
            return read_at(checkpoint.root.open(chunk.file), chunk.offset + skip, nbytes)
    raise _unlike(checkpoint, f"a part of {stored.name} is nowhere")
