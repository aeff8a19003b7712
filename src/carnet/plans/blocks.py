"""The steps of one target file as JSON values: columns, with tables of what they number.

A column whose numbers are all the same is one number. Anyone may have written a block: whatever a row numbers must be in its table,
and of the kind that its form needs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from carnet.plans.columns import FAR, IDS, OFFSETS, ROW, Gathered, More, Steps
from carnet.plans.values import below, dtype_of, list_of, numbers_of, text_of
from carnet.steps import Elementwise, Encoding, Fill, Function, Make, Measure, Move, Place, Product, Put, Same, Space, Step

MOST = 1 << 15  # steps of one block
KINDS: Mapping[object, type[Step]] = {kind.__name__.lower(): kind for kind in get_args(Step)}
OPEN = ("tensor", "start", "amax", "given", "values")  # what rows say
USED: Mapping[type[Step], tuple[str, ...]] = {
    Move: ("source", "target"),
    Make: ("source", "target", "scales"),
    Product: ("source", "target", "scales"),
    Same: ("source", "target"),
    Measure: ("source",),
    Fill: ("target",),
    Put: ("target",),
}


def by_file(steps: Steps) -> Steps:
    """Return steps in the order of the target files that they are done for, those that only look at the source first."""
    return steps.at(np.argsort(_owners(steps), kind="stable"))


def blocks(steps: Steps) -> Iterator[dict[str, object]]:
    """Yield the blocks of some steps, each of one file; "" are those that only look at the source."""
    owners = _owners(steps)
    low = 0
    for high in [*(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(steps)]:
        for begin in range(low, high, MOST):
            name = steps.names[owners[low]] if owners[low] >= 0 else ""
            yield _block(name, steps.at(slice(begin, min(high, begin + MOST))))
        low = high


def _owners(steps: Steps) -> NDArray[np.int64]:
    """Return the number of the file that each step is done for, of what is assembled the one that its codes go to; else -1."""
    rows, forms = steps.rows, steps.forms
    looks = np.array([isinstance(form, Same | Measure) or _is_of_adapter(form) for form in forms], bool)[rows["form"]]
    assembles = np.array([isinstance(form, Move | Make | Fill) and form.target.space == "scratch" for form in forms], bool)
    owners = np.where(looks, -1, rows["target"]).astype(np.int64)
    codes = steps.where(lambda form: isinstance(form, Make) and form.function == "quantize").rows
    if len(codes):
        codes = codes[np.argsort(codes["source_at"])]
        inside = assembles[rows["form"]]
        at = np.searchsorted(codes["source_at"], rows["target_at"][inside], "right") - 1
        owners[inside] = codes["target"][np.maximum(at, 0)]
    return owners


def _is_of_adapter(form: Step) -> bool:
    return isinstance(form, Move) and form.target.space == "factors"


def _block(name: str, steps: Steps) -> dict[str, object]:
    small = Gathered()
    small.take(steps)
    steps = small.steps()
    tables = {"forms": [_flat(form) for form in steps.forms], "names": steps.names, "starts": steps.starts, "mores": steps.more}
    columns = {column: steps.rows[column] for column in (*IDS, *OFFSETS)}
    said = {name: int(found[0]) if (found == found[0]).all() else found.tolist() for name, found in columns.items()}
    return {"steps": name, "number": len(steps), **tables, **said}


def _flat(value: object) -> object:
    """Return a form, or a part of one, as a list."""
    match value:
        case Place():
            return [value.strides, value.dtype, value.space]
        case Encoding():
            return [value.recipe, value.shape, _flat(value.scales), _flat(value.outer)]
        case Move() | Make() | Product() | Same() | Measure() | Fill() | Put():
            return [type(value).__name__.lower(), *(_flat(getattr(value, name)) for name in _said(type(value)))]
        case _:
            return value


def _said(kind: type[Step]) -> list[str]:
    return [field.name for field in fields(kind) if field.name not in OPEN]


def unblock(block: Mapping[str, Any]) -> Steps:
    """Return the steps of a block; raise ValueError, TypeError, KeyError or IndexError where it is none."""
    names = tuple([text_of("names", name) for name in block["names"]])
    forms = tuple(map(_form, block["forms"]))
    starts = tuple([numbers_of("start", start) for start in block["starts"]])
    more = tuple([tuple(each) for each in block["mores"]])
    rows = np.empty(_count(block["number"]), ROW)
    sizes = {"form": len(forms), "start": len(starts), "more": len(more)}
    for column in IDS:
        rows[column] = _column(column, block[column], len(rows), -1, sizes.get(column, len(names)) - 1)
    for column in OFFSETS:
        rows[column] = _column(column, block[column], len(rows), 0, FAR)
    if min(rows[column].min() for column in ("form", "tensor", "start", "more")) < 0:
        raise ValueError("a row of steps lacks a number")
    for form, step in enumerate(forms):
        _check(step, rows[rows["form"] == form], names, more)
    return Steps(forms, names, starts, more, rows)


def _check(form: Step, rows: NDArray[np.void], names: tuple[str, ...], more: tuple[More, ...]) -> None:
    """Raise where rows do not say what a form leaves open."""
    encoding = form.encoding if isinstance(form, Make | Measure) else None
    used = [*USED[type(form)], *(["scales"] if encoding else []), *(["outer"] if encoding and encoding.outer else [])]
    for column in used:
        for name in sorted(set(rows[column].tolist())):
            if name < 0 or below(names[name]) != names[name]:
                raise ValueError("a file of steps is not valid")
    fits = MORE[type(form)]
    if not all(fits(more[each]) for each in sorted(set(rows["more"].tolist()))):
        raise ValueError("a row of steps does not say what its form leaves open")


def _texts(more: More) -> bool:
    return all(type(each) is str for each in more)


MORE: Mapping[type[Step], Callable[[More], bool]] = {
    Make: lambda more: more[:1] != () and (more[0] is None or type(more[0]) is float) and _texts(more[1:]),
    Measure: lambda more: len(more) == 1 and _texts(more),
    Put: lambda more: all(type(each) is float for each in more),
    **dict.fromkeys((Move, Product, Same, Fill), lambda more: more == ()),
}


def _count(number: object) -> int:
    if type(number) is not int or not 0 < number <= MOST:
        raise ValueError(f"a block of steps has 1 to {MOST}")
    return number


def _column(name: str, said: object, number: int, least: int, most: int) -> NDArray[np.int64]:
    """Return a column: a number for each row, or one for all."""
    found: NDArray[Any] = np.array(said)
    if found.dtype.kind != "i" or found.shape not in ((), (number,)) or found.min() < least or found.max() > most:
        raise ValueError(f"the column {name} is not valid")
    return found


def _form(row: object) -> Step:
    word, *values = list_of("form", row)
    kind = KINDS[word]
    made = {name: _part(kind, name, value) for name, value in zip(_said(kind), values, strict=True)}
    blank = {field.name: BLANKS[field.name] for field in fields(kind) if field.name in OPEN}
    return kind(**blank, **made)  # type: ignore[arg-type]


BLANKS = {"tensor": "", "start": (), "amax": (), "given": None, "values": ()}


def _part(kind: type[Step], name: str, value: object) -> object:
    match name:
        case "source" | "target" | "other" | "factor":
            return _place(value)
        case "shape" | "along":
            return numbers_of(name, value)
        case "encoding":
            return None if value is None and kind is Measure else _encoding(value)
        case "function" if value in get_args(Elementwise if kind is Move else Function):
            return value
        case "add" if type(value) is float:
            return value
    raise ValueError(f"{name} is not valid")


def _place(value: object) -> Place:
    strides, dtype, space = list_of("place", value)
    if space not in get_args(Space):
        raise ValueError("an unknown space")
    return Place("", 0, numbers_of("strides", strides), dtype_of(dtype), space)


def _encoding(value: object) -> Encoding:
    recipe, shape, scales, outer = list_of("encoding", value)
    rows, columns = numbers_of("shape", shape)
    return Encoding(text_of("recipe", recipe), (rows, columns), 0, _place(scales), None if outer is None else _place(outer))
