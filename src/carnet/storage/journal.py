"""Owning a staging folder: who holds the lock on its *journal*, alone or together with others.

A crossing that several processes write, on any machines, has a journal for each part beside this one, which its process locks. All
of them hold the lock on this one together; the first holds it alone until it has written that every file is there (``prepared``). The
lock is the kernel's: it ends with its process.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from carnet.errors import BadRequest, MachineFailed, shown
from carnet.storage.journal_lines import (
    NAME,
    YOUNG,
    File,
    Said,
    append,
    check,
    counts,
    head,
    is_here,
    last_holder,
    line,
    name_of,
    of_this_plan,
    parts_in,
    said_in,
    text,
)
from carnet.storage.opening import NEW, explained, open_regular, told
from carnet.storage.protocol import Crossing, Part

LOOK = 0.05  # seconds between two looks at a lock
SHORT = 5.0  # seconds that a part waits for whoever holds the folder alone, and longer while another part prepares it


@dataclass(frozen=True, slots=True)
class Journal:
    """An open and locked journal."""

    main: File
    own: File  # where jobs are noted: the journal itself, or that of a part
    alone: bool  # nobody shares the folder
    done: frozenset[int]  # jobs that an earlier run finished; those of other parts, too, where nobody shares the folder
    measured: Mapping[int, float]  # and what jobs found
    fresh: bool  # nothing in the staging folder counts: begin anew


@contextmanager
def held(
    base: int, folder: Path, crossing: Crossing, *, begin: bool = True, part: Part | None = None
) -> Iterator[Journal | None]:
    """Open, lock and read the journal in an open folder, or give None where there is none and the caller should look again.

    An empty folder gets one, if ``begin``. Raises BadRequest where it is not a journal, another plan's, or somebody holds it; then
    nothing was changed.
    """
    try:
        descriptor = _opened(base, folder, crossing, part, begin=begin)
    except OSError as error:
        raise explained(error, str(folder / NAME)) from error
    if descriptor is None:
        yield None
        return
    try:
        main = File(descriptor, str(folder / NAME))
        check(main, whole=True)
        alone = _lock(main, crossing, part)
        said = of_this_plan(main, crossing) if _named(descriptor, NAME, base) else None
        if said is None:
            yield None  # published or removed by another run a moment ago
            return
        if alone:
            os.ftruncate(descriptor, len(text(main)))
            append(main, _holder(part))
        with _parts_own(base, folder, crossing, part, main) as own:
            yield _read(base, said, crossing, part, Journal(main, own, alone, frozenset(), {}, fresh=False))
    finally:
        os.close(descriptor)


@contextmanager
def _parts_own(base: int, folder: Path, crossing: Crossing, part: Part | None, main: File) -> Iterator[File]:
    """Open and lock the journal of a part; that of none is the journal itself."""
    if part is None:
        yield main
        return
    path = folder / name_of(part.number, part.of)
    with told(path):
        try:
            descriptor = os.open(path.name, NEW | os.O_APPEND, 0o666, dir_fd=base)
        except FileExistsError:
            descriptor = open_regular(path.name, os.O_RDWR | os.O_APPEND, dir_fd=base)
    try:
        own = File(descriptor, str(path))
        check(own, whole=False)
        until = time.monotonic() + crossing.patience
        while not _locked(own, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise _is_held(own, f"another run is writing part {part}")
            time.sleep(LOOK)
        os.ftruncate(descriptor, len(text(own)))
        yield own
    finally:
        os.close(descriptor)


def begin(journal: Journal, crossing: Crossing) -> None:
    """Write that what was done until now counts for nothing."""
    for file in dict.fromkeys((journal.main, journal.own)):
        append(file, head(crossing))


def share(journal: Journal) -> None:
    """Write that every file is there, and let other parts hold the journal, too."""
    if journal.own == journal.main or not journal.alone:
        return
    append(journal.main, line({"prepared": True}))
    until = time.monotonic() + SHORT
    while not _locked(journal.main, fcntl.LOCK_SH):  # another had it between: it looks, and shares it again
        if time.monotonic() > until:
            raise _is_held(journal.main, f"another run is writing {Path(journal.main.name).parent.name}")
        time.sleep(LOOK)


def note(journal: Journal, number: int, found: float | None = None) -> None:
    """Write that a job is done, and what it found."""
    append(journal.own, line(number if found is None else [number, found]))


def settle(journal: Journal) -> None:
    """Write that what was done until now is on the disk."""
    append(journal.own, line({"flushed": True}))
    with told(journal.own.name):
        os.fsync(journal.own.descriptor)


def measured_by_all(base: int, crossing: Crossing) -> Mapping[int, float]:
    """Return what jobs found, from every journal in an open folder."""
    return {number: found for said in _all(base) if counts(said, crossing) for number, found in said.measured.items()}


def end(journal: Journal) -> None:
    """Write that all is on the disk and examined, so that the folder may become the target."""
    append(journal.main, line({"whole": True}))
    os.fsync(journal.main.descriptor)


def is_whole(base: int, crossing: Crossing) -> bool:
    """Say whether a folder has the journal of this crossing, at its end: it was killed before it could remove it."""
    try:
        descriptor = open_regular(NAME, dir_fd=base)
    except OSError:
        return False
    try:
        file = File(descriptor, NAME)
        check(file, whole=True)
        said = said_in(file)
        return said.head.get("plan") == crossing.plan and said.whole
    except BadRequest:
        return False
    finally:
        os.close(descriptor)


def _holder(part: Part | None) -> bytes:
    who = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    return line(who if part is None else {**who, "part": str(part)})


def _opened(base: int, folder: Path, crossing: Crossing, part: Part | None, *, begin: bool) -> int | None:
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
        check(young, whole=False)
        if _lock(young, crossing, part) and _named(descriptor, YOUNG, base):
            os.ftruncate(descriptor, 0)
            append(young, head(crossing))
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


def _lock(file: File, crossing: Crossing, part: Part | None) -> bool:
    """Lock a journal alone (True); a part locks one that says that all is prepared together with the other parts."""
    until = time.monotonic() + max(crossing.patience, 0 if part is None else SHORT)
    while True:
        if part is not None and _locked(file, fcntl.LOCK_SH):
            said = said_in(file)
            if said.prepared and counts(said, crossing):
                return False
        if _locked(file, fcntl.LOCK_EX):
            return True
        if part is not None and "part" in last_holder(file):
            until = time.monotonic() + SHORT
        if time.monotonic() >= until:
            raise _is_held(file, f"another run is writing {Path(file.name).parent.name}")
        time.sleep(LOOK)


def _locked(file: File, how: int) -> bool:
    """Lock a file, and say whether that could be done."""
    try:
        fcntl.flock(file.descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, ENOSYS: a network file system that was mounted without locks
        facts = {"where": file.name, "reason": error.strerror}
        remedy = "mount it with locks (Lustre: -o flock), or write to another disk"
        raise MachineFailed("the file system has no locks, so nobody could own the target", facts, remedy=remedy) from error
    return True


def _is_held(file: File, what: str) -> BadRequest:
    facts: dict[str, object] = {"where": Path(file.name).parent}
    if holder := last_holder(file):
        first = f"part {holder['part']} and others, begun by " if "part" in holder else ""
        facts["held by"] = shown(f"{first}process {holder['pid']} on {holder.get('host')}")
        facts["since"] = shown(str(holder.get("since")))
    return BadRequest(what, facts, remedy="wait for it, or write to another folder")


def _all(base: int) -> Iterator[Said]:
    """Yield what the journals in an open folder say, of the crossing and of its parts."""
    for name in (NAME, *(name_of(*part) for part in parts_in(base))):
        descriptor = open_regular(name, dir_fd=base)
        try:
            file = File(descriptor, name)
            check(file, whole=False)
            yield said_in(file)
        finally:
            os.close(descriptor)


def _read(base: int, said: Said, crossing: Crossing, part: Part | None, journal: Journal) -> Journal:
    """Return a locked journal with what it says."""
    ours = [*_all(base)] if part is None else [said, said_in(journal.own)]
    if part is not None and not counts(ours[-1], crossing):
        append(journal.own, head(crossing))
    if part is not None:
        append(journal.own, _holder(part))
    done = frozenset[int]().union(*(each.done if is_here(each) else each.kept for each in ours if counts(each, crossing)))
    # another boot of this machine, or another machine: what a run of all of it did not flush may be lost
    lost = not is_here(said) and not done and part is None and not parts_in(base)
    fresh = not counts(said, crossing) or lost
    measured = {number: found for each in ours if counts(each, crossing) for number, found in each.measured.items()}
    return replace(journal, done=done, measured=measured, fresh=fresh)
