"""Config fields as a two-way table: each row says where a canonical field stands in one program's config, and in which words.

Reading and writing walk the same rows, so there is no direction to get wrong. What a config sets and no row reads is an error, and
so is a field that a model has and a target has no row for (``saying``).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as having
from difflib import get_close_matches
from types import EllipsisType
from typing import Any

from carnet.dialects.senses import Kind, Senseless, expect, of_kind
from carnet.errors import BadCheckpoint, CarnetError, NotSupported, Obstacles
from carnet.model.fields import BY_NAME, NOTHING, SET, Condition, Config, Value
from carnet.model.keys import equal, leaves
from carnet.model.model import concerns

Json = Mapping[str, object]
Default = Value | EllipsisType | Callable[[Config], Value]  # ``...``: the key must be there

ANY = ...  # in a Choice: this key is not looked at, and not written; SET: it has a value, which a Place reads and writes

NONE: Config = {}
NEAR = 0.87  # how alike two keys are where one may be the other mistyped; of letters in the same order, twice those of both


@dataclass(frozen=True, slots=True)
class Place:
    """One canonical field under one key."""

    field: str
    keys: tuple[str, ...]  # dotted; the first is written, all are read; none where the default is the only possible value
    default: Default  # what an absent or null key means; a Table's own word for an absent one stands over it
    words: tuple[tuple[Value, Value], ...]  # (canonical, written) where they differ; the first match counts
    only: Condition  # the fields that a model must have for this key to mean anything; SET for any value but none and zero
    omit: bool  # not written where the value is the default


@dataclass(frozen=True, slots=True)
class Choice:
    """Some canonical fields spread over some keys: one line for each combination that exists."""

    fields: tuple[str, ...]
    keys: tuple[tuple[str, Value], ...]  # (dotted key, its value where absent)
    lines: tuple[tuple[tuple[Value, ...], tuple[object, ...]], ...]  # (field values, key values); the first match counts
    only: Condition = having(default_factory=dict)  # as in a Place


@dataclass(frozen=True, slots=True)
class Flagged:
    """A key that counts only where a flag is set; elsewhere its field equals another field."""

    field: str
    key: str
    flag: str
    otherwise: str  # the other field


@dataclass(frozen=True, slots=True)
class Spread:
    """Keys whose values stand for a field by a rule: the first so many layers, every second, these."""

    field: str
    key: str
    absent: (
        object  # what an absent or null key means, and so the kind of others; a kind where it means nothing; a tuple of several
    )
    meaning: Callable[
        [Any, Config], Value
    ]  # of a key's value; of several, the tuple of them; raises Senseless, and nothing else
    choices: Callable[[Config], Iterable[object]]  # key values to try when the field is written: no inverse to get wrong
    only: Condition = having(default_factory=dict)  # as in a Place
    more: tuple[str, ...] = ()  # further keys that have a say
    others: tuple[tuple[str, ...], ...] = ()  # all these keys under other names, which are read and never written


Row = Place | Choice | Flagged | Spread


@dataclass(frozen=True, slots=True)
class Table:
    """The config of one dialect."""

    rows: tuple[Row, ...]  # in reading order: defaults may look at earlier fields
    fixed: Mapping[str, object] = having(default_factory=dict)  # dotted key -> the one value carnet knows; written too
    written: Mapping[str, object] = having(default_factory=dict)  # dotted key -> what to write; any value is read over
    # dotted key -> what the program takes it for where it is not there, which null is not; where it has no value it is written as null
    absent: Mapping[str, object] = having(default_factory=dict)
    guards: Mapping[str, tuple[object, ...]] = having(
        default_factory=dict
    )  # dotted key -> values that change nothing; not written
    ignored: frozenset[str] = frozenset()  # top-level keys that say nothing about the weights
    closed: bool = True  # a key that no row, guard or list names is an error


def place(
    name: str,
    *keys: str,
    default: Default = ...,
    words: tuple[tuple[Value, Value], ...] = (),
    only: Condition | None = None,
    omit: bool = False,
) -> Place:
    """Write the row of one field under one key."""
    return Place(name, keys, default, words, only or {}, omit)


def read(table: Table, raw: Json, where: str, given: Config = NONE) -> dict[str, Value]:
    """Return the canonical fields that a config says; those that are ``given`` stand over it."""
    unknown = [*_unknown(table, raw, where)] if table.closed else []
    found = Obstacles(unknown)
    raw = {**raw, **unsaid(table, raw)}
    config = dict(given)
    lost: set[str] = set()  # the fields of rows that were refused, for which later ones may look in vain
    for row in (row for row in table.rows if not given.keys() >= {*fields_of(row)}):
        try:
            _read_row(row, raw, config, where)
        except KeyError as error:
            if lost.isdisjoint(error.args):
                raise
            lost.update(fields_of(row))
        except CarnetError as error:
            if not (lost and isinstance(error.__cause__, Senseless)):
                found.errors.append(error)
            lost.update(fields_of(row))
    if table.closed and len(found.errors) == len(unknown):
        found.errors += _idle(table, raw, config, where)
    found.errors += _foreign(table, raw, config, where)
    found.stop()
    for together, (instead, idle) in NOTHING:
        if all(name in config and equal(config[name], wanted) for name, wanted in together.items()):
            config = {name: value for name, value in config.items() if name not in idle} | dict(instead)
    return config


def _read_row(row: Row, raw: Json, config: dict[str, Value], where: str) -> None:
    """Read what one row says; raise KeyError with the name of a field that another one should have read."""
    match row:
        case Place():
            _read_place(row, raw, config, where)
        case Choice():
            _read_choice(row, raw, config, where)
        case Spread():
            _read_spread(row, raw, config, where)
        case Flagged():
            flagged = _switch(row.flag, lookup(raw, row.flag), where) and lookup(raw, row.key) is not None
            if flagged or row.otherwise in config:
                config[row.field] = (
                    _checked(row.field, row.key, lookup(raw, row.key), where) if flagged else config[row.otherwise]
                )


def unsaid(table: Table, raw: Json) -> dict[str, object]:
    """Return the keys that are not in a config, under no name of theirs, with what the program takes them for."""
    names = {key: row.keys for row in table.rows if isinstance(row, Place) for key in row.keys}
    return {key: taken for key, taken in table.absent.items() if not any(_stands(raw, name) for name in names.get(key, (key,)))}


def _stands(raw: Json, key: str) -> bool:
    """Say whether a dotted key is in a config, null or not."""
    above, _, last = key.rpartition(".")
    found = lookup(raw, above) if above else raw
    return isinstance(found, Mapping) and last in found


def lookup(raw: Json, key: str) -> object:
    """Return what stands under a dotted key, None where nothing does."""
    found: object = raw
    for part in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _read_place(row: Place, raw: Json, config: dict[str, Value], where: str) -> None:
    if not applies(row, config):
        return
    value: object = _agreed(raw, row.keys, where)
    if value is None:
        if not concerns(config, row.field):
            return
        if row.default is ... and row.keys:
            field = BY_NAME[row.field]
            facts = {"where": where, "field": field.remark}
            facts |= {"also": ", ".join(row.keys[1:])} if row.keys[1:] else {}
            raise BadCheckpoint(f"the config does not say {row.keys[0]!r}", facts, remedy=field.remedy)
        default = row.default(config) if callable(row.default) else row.default
        assert not isinstance(default, EllipsisType)
        if wrong := _beyond(row.field, default):
            facts = {"where": where, "field": BY_NAME[row.field].remark, "found": f"{default!r}"}
            raise BadCheckpoint(f"the config makes {row.field!r} {wrong}", facts)
        config[row.field] = default
        return
    key = next(key for key in row.keys if lookup(raw, key) is not None)
    if row.words:
        value = _translate(row, key, value, where)
    value = _checked(row.field, key, value, where)
    if row.field in config and not equal(config[row.field], value):
        facts = {"where": where, row.field: repr(config[row.field]), key: repr(value)}
        raise NotSupported(f"the config's {key!r} differs from what the model is otherwise", facts)
    config[row.field] = value


def _translate(row: Place, key: str, value: object, where: str) -> Value:
    for canonical, written in row.words:
        if equal(written, value):
            return canonical
    raise NotSupported(
        f"the config sets {key!r} to a value that carnet does not know",
        {"where": where, "found": repr(value), "known": ", ".join(repr(written) for _, written in row.words)},
    )


def _read_spread(row: Spread, raw: Json, config: dict[str, Value], where: str) -> None:
    if not applies(row, config):
        return
    said = [*zip(*spellings_of(row), each_of(row, row.absent), strict=True)]
    for key in (key for *keys, absent in said for key in keys if isinstance(absent, bool)):
        _switch(key, lookup(raw, key), where)
    try:
        found = tuple(_or_absent(_agreed(raw, keys, where), absent) for *keys, absent in said)
        meant = row.meaning(found if row.more else found[0], config)
        wrong = _beyond(row.field, meant)
        expect(not wrong, f"{row.field} not {wrong}")
    except Senseless as error:
        facts = {key: f"{value!r}"[:80] for key in keys_of(row) if (value := lookup(raw, key)) is not None}
        what = f"sets {' and '.join(map(repr, facts))} to what makes no sense" if facts else f"does not say {row.key!r}"
        raise BadCheckpoint(f"the config {what}", {"where": where, **facts, "expected": error}) from error
    config[row.field] = meant


def _or_absent(value: object, absent: object) -> object:
    """Return a value of the kind that a key's can be, or what stands for none."""
    kind, absent = (absent, None) if isinstance(absent, Kind) else (type(absent), absent)
    return absent if value is None else of_kind(kind, value)


