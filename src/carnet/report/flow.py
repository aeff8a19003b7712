"""The *flow* of bytes of a crossing: from the source's files through the model's components to the target's files.

::

    model-1 ──┐            ┌── attention ──┐            ┌── rank0        a stream is bytes of one fate: as they are, cast,
    model-2 ──┴── bytes ───┼── MLP ────────┼── bytes ───┴── rank1        quantized, stored again, padding, left behind
                           └── left behind
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from carnet.report.components import COMPONENTS, LEFT, OTHER, component_of
from carnet.report.held import Held

REST = "other files"  # which of them holds it is not known
FILES = 8  # nodes of files on one side: more are grouped by their order
SAME, CAST, QUANTIZED, DECODED, COMPUTED, AGAIN, PADDING, BEHIND = (
    "as it is",
    "cast",
    "quantized",
    "dequantized",
    "computed",
    "stored again",
    "padding",
    LEFT,
)
FATES = {  # fate -> what that means
    SAME: "the same bits",
    CAST: "another element type, rounded to nearest even",
    QUANTIZED: "codes and the scales over them",
    DECODED: "the numbers that codes meant",
    COMPUTED: "a function of what the source holds",
    AGAIN: "a tied or a repeated tensor, held once more",
    PADDING: "rows that are no weight",
    BEHIND: "in the source alone",
}


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes from one node to the next."""

    start: str
    end: str
    fate: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Flow:
    """All streams; the names of nodes in the order in which they are drawn."""

    sources: Mapping[str, int]  # node -> its bytes
    components: Mapping[str, tuple[int, int]]  # node -> bytes that come in, and that go out
    targets: Mapping[str, int]
    arriving: tuple[Stream, ...]  # from sources to components
    leaving: tuple[Stream, ...]  # from components to targets

    @property
    def fates(self) -> list[str]:
        """Return the fates that there are, in the order of the table."""
        found = {stream.fate for stream in (*self.arriving, *self.leaving)}
        return [fate for fate in FATES if fate in found]


def flow(source: Sequence[Held], target: Sequence[Held], name: str = "") -> Flow:
    """Return the streams of a crossing; of a checkpoint alone those to its components. ``name``: of a source of unknown files."""
    ours, theirs = _grouped(source, name), _grouped(target, "")
    arriving, leaving = _summed(_arriving(source, ours)), _summed(_leaving(source, target, theirs))
    ins, outs = (defaultdict[str, int](int) for _ in range(2))
    for stream in arriving:
        ins[stream.end] += stream.nbytes
    for stream in leaving:
        outs[stream.start] += stream.nbytes
    known = [each for each in (*COMPONENTS, *sorted({*ins} - {*COMPONENTS})) if ins[each] or outs[each]]
    return Flow(
        _nodes(ours, arriving, "start"),
        {each: (ins[each], outs[each]) for each in known},
        _nodes(theirs, leaving, "end"),
        arriving,
        leaving,
    )


def component(row: Held) -> str:
    """Return the component of a stored tensor, that of its first canonical one."""
    if row.left:
        return f"{LEFT}: {row.left}"
    return next(map(component_of, row.elements), OTHER)


def _arriving(rows: Iterable[Held], groups: Mapping[str, str]) -> Iterable[Stream]:
    for row in rows:
        end, padding = component(row), row.padding / max(row.nbytes, 1)
        for file, nbytes in row.files.items():
            left = round(nbytes * padding)
            yield Stream(groups[file], end, BEHIND if row.left else SAME, nbytes - left)
            yield Stream(groups[file], f"{LEFT}: padding", PADDING, left)


def _leaving(source: Sequence[Held], rows: Iterable[Held], groups: Mapping[str, str]) -> Iterable[Stream]:
    # of several sources the first counts: what a sum keeps is that one's
    before = {name: row for row in reversed(source) if not row.left for name in row.elements if not row.beside}
    ours = {_starred(name): row for name, row in before.items()}
    fates = dict[str, str]()  # of codes, which come before what is beside them
    for row in rows:
        name = next(iter(row.elements), "")
        if row.beside:
            fate = fates.get(name, QUANTIZED if QUANTIZED in fates.values() else SAME)
        else:
            fate = fates[name] = _fate(before.get(name) or ours.get(_starred(name)), row)
        for file, nbytes in row.files.items():
            parts = {
                kind: round(nbytes * part / max(row.nbytes, 1)) for kind, part in ((AGAIN, row.again), (PADDING, row.padding))
            }
            start = OTHER if row.left else component(row)
            yield Stream(start, groups[file], fate, nbytes - sum(parts.values()))
            for kind, part in parts.items():
                yield Stream(start, groups[file], kind, part)


def _starred(name: str) -> str:
    return re.sub(r"^layers\.(\d+|\*)\.", "layers.*.", name)


def _fate(said: Held | None, row: Held) -> str:
    """Return what became of a source's bytes in a stored tensor of the target, from that of the source with the same weight."""
    if row.computed:
        return COMPUTED
    if said is None or said.dtype == row.dtype:
        return SAME
    if row.recipe and row.recipe != said.recipe:
        return QUANTIZED
    return DECODED if said.recipe else CAST


def _summed(streams: Iterable[Stream]) -> tuple[Stream, ...]:
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for each in streams:
        found[each.start, each.end, each.fate] += each.nbytes
    return tuple(Stream(*ends, nbytes) for ends, nbytes in found.items() if nbytes)


def _nodes(groups: Mapping[str, str], streams: Sequence[Stream], side: str) -> dict[str, int]:
    found = dict.fromkeys(groups.values(), 0)
    for each in streams:
        found[each.start if side == "start" else each.end] += each.nbytes
    return {node: nbytes for node, nbytes in found.items() if nbytes}


def _grouped(rows: Iterable[Held], name: str) -> dict[str, str]:
    """Return the node of every file: its own name, or where there are many a run of files that follow each other."""
    files = sorted({file for row in rows for file in row.files if file}, key=_natural)
    found, size = dict[str, str](), -(-len(files) // FILES)
    for at in range(0, len(files), max(size, 1)):
        run = files[at : at + size]
        first, last = (apart(each, files) for each in (run[0], run[-1]))
        found |= dict.fromkeys(run, run[0] if len(run) == 1 else f"{first} … {last} ({len(run)})")
    return {**found, "": REST if files else name or REST}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names as people do: rank2 before rank10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def apart(name: str, names: Sequence[str]) -> str:
    """Return what tells a name from the others; a number is not cut.

    >>> files = ["model-00001-of-00163.safetensors", "model-00021-of-00163.safetensors"]
    >>> apart(files[1], files)
    '00021'
    """
    begin = len(commonprefix(names))  # noqa: RUF071  letter by letter
    end = len(commonprefix([each[begin:][::-1] for each in names]))  # noqa: RUF071  as above
    head, tail = name[:begin].rstrip("0123456789"), name[len(name) - end :].lstrip("0123456789")
    return name[len(head) : len(name) - len(tail)]
