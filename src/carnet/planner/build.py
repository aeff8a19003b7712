"""Build a plan: the entries of the source and of the target meet on the names and axes of the canonical tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.algebra.layout import round_up
from carnet.architectures.known import dialect_of
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.hf import generation
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect, less_one
from carnet.dialects.units import Unit, units
from carnet.dialects.vocabulary import Vocabulary, padded_rows
from carnet.dtypes import FLOATS
from carnet.errors import BadRequest, NotSupported
from carnet.formats.companions import Companions, lacking
from carnet.formats.detect import fingerprint
from carnet.formats.stored import Checkpoint, Key, label_of
from carnet.formats.tokenizers import GENERATION, Tokens, generation_eos
from carnet.inventory.adapting import adapted
from carnet.inventory.planes import type_of_weights
from carnet.inventory.sorting import coded_beside
from carnet.inventory.source_scales import NOTHING as NO_SCALES
from carnet.inventory.source_scales import SourceScales
from carnet.inventory.survey import Inventory, others_of, take
from carnet.model.fields import Config, Value
from carnet.model.model import canonical_shapes, further, number, value
from carnet.model.tensors import BY_PART
from carnet.planner import adapters
from carnet.planner.carrying import carried, is_carried
from carnet.planner.carrying import extents as carried_extents
from carnet.planner.carrying import move as move_carried
from carnet.planner.carrying import records as carried_records
from carnet.planner.choosing import choose, is_off, module_of
from carnet.planner.coding import Coding, asked, cache_tensors, constant_tensors, put_scales
from carnet.planner.coding import steps as code_steps
from carnet.planner.decoding import aside
from carnet.planner.ends import ends
from carnet.planner.factoring import check_computed, factors_of, prove_updates
from carnet.planner.files import target_files, target_texts
from carnet.planner.held import Held, keep, source_pieces
from carnet.planner.joining import cached, is_joined, joined, of_source, places
from carnet.planner.meeting import meet
from carnet.planner.proof import prove
from carnet.plans.blocks import by_file
from carnet.plans.columns import Gathered, Plan, Steps
from carnet.plans.request import Request, as_data, flag_of
from carnet.storage.schemes import file_at

NOTHING = Companions()
FIRST = frozenset({"embed", "draft.join"})  # what has the type that a model is of


def build(
    checkpoint: Checkpoint,
    request: Request,
    along: Companions = NOTHING,
    tokens: Tokens | None = None,
    calibration: Mapping[str, float] | None = None,
) -> Plan:
    """Return the proven plan of a crossing; its memory and window are still open (0).

    ``along`` are the files that go along with the weights; ``tokens`` what the folder says of the tokenizer that goes along;
    ``calibration`` says how large activations were, under the names of ``--amax``.
    """
    changed = [name for name in ("dtype", "adapter") if getattr(request, name) is not None]
    if request.also is not None and changed:
        remedy = f"leave out {flag_of('also')} optimizer, or {flag_of(changed[0])}"
        raise BadRequest("a training goes on with the weights that it has", {"option": flag_of(changed[0])}, remedy=remedy)
    source = take(checkpoint, request.drop, request.vocab_size, request.tokens, alone=KINDS[request.to].alone)
    source = adapted(source, request.adapter, request.adapter_scale)
    names = [name for _, name in source.checkpoint.tensors] if request.to == source.dialect.name else []
    target = dialect_of(source.family, request.to, source.config, names)
    adapters.check(source.config, target)
    said, contradicted = ends(source.config, {} if tokens is None else tokens.ids, source.vocabulary.tokens)
    notes = {} if tokens is None else _compared(tokens, source.vocabulary)
    notes |= others_of(source.others) | _trained_as(source.checkpoint, request)
    notes |= (
        {"token ids": f"contradicted, so config.json has what the model itself says, or nothing: {'; '.join(contradicted)}"}
        if contradicted
        else {}
    )
    if target.kind.companions and target.texts:
        generation = next((file_at(asset.path)[0] for asset in along.assets if asset.name == GENERATION), None)
        ended = None if generation is None else generation_eos(generation)
        notes |= lacking(along.names, said.get("eos", value(source.config, "eos")), ended)
    plan = make_plan(source, target, request, said=said, along=along, calibration=calibration or {}).plan
    return replace(plan, notes={**plan.notes, **notes}, dropped={**plan.dropped, **along.left})


def _trained_as(source: Checkpoint, request: Request) -> dict[str, str]:
    """Return what is to be said of a source whose weights ModelOpt trained, or calibrated, as codes that this target does not have."""
    words = " and ".join(source.trained_as)
    if not words or request.quantize in source.trained_as:
        return {}
    if request.quantize is not None:
        return {"trained as": f"{words}, and written as {request.quantize}: the magnitudes that its quantizers saw go along"}
    return {
        "trained as": f"{words}, and written as plain weights: --quantize {source.trained_as[0]} takes what its quantizers saw along"
    }


def _compared(tokens: Tokens, model: Vocabulary) -> dict[str, str]:
    """Return what is to be said of a tokenizer that has fewer tokens than the model has rows; refuse one that has more."""
    if tokens.reach > model.tokens:
        facts = {"tokenizer": f"{tokens.reach:,} tokens", "model": f"{model.tokens:,} rows of {model.rows:,} that are stored"}
        enough = (
            f"--vocab-size {tokens.reach}"
            if tokens.reach <= model.rows
            else "name the tokenizer that the model was trained with"
        )
        raise BadRequest("the tokenizer has more tokens than the model has rows", facts, remedy=enough)
    if tokens.reach in (0, model.tokens):
        return {}
    return {"tokenizer": f"{tokens.reach:,} tokens; the last {model.tokens - tokens.reach:,} rows of the model have none"}


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what makes its coding steps anew where the scales that a source brings along have changed."""

    plan: Plan
    coding: Callable[[SourceScales], Steps]


