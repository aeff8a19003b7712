"""An *inventory* is a checkpoint whose every stored tensor is understood: tied to canonical tensors, or set aside under a name.

This is where families and formats meet: the keys and shapes that are there choose the rows that describe them. What is left over,
lacking or of another shape stops here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from carnet.box import Box, uncovered, whole
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported
from carnet.families.entries import Entry, entries
from carnet.families.family import Family
from carnet.families.known import dialect_of, recognise
from carnet.families.model import canonical, number, sizes, value
from carnet.families.rows import Dialect
from carnet.families.words import Config, Value
from carnet.formats.stored import Checkpoint, Stored, reshaped

Key = tuple[str, str]  # (unit, name) of a stored tensor
EMBEDDING = "word_embeddings.weight"  # Megatron's, whatever stands before it


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint whose every tensor is understood."""

    checkpoint: Checkpoint  # every tensor in the shape that its entry says
    family: Family
    dialect: Dialect
    config: dict[str, Value]  # canonical fields
    entries: Mapping[Key, Entry]
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names

    @property
    def zero_centred(self) -> bool:
        """Say whether the norms are stored less one."""
        return is_zero_centred(self.dialect, self.config)


def take(checkpoint: Checkpoint, drop: tuple[str, ...] = (), vocab: int | None = None) -> Inventory:
    """Tie every stored tensor of a checkpoint to canonical tensors, or say which one cannot be."""
    inventory, problems = survey(checkpoint, drop, vocab)
    for problem in problems:
        raise problem
    return inventory


def survey(
    checkpoint: Checkpoint, drop: tuple[str, ...] = (), vocab: int | None = None, like: Config | None = None
) -> tuple[Inventory, list[CarnetError]]:
    """Tie what can be tied, and return what is wrong with the rest: unknown tensors, wrong shapes, the first that lacks.

    ``like`` is the model that this one should be: it says how much of a padded axis is padding.
    """
    where = str(checkpoint.root)
    if checkpoint.dialect == "megatron" and not checkpoint.config:
        facts = {
            "where": where,
            "expected": "args in common.pt, the common state or a rank's file; run_config.yaml; model.yaml",
        }
        remedy = "name the model's config.json, or a few lines of YAML, with --config"
        raise BadCheckpoint("the training arguments are missing", facts, remedy=remedy)
    given = {} if vocab is None else {"vocab": vocab}
    family, config = recognise(checkpoint.dialect, checkpoint.config, where, given)
    dialect = dialect_of(family, checkpoint.dialect)
    config |= {name: value(like, name) for name in dialect.pads} if like is not None else {}
    dropped, kept = _drop(checkpoint, dialect, drop)
    if dialect.name == "hf" and not any(f"layers.{config['layers']}." in name for _, name in kept):
        config["mtp"] = 0  # transformers leaves the layers that predict further tokens out, and their number in the config
    if dialect.name == "megatron" and config.get("padded_vocab") is None:
        config["padded_vocab"] = _stored_vocabulary(config, kept, where)
    _refuse_absurd(config, kept, where)
    named = {(entry.unit, entry.name): entry for entry in entries(dialect, config, kept)}
    found = {key: entry for key, entry in named.items() if kept[key].shape == entry.stored}
    problems = [
        *_unknown(kept, named, where),
        *(_misshapen(kept[key], entry, config, where) for key, entry in named.items() if key not in found),
        *_missing(dialect, config, named, where),
    ]
    seen = {key: reshaped(kept[key], entry.shape) for key, entry in found.items() if entry.shape != entry.stored}
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **seen})
    return Inventory(checkpoint, family, dialect, config, found, dropped), problems


def _stored_vocabulary(config: Config, kept: Mapping[Key, Stored], where: str) -> int | None:
    """Return how many rows the tensor-parallel ranks' parts of the embedding have together."""
    found = {unit.split("-")[0]: stored for (unit, name), stored in kept.items() if name.endswith(EMBEDDING)}
    rows = sum(stored.shape[0] for stored in found.values() if stored.shape)
    if 0 < rows < number(config, "vocab"):
        facts = {"where": where, "expected": f"at least {number(config, 'vocab')} rows", "found": f"{rows} rows"}
        raise BadCheckpoint(f"the shape of {EMBEDDING!r} contradicts the config", facts)
    return rows or None