def _agreed(raw: Json, keys: Sequence[str], where: str) -> object:
    """Return the one value that stands under some keys, None where none does."""
    found = {key: value for key in keys if (value := lookup(raw, key)) is not None}
    first = next(iter(found.values()), None)
    if not all(equal(first, other) for other in found.values()):
        raise BadCheckpoint("the config contradicts itself", {"where": where, **{key: repr(found[key]) for key in found}})
    return first


def _beyond(name: str, value: object) -> str:
    """Say how a number is too small or too large for a field; nothing where it is neither."""
    field = BY_NAME[name]
    if field.kind is int and isinstance(value, int):
        if field.least is not None and value < field.least:
            return f"less than {field.least}"
        if field.most is not None and value > field.most:
            return f"more than {field.most}"
    return ""


def _switch(key: str, found: object, where: str) -> bool:
    """Return the value of a key that is either set or not."""
    if found is None or isinstance(found, bool):
        return bool(found)
    raise BadCheckpoint(
        f"the config sets {key!r} to something that is not a bool", {"where": where, "found": f"{found!r}"[:80]}
    )


def each_of(row: Spread, value: object) -> tuple[object, ...]:
    """Return a value for each key of a row."""
    return value if row.more and isinstance(value, tuple) else (value,)


def _read_choice(row: Choice, raw: Json, config: dict[str, Value], where: str) -> None:
    if not applies(row, config):
        return
    found = tuple(absent if (value := lookup(raw, key)) is None else value for key, absent in row.keys)
    for values, wanted in row.lines:
        if all(w is ANY or (w is SET and f is not None) or equal(w, f) for w, f in zip(wanted, found, strict=True)):
            config.update(zip(row.fields, values, strict=True))
            return
    if any(concerns(config, name) for name in row.fields):
        raise NotSupported(
            f"the config's combination of {', '.join(key for key, _ in row.keys)} is not known",
            {"where": where, **{key: repr(value) for (key, _), value in zip(row.keys, found, strict=True)}},
        )


