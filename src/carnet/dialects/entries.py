"""The entries of a model: the stored tensors that the rows of a dialect give.

The same entries describe a source and a target. For a source, the rows whose names are there are taken (that is how a spelling
is chosen); for a target, the rows of one spelling.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product

from carnet.algebra.layout import Fold, Pattern, Share, View, cut_evenly, cut_or_repeat, cut_padded, fold, view
from carnet.dialects.entry import Entry, Like
from carnet.dialects.planes import in_planes
from carnet.dialects.rows import Constant, Dialect, Row, numbered
from carnet.dialects.towers import carried
from carnet.dialects.units import Among, Present, Unit, units
from carnet.errors import BadRequest
from carnet.model import adapters
from carnet.model.fields import Config, Value
from carnet.model.model import further_at, holds, layers, number, sizes, stored_at, tensors, value
from carnet.model.tensors import AXES, BY_PART, RANK, TIED, Canonical, Tensor

BEFORE, AFTER = -1, 1 << 60  # in place of a layer's number, for what lies before and after all of them


def entries(
    dialect: Dialect,
    config: Config,
    present: Present,
    spelling: str = "",
    among: Sequence[Unit] | None = None,
    *,
    coded: bool = False,
) -> Iterator[Entry]:
    """Yield the stored tensors of a model: those of ``present`` that a row names, or all that a target needs, layer by layer.

    ``among`` are the units that hold the model, where the names that are there cannot tell. ``coded`` says that a target has codes.
    """
    weights = [*_weights(dialect, config, present, spelling, among, coded=coded)]
    yield from weights
    yield from in_planes(weights, config, present)


def _weights(
    dialect: Dialect, config: Config, present: Present, spelling: str, among: Sequence[Unit] | None, *, coded: bool
) -> Iterator[Entry]:
    what, stored = layers(config), (stored_at(config), further_at(config))
    top = tensors(config, config)
    for unit in units(dialect, config, present) if among is None else among:
        facts: Config = {"spelling": spelling, "coded": coded, "last": unit.last}
        prefix = _prefix(dialect, unit, present)
        found: dict[int, dict[str, Entry]] = {at: {} for at in (BEFORE, *unit.layers, AFTER)}
        kinds: dict[int, list[int]] = {}
        for layer in unit.layers:
            kinds.setdefault(id(what[layer]), []).append(layer)
        inside = [(what[same[0]], {**top, **tensors(config, what[same[0]])}, same) for same in kinds.values()]
        for row in dialect.rows:
            for kind, known, same in inside if row.inside else [(config, top, [0])]:
                joined = {"joined": adapters.is_one(kind, row.joined)} if row.joined else {}
                if not holds(row.when, kind) or (present is None and not holds(row.written, {**kind, **facts, **joined})):
                    continue
                if _applies(row, dialect, known, kind, present, unit.also):
                    job = _Job(row, dialect, config, kind, known, unit, prefix, present, stored)
                    for at, entry in _of_row(job, same):
                        found[at][entry.name] = entry
        taken: dict[str, Entry] = {}  # the first row of a name whose tensors exist
        for group in found.values():
            for name, entry in group.items():
                taken.setdefault(name, entry)
        yield from taken.values()
    yield from carried(dialect, config, present)


def constants(dialect: Dialect, stored: Iterable[Entry], style: str, own: str) -> Iterator[tuple[Entry, Constant, str]]:
    """Yield what a dialect stores beside some tensors that is no weight: the tensor, what stands beside it, and its name.

    ``style`` is that of its codes, "" where weights are none; ``own`` the type of a model's weights.
    """
    for entry in stored if dialect.constants else ():
        for end, those in dialect.constants.items():
            for one in those if entry.name.endswith(end) else ():
                if one.style in ("", style):
                    dtype = own if one.dtype == "own" else one.dtype
                    yield entry, replace(one, dtype=dtype), entry.name.removesuffix(end[1:]) + one.name


def stored_as(dialect: Dialect, config: Config) -> frozenset[tuple[object, ...]]:
    """Return how a dialect stores the tensors of a model: equal where all files would have the same names, shapes and numbers."""
    kinds = {id(layer): layer for layer in layers(config)}.values()
    inside = [(layer, tensors(config, layer)) for layer in kinds]
    facts: Config = {"spelling": "", "coded": False}
    top = tensors(config, config)
    return frozenset(
        (dialect.prefixes[0], row.name, row.pattern.dims, row.pattern.parts, row.dtype, dialect.zero_centred and not row.whole)
        for row in dialect.rows
        for kind, known in (inside if row.inside else [(config, top)])
        if holds({**row.when, **row.written}, {**kind, **facts}) and all(part in known for part, _ in row.pattern.parts)
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One row for the layers of one kind in one unit."""

    row: Row
    dialect: Dialect
    config: Config
    kind: Config  # the config of these layers
    known: Mapping[str, Tensor]
    unit: Unit
    prefix: str
    present: Present
    stored: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, tuple[int, int]]]]  # the numbers of each layer's halves


