"""The *staging folder* ``OUT.partial`` stands beside OUT until everything is in it; then one rename makes it OUT.

From the first look to the rename one crossing owns it: it holds the lock on its journal, and the folder itself open, so that a link
that takes the folder's place leads nobody astray. Nothing in it is written, truncated or removed that this crossing did not write.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.executor import journal as journals
from carnet.executor.files import Folder, contained, explained
from carnet.executor.journal import Crossing, Journal
from carnet.formats.opening import FOLDER, NEW, NotPlain, check_plain_file, holder, open_regular, write_whole
from carnet.formats.safetensors import render_header
from carnet.formats.torch_dist_files import frames_of
from carnet.steps import AssetFile, Plan, TargetFile

CHUNK = 1 << 20
TEMPORARY = ".tmp"  # what a small file is called until it is whole
LOOKS = 100  # at a folder that others make and publish meanwhile


@dataclass(frozen=True, slots=True)
class Staging:
    """The staging folder of one target, owned."""

    out: Path  # what it becomes
    folder: Path  # where it is: OUT itself where a run was killed just after the rename
    base: int  # descriptor of the folder
    journal: Journal
    crossing: Crossing


def staging_of(out: Path) -> Path:
    """Return the staging folder of a target.

    >>> staging_of(Path("/models/llama")).name
    'llama.partial'
    """
    if out.absolute().name in ("", ".."):
        raise BadRequest(f"{out} names no folder that could be new", remedy="name the folder that the target shall become")
    return out.absolute().with_name(out.absolute().name + ".partial")


@contextmanager
def owned(plan: Plan, crossing: Crossing, source: Path | None, out: Path) -> Iterator[Staging]:
    """Own the staging folder of a target, a new one or as an earlier run of the same crossing left it.

    Raises BadRequest, with nothing touched, where the target exists or lies in its source, where another run holds the folder, where
    another plan began it or nobody of carnet's did, and where something lies in it that this plan does not write.
    """
    out = out.absolute()
    if source is not None:
        _refuse_overlap(source, out)
    for _ in range(LOOKS):
        with ExitStack() as stack:
            staging = _taken(stack, crossing, out)
            if staging is not None:
                if staging.folder != out:
                    _refuse_foreign(plan, staging)
                yield staging
                return
    raise BadRequest(f"others write {out} all the time", remedy="choose another target")


def _taken(stack: ExitStack, crossing: Crossing, out: Path) -> Staging | None:
    """Return the folder with its journal locked, or None where somebody else's folder was published or removed at this moment."""
    folder = out if _is_whole(crossing, out) else staging_of(out)
    if folder != out:
        refuse_taken(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = os.open(folder, FOLDER)
    except OSError as error:
        raise explained(error, str(folder)) from error
    stack.callback(os.close, base)
    journal = stack.enter_context(journals.held(base, folder, crossing, begin=folder != out))
    if journal is None:
        if folder != out and not journals.is_there(base) and _is_there(folder, base):
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
    return Staging(out, folder, base, journal, crossing)


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
    if os.listdir(base) == [journals.NAME]:
        os.unlink(journals.NAME, dir_fd=base)
        with suppress(OSError):
            folder.rmdir()


def refuse_taken(out: Path) -> None:
    """Raise BadRequest where the target is a file or holds something, or its staging folder is none."""
    staging = staging_of(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise BadRequest(f"{out} exists", remedy="choose a folder that is empty or not there")
    if out.is_mount():  # nothing can be renamed to it
        raise BadRequest(f"{out} is a mount point", remedy=f"choose a folder in it: {out / 'model'}")
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise BadRequest(f"{staging} exists and is no folder", remedy="remove it")


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


def _refuse_foreign(plan: Plan, staging: Staging) -> None:
    """Raise BadRequest where the folder holds something that no crossing of this plan wrote."""
    names = set(names_of(plan))
    for name, found in _entries(staging.base):
        if not _is_own(names, name, found):
            facts = {"where": staging.folder, "found": name}
            remedy = "move it away; then the same command goes on where it stopped"
            raise BadRequest("the staging folder holds something that carnet did not write", facts, remedy=remedy)


def _is_own(names: set[str], name: str, found: os.stat_result) -> bool:
    """Say whether something in the folder can be what a crossing wrote that writes files of these names."""
    if stat.S_ISDIR(found.st_mode):
        return any(other.startswith(f"{name}/") for other in names)
    try:
        check_plain_file(found, writes=True)
    except NotPlain:
        return False
    return name in names or name.removesuffix(TEMPORARY) in names or name in (journals.NAME, journals.YOUNG)


def _entries(base: int) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything below an open folder, what lies deeper first, and no link's other end."""
    for folder, folders, files, at in os.fwalk(".", topdown=False, dir_fd=base):
        for name in (*files, *folders):
            yield os.path.normpath(f"{folder}/{name}"), os.stat(name, dir_fd=at, follow_symlinks=False)


def names_of(plan: Plan) -> list[str]:
    """Return the names of all files of a target."""
    return [contained(file.name) for part in (plan.files, plan.assets, plan.texts, plan.raws) for file in part]


def refuse_full(plan: Plan, staging: Staging) -> None:
    """Raise MachineFailed where the disk has less room than what is still to be written."""
    sizes = [(file.name, file.nbytes) for file in plan.files] + [(asset.name, asset.nbytes) for asset in plan.assets]
    needed = sum(_missing(staging.base, contained(name), nbytes) for name, nbytes in sizes)
    needed += sum(len(text.text.encode()) for text in plan.texts)
    disk = os.statvfs(staging.base)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        facts = {"where": staging.folder, "needed": f"{needed:,} bytes", "free": f"{free:,} bytes"}
        remedy = f"free {needed - free:,} bytes, or choose another disk"
        raise MachineFailed("the disk has too little room", facts, remedy=remedy)


def _missing(base: int, name: str, nbytes: int) -> int:
    found = _found(base, name)
    return nbytes if found is None else max(0, nbytes - found.st_blocks * 512)


def _found(base: int, name: str) -> os.stat_result | None:
    try:
        with holder(base, name) as (at, last):
            return os.stat(last, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None


def intact(plan: Plan, staging: Staging) -> bool:
    """Say whether every tensor file is there in its size, as an earlier run made it."""
    found = [(_found(staging.base, contained(file.name)), file.nbytes) for file in plan.files]
    return all(there is not None and there.st_size == nbytes for there, nbytes in found)


def clear(plan: Plan, staging: Staging) -> None:
    """Remove what crossings of this plan wrote into the staging folder, and nothing else."""
    names = set(names_of(plan))
    for name, found in list(_entries(staging.base)):
        if name == journals.NAME or not _is_own(names, name, found):
            continue
        with holder(staging.base, name) as (at, last):
            if stat.S_ISDIR(found.st_mode):
                with suppress(OSError):  # what is in it is not carnet's
                    os.rmdir(last, dir_fd=at)
            else:
                os.unlink(last, dir_fd=at)


def remove(plan: Plan, staging: Staging) -> None:
    """Remove the staging folder of a crossing that can never be finished; what carnet did not write in it stays."""
    clear(plan, staging)
    with suppress(FileNotFoundError):
        os.unlink(journals.NAME, dir_fd=staging.base)
    if _is_there(staging.folder, staging.base):
        with suppress(OSError):
            staging.folder.rmdir()


def create(file: TargetFile, staging: Staging) -> None:
    """Make a tensor file in its full size, all holes, with its header."""
    name = contained(file.name)
    segments = frames_of(file) if file.kind == "torch_dist" else [(0, render_header(file))]
    try:
        with holder(staging.base, name, make=True) as (at, last):
            try:
                descriptor = os.open(last, NEW, 0o666, dir_fd=at)
            except FileExistsError:
                descriptor = open_regular(last, os.O_RDWR, dir_fd=at)
        with open(descriptor, "r+b", buffering=0) as opened:
            os.ftruncate(opened.fileno(), file.nbytes)
            for offset, data in segments:
                os.pwrite(opened.fileno(), data, offset)
    except OSError as error:
        raise explained(error, str(staging.folder / name)) from error


def targets(base: int, folder: Path) -> Folder:
    """Return the files of an open staging folder, to be written."""
    return Folder(folder, os.O_WRONLY, base)


def put_file(name: str, chunks: Iterable[bytes], staging: Staging, *, sync: bool = False) -> None:
    """Write a small file so that it is whole or not there."""
    try:
        with holder(staging.base, contained(name), make=True) as (at, last):
            with suppress(FileNotFoundError):  # of a run that was killed
                os.unlink(last + TEMPORARY, dir_fd=at)
            write_whole(at, last, last + TEMPORARY, chunks, sync=sync)
    except OSError as error:
        raise explained(error, str(staging.folder / name)) from error


def put_asset(asset: AssetFile, staging: Staging) -> None:
    """Take a file over, whole or not at all, and compare its digest on the way."""
    put_file(asset.name, _chunks(asset), staging)


def _chunks(asset: AssetFile) -> Iterator[bytes]:
    digest = xxhash.xxh3_128()
    try:
        with open(open_regular(asset.path), "rb", buffering=0) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                yield chunk
    except OSError as error:
        raise explained(error, asset.path) from error
    if digest.hexdigest() != asset.digest:
        facts = {"where": asset.path, "expected": f"xxh3-128 {asset.digest}", "found": digest.hexdigest()}
        raise BadCheckpoint("a file changed after planning", facts, remedy="plan again")


def flush(base: int, folder: Path, name: str) -> None:
    """Bring a file below an open folder to the disk, or a folder that is, or (named "") itself."""
    try:
        with holder(base, name) as (at, last):
            descriptor = os.open(last or ".", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise explained(error, str(folder / name)) from error


def written(plan: Plan) -> list[str]:
    """Return the names of every file of a plan, then of every folder, the staging folder's own "" last: what must reach the disk."""
    names = names_of(plan)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}
    return [*names, *sorted(folders, reverse=True), ""]


def publish(plan: Plan, staging: Staging) -> None:
    """Make the staging folder the target: from one moment to the next everything is there."""
    out, folder = staging.out, staging.folder
    try:
        parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise explained(error, str(out.parent)) from error
    try:
        if folder != out:
            _refuse_foreign(plan, staging)
            if not _is_there(folder, staging.base):
                raise MachineFailed(f"{folder.name} was moved while it was written", {"where": folder})
            journals.end(staging.journal)
            os.fsync(staging.base)
            os.rename(folder.name, out.name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        os.unlink(journals.NAME, dir_fd=staging.base)
        os.fsync(staging.base)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            remedy = "move it away, and run the same command again: it resumes"
            raise BadRequest(f"{out} exists since a moment ago", remedy=remedy) from error
        raise explained(error, str(out)) from error
    finally:
        os.close(parent)
