"""A *grid* says how a model is shared among the ranks of a job: every rank has a place along each kind of parallelism.

Ranks are numbered as Megatron numbers them (megatron/core/parallel_state.py RankGenerator): the first word of the order runs
fastest. Experts have an order of their own, in which ``etp`` and ``ep`` stand in place of ``tp`` and ``cp``; stages are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from carnet.dialects.units import Among, Unit, within
from carnet.errors import BadRequest, NotSupported
from carnet.model.fields import Config
from carnet.model.model import further, layers, number, stored_at, value

ORDER = "tp-cp-ep-dp-pp"  # Megatron's own unless --use-tp-pp-dp-mapping


@dataclass(frozen=True, slots=True)
class Grid:
    """How a model is shared. What the ranks are more than these sizes need are copies (data parallel)."""

    tp: int = 1  # tensor parallel: ranks that share every layer
    pp: int = 1  # pipeline stages
    ep: int = 1  # ranks that share the experts
    etp: int | None = None  # ranks that share each expert; None for tp
    cp: int = 1  # context parallel: ranks that hold the same weights
    vp: int = 1  # virtual chunks of each stage
    ranks: Sequence[int] | None = None  # the global ranks, in order; None for all of the group
    layers: Sequence[Sequence[int]] | None = None  # layers of each stage, and in it of each chunk; None where all are alike
    order: str = ORDER


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of one rank."""

    tp: int
    pp: int
    ep: int
    etp: int


def seats(grid: Grid, ranks: Sequence[int]) -> dict[int, Seat]:
    """Return the place of every rank.

    >>> seats(Grid(tp=2, pp=2), range(4))[3]
    Seat(tp=1, pp=1, ep=0, etp=1)
    >>> seats(Grid(tp=2, ep=4, etp=1), range(4))[2]
    Seat(tp=0, pp=0, ep=2, etp=0)
    """
    etp = grid.tp if grid.etp is None else grid.etp
    every: dict[str, object] = {"tp": grid.tp, "pp": grid.pp, "ep": grid.ep, "etp": etp, "cp": grid.cp, "vp": grid.vp}
    wrong = {name: repr(size) for name, size in every.items() if not isinstance(size, int) or size < 1}
    if wrong:
        raise BadRequest("the sizes of a grid are whole numbers from 1 on", wrong)
    order = str(grid.order).split("-")
    sizes = {"tp": grid.tp, "cp": grid.cp, "ep": 1, "dp": _copies(grid, ranks, grid.tp * grid.cp * grid.pp), "pp": grid.pp}
    inner = {"tp": etp, "cp": 1, "ep": grid.ep, "dp": _copies(grid, ranks, etp * grid.ep * grid.pp), "pp": grid.pp}
    if sorted(order) != sorted(sizes):
        raise BadRequest(f"{grid.order!r} is not an order of ranks", {"expected": f"the words of {ORDER}"})
    found = {}
    for at, rank in enumerate(ranks):
        dense, expert = _places(at, order, sizes), _places(at, order, inner)
        if dense["pp"] != expert["pp"]:
            raise BadRequest("experts and the rest would lie on different pipeline stages", {"order": grid.order, "rank": rank})
        found[rank] = Seat(dense["tp"], dense["pp"], expert["ep"], expert["tp"])
    return found


def _copies(grid: Grid, ranks: Sequence[int], each: int) -> int:
    if not ranks or len(ranks) % each:
        facts = {"ranks": len(ranks), "tp, pp, ep, cp": f"{grid.tp}, {grid.pp}, {grid.ep}, {grid.cp}", "one copy needs": each}
        raise BadRequest("the ranks do not make up whole copies of the model", facts)
    return len(ranks) // each


def _places(at: int, order: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    places = {}
    for word in order:
        at, places[word] = divmod(at, sizes[word])
    return places


def megatron_units(grid: Grid, config: Config, held: dict[int, Seat]) -> dict[str, tuple[Unit, list[int]]]:
    """Return the units of a model of Megatron, one for each different share, with the ranks that hold it.

    The chunks of a rank are units of their own: the virtual chunks of all stages follow each other.
    """
    etp = grid.tp if grid.etp is None else grid.etp
    few = min((number(layer, "kv_heads") for layer in layers(config) if layer["mixer"] == "attention"), default=grid.tp)
    if few < grid.tp:
        # rows are cut where they fall, a head among ranks: megatron/core/transformer/attention.py SelfAttention
        facts = {"KV heads": few, "tp": grid.tp}
        raise NotSupported("more ranks of Megatron share a model than it has KV heads", facts)
    spans = _spans(grid, stored_at(config)[-1][1] + 1)
    found: dict[str, tuple[Unit, list[int]]] = {}
    for rank, seat in held.items():
        for chunk in range(grid.vp):
            name = unit_name(seat, chunk)
            if name not in found:
                found[name] = _unit(name, grid, config, seat, spans[seat.pp][chunk], chunk, etp), []
            found[name][1].append(rank)
    return found


def _unit(name: str, grid: Grid, config: Config, seat: Seat, span: range, chunk: int, etp: int) -> Unit:
    first, last = (seat.pp, chunk) == (0, 0), (seat.pp, chunk) == (grid.pp - 1, grid.vp - 1)
    at, beyond = stored_at(config), further(config) if last else range(0)
    shares = Among(seat.tp, grid.tp), Among(seat.ep, grid.ep), Among(seat.etp, etp)
    # what predicts further tokens embeds them, and a head apart from its embedding is a copy: megatron/core/models/gpt/gpt_model.py
    also: tuple[str, ...] = ("embed", "position") if beyond else ()
    also += ("head",) if last and not first and value(config, "tied") else ()
    stop = span.stop if value(config, "halves") else None
    return Unit(name, (*within(at, span), *beyond), span.start, first, last, *shares, also=also, stop=stop)


def unit_name(seat: Seat, chunk: int) -> str:
    """Return what the share of a rank's virtual chunk is called."""
    return f"tp{seat.tp}-pp{seat.pp}-ep{seat.ep}-et{seat.etp}-vp{chunk}"


def _are_numbers(stage: object) -> bool:
    return isinstance(stage, Sequence) and all(isinstance(size, int) and size >= 0 for size in stage)


def _spans(grid: Grid, count: int) -> list[list[range]]:
    """Return the layers of each stage and chunk."""
    given = grid.layers
    if given is None:
        each, rest = divmod(count, grid.pp * grid.vp)
        if rest:
            sizes = {"layers": count, "stages": grid.pp, "chunks of each": grid.vp}
            remedy = "say how many layers each stage has: Grid(layers=[[3], [2]])"
            raise BadRequest("the layers do not divide among the pipeline stages", sizes, remedy=remedy)
        given = [[each] * grid.vp] * grid.pp
    if not all(map(_are_numbers, given)):
        facts = {"expected": "a list of numbers for each stage, one for each of its chunks", "found": str(given)}
        raise BadRequest("the layers of the stages are not numbers", facts)
    counts = [list(stage) for stage in given]
    if [len(stage) for stage in counts] != [grid.vp] * grid.pp or sum(map(sum, counts)) != count:
        facts = {"expected": f"{grid.pp} stages of {grid.vp} chunks with {count} layers together", "found": str(counts)}
        raise BadRequest("the layers of the stages are not those of the model", facts)
    spans: list[list[range]] = [[range(0)] * grid.vp for _ in counts]
    start = 0
    for chunk in range(grid.vp):
        for stage in range(grid.pp):
            spans[stage][chunk] = range(start, start := start + counts[stage][chunk])
    return spans
