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
from carnet.examiner.compare import Compared, Side, compare, is_in_order, is_judged, moved
from carnet.examiner.judge import Judgement
from carnet.examiner.means import Order, Spot, each
from carnet.examiner.tensor_files import digest
from carnet.formats.stored import Key, Stored
from carnet.model.tensors import Canonical


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A stored tensor that is to be digested."""

    of: Side
    stored: Stored


@dataclass(frozen=True, slots=True)
class Codes:
    """A stored weight of the target whose codes are held against the source's numbers."""

    key: Key


Job = Canonical | Held | Codes


def jobs(source: Side, target: Side) -> Iterator[Job]:
    """Yield every canonical tensor of the source, and every understood stored tensor of both whose digest does not come with one."""
    stored = (name for entry in source.inventory.entries.values() for name in _names(source, entry))
    names = dict.fromkeys((*stored, *source.shapes))
    places = {name: at for at, name in enumerate(names)}
    digested = {id(part.entry) for name in names for part in target.parts.get(name, []) if is_in_order(part)}
    digested |= {id(part.entry) for name in names if (part := moved(source, target, name)) is not None}
    following: dict[int, list[Held]] = defaultdict(list)
    for of in (source, target):
        for key, entry in of.inventory.entries.items():
            last = max((places[name] for name in _names(source, entry)), default=len(names))
            following[last] += [Held(of, one) for one in of.inventory.stored(key) if id(entry) not in digested]
        following[len(names)] += [Held(of, one) for one in of.inventory.scales.values()]
    for of, _ in source.terms[1:]:
        for key, entry in of.inventory.entries.items():
            last = max((places[name] for name in _names(source, entry)), default=len(names))
            following[last] += [Held(of, one) for one in of.inventory.stored(key)]
        following[len(names)] += [Held(of, one) for one in of.inventory.scales.values()]
    for at, name in enumerate(names):
        yield name
        yield from following[at]
    yield from following[len(names)]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found on the way."""

    compared: dict[Canonical, Compared]
    judged: dict[Key, Judgement]
    source: dict[str, str]  # digests of stored tensors
    target: dict[str, str]
    others: dict[tuple[int, str], str]  # of those that are added to the source, each by its place among them


def work_off(
    source: Side,
    target: Side,
    todo: Sequence[Job],
    judge: Callable[[Key], Judgement],
    threads: int,
    add: Callable[[int], None],
    order: Order | None,
) -> Found:
    """Compare, judge and digest; ``order`` says when what is read of the target is there, None where all is."""

    def do(job: Job) -> Compared | Judgement | str:
        match job:
            case Held(of, stored):
                return digest(of.tensor_files, stored)
            case Codes(key):
                return judge(key)
            case name:
                return compare(source, target, name)

    arriving = None if order is None else order([*_spots(target, todo)])
    done = each(todo, do, lambda job: nbytes(source, target, job), threads, add, arriving)
    found = Found({}, {}, {}, {}, {})
    others = {id(of): at for at, (of, _) in enumerate(source.terms[1:])}
    for job, one in zip(todo, done, strict=True):
        match job:
            case Held(of, stored):
                assert isinstance(one, str), "a digest"
                if id(of) in others:
                    found.others[others[id(of)], stored.label] = one
                else:
                    (found.source if of is source else found.target)[stored.label] = one
            case Codes(key):
                assert isinstance(one, Judgement), "what is said of codes"
                found.judged[key] = one
            case name:
                assert isinstance(one, Compared), "what comparing found"
                found.compared[name] = one
                found.target.update(one.digests)
                found.source.update(one.moved)
    return found


def _spots(target: Side, todo: Sequence[Job]) -> Iterator[list[Spot]]:
    """Yield for each job the places that it reads of the target; one that reads none is due with the one before it."""
    last = list[Spot]()
    for job in todo:
        match job:
            case Held(of, stored):
                read = [stored] if of is target else []
            case Codes(key):
                read = [*target.inventory.stored(key)]
            case name:
                parts = target.parts.get(name, [])
                read = [one for part in parts for one in ((part.stored,) if part.coded is None else part.coded.parts)]
        last = [(chunk.file, chunk.offset) for one in read for chunk in one.chunks] or last
        yield last


def nbytes(source: Side, target: Side, job: Job) -> int:
    """Return the bytes of a job: of the target those that are compared, of both those that are digested."""
    if isinstance(job, Held):
        return job.stored.nbytes
    if isinstance(job, Codes):
        return target.inventory.coded[job.key].codes.nbytes
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
