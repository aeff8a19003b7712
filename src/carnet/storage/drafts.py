"""The *staging folder* ``OUT.partial`` stands beside OUT until everything is in it; then one rename makes it OUT.

From the first look to the rename one crossing owns it: it holds the lock on its journal, and the folder itself open, so that a link
that takes the folder's place leads nobody astray. Nothing in it is written, truncated or removed that this crossing did not write.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from carnet.errors import BadRequest, MachineFailed, shown
from carnet.storage import journal as journals
from carnet.storage.files import PosixTarget
from carnet.storage.journal import Journal
from carnet.storage.journal_lines import NAME, YOUNG, is_journal, name_of, parts_in
from carnet.storage.opening import (
    FOLDER,
    NEW,
    NotPlain,
    check_plain_file,
    explained,
    holder,
    open_below,
    open_regular,
    told,
    write_whole,
)
from carnet.storage.protocol import TAKEN, Crossing, Part

TEMPORARY = ".tmp"  # what a small file is called until it is whole
LOOKS = 100  # at a folder that others make and publish meanwhile


@dataclass(frozen=True, slots=True)
class PosixDraft:
    """The staging folder of one target, owned."""

    out: Path  # what it becomes
    folder: Path  # where it is: OUT itself where a run was killed just after the rename
    names: frozenset[str]  # of the files that are written
    base: int  # descriptor of the folder
    journal: Journal
    crossing: Crossing

    @property
    def where(self) -> str:
        """Return the path of the folder."""
        return str(self.folder)

    @property
    def in_order(self) -> bool:
        """Say no: files are made in their full size."""
        return False

    @property
    def kept(self) -> Collection[str]:
        """Return no file: the journal counts jobs."""
        return ()

    @property
    def whole(self) -> bool:
        """Say whether a run was killed between the rename and its last act."""
        return self.folder == self.out

    @property
    def done(self) -> frozenset[int]:
        """Return the jobs in the journal."""
        return self.journal.done

    @property
    def measured(self) -> Mapping[int, float]:
        """Return what jobs in the journal found."""
        return self.journal.measured

    def measured_by_all(self) -> Mapping[int, float]:
        """Return what is in all journals."""
        return journals.measured_by_all(self.base, self.crossing)

    @property
    def parts(self) -> int:
        """Return the most parts that a journal is one of."""
        return max((of for _, of in parts_in(self.base)), default=0)

    @property
    def fresh(self) -> bool:
        """Say whether the journal is new, or of another boot or state of the source."""
        return self.journal.fresh

    @property
    def ready(self) -> bool:
        """Say whether the journal is held together with other parts."""
        return not self.journal.alone

    def share(self) -> None:
        """Write that every file is there, and hold the journal together with other parts."""
        journals.share(self.journal)

    def note(self, job: int, found: float | None = None) -> None:
        """Write that a job is done."""
        journals.note(self.journal, job, found)

    def settle(self) -> None:
        """Write that what was done outlives the machine's power."""
        journals.settle(self.journal)

    def restart(self) -> None:
        """Remove what crossings of this plan wrote into the folder, and nothing else; begin the journal anew."""
        with told(self.folder):
            self._clear()
        journals.begin(self.journal, self.crossing)

    def _clear(self) -> None:
        held = {os.path.basename(file.name) for file in (self.journal.main, self.journal.own)}
        for name, found in list(entries(self.base)):
            if name in held or not _is_own(self.names, name, found):
                continue
            with holder(self.base, name) as (at, last):
                if stat.S_ISDIR(found.st_mode):
                    with suppress(OSError):  # what is in it is not carnet's
                        os.rmdir(last, dir_fd=at)
                else:
                    os.unlink(last, dir_fd=at)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file."""
        found = _found(self, name)
        return None if found is None else found.st_size

    def reserve(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Raise MachineFailed where the disk has less room than what is still to be written; where nothing is, nothing stays."""
        needed, some = 0, self.journal.own is not self.journal.main  # or other parts may be there
        for name, nbytes in sizes:
            found = _found(self, name)
            some |= found is not None
            needed += nbytes if found is None else max(0, nbytes - found.st_blocks * 512)
        disk = os.statvfs(self.base)
        free = disk.f_bavail * disk.f_frsize
        if needed > free:
            facts = {"where": self.folder, "needed": f"{needed:,} bytes", "free": f"{free:,} bytes"}
            remedy = f"free {needed - free:,} bytes, or choose another disk"
            if not some:
                self.discard()
            raise MachineFailed("the disk has too little room", facts, remedy=remedy)

    def create(self, name: str, nbytes: int, parts: Iterable[tuple[int, bytes]]) -> None:
        """Make a file in its full size, all holes but for some parts."""
        with told(self.folder / name):
            with holder(self.base, name, make=True) as (at, last):
                try:
                    descriptor = os.open(last, NEW, 0o666, dir_fd=at)
                except FileExistsError:
                    descriptor = open_regular(last, os.O_RDWR, dir_fd=at)
            target = PosixTarget(descriptor, str(self.folder / name))
            os.ftruncate(descriptor, nbytes)
            for offset, data in parts:
                target.write(offset, memoryview(data))

    def open(self, name: str) -> PosixTarget:
        """Open a file for writing, following no link."""
        return _opened(self.base, self.folder, name)

    def complete(self, name: str) -> None:
        """Do nothing: holes are zeros."""

    def put(self, name: str, chunks: Iterable[bytes], *, sync: bool = False) -> None:
        """Write a small file so that it is whole or not there."""
        with told(self.folder / name), holder(self.base, name, make=True) as (at, last):
            with suppress(FileNotFoundError):  # of a run that was killed
                os.unlink(last + TEMPORARY, dir_fd=at)
            write_whole(at, last, last + TEMPORARY, chunks, sync=sync)

    def flush(self, name: str) -> None:
        """Bring a file or a folder to the disk, or (named "") the staging folder itself."""
        with told(self.folder / name), holder(self.base, name) as (at, last):
            descriptor = os.open(last or ".", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self) -> None:
        """Remove the folder of a crossing that can never be finished; what carnet did not write in it stays."""
        self._clear()
        with suppress(FileNotFoundError):
            os.unlink(NAME, dir_fd=self.base)
        if _is_there(self.folder, self.base):
            with suppress(OSError):
                self.folder.rmdir()

    def publish(self) -> None:
        """Make the staging folder the target."""
        out, folder = self.out, self.folder
        with told(out.parent):
            parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if folder != out:
                _refuse_foreign(self)
                if not _is_there(folder, self.base):
                    raise MachineFailed(f"{folder.name} was moved while it was written", {"where": folder})
                journals.end(self.journal)
                os.fsync(self.base)
                os.rename(folder.name, out.name, src_dir_fd=parent, dst_dir_fd=parent)
                os.fsync(parent)
            for part in parts_in(self.base):
                os.unlink(name_of(*part), dir_fd=self.base)
            os.unlink(NAME, dir_fd=self.base)
            os.fsync(self.base)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                remedy = "move it away, and run the same command again: it resumes"
                raise BadRequest(f"{out} exists since a moment ago", remedy=remedy) from error
            raise explained(error, str(out)) from error
        finally:
            os.close(parent)