def fields_of(row: Row) -> tuple[str, ...]:
    """Return the canonical fields of a row."""
    return row.fields if isinstance(row, Choice) else (row.field,)


def keys_of(row: Row) -> tuple[str, ...]:
    """Return the keys of a row."""
    match row:
        case Place():
            return row.keys
        case Choice():
            return tuple(key for key, _ in row.keys)
        case Spread():
            return tuple(key for keys in spellings_of(row) for key in keys)
        case Flagged():
            return (row.key, row.flag)


def spellings_of(row: Spread) -> tuple[tuple[str, ...], ...]:
    """Return the keys of a row under each of their names, those that are written first."""
    return ((row.key, *row.more), *row.others)


def applies(row: Row, config: Config) -> bool:
    """Say whether a model has the fields that a row asks for."""
    only = {} if isinstance(row, Flagged) else row.only
    found = {name: config.get(name, BY_NAME[name].neutral) for name in only}
    return all(bool(found[name]) if wanted is SET else equal(found[name], wanted) for name, wanted in only.items())


def _is_written(table: Table, key: str, config: Config) -> bool:
    """Say whether a row owns this key or one below it, so that a constant under the same name is only a starting value."""
    return any(
        owned == key or owned.startswith(f"{key}.") for row in table.rows if applies(row, config) for owned in keys_of(row)
    )


