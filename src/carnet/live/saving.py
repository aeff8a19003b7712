"""Files that ranks write together: what the crossing of files would have written, without a checkpoint between.

The target is laid out as ever. A tensor goes to one rank, which writes it into its place; the target appears when all have.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from secrets import token_hex

import torch

from carnet.dtypes import BY_NAME
from carnet.errors import BadRequest
from carnet.executor import files, staging
from carnet.executor.journal import Crossing
from carnet.formats.opening import FOLDER
from carnet.live.checking import flat_bytes
from carnet.live.moves import Spot
from carnet.steps import Plan, TargetTensor


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
def begun(plan: Plan, out: Path) -> Iterator[staging.Staging]:
    """Own the folder beside the target, with every file in its full size; remove it where the target does not come about."""
    folder = staging.staging_of(out)
    if os.path.lexists(folder):
        raise BadRequest(f"{folder} exists", remedy="remove it, or choose another target")
    # nobody goes on where such a save stopped: its crossing comes never again
    with staging.owned(plan, Crossing(f"live {token_hex(8)}"), None, out) as held:
        try:
            staging.refuse_full(plan, held)
            for file in plan.files:
                staging.create(file, held)
            yield held
        except BaseException:
            staging.remove(plan, held)
            raise


def opened(out: Path) -> files.Folder:
    """Return the folder in which the files of a target are written."""
    folder = staging.staging_of(out)
    try:
        return staging.targets(os.open(folder, FOLDER), folder)
    except OSError as error:
        raise files.explained(error, str(folder)) from error


def write(folder: files.Folder, file: str, place: TargetTensor, tensor: torch.Tensor) -> None:
    """Write one tensor into its place."""
    data = flat_bytes(tensor.detach()).cpu().numpy()
    files.write(files.opened(folder, file), place.offset, data.data)


def close(folder: files.Folder) -> None:
    """Close the files of a target and its folder."""
    files.close(folder)
    assert folder.base is not None
    os.close(folder.base)


def end(plan: Plan, held: staging.Staging) -> None:
    """Write the small files, bring all to the disk, and put the target in place."""
    for text in sorted(plan.texts, key=lambda text: text.name == "config.json"):
        staging.put_file(text.name, [text.text.encode()], held)
    for name in staging.written(plan):
        staging.flush(held.base, held.folder, name)
    staging.publish(plan, held)
