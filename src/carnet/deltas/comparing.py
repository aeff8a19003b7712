"""Comparing what deltas make of a base with the version that they are said to lead to; nothing is written."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Unpack

import numpy as np

from carnet.deltas.means import choose, largest_first, work
from carnet.deltas.sides import Reading, check_pair, sides_of
from carnet.deltas.stepping import Stepping, check_base, close, steps_of
from carnet.examiner.compare import Finding
from carnet.examiner.verdict import Verdict
from carnet.formats.files import check_unchanged
from carnet.plans.options import PathLike
from carnet.plans.request import MEMORY, memory_of, only, threads_of
from carnet.pool import Tell
from carnet.progress import Callback, Told, verb


@verb
def verify(
    base: PathLike,
    deltas: PathLike | Sequence[PathLike],
    *,
    against: PathLike,
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
    **options: Unpack[Reading],
) -> Verdict:
    """Compare a base and the deltas that follow it with a version, element by element; either may have any layout, as for ``delta``.

    Raises BadRequest where the base is not that of the first delta, BadCheckpoint where a delta is damaged.
    """
    only(Reading.__optional_keys__, options)
    space, wanted = memory_of({"memory": memory}), threads_of({"threads": threads})
    steps, (side, other) = steps_of(deltas), sides_of(base, against, options)
    check_base(side, steps)
    check_pair(side, other)
    means = choose(space, (side, other), lambda window: steps.memory(window) + window // 2, wanted)
    names = largest_first((name, tensor.nbytes) for name, tensor in side.tensors.items())
    checks = [(at, number) for at, each in enumerate((side, other)) for number in range(each.checks)]

    @contextmanager
    def hire(tell: Tell) -> Iterator[Callable[[int], Finding | None]]:
        spare, unequal = np.empty(means.window, np.uint8), np.empty(means.window, np.bool_)
        with side.opened(means.window, tell) as old, other.opened(means.window, tell) as new:

            def serve(number: int) -> Finding | None:
                if number >= len(names):
                    at, copy = checks[number - len(names)]
                    (old, new)[at].check(copy)
                    return None
                tensor = side.tensors[names[number]]
                stepping, differ, first = Stepping(steps, tensor), 0, -1
                for low, high in tensor.pieces(means.window):
                    made, theirs = old.read(tensor.name, low, high), new.read(tensor.name, low, high)
                    stepping.next(made, spare)
                    ours, wanted = made.view(tensor.bits), theirs.view(tensor.bits)
                    found = np.not_equal(ours, wanted, out=unequal[: ours.size])
                    if first < 0 and found.any():
                        first = low // ours.itemsize + int(found.argmax())
                    differ += int(np.count_nonzero(found))
                    tell(high - low)
                stepping.end()
                if not differ:
                    return None
                spot = [int(index) for index in np.unravel_index(first, tensor.shape)] if tensor.shape else []
                detail = f"{differ:,} of {prod(tensor.shape):,} elements differ, the first at {spot}"
                return Finding("bits differ", tensor.name, tensor.name, detail)

            yield serve

    try:
        found = work(len(names) + len(checks), side.nbytes, means, hire, Told(progress, "examining").amount)
    finally:
        close(steps)
    for each in (side, other):
        each.check_unchanged()
    for delta in steps.deltas:
        check_unchanged(delta.where, delta.stamps)
    made = " + ".join(map(str, (side, *(delta.where for delta in steps.deltas))))
    order = {name: at for at, name in enumerate(side.tensors)}
    findings = sorted((each for each in found if each is not None), key=lambda each: order[each.stored])
    return Verdict(str(other), made, tuple(findings), None, side.nbytes)