def _checked(name: str, key: str, value: object, where: str) -> Value:
    """Return the value if the field can have it; a list as a tuple."""
    field = BY_NAME[name]
    try:
        found = of_kind(field.kind | list[field.kind] if field.many else field.kind, value)  # type: ignore[name-defined]
        wrong = _beyond(name, found)
    except Senseless as error:
        found, wrong = None, f"something that is not {error}"
    if wrong:
        raise BadCheckpoint(f"the config sets {key!r} to {wrong}", {"where": where, "found": f"{value!r}"[:80]})
    return tuple(found) if isinstance(found, list) else found


def canonical(said: Json, where: str) -> dict[str, Value]:
    """Return fields that stand under their canonical names; raise BadCheckpoint for a name or a value that none can have."""
    for name in said:
        if name not in BY_NAME:
            raise BadCheckpoint(f"there is no field {name[:80]!r} of a model", {"where": where})
    return {name: None if value is None else _checked(name, name, value, where) for name, value in said.items()}


def strange(table: Table, raw: Json) -> dict[str, object]:
    """Return the keys of a config that its table does not name, with what they are set to; null and empty records count, too."""
    known = _known(table)
    records = {key.rpartition(".")[0] for key in known}
    empty = [key for key, value in raw.items() if not value and key not in records]
    keys = dict.fromkeys([*leaves(raw), *empty])
    whole = {key for row in table.rows for key in keys_of(row)} | table.ignored  # what stands below them is theirs
    return {key: lookup(raw, key) for key in keys if key not in known and key.split(".")[0] not in whole}


def _known(table: Table) -> set[str]:
    return {key for row in table.rows for key in keys_of(row)} | {*table.fixed, *table.written, *table.guards}


def _unknown(table: Table, raw: Json, where: str) -> Iterator[NotSupported]:
    """Yield a refusal of each key that nobody knows; a neutral value asks for nothing, but where a key is a known one mistyped."""
    known = {*_known(table), *table.ignored}
    for key, value in strange(table, raw).items():
        meant = get_close_matches(key, known, 1, NEAR)
        if value or (meant and value is not None):
            remedy = f"--accept {key}, if it means nothing for the weights"
            yield NotSupported(
                f"the config sets {key!r}, which carnet does not know",
                {"where": where, "found": f"{value!r}"[:80]},
                remedy=f"is {meant[0]!r} meant? else {remedy}" if meant else remedy,
            )


def _idle(table: Table, raw: Json, config: Config, where: str) -> Iterator[NotSupported]:
    """Yield a refusal of each key that is set and means nothing beside the others: a factor of rope without its type."""
    read_keys = {key for row in table.rows if applies(row, config) for key in keys_of(row)}
    for key in sorted({key for row in table.rows for key in keys_of(row)} - read_keys):
        if lookup(raw, key) is not None:
            yield NotSupported(
                f"the config sets {key!r}, which means nothing beside the rest",
                {"where": where, "found": f"{lookup(raw, key)!r}"[:80]},
            )


def _foreign(table: Table, raw: Json, config: Config, where: str) -> Iterator[NotSupported]:
    """Yield a refusal of each key that is set to another value than those that are known."""
    for key, values in {**{k: (v,) for k, v in table.fixed.items()}, **table.guards}.items():
        found = lookup(raw, key)
        if found is None and any(v is True for v in values) and _stands(raw, key):
            found = False  # which null is to a program that looks whether it is set
        if found is not None and not any(equal(found, v) for v in values) and not _is_written(table, key, config):
            yield NotSupported(
                f"the config sets {key!r} to a value that carnet cannot carry over",
                {"where": where, "found": repr(found), "expected": " or ".join(repr(v) for v in values) or "not set"},
            )
