"""The lines of a *journal*. They say whose the staging folder is and what is done, so that a killed crossing goes on where it stopped.

One JSON value a line: the plan, the source and the boot of the machine; who holds the folder; then the number of each finished job,
or number and what it found; and that all of these are on the disk::

    {"carnet-journal": 1, "plan": "5be1...", "source": "9f...", "identity": "77...", "boot": "c0...", "names": ["config.json", ...]}
    {"pid": 4711, "host": "node7", "since": "2026-03-01 12:00:00"}
    0
    [2, 3.25]
    {"flushed": true}

A line is one append, and a last line without an end is not a line. The first line is there as soon as the journal has its name: what
begins otherwise is not a journal, and nothing beside it is touched. A first line that comes again begins anew. Bytes that were written
before the machine went down may not have reached the disk, and those of a source that changed are no longer right: what was done in
another boot and not flushed, or of another state of the source, counts for nothing.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from carnet.errors import BadRequest
from carnet.storage.opening import told
from carnet.storage.protocol import Crossing

NAME = "journal.jsonl"
YOUNG = NAME + ".new"  # it gets its name when its first line is there
MAGIC = b'{"carnet-journal": 1, '
BOOT = Path("/proc/sys/kernel/random/boot_id")
OF_PART = re.compile(r"journal-(\d+)-of-(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class File:
    """An open file."""

    descriptor: int
    name: str  # for messages


@dataclass(frozen=True, slots=True)
class Said:
    """What the lines of a journal say, since its last first line."""

    head: Mapping[str, object]
    done: frozenset[int]
    kept: frozenset[int]  # of those, what is on the disk
    measured: Mapping[int, float]
    prepared: bool
    whole: bool


def boot_id() -> str | None:
    """Return what changes when the machine starts, or None where it is not known."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return None


def is_journal(name: str) -> bool:
    """Say whether a name in the staging folder is a journal's.

    >>> is_journal(name_of(3, 64)), is_journal("config.json")
    (True, False)
    """
    return name in (NAME, YOUNG) or OF_PART.fullmatch(name) is not None


def name_of(number: int, of: int) -> str:
    """Return the name of the journal of a part."""
    return f"journal-{number:05}-of-{of:05}.jsonl"


def parts_in(base: int) -> list[tuple[int, int]]:
    """Return the parts, number and of how many, that have a journal in an open folder."""
    found = (OF_PART.fullmatch(name) for name in os.listdir(base))
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def append(file: File, data: bytes) -> None:
    """Add bytes to the end of a file in one go; where it took only some, asking for more has the machine say why."""
    with told(file.name):
        while data := data[os.write(file.descriptor, data) :]:
            pass


def lines(file: File) -> Iterator[object]:
    """Yield what the whole lines of a journal say."""
    for each in text(file).splitlines():
        try:
            yield json.loads(each)
        except (ValueError, RecursionError) as error:
            facts = {"found": repr(each[:80])}
            raise BadRequest(f"{file.name} is not a journal of carnet", facts, remedy="move it away") from error


def text(file: File) -> bytes:
    """Return the whole lines of a journal."""
    found = b""
    while chunk := os.pread(file.descriptor, 1 << 20, len(found)):
        found += chunk
    return found[: found.rfind(b"\n") + 1]


def line(value: object) -> bytes:
    """Return a line of a journal."""
    return (json.dumps(value) + "\n").encode()


def said_in(file: File) -> Said:
    """Return what the lines of a journal say."""
    first, told = dict[str, object](), set[str]()
    done, kept, measured = set[int](), frozenset[int](), dict[int, float]()
    for said in lines(file):
        if type(said) is int:
            done.add(said)
        elif isinstance(said, list) and [*map(type, said)] == [int, float]:
            measured[said[0]] = said[1]
        elif isinstance(said, dict) and "carnet-journal" in said:
            first, done, kept, measured, told = said, set(), frozenset(), {}, set()
        elif isinstance(said, dict):
            told |= said.keys()
            kept = frozenset(done) if "flushed" in said else kept
    return Said(first, frozenset(done), kept, measured, "prepared" in told, "whole" in told)


def check(file: File, *, whole: bool) -> None:
    """Raise BadRequest unless a file begins as a journal does; one that nobody finished beginning may end in the midst of it."""
    first = os.pread(file.descriptor, len(MAGIC), 0)
    if first != MAGIC and (whole or not MAGIC.startswith(first)):
        facts = {"expected": MAGIC.decode() + "...", "found": first.decode("ascii", "backslashreplace") or "an empty file"}
        remedy = "see what its folder holds and move it away, or choose another target"
        raise BadRequest(f"{file.name} is not a journal of carnet", facts, remedy=remedy)


def head(crossing: Crossing) -> bytes:
    """Return the first line of the journal of a crossing."""
    said = {"plan": crossing.plan, "source": crossing.source, "identity": crossing.identity, "boot": boot_id()}
    return line({"carnet-journal": 1, **said, "names": crossing.names})


def of_this_plan(file: File, crossing: Crossing) -> Said:
    """Return what a journal says; raise BadRequest where it is another plan's."""
    said = said_in(file)
    if said.head.get("plan") != crossing.plan:
        folder = Path(file.name).parent
        facts = {"where": folder, "expected": f"plan {crossing.plan}", "found": f"plan {said.head.get('plan')}"}
        raise BadRequest(f"{folder.name} belongs to another plan", facts, remedy="remove it, or finish that crossing first")
    return said


def counts(said: Said, crossing: Crossing) -> bool:
    """Say whether a journal is of this state of the source, as far as this machine can tell."""
    same = said.head.get("plan") == crossing.plan and said.head.get("source") == crossing.source
    return same and (said.head.get("identity") == crossing.identity or not is_here(said))


def is_here(said: Said) -> bool:
    """Say whether a journal was begun on this machine since it was started."""
    return said.head.get("boot") == boot_id() is not None


def last_holder(file: File) -> Mapping[str, object]:
    """Return what who locked a journal last says of itself."""
    return next((said for said in reversed([*lines(file)]) if isinstance(said, dict) and "pid" in said), {})