def _prefix(dialect: Dialect, unit: Unit, present: Present) -> str:
    """Return what stands before the names of a unit: the first prefix under which a name is known."""
    if present is None:
        return dialect.prefixes[0]
    tops = [row.name for row in dialect.rows if "{" not in row.name and not row.name.startswith("/")]
    for prefix in dialect.prefixes:
        if any((unit.name, prefix + name) in present for name in tops):
            return prefix
    begins = {row.name.partition("{")[0] for row in dialect.rows if row.inside and not row.name.startswith("/")}
    for prefix in dialect.prefixes:  # nothing outside of the layers is there, as of adapters alone
        starts = tuple(prefix + begin for begin in begins)
        if any(of == unit.name and name.startswith(starts) for of, name in present):
            return prefix
    return dialect.prefixes[0]


def _applies(
    row: Row,
    dialect: Dialect,
    known: Mapping[str, Tensor],
    kind: Config,
    present: Present,
    also: Collection[str],
) -> bool:
    parts = [part for part, _ in row.pattern.parts]
    again = [part for part in parts if part not in known and value(kind, "tied") and TIED.get(part) in known]
    wanted = dialect.writes_tied or any(part in also for part in again)
    if present is None and again and not wanted:
        return False
    return all(part in known or part in again or adapters.stands_for(kind, part) in known for part in parts)


def _tensor(part: str, job: "_Job") -> Tensor:
    """Return the tensor that is stored under the name of one: that of a tied head, and A that several adapters have, is another."""
    names = (part, adapters.stands_for(job.kind, part), TIED.get(part, ""))
    return next(job.known[name] for name in names if name in job.known)


def _of_row(job: _Job, same: Sequence[int]) -> Iterator[tuple[int, Entry]]:
    """Yield the entries of a row, each with its layer, BEFORE or AFTER."""
    row, unit, present = job.row, job.unit, job.present
    parts = [_tensor(part, job) for part, _ in row.pattern.parts]
    stage = "layer" if row.inside else "last" if row.pattern.parts[0][0] not in job.known else parts[0].stage
    # of a source the names tell: beside further-token layers an embedding stands again, and the final norm with the last of the others
    elsewhere = {"first": not unit.first, "last": not unit.last}.get(stage) and row.pattern.parts[0][0] not in unit.also
    if present is None and elsewhere:
        return
    name = row.name[1:] if row.name.startswith("/") else job.prefix + row.name
    shares = _checked_shares(job, parts, same[0])
    axes = tuple(tensor.axes for tensor in parts)
    stacked = name.replace("{layer}.", "")
    # Megatron numbers the layers of such models, alike or not
    named = any(value(job.config, name) for name in ("blocks", "layer_ffn", "halves"))
    alike = not named and same[-1] < number(job.config, "layers")
    usual = row.inside and job.dialect.stacked and alike
    if usual and ((unit.name, stacked) in present if present is not None else len(same) == number(job.config, "layers")):
        yield BEFORE, _stacked(job, same, stacked, parts, shares, axes)
        return
    each = [*_each(numbered(name), shares, unit.expert_base)]
    spelled = [*_spelled(job, name, same)] if row.inside else [(0, name)]
    mark = f"{{{' '.join(numbered(name))}}}"
    known = [text.replace(mark, shown) for _, shown in (each[0], each[-1]) for _, text in spelled]
    if present is not None and len(each) > 1 and row.inside and not any((unit.name, text) in present for text in known):
        return  # another spelling of them: hundreds of names need no look
    tensors = {layer: (_names(parts, layer),) for layer in (same if row.inside else [0])}
    places = [({"first": BEFORE, "layer": layer}.get(stage, AFTER), text, tensors[layer]) for layer, text in spelled]
    folded = fold(row.pattern, each[0][0])  # the others fold alike
    stored = fold(row.stored, each[0][0]).shape if row.stored else folded.shape
    for held, shown in each:
        views = tuple(_views(folded, parts, held, {}))
        like = Like(folded.shape, stored, views, folded.padding, row.dtype, row.pattern, held, axes, row.cut, _joined(row))
        for at, text, names in places:
            text = text.replace(mark, shown)
            if present is None or (unit.name, text) in present:
                yield at, Entry(unit.name, text, like, names)


def _stacked(
    job: _Job,
    same: Sequence[int],
    name: str,
    parts: list[Tensor],
    shares: dict[str, Share],
    axes: tuple[tuple[str, ...], ...],
) -> Entry:
    """Return the entry of a tensor that holds a row for all layers."""
    pattern = Pattern(job.row.pattern.text, (("layer",), *job.row.pattern.dims), job.row.pattern.parts)
    held = {**shares, "layer": Share(0, len(same), len(same))}
    folded = fold(pattern, held)
    views = tuple(v for at, _ in enumerate(same) for v in _views(folded, parts, shares, {"layer": at}))
    stored = (len(same), *fold(job.row.stored or job.row.pattern, shares).shape)
    like = Like(folded.shape, stored, views, folded.padding, job.row.dtype, pattern, held, axes, job.row.cut, _joined(job.row))
    return Entry(job.unit.name, name, like, tuple(_names(parts, layer) for layer in same))