def make_plan(
    source: Inventory,
    target: Dialect,
    request: Request,
    *,
    among: Sequence[Unit] | None = None,
    said: Config | None = None,
    along: Companions = NOTHING,
    calibration: Mapping[str, float] | None = None,
    source_scales: SourceScales | None = None,
) -> Planned:
    """Return the proven plan that brings an inventory into a dialect.

    ``among`` are the units of the target, None for those of the request; ``said`` are fields that the target has otherwise than the
    request tells; ``source_scales`` are the scales that the source brings along, None where they are to be read from it.
    """
    _refuse_computed(source)
    if target.plain and (request.quantize is not None or request.kv_cache is not None):
        raise NotSupported(f"{target.name}'s class of {source.family.name!r} loads no codes", remedy="leave out --quantize")
    config = {**_target_config(source, request, target), **(said or {})}
    ranks = units(target, config) if among is None and target.ranked else among or ()
    gathered = Gathered()
    carries, joins = is_carried(source, target, request), is_joined(source, target, request)
    for problem in () if carries else coded_beside(source.config, str(source.checkpoint.root)):
        raise problem
    wanted = [*entries(target, config, None, request.names, among, coded=carries or joins or request.quantize is not None)]
    adapters.check_placed(source.config, wanted, target, request.tp)
    coded = carried(source, wanted) if carries else joined(source, target, config, wanted) if joins else {}
    lying = {name for one in coded.values() for name in one.entry.names} if carries else ()
    held, shapes = of_source(source) if joins else (source, canonical_shapes(source.config))
    found, extents = source_pieces(held, request.dtype, gathered, carried_extents(source, coded) if carries else ())
    kept = keep(found, source, {**shapes, **source.changes.factors}, gathered, lying)
    check_computed(source.changes, wanted, target.name)
    factors, updates = factors_of(source.changes, kept, gathered)
    shifts = _shifts(source, target, config)
    plain = [entry for entry in wanted if (entry.unit, entry.name) not in coded]
    computed = type_of_weights(source.checkpoint.tensors, source.config)
    own = str(config["dtype"]) if target.kind.one_type or computed else None
    dtypes = _dtypes(plain, kept, request.dtype, own, {} if target.kind.rounds_sums else shifts)
    coding = asked(request, source, calibration or {}, source_scales)
    coded |= (
        choose(coding.recipe, coding.exclude, coding.off, wanted, dtypes, static=coding.static) if coding is not None else {}
    )
    wanted = [coded[key].entry if (key := (entry.unit, entry.name)) in coded else entry for entry in wanted]
    constants = constant_tensors(target, wanted, source.said if joins else None, str(config["dtype"]))
    cache = cache_tensors(coding, wanted, dtypes) | constants
    base = request.adapter_base or source.checkpoint.notes.get("base")
    training = source.checkpoint.training
    made = target_files(target, wanted, dtypes, config, request, coded, cache, [unit.name for unit in ranks], base, training)

    def code(source_scales: SourceScales, gathered: Gathered) -> Gathered:
        if coding is not None:
            known = replace(coding, source_scales=source_scales)
            scales = cache_tensors(known, wanted, dtypes)
            code_steps(known, coded, made.matrices, made.laid, kept, scales, gathered)
        return gathered

    meet(made.places, kept, shifts, gathered)
    brought = cached(wanted, target, constants, made.laid, shapes) if joins else {}
    if joins:
        meet([*places(source, target, coded, made.laid, shapes), *brought.values()], kept, {}, gathered)
    put_scales({key: one for key, one in constants.items() if key not in brought}, made.laid, gathered)
    if carries:
        move_carried(source, coded, made.laid, gathered)
    steps = by_file(code(NO_SCALES if coding is None else coding.source_scales, gathered).steps())
    files, more = made.files, {**_more(source, target, along), **(carried_records(source) if carries or joins else {})}
    proof = prove((*files, made.scratch, factors), extents, steps)
    prove_updates(factors, updates, steps)
    plan = Plan(
        source=str(source.checkpoint.root),
        fingerprint=fingerprint(source.checkpoint),
        request=as_data(request),
        family=source.family.name,
        files=files,
        texts=target_texts(source.family, target, config, files, coding, wanted, coded, more, base, training),
        scratch=made.scratch,
        factors=factors,
        updates=updates,
        raws=made.raws,
        assets=along.assets,
        steps=steps,
        dropped={**source.dropped, **({} if carries else aside(source))},
        proof={**proof, "vocabulary rows": source.vocabulary.rows, "vocabulary rows left out": source.vocabulary.padding},
        memory=0,
        window=0,
        notes={**source.notes, **_left_plain(coding, wanted), "vocabulary": str(source.vocabulary)},
        unused=source.heard.unused,
        accepted=source.heard.accepted,
        needs=made.needs.data,
    )
    return Planned(plan, lambda source_scales: code(source_scales, gathered.anew()).steps())


