"""Digests on both ends: what left is what arrived, and what several ranks hold is the same on all of them.

Nothing of a run is used again: each rank reads its own memory once more, the sender the weights, the receiver the target.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import xxhash

from carnet.algebra.box import Box, volume
from carnet.errors import BadCheckpoint, MachineFailed
from carnet.live.binding import Located
from carnet.live.landing import Parts
from carnet.live.moves import Transfer
from carnet.live.virtual import Source
from carnet.plans.columns import Plan
from carnet.steps import Same

WORDS = 1 << 22  # that are summed at a time
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # of a word's place
Copies = tuple[str, Box, Sequence[int]]  # a canonical tensor, a box of it, and the ranks that hold it
Digests = tuple[dict[int, int], dict[int, int], dict[int, int]]  # of what left, what came, and what is a copy, by their numbers


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, row after row."""
    dense = tensor.contiguous()  # of one element, whatever its strides: a view by bytes needs one
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def digest(tensor: torch.Tensor) -> int:
    """Return 64 bits that follow from a tensor's bytes: xxh3 on a processor, a sum of words by their places on a GPU.

    Any one word that differs is seen: it counts an odd number of times.
    """
    flat = flat_bytes(tensor)
    if not flat.is_cuda:
        return xxhash.xxh3_64_intdigest(flat.numpy().data)
    rest = -flat.numel() % 4
    words = (torch.nn.functional.pad(flat, (0, rest)) if rest else flat).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), WORDS):
        part = words[start : start + WORDS]
        place = torch.arange(start, start + part.numel(), device=flat.device)
        total += (part.long() * (place * ODD * 2 + 1)).sum()
    return int(total.item()) ^ flat.numel()


def read_again(
    rank: int,
    moves: Sequence[Transfer],
    copies: Sequence[Copies],
    read: Callable[[Transfer], torch.Tensor],
    find: Callable[[Transfer], Parts],
    located: Located,
) -> Digests:
    """Return the digests of what a rank sent (``read`` returns it), of what came to it (``find`` says where), and of its copies."""
    left = {at: digest(read(move)) for at, move in enumerate(moves) if move.sender == rank}
    came = {at: digest(joined(move.box, find(move))) for at, move in enumerate(moves) if move.receiver == rank}
    held = {at: digest(joined(box, located.find(name, box))) for at, (name, box, ranks) in enumerate(copies) if rank in ranks}
    return left, came, held


def compare(every: Mapping[int, Digests], moves: Sequence[Transfer], copies: Sequence[Copies]) -> int:
    """Compare every move at both ends, and every copy with the first, by the digests of all ranks; return how many that were.

    Raises MachineFailed where something arrived otherwise than it left, BadCheckpoint where ranks that should hold the same do not.
    """
    for at, move in enumerate(moves):
        if every[move.sender][0][at] != every[move.receiver][1][at]:
            facts = {
                "tensor": move.tensor,
                "box": str(move.box),
                "left": f"rank {move.sender}",
                "came to": f"rank {move.receiver}",
            }
            raise MachineFailed("a part of a weight arrived otherwise than it left", facts)
    for at, (name, box, ranks) in enumerate(copies):
        odd = next((rank for rank in ranks if every[rank][2][at] != every[ranks[0]][2][at]), None)
        if odd is not None:
            facts = {"tensor": name, "box": str(box), "on": f"rank {ranks[0]}", "differs on": f"rank {odd}"}
            raise BadCheckpoint("two ranks that should hold the same do not", facts)
    return len(moves) + sum(len(ranks) - 1 for _, _, ranks in copies)


def copies_of(source: Source, plan: Plan) -> Iterator[Copies]:
    """Yield the boxes that several ranks hold."""
    for key, entry in source.inventory.entries.items():
        ranks = sorted(set(source.ranks[key]))
        if len(ranks) > 1:
            yield from ((view.tensor, view.box, ranks) for view in entry.views if volume(view.box))
    for step in plan.steps.only(Same):
        ranks = sorted({source.holders(place.file, place.offset)[0] for place in (step.source, step.other)})
        yield step.tensor, Box(step.start, step.shape), ranks


def joined(box: Box, parts: Parts) -> torch.Tensor:
    """Return a box as one tensor."""
    held = list(parts)
    if len(held) == 1:
        return held[0][1]
    made = torch.empty(box.shape, dtype=held[0][1].dtype, device=held[0][1].device)
    for inside, view in held:
        made[inside] = view
    return made
