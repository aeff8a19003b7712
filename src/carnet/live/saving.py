"""Files that ranks write together: what the crossing of files would have written, without a checkpoint between.

The target is laid out as ever. A tensor goes to one rank, which writes it into its place; the target appears when all have.
"""

from collections.abc import Callable, Sequence
from math import prod
from os import O_WRONLY
from pathlib import Path

import torch

from carnet.dtypes import BY_NAME
from carnet.errors import BadRequest
from carnet.executor import files, staging
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


def begin(plan: Plan, out: Path) -> Path:
    """Make the folder beside the target, with every file in its full size; raise CarnetError where it may not be."""
    staging.refuse_taken(out)
    folder = staging.staging_of(out)
    if folder.exists():
        raise BadRequest(f"{folder} exists", remedy="remove it, or choose another target")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise files.explained(error, str(folder)) from error
    staging.refuse_full(plan, folder)
    for file in plan.files:
        staging.create(file, folder)
    return folder


def write(folder: files.Folder, file: str, place: TargetTensor, tensor: torch.Tensor) -> None:
    """Write one tensor into its place."""
    data = flat_bytes(tensor.detach()).cpu().numpy()
    files.write(files.opened(folder, file), place.offset, data.data)


def opened(out: Path) -> files.Folder:
    """Return the folder in which the files of a target are written."""
    return files.Folder(staging.staging_of(out), O_WRONLY)


def end(plan: Plan, out: Path) -> None:
    """Write the small files, bring all to the disk, and put the target in place."""
    folder = staging.staging_of(out)
    for text in sorted(plan.texts, key=lambda text: text.name == "config.json"):
        staging.write_text(text.name, text.text, folder)
    for path in staging.written(plan, folder):
        staging.flush(path)
    staging.publish(folder, out)


def abandon(out: Path) -> None:
    """Remove what was begun."""
    folder = staging.staging_of(out)
    if folder.is_dir():
        staging.remove(folder)
