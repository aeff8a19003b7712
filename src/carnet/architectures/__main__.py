"""``python -m carnet.architectures``: print what carnet knows, a line for each family."""

from collections.abc import Mapping, Sequence

from carnet.architectures.family import Family
from carnet.architectures.known import FAMILIES, padded
from carnet.architectures.wrappers import WRAPPERS, Wrapper
from carnet.dialects.configs import Choice, Place, Row, Table, fields_of, keys_of, read
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.writing import misfits
from carnet.model.fields import BY_NAME, Config, Value
from carnet.model.keys import put
from carnet.model.model import value

SIZES = {"layers": 2, "hidden": 4096, "heads": 4, "kv_heads": 2, "head_dim": 16, "topk": 2, "window": 8}  # others are 32
BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}}
# what no class has a default for, or one that no model has
LISTS = {"layers_block_type": ["mamba", "attention"], "block_configs": [BLOCK, BLOCK], "moe_topk": 2}
HEADINGS = ("family", "Hugging Face", "Megatron", "TensorRT-LLM")


def main() -> None:
    """Print the tables that docs/families.md shows."""
    families = sorted(FAMILIES, key=lambda family: family.name)
    _print([HEADINGS, *((each.name, each.hf.architecture, _megatron(each), _tensorrt(each)) for each in families)])
    print()
    names = {family.hf.architecture: family.name for family in FAMILIES}
    wrappers = sorted(WRAPPERS.values(), key=lambda wrapper: wrapper.architecture)
    _print([("it sees or hears", "family"), *((each.architecture, _inside(each, names)) for each in wrappers)])


def _inside(wrapper: Wrapper, names: Mapping[str, str]) -> str:
    return ", ".join(names[text] for text in (wrapper.text, *wrapper.texts.values()))


def _print(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    for line in lines:
        print("".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def _megatron(family: Family) -> str:
    """Return what a target is cut for, or what the refusal of the family's plain model names first."""
    config = plain(family)
    found = misfits(MEGATRON.table, padded(MEGATRON, config), {}, "Megatron's arguments")
    if any(name in family.traits or name in family.needs for misfit in found for name in misfit.fields):
        said = (f"{name} {value(config, name)}" if name not in family.needs else name for name in found[0].fields)
        return "no word for " + " ".join(said)  # what it needs has another value in every model
    return _cuts(family, MEGATRON.table)


def plain(family: Family) -> Config:
    """Return the fields of a model whose config says the sizes that it has to say, and leaves the rest to its class."""
    table = family.hf.table
    raw: dict[str, object] = {key: said for key, said in LISTS.items() if any(key in keys_of(row) for row in table.rows)}
    raw |= {key: said for key, said in table.written.items() if key in table.absent}  # the only value, and not the class's own
    for row in table.rows:
        if isinstance(row, Place) and row.default is ... and row.keys and not row.only:
            size = SIZES.get(row.field, BY_NAME[row.field].kind(32))
            put(raw, row.keys[0], row.words[0][1] if row.words else size)
    return {**family.traits, **read(table, raw, family.name)}


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
    return {name for row in table.rows for name in fields_of(row)}


def _can_say(table: Table, name: str, wanted: Value) -> bool:
    """Say whether some row of a table can have this value of a field, or no row has to."""
    return wanted == BY_NAME[name].neutral or any(_has(row, name, wanted) for row in table.rows if name in fields_of(row))


def _has(row: Row, name: str, wanted: Value) -> bool:
    match row:
        case Choice():
            return any(values[row.fields.index(name)] == wanted for values, _ in row.lines)
        case Place():
            return wanted in [word for word, _ in row.words] if row.words else bool(row.keys) or row.default == wanted
        case _:
            return True


if __name__ == "__main__":
    main()
