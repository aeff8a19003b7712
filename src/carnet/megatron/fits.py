"""A checkpoint *fits* a spec when each fills the other: every parameter that the spec asks for, every weight that is stored.

The model is built on the meta device, a rank after the other, and asked what megatron-core itself would ask it before it loads: the
keys of its shards, their places, and the whole they are parts of. A layer that the spec builds as nothing asks for nothing: then its
weights are left over, and that is a misfit as much as one that is missing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from carnet.algebra.box import Box, volume, whole
from carnet.architectures.known import hear_config, names_none, recognise
from carnet.dialects.configs import lookup
from carnet.dialects.megatron.releases import ACCEPTABLE, PATTERNS
from carnet.dialects.megatron.rows import DROPPED, MEGATRON
from carnet.dialects.writing import write
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.megatron import PER_RANK, STORE
from carnet.formats.stored import Checkpoint, Key, Stored, label_of
from carnet.inventory.opening import opened
from carnet.inventory.vocabulary_rows import stored_rows
from carnet.megatron.asks import Ask, Asked, of_ranks, of_store, spec_of
from carnet.megatron.fused import Saver
from carnet.megatron.meta import WHOLE, Cut
from carnet.megatron.models import Arguments, describes_hybrid
from carnet.megatron.post_training.modelopt.hybrid.model_specs import misplaced
from carnet.plans.options import local
from carnet.progress import verb

SPECS = ("modelopt", "te", "local")


@dataclass(frozen=True, slots=True)
class Misfit:
    """One thing that does not go together."""

    what: str  # missing, left over, ...
    name: str  # the key, or the layer
    wanted: str  # what the spec asks for
    found: str  # what is stored


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a checkpoint fills the model of a spec."""

    source: str  # the checkpoint
    spec: str  # as it is called in Python
    cut: Cut  # of the model
    fills: tuple[tuple[Ask, str], ...]  # what is asked for and stored so, and the element type that it is stored in
    misfits: tuple[Misfit, ...]
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names of what is stored and no weight

    @property
    def good(self) -> bool:
        """Say whether nothing is missing and nothing is left over."""
        return not self.misfits

    @property
    def cast(self) -> tuple[str, ...]:
        """Name the keys that are stored in another type than the model has: loading casts them."""
        return tuple(sorted({ask.key for ask, stored in self.fills if ask.dtype != stored}))


@verb
def fits(
    path: str | Path,
    spec: str = "modelopt",
    *,
    config: str | Path | None = None,
    tp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    written_by: str | None = None,
) -> Fit:
    """Say whether a checkpoint of Megatron's fills the model of a spec: ``modelopt`` (carnet's), ``te`` or ``local``.

    Only headers are read. ``tp``, ``pp`` and ``ep`` cut the model, 1 each where they are not said; a file a rank is cut as it was
    saved. ``config`` stands in place of the checkpoint's arguments, which mean what the program that wrote them made of them:
    ``written_by``, where that does not show. Raises BadCheckpoint, BadRequest and NotSupported as `inspect`
    does, and where no such model can be built.
    """
    if spec not in SPECS:
        raise BadRequest(f"{spec!r} is not a spec that carnet knows", {"known": ", ".join(SPECS)})
    checkpoint = _open(local("ckpt", path), None if config is None else local("config", config), written_by)
    kept, objects, dropped = _sorted(checkpoint)
    said = _arguments(checkpoint)
    cut = _cut(checkpoint, kept, said, (tp, pp, ep))
    pattern = said.get(PATTERNS[0]) or said.get(PATTERNS[1]) or ""
    lost = misplaced(str(pattern)) if describes_hybrid(said) else {}
    if lost:
        nowhere = tuple(Misfit("no place", f"decoder.layers.{layer}", "nothing", why) for layer, why in lost.items())
        return Fit(str(checkpoint.root), spec, cut, (), nowhere, dropped)
    saver: Saver | None = _saver(kept) if spec == "modelopt" else "te" if spec == "te" else None
    text, builder = spec_of(spec, saver, hybrid=describes_hybrid(said))
    try:
        if checkpoint.format == PER_RANK:
            grouped = spec == "te" and bool(said.get("moe_grouped_gemm"))
            asked = Asked(of_ranks(said, builder, cut, saver, grouped=grouped), set(), {})
        else:
            asked = of_store(said, builder, cut, [name for _, name in kept])
    except BadCheckpoint as error:
        if cut == WHOLE or checkpoint.format == PER_RANK:
            raise
        raise BadRequest("megatron-core cuts no such model so", {"asked for": _said(cut), **error.facts}) from error
    # Transformer Engine's own modules have states that no other has, so that only its own spec could say which
    states = set() if spec == "te" else asked.states
    fills, misfits = _compare(asked.asks, kept)
    return Fit(str(checkpoint.root), text, cut, fills, (*misfits, *_lone(asked, states, kept, objects)), dropped)