def _left_plain(coding: Coding | None, wanted: Sequence[Entry]) -> dict[str, str]:
    """Return what is to be said of modules that stay plain though nobody asked for that."""
    off = sorted(module_of(entry) for entry in wanted if is_off(entry, coding.off)) if coding is not None else []
    more = f" and {len(off) - 1} more" if len(off) > 1 else ""
    return {"left plain": f"{off[0]}{more}, whose quantizers were off"} if off else {}


def _refuse_computed(source: Inventory) -> None:
    """Refuse a source that holds what was computed of a model's tensors: no function of carnet's has an exact inverse."""
    for key, entry in source.entries.items():
        name = next((name for name in entry.names if name.tensor.function), None)
        if name is not None:
            facts = {"where": str(source.checkpoint.root), "tensor": label_of(key), "computed of": ", ".join(name.origins)}
            remedy = "cross the checkpoint that it was made of"
            raise NotSupported(
                "the checkpoint holds a tensor from which a model's own cannot be had back", facts, remedy=remedy
            )


def _more(source: Inventory, target: Dialect, along: Companions) -> dict[str, object]:
    """Return what one Hugging Face config takes over from another: how texts are generated, and the code that goes along."""
    code: dict[str, object] = {} if along.auto_map is None else {"auto_map": along.auto_map}
    return (
        {**generation(source.checkpoint.config), **code} if source.dialect.kind.companions and target.kind.companions else code
    )


