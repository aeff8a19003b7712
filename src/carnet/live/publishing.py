"""A delta of what ranks hand over: from a version that lies in a folder to the tensors that this process holds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Unpack

import numpy as np
import torch

from carnet.deltas import Made
from carnet.deltas.making import between, check
from carnet.deltas.packing import zstd
from carnet.deltas.sides import Reader, Saying, Side, Tensor, side_of
from carnet.errors import BadRequest
from carnet.live.binding import CARNET
from carnet.live.checking import flat_bytes
from carnet.plans.options import PathLike
from carnet.plans.request import MEMORY, memory_of, threads_of
from carnet.pool import Tell
from carnet.progress import Callback, verb


@verb
def delta(
    base: PathLike,
    tensors: Mapping[str, torch.Tensor],
    out: PathLike,
    *,
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
    **saying: Unpack[Saying],
) -> Made:
    """Write what changed from a version of a model, in any layout, to the tensors that ``crossing.run`` returned on this rank.

    The crossing has to be one to ``hf`` whose tensors are whole on it. Everything else is as ``carnet.deltas.delta`` has it; the
    tensors may lie on a GPU, and must not change meanwhile. Raises BadRequest where the two are not of one model.
    """
    zstd()
    check(saying)
    return between(
        *(side_of(base, {}), held(tensors), out, memory_of({"memory": memory}), threads_of({"threads": threads})),
        progress=progress,
        **saying,
    )


def held(tensors: Mapping[str, torch.Tensor]) -> Side:
    """Return the side that some tensors are."""
    for name, tensor in tensors.items():
        if tensor.dtype not in CARNET:
            raise BadRequest(f"{name} has a type that no file holds", {"found": tensor.dtype})

    @contextmanager
    def opened(window: int, tell: Tell) -> Iterator[Reader]:  # noqa: ARG001  who reads tells
        buffer = np.empty(window, np.uint8)
        into, at = torch.from_numpy(buffer), ("", torch.empty(0, dtype=torch.uint8))

        def read(name: str, low: int, high: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
            nonlocal at
            if at[0] != name:  # the bytes of a tensor that is not dense are gathered once
                at = name, flat_bytes(tensors[name].detach())
            into[: high - low].copy_(at[1][low:high])
            return buffer[: high - low]

        yield Reader(read, lambda number: None)

    said = {name: Tensor(name, CARNET[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Side(None, {}, said, opened)
