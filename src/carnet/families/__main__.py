"""``python -m carnet.families``: print what carnet knows, a line for each family."""

from carnet.families.family import Family
from carnet.families.fields import Choice, Place, Row, Table
from carnet.families.known import FAMILIES
from carnet.families.megatron import MEGATRON
from carnet.families.words import BY_NAME, Value

HEADINGS = ("family", "Hugging Face", "Megatron", "TensorRT-LLM")


def main() -> None:
    """Print the table that docs/families.md shows."""
    families = sorted(FAMILIES, key=lambda family: family.name)
    lines = [HEADINGS, *((each.name, each.hf.architecture, _megatron(each), _tensorrt(each)) for each in families)]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    for line in lines:
        print("".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def _megatron(family: Family) -> str:
    """Return what a target is cut for, or the first of the family's traits that Megatron's arguments cannot say."""
    for name, value in family.traits.items():
        if not _can_say(MEGATRON.table, name, value):
            return f"no word for {name} {value}"
    return _cuts(family, MEGATRON.table)


def _tensorrt(family: Family) -> str:
    return f"no: {family.without}" if family.trtllm is None else _cuts(family, family.trtllm.table)


def _cuts(family: Family, table: Table) -> str:
    """Return what a target is cut for, and the fields of the family's own config that this one has no place for."""
    here, there = _placed(family.hf.table), _placed(table)
    stages = table is MEGATRON.table or _can_say(table, "pp", 2)
    cuts = " ".join(("TP", *["PP"] * stages, *["EP"] * ("experts" in here & there)))
    unsaid = sorted(name for name in here - there if not (BY_NAME[name].soft or BY_NAME[name].storage))
    # one word stands for the numbers that stretch the angles
    named = [name for name in unsaid if name == "rope_type" or not name.startswith("rope_")]
    return f"{cuts}, not {' '.join(named)}" if named else cuts


def _placed(table: Table) -> set[str]:
    return {name for row in table.rows for name in _fields(row)}


def _can_say(table: Table, name: str, value: Value) -> bool:
    """Say whether some row of a table can have this value of a field, or no row has to."""
    return value == BY_NAME[name].neutral or any(_has(row, name, value) for row in table.rows if name in _fields(row))


def _has(row: Row, name: str, value: Value) -> bool:
    match row:
        case Choice():
            return any(values[row.fields.index(name)] == value for values, _ in row.lines)
        case Place():
            return value in [word for word, _ in row.words] if row.words else bool(row.keys) or row.default == value
        case _:
            return True


def _fields(row: Row) -> tuple[str, ...]:
    return row.fields if isinstance(row, Choice) else (row.field,)


if __name__ == "__main__":
    main()