def staging_of(out: Path) -> Path:
    """Return the staging folder of a target.

    >>> staging_of(Path("/models/llama")).name
    'llama.partial'
    """
    if out.absolute().name in ("", ".."):
        raise BadRequest(f"{out} names no folder that could be new", remedy="name the folder that the target shall become")
    return out.absolute().with_name(out.absolute().name + ".partial")


@contextmanager
def owned(
    out: Path, names: Collection[str], crossing: Crossing, sources: Iterable[Path], part: Part | None = None
) -> Iterator[PosixDraft]:
    """Own the staging folder of a target; ``sources`` are folders of this machine that it must not lie in."""
    for source in sources:
        _refuse_overlap(source, out)
    _refuse_entangled(out, names)
    crossing = replace(crossing, names=tuple(sorted(names)))
    for _ in range(LOOKS):
        with ExitStack() as stack:
            draft = _taken(stack, crossing, out, frozenset(names), part)
            if draft is not None:
                if not draft.whole and not draft.ready:  # where others are at work who has prepared it has looked
                    _refuse_foreign(draft)
                yield draft
                return
        if part is not None:
            time.sleep(journals.LOOK)
    raise BadRequest(f"others write {out} all the time", remedy="choose another target")


def joined(out: Path) -> Callable[[str], PosixTarget]:
    """Return what opens files of a staging folder that another process owns."""
    folder = staging_of(out)
    with told(folder):
        held = PosixTarget(os.open(folder, FOLDER), str(folder))
    return lambda name: _opened(held.descriptor, folder, name)


def _opened(base: int, folder: Path, name: str) -> PosixTarget:
    with told(folder / name):
        return PosixTarget(open_below(base, name, os.O_WRONLY), str(folder / name))


