"""Rounds on their way: boxes are packed into flat buckets, exchanged all at once, and unpacked.

::

    pack 0 | exchange 0 .......... | exchange 1 .......... |
           | pack 1                | unpack 0 | pack 2     | unpack 1      two buckets each way: one is filled while one travels

A small message costs as much as a large one, so that every pair of ranks has one message a round, however many boxes are in it.
What is coded goes in the later rounds: scales are found while the first are on their way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from carnet.algebra.box import Box
from carnet.live.binding import TORCH, Located
from carnet.live.control import Control, watched
from carnet.live.copying import Act, Copy, acts, reads
from carnet.live.encoding import Coder
from carnet.live.landing import Parts
from carnet.live.moves import Transfer

Find = Callable[[Transfer], Parts]  # where a box goes, in the memory of this rank


@dataclass(frozen=True, slots=True)
class Round:
    """One round as one rank has it."""

    moves: Sequence[Transfer]  # that concern this rank
    travels: bool  # whether anything goes from one rank to another, anywhere
    coded: bool  # whether any of that is coded, or of what stays
    sends: list[int]  # bytes for each rank of the group, in its order
    receives: list[int]
    turn: int  # which of two buckets it has


@dataclass(slots=True)
class Acts:
    """What a rank copies in one round."""

    packs: Sequence[Act]  # into the bucket
    stays: Sequence[Act]  # from this rank to itself
    unpacks: Sequence[Act]


class Buckets:
    """The memory of one rank in which boxes travel: two buckets each way, which all ways out of a plan share."""

    def __init__(self, control: Control, moves: Sequence[Transfer], most: int) -> None:
        """Make buckets of ``most`` bytes, or less where all that this rank sends or receives is less."""
        away = [move for move in moves if move.sender != move.receiver]
        sent = sum(move.nbytes for move in away if move.sender == control.rank)
        received = sum(move.nbytes for move in away if move.receiver == control.rank)
        self._device = control.device()
        self._held = [[self._empty(min(most, total)), self._empty(most if total > most else 0)] for total in (sent, received)]
        self.nbytes = sum(bucket.numel() for side in self._held for bucket in side)  # of all of them

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def take(self, side: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return what serves the even rounds and the odd ones: of sending (side 0) or receiving (1), ``sizes`` bytes in each.

        One that is too small, because a tensor that goes whole is larger, has a companion.
        """
        needs = [max(sizes[turn::2], default=0) for turn in (0, 1)]
        self.nbytes += sum(need for own, need in zip(self._held[side], needs, strict=True) if need > own.numel())
        return [own if need <= own.numel() else self._empty(need) for own, need in zip(self._held[side], needs, strict=True)]


class Wire:
    """The rounds of one way out, as one rank has them."""

    def __init__(self, control: Control, rounds: Sequence[Sequence[Transfer]], buckets: Buckets) -> None:
        self._control = control
        at = {rank: place for place, rank in enumerate(control.ranks)}
        self.rounds: list[Round] = []
        for number, moves in enumerate(rounds):
            own = [move for move in moves if control.rank in (move.sender, move.receiver)]
            travels = any(move.sender != move.receiver for move in moves)
            coded = any(move.coded for move in moves)
            one = Round(own, travels, coded, [0] * len(at), [0] * len(at), number % 2)
            for move in own:
                if move.sender == move.receiver:
                    continue
                side, peer = (one.sends, move.receiver) if move.sender == control.rank else (one.receives, move.sender)
                side[at[peer]] += move.nbytes
            self.rounds.append(one)
        sides = zip(*[(sum(one.sends), sum(one.receives)) for one in self.rounds] or [(0, 0)], strict=True)
        self._out, self._in = (buckets.take(side, list(sizes)) for side, sizes in enumerate(sides))

    def lay(self, one: Round, located: Located, find: Find, coder: Coder) -> Acts:
        """Return what is copied where in a round: good as long as the memory is the same."""
        out, into = self._out[one.turn], self._in[one.turn]
        sent, got = _starts(one.sends), _starts(one.receives)
        at = {peer: number for number, peer in enumerate(self._control.ranks)}
        packs, stays, unpacks = list[Copy](), list[Copy](), list[Copy]()
        for move in one.moves:
            if move.sender == move.receiver:
                stays += [copy for inside, view in find(move) for copy in _pass_on(located, move, inside, view)]
            elif move.sender == self._control.rank:
                packs += reads(_slice(out, move, sent, at[move.receiver]), move, located.find(move.tensor, move.box))
            else:
                box = _slice(into, move, got, at[move.sender])
                unpacks += [Copy(view, [((), box[inside])], None) for inside, view in find(move)]
        return Acts(acts(packs, coder), acts(stays, coder), acts(unpacks, coder))

    def run(self, every: Iterable[Acts], weigh: Act) -> Iterator[Round]:
        """Exchange all rounds, with what each copies; yield each when what it brought is in its place.

        ``weigh`` finds the scales: nothing is coded before, and nothing that was coded has a place before.
        """
        before: tuple[Round, Acts] | None = None
        waiting: dist.Work | None = None
        known = False
        for one, todo in zip(self.rounds, every, strict=True):
            if one.coded and not known:
                weigh()
                known = True
            _do(todo.packs)
            work = self._exchange(one) if one.travels else None
            self._wait(waiting)
            _do(todo.stays)
            if before is not None:
                _do(before[1].unpacks)
                yield before[0]
            before, waiting = (one, todo), work
        self._wait(waiting)
        if before is not None:
            _do(before[1].unpacks)
            yield before[0]

    def _exchange(self, one: Round) -> dist.Work | None:
        out, into = self._out[one.turn][: sum(one.sends)], self._in[one.turn][: sum(one.receives)]
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


def _do(acts: Iterable[Act]) -> None:
    for act in acts:
        act()


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _slice(bucket: torch.Tensor, move: Transfer, starts: list[int], peer: int) -> torch.Tensor:
    """Return the next box of a peer's message, and go on behind it."""
    start, dtype = starts[peer], TORCH[move.dtype]
    starts[peer] += move.nbytes
    return bucket[start : start + prod(move.spot.shape) * dtype.itemsize].view(dtype).view(move.spot.shape)


def _pass_on(located: Located, move: Transfer, inside: tuple[slice, ...], out: torch.Tensor) -> list[Copy]:
    """Return what brings a part of a box that stays on its rank to its place."""
    starts = [low + (part.start or 0) for low, part in zip(move.box.start, inside, strict=False)] or move.box.start
    box = move.box if move.in_blocks else Box(tuple(starts), tuple(out.shape))
    return reads(out, move, located.find(move.tensor, box))
