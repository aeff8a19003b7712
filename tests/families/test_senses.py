"""Any value under any key of a table is read or refused with a CarnetError; what else a rule raises is a mistake, and shows as one."""

import json
from functools import cache
from itertools import product
from random import Random

import pytest

from carnet.architectures.known import SPELLED, dialect_of, others
from carnet.dialects.configs import Place, Spread, Table, applies, keys_of, place, read
from carnet.dialects.longrope import LONGROPE
from carnet.dialects.senses import Senseless, expect, of_kind
from carnet.dialects.writing import misfits, write
from carnet.dialects.yarn import YARN
from carnet.errors import BadCheckpoint, CarnetError
from tests.attacks.test_fuzz_shapes import strange
from tests.families.samples import MAYBE, SAMPLES, draw, family_of, fits, said
from tests.families.test_every_refusal import SPOKEN, changed

WRONG = (
    *(None, True, False, 0, 1, -1, 3, 1 << 62, 10**400, 0.5, -1e308, 1e308, float("nan"), float("inf"), "", "a", "{}", "[1]"),
    *([], [0], [-1], [1 << 62], [0.5], ["a"], [True], [None], [[1]], [{}], {}, {"a": 1}, (1, 2)),
)
TURNS = 60
TABLES: dict[str, list[str]] = {}  # a family's in a program, or Megatron's one -> the samples that it can say
for name, dialect in SPOKEN:
    TABLES.setdefault(dialect if dialect == "megatron" else f"{family_of(name).name} {dialect}", []).append(name)
SPREADS = [
    (table, at)
    for table, names in TABLES.items()
    for rows in [dialect_of(family_of(names[0]), table.split()[-1]).table.rows]
    for at, row in enumerate(rows)
    # of a table that knows no such positions their rows never apply
    if isinstance(row, Spread)
    and (row.only not in (YARN, LONGROPE) or any(row.only["rope_type"] in dict(r.words) for r in rows if isinstance(r, Place)))
]
STRETCHED = [more for more in MAYBE if more.keys() & {"rope_type", "window", "router_groups"}]


@cache
def said_with(table: str, at: int) -> tuple[str, dict[str, object]]:
    """Return a sample to which a row of a table applies, and what its config says."""
    dialect = table.rsplit(maxsplit=1)[-1]
    row = dialect_of(family_of(TABLES[table][0]), dialect).table.rows[at]
    for more, turn in product(({}, *STRETCHED), range(3)):  # one that is drawn stretched is not stretched otherwise
        for name in TABLES[table]:
            model = draw(name, Random(f"{name}{turn or ''}"), tuple(SAMPLES[name].dialects.split()))
            config = {**model.config, **more}
            if applies(row, config) and fits(model.family, model.config, more, (dialect,)):
                return name, said(model.family, dialect, config)
    raise AssertionError("no sample comes to this row")


def endures(name: str, dialect: str, config: dict[str, object]) -> None:
    """Read a config, and ask the family's programs whether they can say what it says."""
    family = family_of(name)
    try:
        found = {**family.traits, **read(dialect_of(family, dialect).table, config, "a config")}
    except CarnetError as error:
        assert str(error)
        return
    for spelled in (spell(family) for spell in SPELLED.values()):
        if spelled is not None:
            misfits(spelled.table, found, family.traits, "a config")


@pytest.mark.parametrize("table", TABLES)
def test_any_value_under_any_key_is_read_or_refused(table):
    name, config = said_with(table, 0)
    rows = dialect_of(family_of(name), table.split()[-1]).table.rows
    for key in sorted({key for row in rows for key in keys_of(row)}):
        for wrong in WRONG[::2]:
            endures(name, table.split()[-1], changed(config, key, wrong))


@pytest.mark.parametrize(("table", "at"), SPREADS)
def test_any_values_under_the_keys_of_a_rule_are_read_or_refused(table, at):
    dialect, chance = table.split()[-1], Random(at)
    name, whole = said_with(table, at)
    row = dialect_of(family_of(name), dialect).table.rows[at]
    for key in keys_of(row):
        for wrong in WRONG:
            endures(name, dialect, changed(whole, key, wrong))
    for _ in range(TURNS if row.more else 0):
        config = whole
        for key in chance.sample(keys_of(row), chance.randint(2, len(keys_of(row)))):
            config = changed(config, key, chance.choice(WRONG))
        endures(name, dialect, config)
    for key in {key.split(".")[0] for key in keys_of(row)}:
        value = whole.get(key)
        text = isinstance(value, str) and value.startswith("{")
        for _ in range(TURNS if text or (isinstance(value, list | dict) and value) else 0):
            other = strange(json.loads(value) if text else value, chance)
            endures(name, dialect, {**whole, key: json.dumps(other) if text else other})


