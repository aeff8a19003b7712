"""The *journal* says whose the staging folder is and which jobs are done, so that a killed crossing goes on where it stopped.

One JSON value a line: the plan, the source and the boot of the machine; who holds the folder; then the number of each finished job::

    {"carnet-journal": 1, "plan": "5be1...", "source": "9f...", "boot": "c0..."}
    {"pid": 4711, "host": "node7", "since": "2026-03-01 12:00:00"}
    0
    2

A line is one append, and a last line without an end is not a line. The first line is there as soon as the journal has its name: what
begins otherwise is not a journal, and nothing beside it is touched. A first line that comes again begins anew. Bytes that were written
before the machine went down may not have reached the disk, and those of a source that changed are no longer right: what was done in
another boot, or of another state of the source, counts for nothing. The lock on the journal is the kernel's: it ends with its process.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from carnet.errors import BadRequest, MachineFailed, shown
from carnet.storage.opening import NEW, explained, open_regular, told
from carnet.storage.protocol import Crossing

NAME = "journal.jsonl"
YOUNG = NAME + ".new"  # it gets its name when its first line is there
MAGIC = b'{"carnet-journal": 1, '
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class File:
    """An open file."""

    descriptor: int
    name: str  # for messages


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
def held(base: int, folder: Path, crossing: Crossing, *, begin: bool = True) -> Iterator[Journal | None]:
    """Open, lock and read the journal in an open folder, or give None where there is none and the caller should look again.

    An empty folder gets one, if ``begin``. Raises BadRequest where it is not a journal, another plan's, or somebody holds it; then
    nothing was changed.
    """
    try:
        descriptor = _opened(base, folder, crossing, begin=begin)
    except OSError as error:
        raise explained(error, str(folder / NAME)) from error
    if descriptor is None:
        yield None
        return
    try:
        file = File(descriptor, str(folder / NAME))
        _check(file, whole=True)
        _lock(file)
        if _named(descriptor, NAME, base):
            found = _read(file, crossing)
            append(file, _line({"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
            yield found
        else:  # published or removed by another run a moment ago
            yield None
    finally:
        os.close(descriptor)


def begin(journal: Journal, crossing: Crossing) -> None:
    """Write that what was done until now counts for nothing."""
    append(journal.file, _head(crossing))


def note(journal: Journal, number: int) -> None:
    """Write that a job is done."""
    append(journal.file, b"%d\n" % number)


def end(journal: Journal) -> None:
    """Write that all is on the disk and examined, so that the folder may become the target."""
    append(journal.file, _line({"whole": True}))
    os.fsync(journal.file.descriptor)


def append(file: File, data: bytes) -> None:
    """Add bytes to the end of a file in one go; where it took only some, asking for more has the machine say why."""
    with told(file.name):
        while data := data[os.write(file.descriptor, data) :]:
            pass


def is_there(base: int) -> bool:
    """Say whether an open folder has a journal."""
    return NAME in os.listdir(base)


def is_whole(base: int, crossing: Crossing) -> bool:
    """Say whether a folder has the journal of this crossing, at its end: it was killed before it could remove it."""
    try:
        descriptor = open_regular(NAME, dir_fd=base)
    except OSError:
        return False
    try:
        file = File(descriptor, NAME)
        _check(file, whole=True)
        said = _said(file)
        return said.head.get("plan") == crossing.plan and said.whole
    except BadRequest:
        return False
    finally:
        os.close(descriptor)


def _head(crossing: Crossing) -> bytes:
    return _line({"carnet-journal": 1, "plan": crossing.plan, "source": crossing.source, "boot": boot_id()})


def _line(value: object) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _opened(base: int, folder: Path, crossing: Crossing, *, begin: bool) -> int | None:
    """Return the journal's descriptor, or None where there is none; an empty folder gets one."""
    with suppress(FileNotFoundError):
        return open_regular(NAME, os.O_RDWR | os.O_APPEND, dir_fd=base)
    if not begin or not set(os.listdir(base)) <= {YOUNG}:
        return None
    try:
        descriptor = os.open(YOUNG, NEW | os.O_APPEND, 0o666, dir_fd=base)
    except FileExistsError:  # of a run that was killed in the midst of this, or is there now
        try:
            descriptor = open_regular(YOUNG, os.O_RDWR | os.O_APPEND, dir_fd=base)
        except FileNotFoundError:
            return None
    young = File(descriptor, str(folder / YOUNG))
    try:
        _check(young, whole=False)
        _lock(young)
        if _named(descriptor, YOUNG, base):
            os.ftruncate(descriptor, 0)
            append(young, _head(crossing))
            os.rename(YOUNG, NAME, src_dir_fd=base, dst_dir_fd=base)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _named(descriptor: int, name: str, base: int) -> bool:
    """Say whether an open file still has its name."""
    try:
        return os.path.samestat(os.stat(name, dir_fd=base, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check(file: File, *, whole: bool) -> None:
    """Raise BadRequest unless a file begins as a journal does; one that nobody finished beginning may end in the midst of it."""
    first = os.pread(file.descriptor, len(MAGIC), 0)
    if first != MAGIC and (whole or not MAGIC.startswith(first)):
        facts = {"expected": MAGIC.decode() + "...", "found": first.decode("ascii", "backslashreplace") or "an empty file"}
        remedy = "see what its folder holds and move it away, or choose another target"
        raise BadRequest(f"{file.name} is not a journal of carnet", facts, remedy=remedy)


def _lock(file: File) -> None:
    try:
        fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        folder = Path(file.name).parent
        facts: dict[str, object] = {"where": folder}
        holders = [line for line in _lines(file) if isinstance(line, dict) and "pid" in line]
        if holders:
            facts["held by"] = shown(f"process {holders[-1]['pid']} on {holders[-1].get('host')}")
            facts["since"] = shown(str(holders[-1].get("since")))
        raise BadRequest(
            f"another run is writing {folder.name}", facts, remedy="wait for it, or write to another folder"
        ) from None
    except OSError as error:  # ENOLCK, ENOSYS: a network file system that was mounted without locks
        facts = {"where": file.name, "reason": error.strerror}
        remedy = "mount it with locks (Lustre: -o flock), or write to another disk"
        raise MachineFailed("the file system has no locks, so nobody could own the target", facts, remedy=remedy) from error


def _lines(file: File) -> Iterator[object]:
    """Yield what the whole lines of a journal say."""
    for line in _text(file).splitlines():
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRequest(
                f"{file.name} is not a journal of carnet", {"found": repr(line[:80])}, remedy="move it away"
            ) from error


def _text(file: File) -> bytes:
    text = b""
    while chunk := os.pread(file.descriptor, 1 << 20, len(text)):
        text += chunk
    return text[: text.rfind(b"\n") + 1]


@dataclass(frozen=True, slots=True)
class _Said:
    """What the lines of a journal say, since its last first line."""

    head: Mapping[str, object]
    done: frozenset[int]
    whole: bool


def _said(file: File) -> _Said:
    head: dict[str, object] = {}
    done, whole = set[int](), False
    for line in _lines(file):
        if type(line) is int:
            done.add(line)
        elif isinstance(line, dict) and "carnet-journal" in line:
            head, done, whole = line, set(), False
        elif isinstance(line, dict) and "whole" in line:
            whole = True
    return _Said(head, frozenset(done), whole)


def _read(file: File, crossing: Crossing) -> Journal:
    """Return what a locked journal says; what comes after its last whole line goes."""
    said = _said(file)
    plan, boot, source = (said.head.get(key) for key in ("plan", "boot", "source"))
    if plan != crossing.plan:
        folder = Path(file.name).parent
        facts = {"where": folder, "expected": f"plan {crossing.plan}", "found": f"plan {plan}"}
        raise BadRequest(f"{folder.name} belongs to another plan", facts, remedy="remove it, or finish that crossing first")
    os.ftruncate(file.descriptor, len(_text(file)))
    counts = boot is not None and boot == boot_id() and source == crossing.source
    return Journal(file, said.done if counts else frozenset(), fresh=not counts)
