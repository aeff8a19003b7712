"""An *entry* is one stored tensor that a dialect has for a model: its name, its shape, and the views of canonical tensors in it.

The same entries describe a source and a target. For a source, the rows whose names are there are taken (that is how a spelling
is chosen); for a target, the rows of one spelling.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from carnet.box import Box
from carnet.errors import BadRequest
from carnet.families.model import TIED, Config, Tensor, number, sizes, tensors, value
from carnet.families.rows import Dialect, Row
from carnet.layout import Fold, Pattern, Share, View, cut_evenly, cut_or_repeat, cut_padded, cut_unevenly, fold, view


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row says about a stored tensor, before it became views: a second opinion starts from here."""

    pattern: Pattern
    shares: Mapping[str, Share]  # of every axis
    parts: tuple[tuple[str, ...], ...]  # per part of the pattern: the axes of its canonical tensor
    tensors: tuple[tuple[str, ...], ...]  # per index of the layer dimension (one, if there is none): the tensor in each part


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor."""

    unit: str  # the rank that holds it: "rank3"; "" where names are global
    name: str
    shape: tuple[int, ...]  # elements
    views: tuple[View, ...]  # disjoint; together with the padding they are the whole tensor
    padding: tuple[Box, ...]  # stored boxes that hold no weight
    padded: str  # the canonical tensor whose axis is padded; "" for none
    reading: Reading  # the same once more, as the row says it


@dataclass(frozen=True, slots=True)
class Unit:
    """One file of a dialect: a rank, or everything."""

    name: str
    rank: int  # place among the ranks that share a layer
    layers: range  # global numbers of its layers
    first: bool  # holds what comes before the layers
    last: bool  # holds what comes after them


def units(dialect: Dialect, config: Config) -> list[Unit]:
    """Return the files of a dialect, in the order of their ranks: rank = stage x tp + place, as TensorRT-LLM numbers them."""
    layers = sizes(config)["layer"]
    if not dialect.ranked:
        return [Unit("", 0, range(layers), True, True)]
    tp, pp = number(config, "tp"), number(config, "pp")
    if pp > layers:
        raise BadRequest(
            f"cannot share {layers} layers among {pp} pipeline stages", remedy=f"use a pipeline-parallel size up to {layers}"
        )
    stages = [cut_unevenly(layers, pp, stage) for stage in range(pp)]
    return [
        Unit(f"rank{stage * tp + rank}", rank, range(held.start, held.stop), stage == 0, stage == pp - 1)
        for stage, held in enumerate(stages)
        for rank in range(tp)
    ]


def entries(
    dialect: Dialect, config: Config, present: Collection[tuple[str, str]] | None, spelling: str = ""
) -> Iterator[Entry]:
    """Yield the stored tensors of a model: those of ``present`` ((unit, name) pairs) that a row names, or all that a target needs."""
    known = tensors(config)
    for unit in units(dialect, config):
        prefix = _prefix(dialect, unit, present)
        taken: set[str] = set()
        for row in dialect.rows:
            if not _applies(row, dialect, known, config, present, spelling):
                continue
            for entry in _of_row(row, dialect, config, known, unit, prefix, present):
                if entry.name not in taken:
                    taken.add(entry.name)
                    yield entry


def _prefix(dialect: Dialect, unit: Unit, present: Collection[tuple[str, str]] | None) -> str:
    """Return what stands before the names of a unit: the first prefix under which a name is known."""
    if present is None:
        return dialect.prefixes[0]
    tops = [row.name for row in dialect.rows if "{" not in row.name and not row.name.startswith("/")]
    for prefix in dialect.prefixes:
        if any((unit.name, prefix + name) in present for name in tops):
            return prefix
    return dialect.prefixes[0]


def _applies(
    row: Row,
    dialect: Dialect,
    known: dict[str, Tensor],
    config: Config,
    present: Collection[tuple[str, str]] | None,
    spelling: str,
) -> bool:
    parts = [part for part, _ in row.pattern.parts]
    again = [part for part in parts if part not in known and value(config, "tied") and TIED.get(part) in known]
    if present is None and ((again and not dialect.writes_tied) or row.spelling not in ("", spelling)):
        return False
    return all(part in known or part in again for part in parts)


def _of_row(
    row: Row,
    dialect: Dialect,
    config: Config,
    known: dict[str, Tensor],
    unit: Unit,
    prefix: str,
    present: Collection[tuple[str, str]] | None,
) -> Iterator[Entry]:
    parts = [known.get(part) or known[TIED[part]] for part, _ in row.pattern.parts]
    again = row.pattern.parts[0][0] not in known
    stage = "last" if again else parts[0].stage
    if (stage == "first" and not unit.first) or (stage == "last" and not unit.last):
        return
    name = row.name[1:] if row.name.startswith("/") else prefix + row.name
    try:
        shares = _shares(row.cut, dialect, config, unit)
    except BadRequest as refusal:
        tensor = parts[0].name.replace("{layer}", str(unit.layers.start))
        raise BadRequest(refusal.what, {"tensor": tensor, **refusal.facts}, remedy=refusal.remedy) from None
    axes = tuple(tuple(tensor.axes.split()) for tensor in parts)
    stacked = name.replace("{layer}.", "")
    if stage == "layer" and dialect.stacked and present is not None and (unit.name, stacked) in present:
        pattern = Pattern(row.pattern.text, (("layer",), *row.pattern.dims), row.pattern.parts)
        folded = fold(pattern, shares)
        views = tuple(
            v for at in range(len(unit.layers)) for v in _views(folded, parts, shares, unit.layers[at], {"layer": at})
        )
        reading = Reading(pattern, shares, axes, tuple(_names(parts, layer) for layer in unit.layers))
        yield Entry(unit.name, stacked, folded.shape, views, folded.padding, parts[0].name if folded.padding else "", reading)
        return
    folded = fold(row.pattern, shares)
    like = tuple(_views(folded, parts, shares, 0, {}))  # the layers differ in names only
    for at, layer in enumerate(unit.layers) if stage == "layer" else [(0, 0)]:
        spelled = name.replace("{layer}", str(at))
        if present is None or (unit.name, spelled) in present:
            names = _names(parts, layer)
            views = tuple(View(n, v.box, v.origin, v.places) for n, v in zip(names, like, strict=True))
            reading = Reading(row.pattern, shares, axes, (names,))
            yield Entry(
                unit.name, spelled, folded.shape, views, folded.padding, parts[0].name if folded.padding else "", reading
            )


def _names(parts: list[Tensor], layer: int) -> tuple[str, ...]:
    return tuple(tensor.name.replace("{layer}", str(layer)) for tensor in parts)


def _views(folded: Fold, parts: list[Tensor], shares: dict[str, Share], layer: int, at: dict[str, int]) -> Iterator[View]:
    for slot, tensor in zip(folded.slots, parts, strict=True):
        yield view(slot, tensor.name.replace("{layer}", str(layer)), tensor.axes.split(), shares, at)


def _shares(cut: str, dialect: Dialect, config: Config, unit: Unit) -> dict[str, Share]:
    """Return what a unit holds of every axis, for a stored tensor that is cut along one of them."""
    size = sizes(config)
    shares = {axis: Share(0, length, length) for axis, length in size.items()}
    if cut == "embedding":
        cut = {"none": "", "rows": "vocab", "columns": "hidden"}[str(value(config, "embedding"))]
    if not dialect.ranked:
        padded = value(config, "padded_vocab")
        if cut == "vocab" and isinstance(padded, int):
            shares["vocab"] = Share(0, padded, size["vocab"])
        return shares
    tp = number(config, "tp")
    match cut:
        case "kv":
            shares |= cut_or_repeat("kv", size["kv"], "rep", size["rep"], tp, unit.rank)
        case "vocab":
            shares["vocab"] = cut_padded(size["vocab"], tp, unit.rank)
        case "ffn" | "hidden":
            shares[cut] = cut_evenly(cut, size[cut], tp, unit.rank)
        case _:
            assert not cut, f"a row is cut along {cut!r}, which no rank is"
    return shares