def facts(found: Fit) -> dict[str, object]:
    """Return what a fit is, as lines of a few words each."""
    cast, said = found.cast, "fills" if found.good else "does not fill"
    keys = {_key(ask) for ask, _ in found.fills}
    elements = sum(volume(box) for _, box in {(_key(ask), ask.box) for ask, _ in found.fills})
    return {
        "fits" if found.good else "misfits": f"{found.source} {said} the model of the spec",
        "spec": found.spec,
        "model": f"{_said(found.cut)}, on the meta device",
        "filled": f"{len(found.fills):,} parts of parameters by {len(keys):,} stored tensors, {elements:,} elements",
        **({"cast": f"{len(cast)} of them, {cast[0]} the first"} if cast else {}),
        "left behind": ", ".join(f"{reason} ({len(names)})" for reason, names in found.dropped.items()) or "nothing",
    }


def misfits(found: Fit) -> list[tuple[str, ...]]:
    """Return a line for each thing that does not go together."""
    return [(each.what, each.name, each.wanted, each.found) for each in found.misfits]


def lines(found: Fit, *, every: bool = False) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return a table of what fills what: a line for all layers, ranks and experts that are alike, or for each part of a parameter."""
    if every:
        head = ["parameter", "rank", "stored tensor", "box", "type"]
        return head, [
            (ask.parameter, ask.rank, label_of(_key(ask)), f"{_span(ask.box)} of {_shape(ask.shape)}", stored)
            for ask, stored in found.fills
        ]
    alike = Counter(
        (_any(ask.parameter), _any(label_of(_key(ask))), _shape(ask.box.shape), _shape(ask.shape), stored)
        for ask, stored in found.fills
    )
    head = ["parameter", "stored tensor", "parts", "of this shape", "out of", "type"]
    return head, [(*kind[:2], f"{count:,}", *kind[2:]) for kind, count in alike.items()]


def _any(name: str) -> str:
    """Return a name with a star for the number of a layer, of an expert, of a rank."""
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=^tp)\d+(?=-)|(?<=-[pev]p)\d+|(?<=\.weight)\d+$", "*", name)


def data(found: Fit) -> dict[str, object]:
    """Return a fit as plain values."""
    return {
        "fits": found.good,
        "source": found.source,
        "spec": found.spec,
        "cut": {"tp": found.cut.tp, "pp": found.cut.pp, "ep": found.cut.ep, "vp": found.cut.vp},
        "filled": [
            {
                "parameter": ask.parameter,
                "rank": ask.rank,
                "key": label_of(_key(ask)),
                "start": list(ask.box.start),
                "shape": list(ask.box.shape),
                "of": list(ask.shape),
                "dtype": ask.dtype,
                "stored": stored,
            }
            for ask, stored in found.fills
        ],
        "misfits": [{"what": m.what, "name": m.name, "wanted": m.wanted, "found": m.found} for m in found.misfits],
        "cast": list(found.cast),
        "dropped": {reason: list(names) for reason, names in found.dropped.items()},
    }


# --- the checkpoint ------------------------------------------------------------------------------------------------------------


def _open(path: str, config: str | None, written_by: str | None) -> Checkpoint:
    """Return a checkpoint of Megatron's in a form that megatron-core loads by itself."""
    checkpoint = opened(path, config, written_by, (), None)
    if checkpoint.format not in {STORE, PER_RANK}:
        facts = {
            "where": path,
            "found": f"{checkpoint.dialect} ({checkpoint.format})",
            "expected": f"megatron ({STORE} or {PER_RANK})",
        }
        raise NotSupported("only what megatron-core loads can fill one of its specs", facts)
    if not checkpoint.config:
        remedy = "name the model's config.json, or a few lines of YAML, with --config"
        raise BadCheckpoint("the training arguments are missing", {"where": path}, remedy=remedy)
    return checkpoint


def _sorted(checkpoint: Checkpoint) -> tuple[dict[Key, Stored], dict[str, str | None], dict[str, tuple[str, ...]]]:
    """Return the weights under megatron-core's own names, the objects with why they are set aside, and all that is: reason -> names."""
    prefix = _prefix(checkpoint)
    kept: dict[Key, Stored] = {}
    objects: dict[str, str | None] = {}
    dropped: dict[str, list[str]] = defaultdict(list)
    for key in (*checkpoint.tensors, *(("", name) for name in checkpoint.objects)):
        reason = next((reason for pattern, reason in DROPPED.items() if fnmatchcase(key[1], pattern)), None)
        name = key[1].removeprefix(prefix)
        if reason is not None:
            dropped[reason].append(label_of(key))
        elif key in checkpoint.tensors:
            kept[key[0], name] = checkpoint.tensors[key]
        if key not in checkpoint.tensors:
            objects[name] = reason
    return kept, objects, {reason: tuple(sorted(names)) for reason, names in sorted(dropped.items())}


def _prefix(checkpoint: Checkpoint) -> str:
    """Return what stands before megatron-core's names: a wrapper's own."""
    for prefix in MEGATRON.prefixes:
        if any(name.startswith((f"{prefix}embedding.", f"{prefix}decoder.")) for _, name in checkpoint.tensors):
            return prefix
    return ""


