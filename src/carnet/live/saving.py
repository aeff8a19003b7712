"""Files that ranks write together: what the crossing of files would have written, without a checkpoint between.

The target is laid out as ever. A tensor goes to one rank, which writes it into its place; the target appears when all have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from secrets import token_hex

import torch

from carnet.dtypes import BY_NAME
from carnet.executor import staging
from carnet.live.checking import flat_bytes
from carnet.live.moves import Spot
from carnet.plans.columns import Plan
from carnet.steps import TargetTensor
from carnet.storage.protocol import Crossing, Draft, Opened, Target
from carnet.storage.schemes import folder_at


class Writers:
    """Who writes what: every tensor has one rank."""

    def __init__(self, plan: Plan, holders: Callable[[str], Sequence[int]]) -> None:
        """Give each file to its ranks; one that several hold is shared by bytes among them, neighbours together."""
        self._rank: dict[tuple[str, str], int] = {}
        self.tensors: dict[int, dict[str, tuple[str, TargetTensor]]] = {}
        total = sum(_nbytes(tensor) for file in plan.files for tensor in file.tensors) or 1
        done = 0
        for file in plan.files:
            ranks = holders(file.name)
            for tensor in file.tensors:
                rank = ranks[done * len(ranks) // total]
                done += _nbytes(tensor)
                self._rank[file.name, tensor.name] = rank
                self.tensors.setdefault(rank, {})[tensor.name] = file.name, tensor

    def of(self, spot: Spot) -> list[int]:
        """Return who writes the tensor at a spot."""
        return [self._rank[spot.file, spot.name]]


def _nbytes(tensor: TargetTensor) -> int:
    return prod(tensor.shape) * BY_NAME[tensor.dtype].nbytes


@contextmanager
def begun(plan: Plan, out: Path) -> Iterator[Draft]:
    """Own the folder beside the target, with every file in its full size; remove it where the target does not come about."""
    # nobody goes on where such a save stopped: its crossing comes never again
    with staging.owned(plan, Crossing(f"live {token_hex(8)}"), None, out) as held:
        try:
            staging.prepare(plan, held)
            yield held
        except BaseException:
            held.discard()
            raise


def opened(out: Path) -> Opened[Target]:
    """Return the files of a target that the leader owns."""
    return Opened(folder_at(out).joined())


def write(target: Target, place: TargetTensor, tensor: torch.Tensor) -> None:
    """Write one tensor into its place."""
    target.write(place.offset, flat_bytes(tensor.detach()).cpu().numpy().data)


def end(plan: Plan, held: Draft) -> None:
    """Write the small files, bring all to the disk, and put the target in place."""
    staging.put_texts(plan, held)
    for name in staging.written(plan):
        held.flush(name)
    held.publish()