def _taken(stack: ExitStack, crossing: Crossing, out: Path, names: frozenset[str], part: Part | None) -> PosixDraft | None:
    """Return the folder with its journal locked, or None where somebody else's folder was published or removed at this moment."""
    folder = out if _is_whole(crossing, out) else staging_of(out)
    if folder != out:
        refuse_taken(out)
    if part is not None and part.joins and not (folder / NAME).exists():
        remedy = "give every machine the same disk under the same path"
        raise MachineFailed("this machine does not see the target that others write", {"where": folder}, remedy=remedy)
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        base = os.open(folder, FOLDER)
    stack.callback(os.close, base)
    journal = stack.enter_context(journals.held(base, folder, crossing, begin=folder != out, part=part))
    if journal is None:
        if folder != out and not {NAME, YOUNG} & {*os.listdir(base)} and _is_there(folder, base):
            raise BadRequest(
                f"{folder} exists and no crossing of carnet began it", remedy="remove it, or choose another target"
            )
        return None
    if folder != out:
        try:
            refuse_taken(out)  # it may have been published meanwhile
        except BadRequest:
            _leave_nothing(base, folder)
            raise
    return PosixDraft(out, folder, names, base, journal, crossing)


def _is_whole(crossing: Crossing, out: Path) -> bool:
    """Say whether OUT is there because a run of this crossing was killed between the rename and its last act."""
    try:
        base = os.open(out, FOLDER)
    except OSError:
        return False
    try:
        return journals.is_whole(base, crossing)
    finally:
        os.close(base)


def _is_there(folder: Path, base: int) -> bool:
    """Say whether a folder that is open still has its name."""
    try:
        return os.path.samestat(os.stat(folder, follow_symlinks=False), os.fstat(base))
    except FileNotFoundError:
        return False


def _leave_nothing(base: int, folder: Path) -> None:
    """Remove a staging folder in which nothing was written."""
    if os.listdir(base) == [NAME]:
        os.unlink(NAME, dir_fd=base)
        with suppress(OSError):
            folder.rmdir()


def refuse_taken(out: Path) -> None:
    """Raise BadRequest where the target is a file or holds something, or its staging folder is none."""
    staging = staging_of(out)
    with told(out):
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise BadRequest(f"{out} exists", remedy=TAKEN)
        if out.is_mount():  # nothing can be renamed to it
            raise BadRequest(f"{out} is a mount point", remedy=f"choose a folder in it: {out / 'model'}")
        if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
            raise BadRequest(f"{staging} exists and is not a folder", remedy="remove it")


def _refuse_overlap(source: Path, out: Path) -> None:
    """Raise BadRequest where the target would be written into its source, or the source lies where the target is written."""
    origin = Path(os.path.realpath(source))
    for folder in (out, staging_of(out)):
        target = Path(os.path.realpath(folder))
        if target.is_relative_to(origin) or origin.is_relative_to(target):
            facts = {"source": origin, "target": target}
            raise BadRequest(
                "the target and its source lie in each other", facts, remedy="choose a target outside of the source"
            )


def _refuse_entangled(out: Path, names: Collection[str]) -> None:
    """Raise BadRequest where a file would lie in another, or in the place of what the staging folder itself needs."""
    files, folders = set(names), {str(parent) for name in names for parent in PurePosixPath(name).parents}
    ours = {name + TEMPORARY for name in files}
    theirs = set(filter(is_journal, files | folders))
    for found in sorted((files & folders) | ((files | folders) & ours) | theirs):
        raise BadRequest("a file of the target is in the way of another one", {"target": out, "file": shown(found)})


def _refuse_foreign(draft: PosixDraft) -> None:
    """Raise BadRequest where the folder holds something that no crossing of this plan wrote."""
    with told(draft.folder):
        for name, found in entries(draft.base):
            if not _is_own(draft.names, name, found):
                facts = {"where": draft.folder, "found": name}
                remedy = "move it away; then the same command goes on where it stopped"
                raise BadRequest("the staging folder holds something that carnet did not write", facts, remedy=remedy)


def _is_own(names: Collection[str], name: str, found: os.stat_result) -> bool:
    """Say whether something in the folder can be what a crossing wrote that writes files of these names."""
    if stat.S_ISDIR(found.st_mode):
        return any(other.startswith(f"{name}/") for other in names)
    try:
        check_plain_file(found, writes=True)
    except NotPlain:
        return False
    return name in names or name.removesuffix(TEMPORARY) in names or is_journal(name)


def entries(base: int) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything below an open folder, what lies deeper first, and no link's other end."""
    for folder, folders, files, at in os.fwalk(".", topdown=False, dir_fd=base):
        for name in (*files, *folders):
            yield os.path.normpath(f"{folder}/{name}"), os.stat(name, dir_fd=at, follow_symlinks=False)


def _found(draft: PosixDraft, name: str) -> os.stat_result | None:
    with told(draft.folder / name), suppress(FileNotFoundError), holder(draft.base, name) as (at, last):
        return os.stat(last, dir_fd=at, follow_symlinks=False)
    return None
