"""What a rank copies in a round: box by box on a processor, all boxes of a kind in one launch on a GPU."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from carnet.live.batches import WIDE, WORDS, Batch, Job, batch, is_even, pairs
from carnet.live.checking import joined
from carnet.live.encoding import Coder
from carnet.live.landing import Parts
from carnet.live.moves import Transfer
from carnet.quantize.recipes import Recipe

Act = Callable[[], object]
Kind = tuple[Recipe, str] | None  # which part of coding; None for bits as they are
ON_GPUS = "fp8", "mxfp8", "nvfp4"  # schemes with a kernel, for weights in bf16; what has none is coded on the processor


@dataclass(frozen=True, slots=True)
class Copy:
    """What one move brings to one place of memory."""

    out: torch.Tensor
    parts: Sequence[tuple[tuple[slice, ...], torch.Tensor]]  # what is read: one view, or several that make up the box
    move: Transfer | None  # what is made of it; None for bits as they are

    @property
    def is_plain(self) -> bool:
        """Say whether bits stay as they are."""
        move = self.move
        return move is None or not (move.coded or move.add or move.function or self.out.dtype != self.parts[0][1].dtype)


def reads(out: torch.Tensor, move: Transfer, parts: Parts) -> list[Copy]:
    """Return what brings the parts of a box to their place; rows of blocks stay whole."""
    if move.in_blocks:
        return [Copy(out, list(parts), move)]
    return [Copy(out[inside], [((), view)], move) for inside, view in parts]


def acts(copies: Sequence[Copy], coder: Coder) -> list[Act]:
    """Return the fewest acts that do some copies."""
    groups: dict[Kind, list[tuple[Job, Copy]]] = defaultdict(list)
    made: list[Act] = []
    for copy in copies:
        found = _job(copy, coder)
        if found is None:
            made.append(partial(_do, copy, coder))
        else:
            groups[found[0]].append((found[1], copy))
    for kind, many in groups.items():
        one, left = batch((job for job, _ in many), WORDS if kind is None else WIDE)
        made += [partial(_launch, kind, one, coder)] if one is not None else []
        made += [partial(_do, many[number][1], coder) for number in left]
    return made


def _do(copy: Copy, coder: Coder) -> None:
    view = copy.parts[0][1] if copy.move is None or len(copy.parts) == 1 else joined(copy.move.box, copy.parts)
    copy.out.copy_(view if copy.move is None else coder.dress(copy.move, view))


def _job(copy: Copy, coder: Coder) -> tuple[Kind, Job] | None:
    """Return how a GPU does it among others, None where it is done alone."""
    view, out = copy.parts[0][1], copy.out
    if len(copy.parts) > 1 or not (view.is_cuda and out.is_cuda):
        return None
    if copy.is_plain:
        return (None, Job(view.view(torch.int64), out.view(torch.int64))) if is_even(view, 8) and is_even(out, 8) else None
    coded = None if copy.move is None else copy.move.coded
    if coded is None or coded.recipe.scheme not in ON_GPUS:
        return None
    number, own = coder.matrices[coded.matrix]
    rows = view.flatten(out.dim() - 1)  # in other memory where its columns are no neighbours
    found = pairs(rows)
    eight = coded.part == "codes" and not coded.recipe.packing  # two codes for two weights
    if own != "bf16" or rows.data_ptr() != view.data_ptr() or found is None or (eight and not is_even(out, 2)):
        return None
    return (coded.recipe, coded.part), Job(found, out.view(torch.int16) if eight else out, number)


def _launch(kind: Kind, one: Batch, coder: Coder) -> None:
    from carnet.live import kernels

    if kind is None:
        kernels.copy(one)
    else:
        kernels.code(one, *kind, coder.numbers)