def _drop(
    checkpoint: Checkpoint, dialect: Dialect, asked: tuple[str, ...]
) -> tuple[dict[str, tuple[str, ...]], dict[Key, Stored]]:
    """Set aside what is no weight, and what was asked to be left behind: reason -> names, and the rest."""
    reasons = {**{pattern: f"--drop {pattern}" for pattern in asked}, **dialect.dropped}
    dropped: dict[str, list[str]] = defaultdict(list)
    kept, unknown = {}, []
    for key, reason in _reasons([*checkpoint.tensors, *(("", name) for name in checkpoint.objects)], reasons):
        if reason is not None:
            dropped[reason].append("/".join(filter(None, key)))
        elif key in checkpoint.tensors:
            kept[key] = checkpoint.tensors[key]
        else:
            unknown.append(key[1])
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


def _reasons(keys: Iterable[Key], reasons: Mapping[str, str]) -> Iterator[tuple[Key, str | None]]:
    for key in keys:
        yield key, next((reason for pattern, reason in reasons.items() if fnmatchcase(key[1], pattern)), None)


def _refuse_absurd(config: Config, kept: Mapping[Key, Stored], where: str) -> None:
    """Refuse a number of layers that no tensor here can have, before anything is listed for each of them."""
    most = max([len(kept), *(stored.shape[0] for stored in kept.values() if stored.shape)])
    if number(config, "layers") > most:
        facts = {"where": where, "layers": number(config, "layers"), "stored tensors": len(kept)}
        raise BadCheckpoint("the config says more layers than the checkpoint can hold", facts)


def _unknown(kept: Mapping[Key, Stored], named: Mapping[Key, Entry], where: str) -> Iterator[CarnetError]:
    unknown = sorted(key for key in kept if key not in named)
    if unknown:
        names = ["/".join(filter(None, key)) for key in unknown]
        facts = {"where": where, "tensor": names[0], **({"and": names[1]} if len(names) > 1 else {}), "in all": len(names)}
        yield NotSupported(
            "the checkpoint holds a tensor that carnet does not know",
            facts,
            remedy=f"--drop '{unknown[0][1]}' if it may be left behind",
        )


def _misshapen(stored: Stored, entry: Entry, config: Config, where: str) -> CarnetError:
    name = "/".join(filter(None, (entry.unit, entry.name)))
    sized = "  ".join(f"{axis} {length}" for axis, length in sizes(config).items())
    facts = {"where": where, "tensor": name, "expected": list(entry.stored), "found": list(stored.shape), "config": sized}
    return BadCheckpoint(f"the shape of {name!r} contradicts the config", facts)


def _missing(dialect: Dialect, config: Config, named: Mapping[Key, Entry], where: str) -> Iterator[CarnetError]:
    """Yield the first canonical tensor that the stored ones do not cover."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    for entry in named.values():
        for view in entry.views:
            boxes[view.tensor].append(view.box)
    for name, shape in canonical_shapes(config).items():
        hole = uncovered(whole(shape), sorted(boxes[name], key=lambda box: box.start))
        if hole is not None:
            rows = [row.name for row in dialect.rows if any(_canonical(part, name) for part, _ in row.pattern.parts)]
            facts = {"where": where, "tensor": name, "looked for": " or ".join(rows)}
            if boxes[name]:
                facts["missing part"] = f"start {list(hole.start)}, shape {list(hole.shape)} of {list(shape)}"
            yield BadCheckpoint(f"the checkpoint lacks {name!r}", facts)
            return


def _canonical(part: str, name: str) -> bool:
    return part == name or (part.startswith("layers.") and part.split(".", 2)[2] == name.split(".", 2)[-1])


def is_zero_centred(dialect: Dialect, config: Config) -> bool:
    """Say whether a dialect stores the norms of a model less one."""
    return bool(value(config, "zero_centred")) if dialect.zero_centred is None else dialect.zero_centred


def norms(config: Config) -> frozenset[str]:
    """Return the names of the canonical tensors that scale a norm."""
    return frozenset(name for name, tensor, _ in canonical(config) if tensor.is_norm)


def canonical_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return every canonical tensor of a model, layers written out, with its shape."""
    return {name: shape for name, _, shape in canonical(config)}
