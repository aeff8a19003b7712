"""Ranks agree before they move anything: what goes wrong on one of them is an error on all, and nobody waits for a rank that is gone.

For a whole job there are groups of their own, with a time limit: one that moves tensors, and one of gloo, on the processors, for
words. A group that a caller made is used for both, with the time limit that it has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from carnet.errors import BadRequest, CarnetError, MachineFailed


class Control:
    """The ranks of a crossing."""

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        """Make the groups of a job, or take a group as it is; every rank of it must be here. ``timeout`` in seconds."""
        self.ranks: Sequence[int] = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.rank, self.seconds = dist.get_rank(), timeout
        if self.rank not in self.ranks:
            raise BadRequest("this rank is not in the group", {"rank": self.rank, "group": str(self.ranks)})
        backend = dist.get_backend(group)
        self.on_gpu = "nccl" in backend
        self._talk = self.wire = group
        self._own, self._closed = group is None, False
        if self._own:
            limit = timedelta(seconds=timeout)
            with self._watched():
                self._talk = self.wire = dist.new_group(backend="gloo", timeout=limit)
                if self.on_gpu:
                    self.wire = dist.new_group(backend=backend, timeout=limit)
        self._words = self.device() if group is not None else torch.device("cpu")

    def close(self) -> None:
        """Give up the groups that were made here; every rank must."""
        self._closed = True
        made = dict.fromkeys((self.wire, self._talk)) if self._own else {}
        self._own = False
        for group in made:  # in the same order on all ranks: NCCL's wait for each other
            dist.destroy_process_group(group)

    def device(self) -> torch.device:
        """Return where buckets lie: the GPU of this rank, or main memory."""
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")

    def agree(self, refusal: Exception | None, digest: str = "") -> None:
        """Go on where no rank has a refusal and all have the same digest; raise on every rank otherwise.

        Raises the rank's own refusal, on the others one that names the first rank that refused.
        """
        if not self.any(refusal is not None or bool(digest)):
            return
        said = self.gather((None if refusal is None else _words(refusal), digest))
        if refusal is not None:
            raise refusal
        for rank, (wrong, _) in zip(self.ranks, said, strict=True):
            if wrong is not None:
                kind, what, facts = wrong
                raise kind(what, {"on": f"rank {rank}", **facts})
        odd = next((rank for rank, (_, each) in zip(self.ranks, said, strict=True) if each != said[0][1]), None)
        if odd is not None:
            facts = {"rank": odd, "differs from": f"rank {self.ranks[0]}"}
            raise BadRequest("the ranks were given different configs, grids or options", facts)

    def gather(self, value: object) -> list[Any]:
        """Return a small value of every rank."""
        found: list[Any] = [None] * len(self.ranks)
        with self._watched():
            dist.all_gather_object(found, value, group=self._talk)
        return found

    def any(self, flag: bool) -> bool:
        """Say whether a flag is set on any rank."""
        return self.each(flag)[0]

    def each(self, *flags: bool) -> list[bool]:
        """Say of each flag whether it is set on any rank."""
        if self._closed:
            raise BadRequest("the crossing is closed", remedy="plan another")
        said = torch.tensor(flags, dtype=torch.uint8, device=self._words)
        with self._watched():
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self._talk)
        return [bool(flag) for flag in said.tolist()]

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest over all ranks of each number, on the processor."""
        values = values.to(self._words)
        with self._watched():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._talk)
        return values.cpu()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with watched(self.rank, self.seconds):
            yield


@contextmanager
def together(control: Control) -> Iterator[Callable[..., None]]:
    """Do something on every rank, and go on where it went well on all; what is handed to ``same`` must be the same on all.

    What is done must not talk to other ranks.
    """
    refusal: Exception | None = None
    said: list[str] = []
    try:
        yield lambda *facts: said.append(repr(facts))
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must not wait
        refusal = error
    control.agree(refusal, "".join(said))


def _words(error: Exception) -> tuple[type[CarnetError], str, dict[str, str]]:
    """Return an error as another rank can raise it."""
    if isinstance(error, CarnetError):
        return type(error), error.what, {name: str(fact) for name, fact in error.facts.items()}
    return MachineFailed, "a rank of the job failed", {"found": f"{type(error).__name__}: {error}"}


@contextmanager
def watched(rank: int, seconds: float) -> Iterator[None]:
    """Turn what torch.distributed raises where a rank is gone into one clear error."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch.distributed.DistError among them
        facts = {
            "on": f"rank {rank}",
            "time limit": f"{seconds:g} s",
            "reason": str(error).strip().partition("\n")[0] or type(error).__name__,
        }
        raise MachineFailed("a rank of the job does not answer", facts) from error
