"""Rounds on their way: boxes are packed into flat buckets, exchanged all at once, and unpacked.

::

    pack 0 | exchange 0 .......... | exchange 1 .......... |
           | pack 1                | unpack 0 | pack 2     | unpack 1      two buckets each way: one is filled while one travels

A small message costs as much as a large one, so that every pair of ranks has one message a round, however many boxes are in it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
import torch.distributed as dist

from carnet.box import Box
from carnet.live.binding import TORCH, Book
from carnet.live.control import Control, watched
from carnet.live.landing import Parts
from carnet.live.moves import Move

Act = Callable[[], object]
Dressed = Callable[[Move, torch.Tensor], torch.Tensor]  # what a move makes of what it reads
Find = Callable[[Move], Parts]  # where a box goes, in the memory of this rank


@dataclass(slots=True)
class Round:
    """One round as one rank has it."""

    moves: Sequence[Move]  # that concern this rank
    travels: bool  # whether anything goes from one rank to another, anywhere
    sends: list[int]  # bytes for each rank of the group, in its order
    receives: list[int]
    packs: list[Act] = field(default_factory=list)
    unpacks: list[Act] = field(default_factory=list)


class Wire:
    """The buckets of one rank."""

    def __init__(self, control: Control, rounds: Sequence[Sequence[Move]]) -> None:
        self._control = control
        self._device = control.device()
        at = {rank: place for place, rank in enumerate(control.ranks)}
        self.rounds = []
        for moves in rounds:
            own = [move for move in moves if control.rank in (move.sender, move.receiver)]
            travels = any(move.sender != move.receiver for move in moves)
            one = Round(own, travels, [0] * len(at), [0] * len(at))
            for move in own:
                if move.sender == move.receiver:
                    continue
                side, peer = (one.sends, move.receiver) if move.sender == control.rank else (one.receives, move.sender)
                side[at[peer]] += move.nbytes
            self.rounds.append(one)
        self._out, self._in = (self._buckets([sum(side) for side in sides]) for sides in zip(*self._sides(), strict=True))

    def _sides(self) -> list[tuple[list[int], list[int]]]:
        return [(one.sends, one.receives) for one in self.rounds] or [([], [])]

    def _buckets(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return two buckets, of which one serves the even rounds."""
        return [torch.empty(max(sizes[turn::2], default=0), dtype=torch.uint8, device=self._device) for turn in (0, 1)]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buckets of this rank."""
        return sum(bucket.numel() for bucket in (*self._out, *self._in))

    def load(self, book: Book, find: Find, dress: Dressed) -> None:
        """Lay down what is copied where: done once for the same memory."""
        rank = self._control.rank
        for turn, one in enumerate(self.rounds):
            out, into_bucket = self._out[turn % 2], self._in[turn % 2]
            sent, got = _starts(one.sends), _starts(one.receives)
            at = {peer: number for number, peer in enumerate(self._control.ranks)}
            one.packs, one.unpacks = [], []
            for move in one.moves:
                if move.sender == move.receiver:
                    one.packs += [act for inside, view in find(move) for act in _pass_on(book, move, inside, view, dress)]
                elif move.sender == rank:
                    box = _slice(out, move, sent, at[move.receiver])
                    one.packs += [
                        partial(_read, box[inside], view, move, dress) for inside, view in book.find(move.tensor, move.box)
                    ]
                else:
                    box = _slice(into_bucket, move, got, at[move.sender])
                    one.unpacks += [partial(view.copy_, box[inside]) for inside, view in find(move)]

    def run(self) -> Iterator[Round]:
        """Exchange all rounds; yield each when what it brought is in its place."""
        before: Round | None = None
        work: dist.Work | None = None
        for turn, one in enumerate(self.rounds):
            for act in one.packs:
                act()
            self._wait(work)
            work = self._exchange(one, turn % 2) if one.travels else None
            if before is not None:
                yield _unpacked(before)
            before = one
        self._wait(work)
        if before is not None:
            yield _unpacked(before)

    def _exchange(self, one: Round, turn: int) -> dist.Work | None:
        out, into = self._out[turn][: sum(one.sends)], self._in[turn][: sum(one.receives)]
        with watched(self._control.rank, self._control.seconds):
            work: dist.Work | None = dist.all_to_all_single(
                into, out, one.receives, one.sends, group=self._control.wire, async_op=True
            )
        return work

    def _wait(self, work: dist.Work | None) -> None:
        if work is None:
            return
        with watched(self._control.rank, self._control.seconds):
            work.wait()


def _unpacked(one: Round) -> Round:
    for act in one.unpacks:
        act()
    return one


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _slice(bucket: torch.Tensor, move: Move, starts: list[int], peer: int) -> torch.Tensor:
    """Return the next box of a peer's message, and go on behind it."""
    start, dtype = starts[peer], TORCH[move.dtype]
    starts[peer] += move.nbytes
    return bucket[start : start + prod(move.box.shape) * dtype.itemsize].view(dtype).view(move.box.shape)


def _read(out: torch.Tensor, view: torch.Tensor, move: Move, dress: Dressed) -> None:
    out.copy_(dress(move, view))


def _pass_on(book: Book, move: Move, inside: tuple[slice, ...], out: torch.Tensor, dress: Dressed) -> list[Act]:
    """Return what brings a part of a box that stays on its rank to its place."""
    starts = [low + (part.start or 0) for low, part in zip(move.box.start, inside, strict=False)] or move.box.start
    box = Box(tuple(starts), tuple(out.shape))
    return [partial(_read, out[within], view, move, dress) for within, view in book.find(move.tensor, box)]