def _joined(row: Row) -> tuple[str, ...]:
    return row.joined if row.written.get("joined") else ()


def _spelled(job: _Job, name: str, same: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield each layer with its name: its place in the unit, or its place among the layers that predict further tokens.

    A source is looked up under all that such a layer may be called; a target has the first, or the first where several layers for one
    token are numbered in it.
    """
    (stored, beyond), half = job.stored, BY_PART[job.row.pattern.parts[0][0]].half
    usual, *further = job.dialect.further
    count, nested = len(stored), [other for other in further if "{inner}" in other]
    for layer in same:
        if layer < count or not usual:
            at = stored[layer][half] if layer < count else layer
            if job.unit.stop is None or job.unit.base <= at < job.unit.stop:
                yield layer, name.replace("{layer}", str(at - job.unit.base))
            continue
        token, inner = beyond[layer - count]
        alone = (nested if value(job.config, "hybrid") and nested else further)[:1]
        for other in alone if job.present is None else further:
            whole = name.replace(usual, other) if other[0] != "/" else name.replace(job.prefix + usual, other[1:])
            spelled = whole.replace("{layer}", str(token if nested else layer - count)).replace("{inner}", str(inner[half]))
            yield layer, spelled


def _each(axes: tuple[str, ...], shares: dict[str, Share], base: int | None) -> Iterator[tuple[dict[str, Share], str]]:
    """Yield the shares and the number of each index of some axes that has a tensor of its own, an expert; once where there is one."""
    if not axes:
        yield shares, ""
        return
    first = 0 if axes != ("expert",) else shares["expert"].start if base is None else base
    for indices in product(*(range(shares[axis].start, shares[axis].stop) for axis in axes)):
        own = {axis: Share(at, at + 1, shares[axis].size) for axis, at in zip(axes, indices, strict=True)}
        nth = reduce(lambda before, share: before * share.size + share.start, own.values(), 0)
        yield {**shares, **own}, str(nth - first)


def _names(parts: list[Tensor], layer: int) -> tuple[Canonical, ...]:
    return tuple(tensor.at(layer) for tensor in parts)


def _views(folded: Fold, parts: list[Tensor], shares: dict[str, Share], at: dict[str, int]) -> Iterator[View]:
    for slot, tensor in zip(folded.slots, parts, strict=True):
        yield view(slot, "", tensor.axes, shares, at)


def _checked_shares(job: _Job, parts: list[Tensor], layer: int) -> dict[str, Share]:
    try:
        return _shares(job.row.cut, job.dialect, job.kind, job.unit, adapters.rank(job.kind, parts[0]))
    except BadRequest as refusal:
        raise BadRequest(refusal.what, {"tensor": parts[0].at(layer), **refusal.facts}, remedy=refusal.remedy) from None


def _shares(cut: str, dialect: Dialect, config: Config, unit: Unit, rank: int = 0) -> dict[str, Share]:
    """Return what a unit holds of every axis, for a stored tensor that is cut along one of them; ``rank`` is that of an adapter."""
    size = sizes(config) | {RANK: rank}
    shares = {axis: Share(0, length, length) for axis, length in size.items()}
    once, cut = cut == "once", "expert" if cut == "once" else cut
    if cut == "embedding":
        cut = {"none": "", "rows": "vocab", "columns": "hidden"}[str(value(config, "embedding"))]
    shares |= {axis: Share(0, pad(config), size[axis]) for axis, pad in dialect.pads.items() if size[axis]}
    shares["vocab"] = _cut_vocabulary(size["vocab"], value(config, "padded_vocab"), Among())
    axis = AXES.get(cut)
    if axis is None:
        return shares
    place = unit.among(axis)
    match axis.cut:
        case "padded":
            shares[cut] = _cut_vocabulary(size[cut], value(config, "padded_vocab"), place)
        case "repeated":
            shares |= cut_or_repeat(cut, size[cut], axis.inner, size[axis.inner], place.world, place.rank)
        case "evenly":
            for each in (axis, *([AXES[axis.inner]] if axis.inner else [])):
                if (place := unit.among(each)).world > 1:
                    shares[each.name] = cut_evenly(each.name, size[each.name], place.world, place.rank)
            if once:  # the ranks add up what each of them makes
                shares["moe_hidden"] = Share((wide := size["moe_hidden"]) * place.rank, wide * (place.rank + 1), wide)
        case _:
            raise AssertionError(f"no ranks share the axis {cut!r}")
    return shares


def _cut_vocabulary(size: int, padded: Value, place: Among) -> Share:
    """Return a rank's rows: an equal part of what is stored, or of the next multiple of the world."""
    if not isinstance(padded, int):
        return cut_padded(size, place.world, place.rank)
    step = padded // place.world
    return Share(place.rank * step, (place.rank + 1) * step, size)
