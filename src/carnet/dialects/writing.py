"""Writing a config: the rows of a table say which keys a model's fields come to stand in, and what none of them can say."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

from carnet.dialects.configs import (
    ANY,
    Choice,
    Flagged,
    Place,
    Row,
    Spread,
    Table,
    applies,
    each_of,
    fields_of,
    keys_of,
    spellings_of,
)
from carnet.dialects.senses import Senseless
from carnet.errors import NotSupported, Obstacles
from carnet.model.fields import BY_NAME, SET, Config, Value
from carnet.model.keys import equal, put
from carnet.model.model import concerns, matters


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something that a config cannot say of a model."""

    fields: tuple[str, ...]  # canonical
    error: NotSupported


def write(table: Table, config: Config, traits: Config, where: str) -> dict[str, object]:
    """Return the config that says these canonical fields; refuse one that it cannot say."""
    out, found = written(table, config, traits, where)
    Obstacles(misfit.error for misfit in found).stop()
    return out


def misfits(table: Table, config: Config, traits: Config, where: str) -> list[Misfit]:
    """Return all that a config cannot say of a model with these canonical fields."""
    return written(table, config, traits, where)[1]


def written(table: Table, config: Config, traits: Config, where: str) -> tuple[dict[str, object], list[Misfit]]:
    """Return what a config can say of a model with these canonical fields, and what it cannot."""
    out: dict[str, object] = {}
    found: list[Misfit] = []
    for key, constant in {**table.fixed, **dict.fromkeys(table.absent), **table.written}.items():
        put(out, key, constant)
    said: dict[str, object] = {}
    heeded, idle = set[str](), set[str]()
    heard: Config = {
        name: value for name, value in config.items() if name != "blocks"
    }  # what a reader knows of the model so far
    for row in table.rows:
        heard = config if "blocks" in fields_of(row) else heard
        asked = heard if isinstance(row, Place) and row.default is ... else config
        concerned = any(concerns(asked, name) for name in fields_of(row))
        (heeded if concerned else idle).update(keys_of(row))
        if not concerned:
            continue
        try:
            pairs = [*_writes(row, config, where)]
        except NotSupported as error:
            found.append(Misfit(fields_of(row), error))
            continue
        for key, value in pairs:
            if key in said and not equal(said[key], value):
                facts = {"where": where, "field": ", ".join(fields_of(row)), "needs": f"{said[key]!r} and {value!r} at once"}
                refusal = NotSupported(f"the target's config cannot say what the model needs of {key!r}", facts)
                found.append(Misfit(fields_of(row), refusal))
            said[key] = value
            put(out, key, value)
    for key in (table.absent.keys() & idle) - heeded:  # not null either, where a class wants a number
        out.pop(key, None)
    return out, [*found, *_unplaced(table, config, traits, where)]


def _unplaced(table: Table, config: Config, traits: Config, where: str) -> Iterator[Misfit]:
    """Yield the fields that no row of a table speaks for."""
    expressed = {name for row in table.rows if _says(row, config) for name in fields_of(row)}
    # a field that has one possible value cannot be silently another, its neutral one either
    implied = {row.field for row in table.rows if isinstance(row, Place) and not row.keys and applies(row, config)}
    for name, value in config.items():
        known = BY_NAME[name]
        if (
            name not in expressed
            and not (known.soft or known.storage)
            and matters(config, name)
            and (name in implied or not equal(value, known.neutral))
            and not (name in traits and equal(traits[name], value))
        ):
            facts = {"where": where, "field": f"{name}: {known.remark}", "found": f"{value!r}"[:80]}
            yield Misfit((name,), NotSupported(f"the target's config has no place for {name!r}", facts))


def _writes(row: Row, config: Config, where: str) -> Iterator[tuple[str, object]]:
    """Yield what one row writes: (dotted key, value)."""
    match row:
        case Place():
            neutral = BY_NAME[row.field].neutral
            value = config.get(row.field, None if isinstance(neutral, EllipsisType) else neutral)
            if not applies(row, config) or value is None or not row.keys:
                return
            if row.omit and equal(value, row.default(config) if callable(row.default) else row.default):
                return
            spelled = next((word for canonical, word in row.words if equal(canonical, value)), None)
            if row.words and spelled is None:
                raise NotSupported(
                    f"the target's config cannot say {row.field} = {value!r}",
                    {"where": where, "key": row.keys[0], "known": ", ".join(str(canonical) for canonical, _ in row.words)},
                )
            yield row.keys[0], spelled if row.words else value
        case Spread():
            if applies(row, config):
                neutral = BY_NAME[row.field].neutral
                value = config.get(row.field, None if isinstance(neutral, EllipsisType) else neutral)
                choice = _choice(row, config, value)
                if choice is ANY:
                    facts = {"where": where, "key": row.key, row.field: value}
                    raise NotSupported(f"the target's config cannot say {row.field}", facts)
                said = zip(spellings_of(row)[0], each_of(row, choice), strict=True)
                yield from ((key, value) for key, value in said if value is not None)
        case Choice():
            if not applies(row, config):
                return
            values = tuple(config.get(name, BY_NAME[name].neutral) for name in row.fields)
            line = next((keys for fields, keys in row.lines if all(map(equal, fields, values))), None)
            if line is None:
                raise NotSupported(
                    "the target's config cannot say what the model is",
                    {"where": where, **{name: repr(value) for name, value in zip(row.fields, values, strict=True)}},
                )
            yield from (
                (key, value) for (key, _), value in zip(row.keys, line, strict=True) if value is not ANY and value is not SET
            )
        case Flagged():
            yield row.flag, config[row.field] != config[row.otherwise]
            yield row.key, config[row.field]


def _choice(row: Spread, config: Config, wanted: Value) -> object:
    """Return the values of a row's keys that would be read as what a model is, ANY where there are none."""
    try:
        return next((choice for choice in row.choices(config) if row.meaning(choice, config) == wanted), ANY)
    except Senseless:
        return ANY


def _says(row: Row, config: Config) -> bool:
    """Say whether a row speaks for its fields: one without a key does where the value is what would be read."""
    if isinstance(row, Place) and not row.keys and applies(row, config) and concerns(config, row.field):
        default = row.default(config) if callable(row.default) else row.default
        return equal(config.get(row.field), default)
    return applies(row, config)