@pytest.mark.parametrize("name", SAMPLES)
def test_whether_another_family_can_say_a_model_is_answered_for_any(name):
    model = draw(name, Random(name), tuple(SAMPLES[name].dialects.split()))
    for more in ({}, *STRETCHED):
        others(family_of(name), {**model.config, **more}, "a config")


# --- mistakes -------------------------------------------------------------------------------------------------------------------


def rule(meaning, choices=lambda c: (2,), **more) -> Table:
    """Return the table of a program whose config says the layers and, by a rule, the experts."""
    return Table((place("layers", "count"), Spread("experts", "rule", 0, meaning, choices, **more)))


MISTAKES = [
    pytest.param(lambda said, c: c["lyers"], KeyError, id="a field that nobody knows"),
    pytest.param(lambda said, c: c["hidden"], KeyError, id="a field that no row reads"),
    pytest.param(lambda said, c: said["layers"], TypeError, id="a number taken for a record"),
    pytest.param(lambda said: said, TypeError, id="too few parameters"),
    pytest.param(lambda said, c: int("x"), ValueError, id="a text that is no number"),
    pytest.param(lambda said, c: (1, 2)[said], IndexError, id="past the end"),
    pytest.param(lambda said, c: 1 // (said - said), ZeroDivisionError, id="by nothing"),
]


@pytest.mark.parametrize("count", [4, "4"], ids=["", "after a refusal"])
@pytest.mark.parametrize(("meaning", "mistake"), MISTAKES)
def test_a_mistake_in_a_table_is_no_bad_checkpoint(meaning, mistake, count):
    with pytest.raises(mistake):
        read(rule(meaning), {"count": count, "rule": 2}, "a config")


@pytest.mark.parametrize(("meaning", "mistake"), MISTAKES)
def test_a_mistake_in_a_table_is_nothing_that_a_config_cannot_say(meaning, mistake):
    with pytest.raises(mistake):
        write(rule(meaning), {"layers": 4, "experts": 2}, {}, "a config")


def test_a_rule_that_looks_in_vain_for_what_was_refused_says_nothing_more():
    with pytest.raises(BadCheckpoint) as caught:
        read(rule(lambda said, c: said * c["layers"]), {"count": "4", "rule": 2}, "a config")
    assert caught.value.what == "the config sets 'count' to something that is not an int"
    assert caught.value.facts == {"where": "a config", "found": "'4'"}


def test_what_makes_no_sense_is_refused_with_what_would():
    def even(said, _):
        expect(said % 2 == 0, "an even number")
        return said

    with pytest.raises(BadCheckpoint) as caught:
        read(rule(even), {"count": 4, "rule": 3}, "a config")
    assert caught.value.what == "the config sets 'rule' to what makes no sense"
    assert {key: str(fact) for key, fact in caught.value.facts.items()} == {
        "where": "a config",
        "rule": "3",
        "expected": "an even number",
    }


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 1.0, "an int"),
        (int, True, "an int"),
        (int, -(1 << 63), "an int of 64 bits"),
        (float, True, "a float"),
        (float, "1", "a float"),
        (float, float("nan"), "a finite number"),
        (float, -float("inf"), "a finite number"),
        (float, 10**400, "a finite number"),
        (bool, 1, "a bool"),
        (str, None, "a str"),
        (list[int], 1, "a list"),
        (list[int], [1, True], "an int"),
        (list[str], ["a", 1], "a str"),
        (list[dict[str, object]], [[]], "a record"),
        (int | list[int], "1", "an int"),
        (int | list[int], ["1"], "an int"),
    ],
)
def test_a_value_of_another_kind_makes_no_sense(kind, value, expected):
    with pytest.raises(Senseless, match=f"^{expected}$"):
        of_kind(kind, value)


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (int, -1, -1),
        (float, 1, 1.0),
        (bool, False, False),
        (list[int], (1, 2), [1, 2]),  # of a pickle
        (list[int], [], []),
        (int | list[int], 3, 3),
        (int | list[int], [3], [3]),
        (list[dict[str, object]], [{"a": 1}], [{"a": 1}]),
    ],
)
def test_a_value_of_a_kind_is_it(kind, value, found):
    assert of_kind(kind, value) == found
    assert type(of_kind(kind, value)) is type(found)
