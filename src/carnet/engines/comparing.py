"""What an engine holds beside what it must hold.

Equal digests prove equal bytes. Where they differ, weights differ, or the engine keeps them otherwise: as no bytes at all, because a
kernel has packed them into a form of its own, or as codes that it has packed anew. Those are not comparable: nobody calls them equal.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from carnet.engines.expected import EXPERTS, Expected
from carnet.engines.table import ENGINES, Engine
from carnet.errors import BadRequest, NotSupported


@dataclass(frozen=True, slots=True)
class Finding:
    """One parameter of one rank that is not what it must be, or of which nobody can say."""

    rank: str  # as the engine names it
    name: str
    what: str
    expected: str = ""  # digests
    found: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an engine holds beside what it must hold."""

    engine: str
    release: str
    source: str
    url: str
    equal: int  # parameters of ranks
    different: tuple[Finding, ...]
    apart: tuple[Finding, ...]  # not comparable

    @property
    def compared(self) -> int:
        """Return how many parameters of ranks could be compared."""
        return self.equal + len(self.different)

    def __bool__(self) -> bool:
        """Say whether something was compared, and all of that is equal."""
        return self.equal > 0 and not self.different


def compare(expected: Expected, found: Mapping[str, str], url: str = "") -> Comparison:
    """Compare the digests that an engine says with those that it must say.

    Raises BadRequest where its ranks are others.
    """
    engine = ENGINES[expected.engine]
    homes = {key: engine.copies.sub(engine.copy, key, count=1) for key in found}
    _check_ranks(engine, expected, homes)
    places = {digest: key for key, each in reversed([*expected.digests.items()]) for digest in each}
    equal, different, apart = 0, list[Finding](), list[Finding]()
    for key, digest in found.items():
        wanted = expected.digests.get(homes[key])
        rank, name = _split(key)
        if wanted is not None and digest in wanted:
            equal += 1
        elif wanted is None:
            there = Finding(rank, name, "no weight of the checkpoint", found=digest)
            (apart if engine.buffers or expected.coded else different).append(there)
        elif digest in engine.nothing:
            apart.append(Finding(rank, name, "packed by the engine: no bytes are left", wanted[0], digest))
        elif homes[key] in expected.coded and digest not in places:
            apart.append(Finding(rank, name, "the engine may have packed it anew", wanted[0], digest))
        else:
            what = "different" if digest not in places else f"holds {places[digest]}"
            different.append(Finding(rank, name, what, wanted[0], digest))
    for rank, name, home in _lacking(expected, homes):
        lost = Finding(rank, name, "the engine has none", expected.digests[home][0])
        (apart if home in expected.coded else different).append(lost)
    where = expected.engine, expected.release, expected.source, url
    return Comparison(*where, equal, tuple(different), tuple(apart))


def _lacking(expected: Expected, homes: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield rank, name and key of what ranks of the engine do not have."""
    ranks = {_split(key)[0]: _split(home)[0] for key, home in homes.items()}
    for rank, home in ranks.items():
        for key in expected.digests:
            if _split(key)[0] == home and rank + key.removeprefix(home) not in homes:
                yield rank, _split(key)[1], key


def _check_ranks(engine: Engine, expected: Expected, homes: Mapping[str, str]) -> None:
    there, wanted = {_split(key)[0] for key in homes}, {_split(key)[0] for key in expected.digests}
    own = {_split(home)[0] for home in homes.values()}
    if own != wanted:
        facts = {"expected": _few(wanted), "found": _few(own) or "no parameter at all"}
        remedy = "say how the engine is shared: --tp, --pp and --ep as it was started with"
        raise BadRequest(f"the ranks of {engine.name} are others than those that digests are expected of", facts, remedy=remedy)
    if there != own and any(EXPERTS in key for key in expected.digests):
        facts = {"found": _few(there)}
        raise NotSupported(f"{engine.name} shares experts among data-parallel ranks, which carnet does not cut", facts)


def _few(ranks: Collection[str]) -> str:
    first, more = sorted(ranks)[:4], len(ranks) - 4
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _split(key: str) -> tuple[str, str]:
    """Return rank and name.

    >>> _split("dp0:pp0:pcp0:tp1:model.norm.weight")
    ('dp0:pp0:pcp0:tp1', 'model.norm.weight')
    """
    rank, _, name = key.rpartition(":")
    return rank, name