def _target_config(source: Inventory, request: Request, target: Dialect) -> dict[str, Value]:
    config: dict[str, Value] = {
        **source.config,
        "padded_vocab": None,
        "tp": 1,
        "pp": 1,
        "world": 1,
        "ep": 1,
        "moe_tp": 1,
        "embedding": "none",
        "halves": False,
    }
    own = value(source.config, "dtype")
    embed = (
        own if key in source.coded else stored.dtype
        for key, stored in source.checkpoint.tensors.items()
        if key in source.entries and not FIRST.isdisjoint(source.entries[key].names)
    )
    computed = type_of_weights(source.checkpoint.tensors, source.config)
    config["dtype"] = request.dtype or computed or next(embed, own)  # of adapters alone, their own
    if target.kind.pads_vocabulary:
        config |= {"tp": request.tp, "pp": request.pp, "ep": request.ep, "zero_centred": source.zero_centred}
        config["padded_vocab"] = padded_rows(number(config, "vocab"), request.tp)
    elif target.ranked:
        if request.tp % request.ep:
            raise BadRequest(
                f"{request.tp} ranks cannot share the experts by {request.ep}", remedy="use an --ep that divides --tp"
            )
        if number(source.config, "mtp") and (target.kind.releases or not any(target.further)):
            raise _further_apart(source, target)
        if (
            target.kind.whole_ep and request.ep > 1 and not number(config, "experts")
        ):  # vllm/config/model.py _verify_with_expert_parallelism
            raise BadRequest("the model has no experts that ranks could share", {"ep": request.ep}, remedy="leave out --ep")
        if target.kind.whole_ep and request.ep not in (1, request.tp):
            facts = {
                "tp": request.tp,
                "ep": request.ep,
                "because": f"{target.name} shares the experts among all ranks, or each",
            }
            raise BadRequest("some of the ranks cannot share the experts", facts, remedy=f"--ep {request.tp}, or leave it out")
        config |= {"tp": request.tp, "pp": request.pp, "world": request.tp * request.pp}
        config |= {"padded_vocab": _padded_rows(target, config, request.tp)} if target.kind.pads_to else {}
        config |= {"ep": request.ep, "moe_tp": request.tp // request.ep, "embedding": _embedding(request, target)}
    elif (request.tp, request.pp, request.ep, request.parallel_embedding or "none") != (1, 1, 1, "none"):
        raise BadRequest(
            f"a target of the kind {target.name!r} is not cut for ranks",
            remedy="leave out --tp, --pp, --ep and --parallel-embedding",
        )
    return config


def _further_apart(source: Inventory, target: Dialect) -> NotSupported:
    """Return the refusal of layers that an engine loads as a model of their own."""
    apart = source.dialect.further[1].strip("/").partition("{layer}")[0]
    patterns = [f"{apart}*"] if apart else [f"*layers.{layer}.*" for layer in further(source.config)]
    drop = " ".join(f"--drop '{each}'" for each in patterns)
    what = f"{target.name} loads layers that predict further tokens as a model of their own"
    return NotSupported(what, remedy=f"{drop} leaves them behind")


def _padded_rows(target: Dialect, config: Config, ranks: int) -> int:
    """Return how many rows of a vocabulary some ranks store that pad it to a multiple; refuse where they cannot share them."""
    rows = round_up(number(config, "vocab"), target.kind.pads_to)
    if rows % ranks:
        facts = {"tp": ranks, "rows": f"{rows}, a multiple of {target.kind.pads_to}"}
        raise BadRequest(
            "the ranks cannot share the vocabulary", facts, remedy=f"use a tensor-parallel size that divides {rows}"
        )
    return rows


def _embedding(request: Request, target: Dialect) -> str:
    """Return how ranks share the embedding: as asked, or as the family's class does where there is more than one."""
    return request.parallel_embedding or (target.embedding if request.tp > 1 else "none")


def _dtypes(
    wanted: Iterable[Entry], kept: Mapping[str, Held], asked: str | None, own: str | None, exact: Mapping[str, float]
) -> dict[Key, str]:
    """Return the element type of every target tensor: the one asked for, the one that all weights have, or the source's own.

    A sum of ``exact`` is kept in f32, which holds it without rounding; NVIDIA's ranks round it.
    """
    dtypes, known, floats = dict[Key, str](), dict[tuple[int, ...], str](), set(FLOATS)
    for entry in wanted:
        names = entry.names
        if entry.dtype or (exact and not exact.keys().isdisjoint(names)):
            dtypes[entry.unit, entry.name] = entry.dtype or "f32"
            continue
        names = tuple([origin for name in names for origin in name.origins])
        cuts = names[0].plane != "", *[id(kept[name].cut) for name in names]
        if cuts not in known:
            # of codes: as asked
            found = {dtype or asked or "u8" for name in names for dtype in kept[name].cut.dtypes}
            wished = asked or (own if names[0].tensor.part in BY_PART and not names[0].plane else None)
            found = {wished} if wished is not None and found <= floats else found
            if len(found) > 1:
                raise NotSupported(
                    f"the parts of {entry.name!r} have different element types",
                    {"found": ", ".join(sorted(found))},
                    remedy="name one with --dtype",
                )
            known[cuts] = found.pop()
        dtypes[entry.unit, entry.name] = known[cuts]
    return dtypes


def _shifts(source: Inventory, target: Dialect, config: Config) -> dict[str, float]:
    """Return what is added to a tensor on the way: one to a norm that only the source stores less one."""
    there = less_one(target, config)
    differ = source.less_one ^ there
    shapes = canonical_shapes(source.config) if differ else ()
    return {name: -1.0 if name.tensor.part in there else 1.0 for name in shapes if name.tensor.part in differ}
