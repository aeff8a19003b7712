"""An *inventory* is a checkpoint whose every stored tensor is understood: tied to canonical tensors, or set aside under a name.

This is where families and formats meet: the keys and shapes that are there choose the rows that describe them. What is left over,
lacking or of another shape stops here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from heapq import nsmallest
from operator import le
from typing import TYPE_CHECKING

from carnet.algebra.box import Box, uncovered, whole
from carnet.architectures.family import Family
from carnet.architectures.known import dialect_of, hear_config, names_none, others, recognise, text_of, without
from carnet.architectures.wrappers import beside, is_of_tower
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.kinds import KINDS, Kind
from carnet.dialects.megatron.programs import AS_IT_STANDS, Heard
from carnet.dialects.planes import OPTIMIZER
from carnet.dialects.rows import Dialect, is_zero_centred, less_one
from carnet.dialects.strangers import way_out
from carnet.dialects.towers import found
from carnet.dialects.vocabulary import Vocabulary, by_config, given
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported, Obstacles
from carnet.formats.adapters import BRIDGE, SAID
from carnet.formats.stored import Checkpoint, Coded, Key, Stored, label_of, reshaped
from carnet.inventory.adapters import STRANGE, with_adapters
from carnet.inventory.changed import NOTHING, Changes
from carnet.inventory.lent import is_of_lent_tower
from carnet.inventory.planes import in_model_space, instead, planes_of
from carnet.inventory.sorting import Sorted, as_coded, check_cache, check_lists, coded_beside, in_parts, sort_out, unlisted
from carnet.inventory.telling import as_head, further_stored, told_by_store, true_widths
from carnet.inventory.vocabulary_rows import contradicted, enough, other_rows, stored_rows, told_of
from carnet.model.adapters import bare
from carnet.model.fields import Config, Value
from carnet.model.model import canonical_shapes, number, sizes, value
from carnet.model.tower import told
from carnet.quantize.reading import Said, plain, read

if TYPE_CHECKING:
    from carnet.inventory.merged import Merged

WRAPPERS = {  # what a name begins with, or a part of it -> what that is, and what to do
    "_orig_mod.": (
        "the weights of what torch.compile wraps around a model",
        "save the model itself: model._orig_mod.save_pretrained(OUT)",
    ),
    "base_model.model.": (
        "the weights of an adapter, or of a model inside peft's wrapper",
        "merge it into its model with peft: model.merge_and_unload().save_pretrained(OUT)",
    ),
}


class Lacking(BadCheckpoint):
    """A canonical tensor, or a part of one, is stored nowhere."""


@dataclass(frozen=True, slots=True, repr=False)
class Inventory:
    """A checkpoint whose every tensor is understood."""

    checkpoint: Checkpoint  # every tensor in the shape that its entry says
    family: Family
    dialect: Dialect
    config: dict[str, Value]  # canonical fields
    entries: Mapping[Key, Entry]
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names
    said: Said | None  # what the config says about quantized weights
    coded: Mapping[Key, Coded]  # the entries that are stored as codes, by the name of the weight
    scales: Mapping[Key, Stored]  # what is no part of a weight: scales of activations and of the cache, shapes
    vocabulary: Vocabulary
    less_one: frozenset[str]  # the norms that are stored less one, named within their layer
    heard: Heard = AS_IT_STANDS  # Megatron's arguments: what its program did not use, what a target need not do
    pruned: str = ""  # what the arguments said of the model that this one was cut from, and what is so
    others: Mapping[str, bool] = field(default_factory=dict)  # families that it could be too -> whether with the same tensors
    merged: "Merged | None" = None  # what is added to it, where a target is a sum
    changes: Changes = NOTHING  # what adapters add to its weights, where a target has them merged

    def __repr__(self) -> str:
        return f"Inventory({self.family.name} of {self.dialect.name}, {len(self.entries):,} stored tensors)"

    def stored(self, key: Key) -> tuple[Stored, ...]:
        """Return the stored tensors of an entry: one, or codes with their scales."""
        one = self.coded.get(key)
        return (self.checkpoint.tensors[key],) if one is None else one.parts

    @property
    def notes(self) -> dict[str, str]:
        """Return what a person should know of its quantized weights, and of the adapters that are added: subject -> a line."""
        plain = unlisted(self.said, self.entries, self.coded)
        more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
        said = f"{plain[0]}{more}, though the config calls it quantized: engines would look for its scales" if plain else ""
        lent = self.checkpoint.adapter
        added = self.changes.said("own" if lent is None else str(lent.root)) if self.changes.of else ""
        lines = ("read as plain", said), ("adapters", added), ("pruned", self.pruned)
        return {subject: line for subject, line in lines if line}

    @property
    def zero_centred(self) -> bool:
        """Say whether norms are stored less one."""
        return is_zero_centred(self.dialect, self.config)


def others_of(others: Mapping[str, bool]) -> dict[str, str]:
    """Return in one line which families a model could be too, none where it is of one alone.

    >>> others_of({"mistral": True, "granite": True, "phi3": False})
    {'could be': 'mistral, granite (the same tensors), phi3 (other tensors); --as FAMILY takes another'}
    """
    groups = {"the same tensors": True, "other tensors": False}
    said = [
        f"{', '.join(names)} ({what})"
        for what, same in groups.items()
        if (names := [n for n, s in others.items() if s == same])
    ]
    return {"could be": f"{', '.join(said)}; --as FAMILY takes another"} if said else {}


def take(
    checkpoint: Checkpoint,
    drop: tuple[str, ...] = (),
    vocab: int | None = None,
    counted: int | None = None,
    *,
    alone: bool = False,
) -> Inventory:
    """Tie every stored tensor of a checkpoint to canonical tensors, or say which one cannot be."""
    inventory, problems = survey(checkpoint, drop, vocab, counted=counted, alone=alone)
    Obstacles(problems).stop()
    return inventory


def survey(
    checkpoint: Checkpoint,
    drop: tuple[str, ...] = (),
    vocab: int | None = None,
    like: Config | None = None,
    counted: int | None = None,
    carried: Said | None = None,
    *,
    alone: bool = False,
) -> tuple[Inventory, list[CarnetError]]:
    """Tie what can be tied, and return what is wrong with the rest: unknown tensors, wrong shapes, the first that lacks.

    ``like`` is the model that this one should be: it says how much of a padded axis is padding. ``counted`` is how many tokens the
    tokenizer has that is to go along. ``carried`` is what that model's own config says of codes: the same words mean the same codes.
    ``alone`` asks for the adapters without the model that they are of.
    """
    where, kind = str(checkpoint.root), KINDS[checkpoint.dialect]
    _refuse_silent(checkpoint, kind, where)
    _refuse_wrapped(checkpoint, kind, where)
    text, wrapper = text_of({key: said for key, said in checkpoint.config.items() if key not in (SAID, BRIDGE)}, where)
    whole, checkpoint = checkpoint, replace(checkpoint, config=text)
    own = plain(kind.codes_key, checkpoint.config)
    names = {name for _, name in checkpoint.tensors}
    own, pruned = true_widths(checkpoint, without(kind, own, names, drop))
    told = told_of(checkpoint, own, vocab, counted, like) if kind.arguments else None
    checkpoint, own = as_head(checkpoint, own, told)
    heard = hear_config(kind, own, where, checkpoint.program, checkpoint.era, checkpoint.accept)
    fixed = {n: each for n, each in (("vocab", vocab if told is None else told.tokens), ("wrapper", wrapper)) if each}
    said, family, config = _read(checkpoint, kind, heard, fixed)
    undecided = checkpoint.family is None and names_none(kind, heard.said)
    dialect = dialect_of(family, kind.name, config, names)
    config |= {
        **({name: value(like, name) for name in dialect.pads} if like is not None else {}),
        **planes_of(checkpoint, like),
    }
    dropped, kept = _drop(checkpoint, dialect, drop, planes="planes" in config)
    tower = _take_tower(checkpoint, dialect, config, kept, like)
    # else it is held to what the program of its style writes
    published = like is None or said == carried
    sorted_out = (
        Sorted(kept, {}, {}, []) if said is None else sort_out(said, kept, where, published=published, loaded=kind.joins_codes)
    )
    kept = {**sorted_out.kept, **tower}
    if kind.omits_further or (kind.arguments and not names_none(kind, heard.said)):
        config |= _further(dialect, config, kept)
    config["halves"] = not value(config, "hybrid") and any(name.endswith(kind.halved_by) for _, name in kept)
    config |= told_by_store(dialect, config, kept)
    if kind.pads_vocabulary and config.get("padded_vocab") is None:
        config["padded_vocab"] = enough(stored_rows(checkpoint), config, where)
    _refuse_absurd(config, kept, where)
    dialect, dropped, kept = with_adapters(whole, family, (dialect, dropped, kept), config, like, alone=alone)
    kept = in_model_space(checkpoint, dialect, config, kept)
    named = {(entry.unit, entry.name): entry for entry in entries(dialect, config, kept)}
    rows = 0 if kind.pads_vocabulary or kind.pads_to else other_rows(config, named, kept)
    if rows and vocab is not None:
        told = given(vocab, rows, where)
        config["padded_vocab"] = rows
        named = {(entry.unit, entry.name): entry for entry in entries(dialect, config, kept)}
    named |= {
        key: as_coded(said, one, named[key])
        for key, one in sorted_out.coded.items()
        if key in named and said is not None and not kind.joins_codes
    }
    fitting = {key: entry for key, entry in named.items() if kept[key].shape == entry.stored}
    missing = [*_missing(dialect, config, named, where)]
    problems = [
        *([contradicted(config, rows, named, kept, where)] if rows and told is None else []),
        *sorted_out.problems,
        *(coded_beside(config, where) if said is None else []),
        *([] if said is None or not published else check_lists(said, sorted_out.coded, where)),
        *([] if said is None else check_cache(said, named, sorted_out.scales, where, published=published)),
        *_unknown(kept, named, where, whole=not missing, alone=kind.alone),
        *(_misshapen(kept[key], named[key], config, where, arguments=kind.arguments) for key in named if key not in fitting),
        *missing,
    ]
    found = sorted_out.unbroken(fitting)
    coded = {key: one for key, one in sorted_out.coded.items() if key in found}
    problems += in_parts(coded, found, where) if kind.joins_codes else ()
    seen = {key: reshaped(kept[key], entry.shape) for key, entry in found.items() if entry.shape != entry.stored}
    checkpoint = replace(checkpoint, tensors={**instead(checkpoint.tensors, kept), **seen})
    told = told or by_config(config)
    could = others(family, bare(config), where) if undecided else {}
    centred = less_one(dialect, config, [name for _, name in found])
    made = Inventory(
        checkpoint, family, dialect, config, found, dropped, said, coded, sorted_out.scales, told, centred, heard, pruned, could
    )
    return made, problems


def _read(checkpoint: Checkpoint, kind: Kind, heard: Heard, given: Config) -> tuple[Said | None, Family, dict[str, Value]]:
    """Return what a config says of codes, whose model it is, and which; refuse with all that is in the way of either."""
    where, refused = str(checkpoint.root), Obstacles()
    with refused:
        said = read(kind.codes_key, checkpoint.config, where)
    with refused:
        family, config = recognise(kind.name, heard.said, where, given, checkpoint.family)
    refused.stop()
    return said, family, bare(config)  # what adapters there are is for the store to say


def _take_tower(
    checkpoint: Checkpoint, dialect: Dialect, config: dict[str, Value], kept: dict[Key, Stored], like: Config | None
) -> dict[Key, Stored]:
    """Take what goes along with a text model that is inside of a class that also sees or hears out of what is kept.

    Where all of it is left behind, the model is the text model alone. Of a target each tensor is to have its shape in the source.
    """
    config.pop("tower", None)  # what is there says it
    if not config.get("wrapper"):
        return {}
    where, names = str(checkpoint.root), beside(dialect, {name for _, name in checkpoint.tensors})
    names |= {stored.name for stored in kept.values() if is_of_lent_tower(stored)}
    there = {key: stored for key, stored in kept.items() if key[1] in names}
    held = {key: [*found(dialect, stored.name, stored.dtype, stored.shape, where)] for key, stored in there.items()}
    if dialect.kind.arguments:  # what a program calls otherwise than a folder does, and no row says, is unknown
        held = {key: each for key, each in held.items() if is_of_tower(config, each[0].name)}
    if not there and names:
        config["wrapper"] = ""
    elif not there:
        lend = "; --tower with a folder of the class brings the rest" if dialect.kind.arguments else ""
        remedy = f"--config with the config.json of the text model's own class takes it as that{lend}"
        raise BadCheckpoint(
            "the checkpoint holds a text model alone, and its class also sees or hears", {"where": where}, remedy=remedy
        )
    config["tower"] = (like or {}).get("tower") or told(one for each in held.values() for one in each)
    return {key: kept.pop(key) for key in held}


def _further(dialect: Dialect, config: Config, kept: Mapping[Key, Stored]) -> dict[str, Value]:
    """Return the fields that say which layers for further tokens are stored."""
    count = further_stored(dialect, config, kept)
    return {"mtp": count, "mtp_blocks": value(config, "mtp_blocks") if count else None}


def _drop(
    checkpoint: Checkpoint, dialect: Dialect, asked: tuple[str, ...], *, planes: bool
) -> tuple[dict[str, tuple[str, ...]], dict[Key, Stored]]:
    """Set aside what is not a weight, and what was asked to be left behind: reason -> names, and the rest.

    With ``planes`` the optimizer's state is kept.
    """
    said = {pattern: f"--drop {pattern}" for pattern in asked}
    reasons = {**said, **dialect.dropped, **said}  # first in order and in meaning, also where the dialect has the same pattern
    dropped: dict[str, list[str]] = defaultdict(list)
    held = {pattern: why for pattern, why in reasons.items() if not (planes and why == OPTIMIZER)}
    found = _reasons({name for _, name in checkpoint.tensors}, held) | _reasons(checkpoint.objects, reasons)
    for key in (*checkpoint.tensors, *(("", name) for name in checkpoint.objects)) if found else ():
        if key[1] in found:
            dropped[found[key[1]]].append(label_of(key))
    kept = {key: stored for key, stored in checkpoint.tensors.items() if key[1] not in found}
    unknown = [name for name in checkpoint.objects if name not in found]
    if unknown:
        raise NotSupported(
            "the checkpoint holds an object that carnet does not know", {"name": unknown[0], "others": len(unknown) - 1}
        )
    for pattern in asked:
        if f"--drop {pattern}" not in dropped:
            raise BadRequest(
                f"nothing in the checkpoint is called {pattern!r}",
                {"option": "--drop"},
                remedy="look at `carnet inspect --tensors`",
            )
    return {reason: tuple(sorted(names)) for reason, names in sorted(dropped.items())}, kept


def _refuse_silent(checkpoint: Checkpoint, kind: Kind, where: str) -> None:
    """Refuse a Megatron checkpoint, and adapters, that say nothing of their model."""
    said = checkpoint.config.keys() - {SAID, BRIDGE}
    if kind.alone and not said:
        facts = {"where": where, "its base model": checkpoint.notes.get("base", "not named")}
        remedy = "--config with the config.json of the base model"
        raise BadRequest("the folder holds adapters, and no config of the model that they are of", facts, remedy=remedy)
    if kind.arguments and not said:
        facts = {
            "where": where,
            "expected": "args in common.pt, the common state or a rank's file; run_config.yaml; model.yaml",
        }
        remedy = "name the model's config.json, or a few lines of YAML, with --config"
        raise BadCheckpoint("the training arguments are missing", facts, remedy=remedy)


def _refuse_wrapped(checkpoint: Checkpoint, kind: Kind, where: str) -> None:
    """Refuse the weights of a wrapper by the wrapper's name, which stands before or within those of the model."""
    for _, name in () if kind.alone else checkpoint.tensors:
        for mark, (what, remedy) in WRAPPERS.items():
            if mark in name and (name.startswith(mark) or f".{mark}" in name):
                raise NotSupported(f"the folder holds {what}, not a model", {"where": where, "tensor": name}, remedy=remedy)


