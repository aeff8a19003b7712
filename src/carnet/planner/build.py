"""Build a plan: the entries of the source and of the target meet on the names and axes of the canonical tensors."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.algebra.box import Box, Line, along, intersect, overlap, uncovered, volume, whole
from carnet.algebra.layout import View
from carnet.architectures.known import dialect_of
from carnet.dialects.entries import Entry, Unit, entries, units
from carnet.dialects.hf import generation
from carnet.dialects.rows import Dialect
from carnet.dialects.vocabulary import Vocabulary, padded_rows
from carnet.dtypes import FLOATS
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported
from carnet.formats.companions import Companions, lacking
from carnet.formats.detect import fingerprint
from carnet.formats.stored import Checkpoint, Chunk, Key, dense_strides, label_of
from carnet.formats.tokenizers import GENERATION, Tokens, generation_eos
from carnet.inventory.source_scales import SourceScales
from carnet.inventory.survey import Inventory, is_zero_centred, others_of, take
from carnet.model.fields import Config, Value
from carnet.model.model import canonical_shapes, number, value
from carnet.planner.choosing import choose
from carnet.planner.coding import asked, cache_tensors
from carnet.planner.coding import steps as coding_steps
from carnet.planner.decoding import alike, aside, coded_pieces
from carnet.planner.ends import ends
from carnet.planner.files import target_files, target_texts
from carnet.planner.pieces import Piece, Shelf, cut, pieces, separate, views_of
from carnet.planner.proof import Extent, prove
from carnet.plans.request import Request, as_data
from carnet.steps import Fill, Make, Move, Place, Plan, Same, Step, TargetFile, TargetTensor
from carnet.storage.schemes import file_at

NOTHING = Companions()


def build(
    checkpoint: Checkpoint,
    request: Request,
    along: Companions = NOTHING,
    tokens: Tokens | None = None,
    calibration: Mapping[str, float] | None = None,
) -> Plan:
    """Return the proven plan of a crossing; its memory, window and threads are still open (0).

    ``along`` are the files that go along with the weights; ``tokens`` what the folder says of the tokenizer that goes along;
    ``calibration`` says how large activations were, under the names of ``--amax``.
    """
    source = take(checkpoint, request.drop, request.vocab_size, request.tokens)
    target = dialect_of(source.family, request.to)
    said, contradicted = ends(source.config, {} if tokens is None else tokens.ids, source.vocabulary.tokens)
    notes = {} if tokens is None else _compared(tokens, source.vocabulary)
    notes |= others_of(source.others)
    notes |= (
        {"token ids": f"contradicted, so config.json has what the model itself says, or nothing: {'; '.join(contradicted)}"}
        if contradicted
        else {}
    )
    if target.kind.companions:
        generation = next((file_at(asset.path)[0] for asset in along.assets if asset.name == GENERATION), None)
        ended = None if generation is None else generation_eos(generation)
        notes |= lacking(along.names, said.get("eos", value(source.config, "eos")), ended)
    plan = draw(source, target, request, said=said, along=along, calibration=calibration or {}).plan
    return replace(plan, notes={**plan.notes, **notes}, dropped={**plan.dropped, **along.left})


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
class Drawing:
    """A plan, and what makes its coding steps anew where the scales that a source brings along have changed."""

    plan: Plan
    coding: Callable[[SourceScales], Iterator[Step]]


def draw(
    source: Inventory,
    target: Dialect,
    request: Request,
    *,
    among: Sequence[Unit] | None = None,
    said: Config | None = None,
    along: Companions = NOTHING,
    calibration: Mapping[str, float] | None = None,
    source_scales: SourceScales | None = None,
) -> Drawing:
    """Return the proven plan that brings an inventory into a dialect.

    ``among`` are the units of the target, None for those of the request; ``said`` are fields that the target has otherwise than the
    request tells; ``source_scales`` are the scales that the source brings along, None where they are to be read from it.
    """
    config = {**_target_config(source, request, target), **(said or {})}
    ranks = units(target, config) if among is None and target.ranked else among or ()
    found, extents = _source_pieces(source, request.dtype)
    kept, steps = _keep(found, source)
    wanted = list(entries(target, config, None, request.spelling, among))
    shifts = _shifts(source, target, config)
    dtypes = _dtypes(wanted, kept, request, {} if target.kind.rounds_sums else shifts)
    coding = asked(request, source, calibration or {}, source_scales)
    coded = choose(coding.recipe, coding.exclude, wanted, dtypes, static=coding.static) if coding is not None else {}
    wanted = [coded[key].entry if (key := (entry.unit, entry.name)) in coded else entry for entry in wanted]
    cache = cache_tensors(coding, wanted, dtypes)
    made = target_files(target, wanted, dtypes, config, request, coded, cache, [unit.name for unit in ranks])

    def code(source_scales: SourceScales) -> Iterator[Step]:
        if coding is not None:
            known = replace(coding, source_scales=source_scales)
            scales = cache_tensors(known, wanted, dtypes)
            yield from coding_steps(known, coded, made.matrices, made.laid, kept, scales)

    steps += _meet(made.places, kept, shifts)
    steps += code(coding.source_scales) if coding is not None else ()
    files = made.files
    proof = prove((*files, made.scratch), extents, steps)
    plan = Plan(
        source=str(source.checkpoint.root),
        fingerprint=fingerprint(source.checkpoint),
        request=as_data(request),
        family=source.family.name,
        files=files,
        texts=target_texts(source.family, target, config, files, coding, wanted, coded, _more(source, target, along)),
        scratch=made.scratch,
        raws=made.raws,
        assets=along.assets,
        steps=tuple(steps),
        dropped={**source.dropped, **aside(source)},
        proof={**proof, "vocabulary rows": source.vocabulary.rows, "vocabulary rows left out": source.vocabulary.padding},
        memory=0,
        window=0,
        threads=0,
        notes={**source.notes, "vocabulary": str(source.vocabulary)},
        unused=source.heard.unused,
        accepted=source.heard.accepted,
        needs=made.needs.data,
    )
    return Drawing(plan, code)


def _more(source: Inventory, target: Dialect, along: Companions) -> dict[str, object]:
    """Return what one Hugging Face config takes over from another: how texts are generated, and the code that goes along."""
    code: dict[str, object] = {} if along.auto_map is None else {"auto_map": along.auto_map}
    return (
        {**generation(source.checkpoint.config), **code}
        if source.dialect.kind is target.kind and target.kind.companions
        else code
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
    }
    embed = next(
        stored
        for key, stored in source.checkpoint.tensors.items()
        if key in source.entries and _holds(source.entries[key], "embed")
    )
    config["dtype"] = request.dtype or embed.dtype
    if target.kind.pads_vocabulary:
        config |= {"tp": request.tp, "pp": request.pp, "ep": request.ep, "zero_centred": source.zero_centred}
        config["padded_vocab"] = padded_rows(number(config, "vocab"), request.tp)
    elif target.ranked:
        if request.tp % request.ep:
            raise BadRequest(
                f"{request.tp} ranks cannot share the experts by {request.ep}", remedy="use an --ep that divides --tp"
            )
        config |= {"tp": request.tp, "pp": request.pp, "world": request.tp * request.pp}
        config |= {"ep": request.ep, "moe_tp": request.tp // request.ep, "embedding": _embedding(request, target)}
    elif (request.tp, request.pp, request.ep, request.parallel_embedding or "none") != (1, 1, 1, "none"):
        raise BadRequest(
            f"a target of the kind {target.name!r} is not cut for ranks",
            remedy="leave out --tp, --pp, --ep and --parallel-embedding",
        )
    return config


def _embedding(request: Request, target: Dialect) -> str:
    """Return how ranks share the embedding: as asked, or as the family's class does where there is more than one."""
    return request.parallel_embedding or (target.embedding if request.tp > 1 else "none")


