"""Tables shared by rows. A vocabulary's rows change hands: out of the padded cut that a training has into the cut of the true one.

::

    padded, 2 x 6    | 0 1 2 3 4 5 | 6 7 8 9 . . |
    true, 2 x 5      | 0 1 2 3 4 | 5 6 7 8 9 |          row 5 moves, all others stay where they are

Every rank computes from the numbers alone what it sends and receives. Megatron's export sums a table of zeros over all ranks instead.
"""

import torch
import torch.distributed as dist

from carnet.algebra.layout import Share, cut_evenly, cut_padded, round_up
from carnet.errors import BadCheckpoint


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the next multiple of the ranks: rows of the vocabulary that they share evenly.

    >>> pad_vocab_size(97, 2), pad_vocab_size(98, 2)
    (98, 98)
    """
    return round_up(vocab_size, tp_size)


def padded(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a table with so many rows, zeros after its own."""
    return table if len(table) == rows else torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])])


def part(table: torch.Tensor, world: int, rank: int) -> torch.Tensor:
    """Return a rank's rows of a table, all ranks having as many: zeros where they reach past it."""
    share = cut_padded(len(table), world, rank)
    return padded(table[share.start :][: share.held], share.stop - share.start).contiguous()


def reshare(held: torch.Tensor, size: int, *, world: int, rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's rows of a vocabulary of ``size``, which the ``world`` ranks of a group hold as equal parts of a padded one.

    Shapes: [padded / ranks, hidden] -> [ceil(size / ranks), hidden], zeros where the last shares reach past the vocabulary. Every rank
    of the group has to call it. Raises BadCheckpoint where the ranks hold fewer rows than ``size``.
    """
    rows = len(held)
    if rows * world < size:
        facts = {"expected": f"at least {size} rows", "found": f"{rows} on each of {world} ranks"}
        raise BadCheckpoint("the vocabulary is larger than the embedding", facts)
    has = [cut_evenly("vocab", rows * world, world, each) for each in range(world)]
    wants = [cut_padded(size, world, each) for each in range(world)]
    sends, gets = [_shared(has[rank], each) for each in wants], [_shared(each, wants[rank]) for each in has]
    # both sides in the order of the rows: what leaves is the beginning of what is here, what comes that of what is made
    made = held.new_zeros(wants[rank].stop - wants[rank].start, *held.shape[1:])
    dist.all_to_all_single(made[: sum(gets)], held[: sum(sends)].contiguous(), gets, sends, group=group)
    return made


def _shared(has: Share, wants: Share) -> int:
    """Count the true rows that are in both."""
    return max(0, min(has.stop, wants.start + wants.held) - max(has.start, wants.start))
