"""What a *document* says, as a report draws it: everything in it of its kind, whoever wrote it, and of a sum all of its sources."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from shlex import quote
from typing import Any

from carnet.errors import BadCheckpoint, shown
from carnet.examiner.asked import words
from carnet.formats.side_files import DOCUMENT
from carnet.inventory.merged import DIFFERENCES
from carnet.report.held import Held, held_in

MOST = 1 << 63  # no count is as large
ANY = "*"  # every key of a table, every place of a list
NOTHING = ()  # what no JSON is


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _shape(value: object) -> bool:
    return isinstance(value, list) and all(map(_count, value)) and prod(value) < MOST


def _ratio(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST)


def _list(value: object) -> bool:
    return isinstance(value, list)


def _table(value: object) -> bool:
    return isinstance(value, Mapping)


KINDS: tuple[
    tuple[tuple[str, ...], str, Callable[[object], bool]], ...
] = (  # where -> what stands there, if anything stands above
    (("vocabulary", "rows"), "a count", _count),
    (("vocabulary", "left out as padding"), "a count", _count),
    (("proof", "tensors"), "a count", _count),
    (("proof", "elements compared"), "a count", _count),
    (("proof", "casts"), "a list", _list),
    (("proof", "codes", "weights"), "a count", _count),
    (("proof", "codes", "saturated"), "a count", _count),
    (("proof", "codes", "snr dB"), "a number", _ratio),
    (("proof", "codes", "worst"), "a list", _list),
    (("proof", "codes", "worst", ANY), "a table", _table),
    (("proof", "codes", "worst", ANY, "tensor"), "a name", lambda value: isinstance(value, str)),
    (("proof", "codes", "worst", ANY, "snr dB"), "a number", _ratio),
    (("proof", "codes", "worst", ANY, "saturated"), "a count", _count),
    (("source", "tensors", ANY, "shape"), "a shape", _shape),
    (("merge", "sources", ANY, "tensors", ANY, "shape"), "a shape", _shape),
    (("merge", "weights"), "a list", _list),
    (("merge", "names"), "a list", _list),
    (("merge", "keep"), "a list", _list),
    (("dropped", ANY), "a list", _list),
)


def look(data: Mapping[str, Any], where: object) -> None:
    """Raise BadCheckpoint where a document says something of another kind than it should: anybody can seal one."""
    for path, kind, fits in KINDS:
        for place, value in _at(data, path):
            if not fits(value):
                facts = {"where": where, "key": shown(": ".join(place)), "expected": kind, "found": shown(repr(value)[:300])}
                remedy = f"remove {DOCUMENT}; carnet verify CKPT OUT --seal writes a new one"
                raise BadCheckpoint("the carnet does not say what it should", facts, remedy=remedy)


def _at(data: object, path: Sequence[str]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield what stands at a path, NOTHING where its last key alone is not there."""
    if not path:
        yield (), data
        return
    pairs = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    found = [(str(key), value) for key, value in pairs if path[0] in (ANY, key)]
    if not found and len(path) == 1 and path[0] != ANY and isinstance(data, Mapping):
        found = [(path[0], NOTHING)]
    for key, value in found:
        yield from (((key, *rest), each) for rest, each in _at(value, path[1:]))


def named_in(data: Mapping[str, Any]) -> str:
    """Return the names of the sources that a document names, "" for none."""
    source, merge = data.get("source"), data.get("merge")
    if isinstance(merge, Mapping):
        return ", ".join(map(str, merge["names"]))
    return str(source.get("name")) if isinstance(source, Mapping) else ""


def rows_of(data: Mapping[str, Any]) -> list[Held]:
    """Return the rows of the sources that a document names; of a sum each source is a file."""
    rows, merge = held_in(data.get("source")), data.get("merge")
    if not isinstance(merge, Mapping) or not isinstance(merge.get("sources"), Mapping):
        return rows
    sides = [rows, *map(held_in, merge["sources"].values())]
    names = [str(name) for name in merge["names"]] + [f"{at}" for at in range(len(merge["names"]), len(sides))]
    return [
        replace(row, files={f"{at}: {name}": row.nbytes})
        for at, (name, side) in enumerate(zip(names, sides, strict=False), 1)
        for row in side
    ]


def summed(data: Mapping[str, Any], rows: Sequence[Held]) -> list[Held]:
    """Return the rows of a target: those of a sum are computed, but for what was kept from the first source and for codes."""
    merge = data.get("merge")
    if not isinstance(merge, Mapping):
        return [*rows]
    keep = [str(pattern) for pattern in merge["keep"]]
    return [
        replace(row, computed=bool(row.elements) and not row.recipe and not _kept(row, keep)) if not row.left else row
        for row in rows
    ]


def _kept(row: Held, keep: Sequence[str]) -> bool:
    return all(any(fnmatchcase(each, pattern) for pattern in keep for each in (name, row.label)) for name in row.elements)


def again(data: Mapping[str, Any]) -> str:
    """Return the command that examines a target once more."""
    merge, request = data.get("merge"), data.get("request")
    asked_of = request if isinstance(request, Mapping) else {}
    said = words({**asked_of, "tokens": None}) + (["--tokenizer DIR"] if asked_of.get("tokens") is not None else [])
    if not isinstance(merge, Mapping):
        return " ".join(["carnet verify CKPT OUT", *said])
    asked = ["--weights", ",".join(map(str, merge["weights"]))]
    asked += ["--method", DIFFERENCES] if merge.get("method") == DIFFERENCES else []
    asked += [part for pattern in merge["keep"] for part in ("--keep", quote(shown(str(pattern))))]
    return " ".join(["carnet verify", *["CKPT"] * len(merge["names"]), "OUT", *asked, *said])
