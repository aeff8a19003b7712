"""A *unit* is one file of a dialect: a rank with its share of the layers and of their axes, or everything."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

from carnet.algebra.layout import cut_unevenly
from carnet.dialects.rows import Dialect
from carnet.errors import BadCheckpoint, BadRequest
from carnet.model.fields import Config, Value
from carnet.model.model import further, number, stored_at
from carnet.model.tensors import Axis


@dataclass(frozen=True, slots=True)
class Among:
    """A place among ranks."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """One file of a dialect: a rank, or everything."""

    name: str
    layers: tuple[int, ...]  # global numbers of its layers, in the order of its own numbers
    base: int  # the number in the whole model of the stored layer that its names call 0
    first: bool  # holds what comes before the layers
    last: bool  # holds what comes after them
    tensor: Among = Among()  # among the ranks that share every layer
    expert: Among = Among()  # among those that share the experts
    expert_tensor: Among = Among()  # among those that share each expert
    expert_base: int | None = None  # the global number of the expert that its names call 0; None for the first that it holds
    stop: int | None = None  # the number of the stored layer behind its last, where a layer may lie in two units
    also: Collection[str] = ()  # canonical tensors outside the layers that it has besides: "embed", "head"

    def among(self, axis: Axis) -> Among:
        """Return the place of this unit among the ranks that share an axis."""
        return {"tensor": self.tensor, "expert": self.expert, "expert_tensor": self.expert_tensor}[axis.among]


NUMBERED = re.compile(r"(?P<kind>decoder|mtp)\.layers\.(?P<layer>\d+)\.")
Present = Collection[tuple[str, str]] | None  # (unit, name) of every stored tensor of a source; None for a target


def units(dialect: Dialect, config: Config, present: Present = None) -> list[Unit]:
    """Return the files of a dialect, in the order of their ranks."""
    labels = sorted({label for label, _ in present or () if label.startswith("tp")})
    if dialect.ranked:
        return _rank_units(dialect, config)
    if labels:
        return _megatron_units(config, labels, present or ())
    return [Unit("", tuple(range(further(config).stop)), 0, first=True, last=True)]


def _rank_units(dialect: Dialect, config: Config) -> list[Unit]:
    """Return the ranks as programs number them: rank = stage x tp + place; neighbours share the experts."""
    kind, count = dialect.kind, number(config, "layers")
    tp, pp, ep = number(config, "tp"), number(config, "pp"), number(config, "ep")
    if pp > count:
        raise BadRequest(
            f"cannot share {count} layers among {pp} pipeline stages", remedy=f"use a pipeline-parallel size up to {count}"
        )
    if pp > 1 and not kind.units[1]:
        raise BadRequest(
            f"the files of {kind.name} are of ranks that share each layer alone", {"pp": pp}, remedy="leave out --pp"
        )
    found = []
    for stage, rank in product(range(pp), range(tp)):
        held, last = cut_unevenly(count, pp, stage, spares_last=kind.spares_last), stage == pp - 1
        layers = tuple(range(held.start, further(config).stop if last else held.stop))
        expert, expert_tensor = Among(rank % ep, ep), Among(rank // ep, tp // ep)
        name = kind.units[pp > 1].format(rank=stage * tp + rank, tp=rank, pp=stage)
        base = held.start if kind.counts_anew else 0
        among = Among(rank, tp), expert, expert_tensor
        found.append(Unit(name, layers, base, stage == 0, last, *among, also=dialect.on_all_stages))
    return found


def told_ranks(labels: Collection[str]) -> dict[str, Value]:
    """Return how many ranks and stages there are, as the names of a source's units say.

    >>> told_ranks(["pp-0-tp-0", "pp-0-tp-1", "pp-1-tp-0", "pp-1-tp-1"])
    {'tp': 2, 'pp': 2, 'world': 4}
    """
    places = [re.findall(r"\d+", label) for label in labels]
    tp, pp = (1 + max(int((place[-1:] if axis else place[:-1] or ["0"])[0]) for place in places) for axis in (1, 0))
    return {"tp": tp, "pp": pp, "world": tp * pp}


def _megatron_units(config: Config, labels: Sequence[str], present: Collection[tuple[str, str]]) -> list[Unit]:
    """Return the ranks of a per-rank checkpoint: ``tp0-pp1-ep0-vp0``; the virtual chunks of all stages follow each other.

    Stages may differ in length, and layers that predict further tokens may have a stage of their own: the numbers of the layers are
    counted from the names that are there.
    """
    places = {label: tuple(int(part.lstrip("tpev")) for part in label.split("-")) for label in labels}
    held: dict[tuple[int, int], set[int]] = {(v, p): set() for _, p, _, v in places.values()}
    beyond = set[tuple[int, int]]()
    for label, name in present:
        numbered = NUMBERED.search(name)
        if numbered:
            _, p, _, v = places[label]
            if numbered["kind"] == "mtp":
                beyond.add((v, p))
            else:
                held[v, p].add(int(numbered["layer"]))
    starts, start = {}, 0
    for place in sorted(held):
        starts[place] = start
        start += len(held[place])
    at = stored_at(config)
    count = at[-1][1] + 1
    if len(held) == 1 and start < count:
        start = count  # a layer that does nothing has no names
    if start > count:
        raise BadCheckpoint("the ranks hold more layers than the config says", {"expected": count, "found": start})
    tp, ep = (max(place[axis] for place in places.values()) + 1 for axis in (0, 2))
    found = []
    for label, (t, p, e, v) in places.items():
        last, base = (v, p) == max(held), starts[v, p]
        stop = start if last else base + len(held[v, p])
        layers = within(at, range(base, stop))
        layers += tuple(further(config)) if (v, p) in beyond else ()
        found.append(Unit(label, layers, base, (v, p) == (0, 0), last, Among(t, tp), Among(e, ep), Among(t, tp)))
    return found


def within(at: Sequence[tuple[int, int]], stored: range) -> tuple[int, ...]:
    """Return the layers of which a unit with these stored layers holds a half: of ``stored_at``.

    >>> within([(0, 1), (2, 3)], range(1, 2)), within([(0, 0), (1, 1)], range(1, 2))
    ((0,), (1,))
    """
    return tuple(layer for layer, (mixer, mlp) in enumerate(at) if mixer in stored or mlp in stored)