def _holds(entry: Entry, tensor: str) -> bool:
    return any(view.tensor == tensor for view in entry.views)


def _source_pieces(source: Inventory, dtype: str | None) -> tuple[dict[str, list[Piece]], list[Extent]]:
    """Return where every canonical tensor lies, and every extent that must be used up."""
    found: dict[str, list[Piece]] = defaultdict(list)
    coded, extents = coded_pieces(source, dtype)
    for piece in coded:
        found[piece.tensor].append(piece)
    for key, entry in source.entries.items():
        if key in source.coded:
            continue
        stored = source.checkpoint.tensors[key]
        label = label_of(key)
        for chunk in stored.chunks:
            padding = [shared for box in entry.padding if (shared := intersect(box, chunk.box)) is not None]
            inside = tuple(
                [Box(tuple(s - c for s, c in zip(box.start, chunk.box.start, strict=True)), box.shape) for box in padding]
            )
            extents.append(Extent(label, chunk.file, chunk.offset, chunk.box.shape, chunk.strides, stored.dtype, inside))
            for view in entry.views:
                for piece in pieces(view, chunk, stored.dtype, stored.shape):
                    found[piece.tensor].append(piece)
    return found, extents


def _keep(found: Mapping[str, list[Piece]], source: Inventory) -> tuple[dict[str, Shelf], list[Step]]:
    """Keep each element of the source once; what repeats it is to be compared."""
    kept, steps = dict[str, Shelf](), list[Step]()
    tiled = set[tuple[tuple[int, ...], tuple[Box, ...]]]()  # sixty layers alike are looked at once
    for name, shape in canonical_shapes(source.config).items():
        cut_so = shape, tuple([piece.box for piece in found[name]])
        if cut_so in tiled:
            kept[name] = Shelf(found[name])
            continue
        distinct, copies = separate(found[name])
        boxes = [piece.box for piece in distinct]
        if uncovered(whole(shape), boxes) is not None or overlap(boxes) is not None:
            raise BadCheckpoint(
                f"the chunks of {name!r} do not make up the whole tensor", {"where": str(source.checkpoint.root)}
            )
        kept[name] = Shelf(distinct)
        if not copies:
            tiled.add(cut_so)
        for piece, copy, box in copies:
            if piece.encoding is not None or copy.encoding is not None:
                steps += alike(name, box, piece, copy)
            else:
                steps.append(Same(name, box.start, box.shape, cut(piece, box), cut(copy, box)))
    return kept, steps