def _reasons(names: Iterable[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Return for each name that a pattern fits the reason of the first that does."""
    found: dict[str, str] = {}
    for pattern, reason in reasons.items():
        match = re.compile(translate(pattern)).match
        for name in [name for name in names if match(name)]:
            found.setdefault(name, reason)
    return found


def _refuse_absurd(config: Config, kept: Mapping[Key, Stored], where: str) -> None:
    """Refuse a number of layers that no tensor here can have, before anything is listed for each of them."""
    most = max([len(kept), *(stored.shape[0] for stored in kept.values() if stored.shape)])
    if number(config, "layers") > most:
        facts = {"where": where, "layers": number(config, "layers"), "stored tensors": len(kept)}
        raise BadCheckpoint("the config says more layers than the checkpoint can hold", facts)


def _unknown(
    kept: Mapping[Key, Stored], named: Mapping[Key, Entry], where: str, *, whole: bool, alone: bool
) -> Iterator[CarnetError]:
    """Yield the first tensor that no row names.

    ``whole`` says that the model is complete without it, ``alone`` that it is a folder of adapters.
    """
    unknown = [key for key in kept if key not in named]
    if unknown:
        first, *second = [label_of(key) for key in nsmallest(2, unknown)]
        facts = {"where": where, "tensor": first, **({"and": second[0]} if second else {}), "in all": len(unknown)}
        looks, remedy = way_out([name for _, name in unknown], {name for _, name in named}, whole=whole)
        remedy = STRANGE if alone else remedy
        facts |= {"looks like": looks} if looks else {}
        yield NotSupported("the checkpoint holds a tensor that carnet does not know", facts, remedy=remedy)


def _misshapen(stored: Stored, entry: Entry, config: Config, where: str, *, arguments: bool) -> CarnetError:
    name = label_of((entry.unit, entry.name))
    sized = "  ".join(f"{axis} {length}" for axis, length in sizes(config).items())
    facts = {"where": where, "tensor": name, "expected": list(entry.stored), "found": list(stored.shape), "config": sized}
    narrower = len(entry.stored) == len(stored.shape) and all(map(le, stored.shape, entry.stored))
    remedy = "--accept pruned, if the model was pruned; --config names its true config.json" if arguments and narrower else None
    return BadCheckpoint(f"the shape of {name!r} contradicts the config", facts, remedy=remedy)


def _missing(dialect: Dialect, config: Config, named: Mapping[Key, Entry], where: str) -> Iterator[CarnetError]:
    """Yield the first canonical tensor that the stored ones do not cover."""
    boxes, held = defaultdict[str, list[Box]](list), defaultdict[int, list[Entry]](list)
    for entry in named.values():
        held[id(entry.tensors)].append(entry)  # the experts of a layer
    for same in held.values():
        for at, name in enumerate(same[0].names):
            boxes[name] += [entry.like.views[at].box for entry in same]
    covered = set[tuple[int, ...]]()  # sixty layers alike are looked at once
    for name, shape in canonical_shapes(config, dialect.parts).items():
        cut_so = *shape, *map(id, boxes[name])
        if cut_so in covered:
            continue
        covered.add(cut_so)
        hole = uncovered(whole(shape), boxes[name])
        if hole is not None:
            found = (row.name for row in dialect.rows if name.tensor.part in dict(row.pattern.parts))
            rows = [row.removeprefix("/") for row in found]  # which says that no prefix stands before it
            facts = {"where": where, "tensor": name, "looked for": " or ".join(rows)}
            if boxes[name]:
                facts["missing part"] = f"start {list(hole.start)}, shape {list(hole.shape)} of {list(shape)}"
            yield Lacking(f"the checkpoint lacks {name!r}", facts)
            return