def _arguments(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the training arguments of a checkpoint as its program used them, a Hugging Face config in place of them translated."""
    where, kind = str(checkpoint.root), MEGATRON.kind
    # what routes tokens otherwise has no weights: it is nothing to refuse a spec for
    routing = [*ACCEPTABLE] if names_none(kind, checkpoint.config) else []
    said = hear_config(kind, checkpoint.config, where, checkpoint.program, checkpoint.era, routing).said
    rows = stored_rows(checkpoint)
    if lookup(said, "architectures"):
        _, canonical = recognise("megatron", said, where, {})
        said = write(MEGATRON.table, {**canonical, "padded_vocab": rows or canonical["vocab"]}, {}, where)
    if said.get("padded_vocab_size") is None and rows:
        said["padded_vocab_size"] = rows
    return said


def _cut(checkpoint: Checkpoint, kept: Mapping[Key, Stored], said: Arguments, asked: tuple[int | None, ...]) -> Cut:
    """Return how the model is cut: as asked for, or as the files are."""
    if checkpoint.format != PER_RANK:
        tp, pp, ep = (size or 1 for size in asked)
        return Cut(tp, pp, ep)
    units = [[int(number) for number in re.findall(r"\d+", unit)] for unit, _ in kept]
    tp, pp, ep, vp = (max(numbers) + 1 for numbers in zip(*units, strict=True))
    if any(size not in {None, own} for size, own in zip(asked, (tp, pp, ep), strict=True)):
        facts = {"asked for": asked, "saved": f"tp {tp} pp {pp} ep {ep}"}
        raise BadRequest(
            "a file a rank fills the ranks that saved it and no others", facts, remedy="leave --tp, --pp and --ep away"
        )
    if said.get("expert_tensor_parallel_size") not in {None, tp} and ep > 1:
        experts = {"tp": tp, "expert_tensor_parallel_size": said["expert_tensor_parallel_size"]}
        raise NotSupported("carnet builds no ranks whose experts are cut otherwise than their attention", experts)
    return Cut(tp, pp, ep, vp)


def _saver(kept: Mapping[Key, Stored]) -> Saver | None:
    """Return whose names the norms have: the linear layers', as one spec or the other has it, or their own."""
    names = {name for _, name in kept}
    if not any(".layer_norm_" in name for name in names):
        return None
    mixtures = [name.removesuffix("router.weight") for name in names if name.endswith("mlp.router.weight")]
    return "local" if any(f"{layer}linear_fc1.layer_norm_weight" in names for layer in mixtures) else "te"


# --- both ----------------------------------------------------------------------------------------------------------------------


def _compare(asks: Sequence[Ask], kept: Mapping[Key, Stored]) -> tuple[tuple[tuple[Ask, str], ...], list[Misfit]]:
    """Return what is filled, with the type that it is stored in, and what is missing, of another shape, or not used whole."""
    fills: list[tuple[Ask, str]] = []
    misfits: list[Misfit] = []
    groups: dict[Key, list[Ask]] = defaultdict(list)
    for ask in asks:
        groups[_key(ask)].append(ask)
    for key, group in groups.items():
        stored, wanted = kept.get(key), group[0].shape
        if stored is None:
            misfits.append(Misfit("missing", label_of(key), f"{_shape(wanted)} for {group[0].parameter}", "nothing"))
        elif stored.shape != wanted:
            misfits.append(
                Misfit("another shape", label_of(key), f"{_shape(wanted)} for {group[0].parameter}", _shape(stored.shape))
            )
        else:
            fills += [(ask, stored.dtype) for ask in group]
            used = sum(volume(box) for box in {ask.box for ask in group})
            if used != volume(whole(wanted)):
                misfits.append(
                    Misfit("partly left over", label_of(key), f"{used:,} elements", f"{volume(whole(wanted)):,} elements")
                )
    return tuple(fills), misfits


def _lone(asked: Asked, states: set[str], kept: Mapping[Key, Stored], objects: Mapping[str, str | None]) -> Iterator[Misfit]:
    """Yield what one side alone knows: parameters without a key, weights and objects left over, states that are not there."""
    for name, shape in asked.silent.items():
        yield Misfit("never loaded", name, _shape(shape), "no key asks for it")
    for key in sorted(kept.keys() - {*map(_key, asked.asks)}):
        yield Misfit("left over", label_of(key), "nothing", _shape(kept[key].shape))
    for name in sorted(name for name, reason in objects.items() if reason is None):
        yield Misfit("left over", name, "nothing", "an object")
    for name in sorted(states - {*objects}):
        yield Misfit("missing", name, "a module's state", "nothing")


def _key(ask: Ask) -> Key:
    return ask.unit, ask.key


def _said(cut: Cut) -> str:
    return f"tp {cut.tp} pp {cut.pp} ep {cut.ep}" + (f" vp {cut.vp}" if cut.vp > 1 else "")


def _span(box: Box) -> str:
    return ", ".join(f"{start}:{start + length}" for start, length in zip(box.start, box.shape, strict=True)) or "all"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
