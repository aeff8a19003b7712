"""The *journal* says which jobs of which plan are done, so that a killed crossing goes on where it stopped.

One JSON value a line: first the plan and the boot of the machine, then the number of each finished job. A line is one append,
and a last line without an end is no line. Bytes that were written before the machine went down may not have reached the disk:
a journal of another boot counts for nothing.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from carnet.errors import BadRequest
from carnet.executor.files import File, append, explained

NAME = "journal.jsonl"
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Journal:
    """An open and locked journal."""

    file: File
    done: frozenset[int]  # jobs that an earlier run finished
    fresh: bool  # nothing in the staging folder counts: begin anew


def boot_id() -> str | None:
    """Return what changes when the machine starts, or None where it is not known."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return None


@contextmanager
def held(path: Path, plan_digest: str) -> Iterator[Journal]:
    """Open, lock and read the journal of a plan; raise BadRequest where it is another plan's or somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise explained(error, str(path)) from error
    try:
        _lock(descriptor, path)
        yield _read(File(descriptor, str(path)), plan_digest)
    finally:
        os.close(descriptor)


def begin(journal: Journal, plan_digest: str) -> None:
    """Write the first line of an empty journal."""
    os.ftruncate(journal.file.descriptor, 0)
    append(journal.file, (json.dumps({"plan": plan_digest, "boot": boot_id()}) + "\n").encode())


def note(journal: Journal, number: int) -> None:
    """Write that a job is done."""
    append(journal.file, b"%d\n" % number)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor))
    except BlockingIOError:
        same = False
    if not same:  # held by another run, or published by it a moment ago
        facts = {"where": path.parent}
        raise BadRequest(f"another run is writing {path.parent.name}", facts, remedy="wait for it, or write to another folder")


def _read(file: File, plan_digest: str) -> Journal:
    text = b""
    while chunk := os.pread(file.descriptor, 1 << 20, len(text)):
        text += chunk
    text = text[: text.rfind(b"\n") + 1]
    os.ftruncate(file.descriptor, len(text))
    if not text:
        return Journal(file, frozenset(), fresh=True)
    first, *rest = text.splitlines()
    try:
        head = json.loads(first)
        done = frozenset(int(line) for line in rest)
        plan, boot = head["plan"], head["boot"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{file.name} is no journal of carnet", remedy="remove its folder, or choose another") from error
    if plan != plan_digest:
        folder = Path(file.name).parent
        facts = {"where": folder, "expected": f"plan {plan_digest}", "found": f"plan {plan}"}
        raise BadRequest(f"{folder.name} belongs to another plan", facts, remedy="remove it, or finish that crossing first")
    same_boot = boot is not None and boot == boot_id()
    return Journal(file, done if same_boot else frozenset(), fresh=not same_boot)
