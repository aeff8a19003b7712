"""What an examination does, in an order in which what is read twice is still in the machine's memory.

A stored tensor is digested right after the last canonical tensor in it was compared, or then, where that reads it in its own order::

    compare layers.0.attention.q, k, v  ->  digest layers.0.qkv of the source  (q, k, v of the target were digested on the way)
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from carnet.algebra.box import Box, volume
from carnet.dialects.entry import Entry
from carnet.dtypes import BY_NAME
from carnet.examiner.compare import Compared, Side, compare, is_in_order, is_judged
from carnet.examiner.means import each
from carnet.examiner.tensor_files import digest
from carnet.formats.stored import Stored
from carnet.model.tensors import Canonical


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A stored tensor that is to be digested."""

    of: Side
    stored: Stored


Job = Canonical | Held


def jobs(source: Side, target: Side) -> Iterator[Job]:
    """Yield every canonical tensor of the source, and every understood stored tensor of both whose digest does not come with one."""
    stored = (name for entry in source.inventory.entries.values() for name in _names(source, entry))
    names = dict.fromkeys((*stored, *source.shapes))
    places = {name: at for at, name in enumerate(names)}
    digested = {id(part.entry) for name in names for part in target.parts.get(name, []) if is_in_order(part)}
    following: dict[int, list[Held]] = defaultdict(list)
    for of in (source, target):
        for key, entry in of.inventory.entries.items():
            last = max((places[name] for name in _names(source, entry)), default=len(names))
            following[last] += [Held(of, one) for one in of.inventory.stored(key) if id(entry) not in digested]
        following[len(names)] += [Held(of, one) for one in of.inventory.scales.values()]
    for at, name in enumerate(names):
        yield name
        yield from following[at]
    yield from following[len(names)]


def work_off(
    source: Side, target: Side, todo: Sequence[Job], threads: int, add: Callable[[int], None]
) -> tuple[dict[Canonical, Compared], dict[str, str], dict[str, str]]:
    """Compare and digest: (what was found of each canonical tensor, digests of the source's stored tensors, and of the target's)."""
    compared, digests = dict[Canonical, Compared](), {id(source): dict[str, str](), id(target): dict[str, str]()}

    def do(at: int) -> None:
        match todo[at]:
            case Held(of, stored):
                digests[id(of)][stored.label] = digest(of.tensor_files, stored)
            case name:
                one = compared[name] = compare(source, target, name)
                digests[id(target)].update(one.digests)

    each(range(len(todo)), do, lambda at: nbytes(source, target, todo[at]), threads, add)
    return compared, digests[id(source)], digests[id(target)]


def nbytes(source: Side, target: Side, job: Job) -> int:
    """Return the bytes of a job: of the target those that are compared, of both those that are digested."""
    if isinstance(job, Held):
        return job.stored.nbytes
    found = 0
    for part in target.parts.get(job, []):
        if part.coded is None:
            found += volume(part.box) * BY_NAME[part.stored.dtype].nbytes * (2 if is_in_order(part) else 1)
        elif not is_judged(source, part.coded, part.entry):
            found += part.coded.codes.nbytes * volume(part.box) // volume(Box((), part.coded.shape))
    return found


def _names(source: Side, entry: Entry) -> Iterator[Canonical]:
    """Yield the canonical tensors of the source that are in a stored one."""
    return (name for names in entry.reading.tensors for name in names if name in source.shapes)