def _dtypes(wanted: Iterable[Entry], kept: Mapping[str, Shelf], request: Request, exact: Collection[str]) -> dict[Key, str]:
    """Return the element type of every target tensor: the source's own, or the one asked for.

    A sum of ``exact`` is kept in f32, which holds it without rounding; NVIDIA's ranks round it.
    """
    dtypes = {}
    own = {name: {_own(piece, request) for piece in shelf.pieces} for name, shelf in kept.items()}
    for entry in wanted:
        if entry.dtype or any(view.tensor in exact for view in entry.views):
            dtypes[entry.unit, entry.name] = entry.dtype or "f32"
            continue
        found = set().union(*(own[view.tensor] for view in entry.views))
        if request.dtype is not None and found <= set(FLOATS):
            found = {request.dtype}
        if len(found) > 1:
            raise NotSupported(
                f"the parts of {entry.name!r} have different element types",
                {"found": ", ".join(sorted(found))},
                remedy="name one with --dtype",
            )
        dtypes[(entry.unit, entry.name)] = found.pop()
    return dtypes


def _own(piece: Piece, request: Request) -> str:
    """Return the element type of a piece; codes have the one that they are dequantized to."""
    return request.dtype if request.dtype is not None and piece.encoding is not None else piece.place.dtype


def _shifts(source: Inventory, target: Dialect, config: Config) -> dict[str, float]:
    """Return what is added to a tensor on the way: one to a norm that only the source stores less one."""
    shift = source.zero_centred - is_zero_centred(target, config)
    return {name: float(shift) for name in canonical_shapes(source.config) if name.tensor.less_one} if shift else {}


def _meet(
    places: Iterable[tuple[Entry, Box, TargetFile, TargetTensor]],
    kept: Mapping[str, Shelf],
    shifts: Mapping[str, float],
) -> Iterator[Step]:
    """Yield a step for every box that a target tensor and a source chunk share, and for every padding of the target."""
    known = dict[int, Line[View]]()
    for entry, part, file, tensor in places:
        chunk = Chunk(part, file.name, tensor.offset, dense_strides(part.shape))
        views: Sequence[View] = entry.views
        if len(views) > 1:
            if id(entry) not in known:
                known[id(entry)] = views_of(entry)
            views = known[id(entry)].between(*along(part, 0))
        for view in views:
            for target in pieces(view, chunk, tensor.dtype, entry.shape, file.space):
                moved = 0
                for source in kept[view.tensor].near(target.box):
                    box = intersect(source.box, target.box)
                    if box is None:
                        continue
                    here, there = cut(source, box), cut(target, box)
                    if source.encoding is not None:
                        if view.tensor in shifts:
                            raise NotSupported(f"{view.tensor!r} is stored as codes, and one is added to it on the way")
                        yield Make("dequantize", view.tensor, box.start, box.shape, here, there, source.encoding)
                    else:
                        yield Move(view.tensor, box.start, box.shape, here, there, shifts.get(view.tensor, 0.0))
                    moved += volume(box)
                if moved != volume(target.box):
                    raise CarnetError("the source does not fill the target", {"tensor": view.tensor, "file": file.name})
        for padding in entry.padding:
            shared = intersect(padding, part)
            if shared is not None:
                at = Piece(entry.padded, part, Place(file.name, chunk.offset, chunk.strides, tensor.dtype, file.space))
                yield Fill(entry.padded, shared.shape, cut(at, shared))
