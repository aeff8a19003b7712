"""The *staging folder* ``OUT.partial`` stands beside OUT until everything is in it; then one rename makes it OUT."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.executor import journal
from carnet.executor.files import contained, explained
from carnet.formats.safetensors import render_header
from carnet.formats.torch_dist_files import frames_of
from carnet.steps import AssetFile, Plan, RawFile, TargetFile

CHUNK = 1 << 20


def staging_of(out: Path) -> Path:
    """Return the staging folder of a target.

    >>> staging_of(Path("/models/llama")).name
    'llama.partial'
    """
    return out.absolute().with_name(out.absolute().name + ".partial")


def refuse_taken(out: Path) -> None:
    """Raise BadRequest where the target is a file or holds something, or its staging folder is not carnet's."""
    staging = staging_of(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise BadRequest(f"{out} exists", remedy="choose a folder that is empty or not there")
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise BadRequest(f"{staging} exists and is no folder", remedy="remove it")
    if staging.is_dir() and any(staging.iterdir()) and not (staging / journal.NAME).is_file():
        raise BadRequest(f"{staging} exists and no crossing of carnet began it", remedy="remove it, or choose another target")


def refuse_full(plan: Plan, staging: Path) -> None:
    """Raise MachineFailed where the disk has less room than what is still to be written."""
    sizes = [(file.name, file.nbytes) for file in plan.files] + [(asset.name, asset.nbytes) for asset in plan.assets]
    needed = sum(_missing(staging / contained(name), nbytes) for name, nbytes in sizes)
    needed += sum(len(text.text.encode()) for text in plan.texts)
    disk = os.statvfs(staging)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        facts = {"where": staging, "needed": f"{needed:,} bytes", "free": f"{free:,} bytes"}
        remedy = f"free {needed - free:,} bytes, or choose another disk"
        raise MachineFailed("the disk has too little room", facts, remedy=remedy)


def _missing(path: Path, nbytes: int) -> int:
    try:
        return max(0, nbytes - path.stat().st_blocks * 512)
    except FileNotFoundError:
        return nbytes


def intact(plan: Plan, staging: Path) -> bool:
    """Say whether every tensor file is there in its size, as an earlier run made it."""
    paths = {staging / contained(file.name): file.nbytes for file in plan.files}
    return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in paths.items())


def clear(staging: Path) -> None:
    """Remove everything in the staging folder but the journal."""
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != journal.NAME:
            path.unlink()


def remove(staging: Path) -> None:
    """Remove the staging folder of a crossing that can never be finished."""
    clear(staging)
    (staging / journal.NAME).unlink(missing_ok=True)
    staging.rmdir()


def create(file: TargetFile, staging: Path) -> None:
    """Make a tensor file in its full size, all holes, with its header."""
    path = staging / contained(file.name)
    segments = frames_of(file) if file.kind == "torch_dist" else [(0, render_header(file))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "x+b", buffering=0) as opened:
            os.ftruncate(opened.fileno(), file.nbytes)
            for offset, data in segments:
                os.pwrite(opened.fileno(), data, offset)
    except OSError as error:
        raise explained(error, str(path)) from error


def write_text(name: str, text: str, staging: Path) -> None:
    """Write a small file so that it is whole or not there."""
    _whole(staging / contained(name), [text.encode()])


def write_raw(raw: RawFile, staging: Path) -> None:
    """Write a file of known bytes so that it is whole or not there."""
    _whole(staging / contained(raw.name), [raw.data])


def write_asset(asset: AssetFile, staging: Path) -> None:
    """Take a file over, whole or not at all, and compare its digest on the way."""
    _whole(staging / contained(asset.name), _chunks(asset))


def _chunks(asset: AssetFile) -> Iterator[bytes]:
    digest = xxhash.xxh3_128()
    try:
        with open(asset.path, "rb", buffering=0) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                yield chunk
    except OSError as error:
        raise explained(error, asset.path) from error
    if digest.hexdigest() != asset.digest:
        facts = {"where": asset.path, "expected": f"xxh3-128 {asset.digest}", "found": digest.hexdigest()}
        raise BadCheckpoint("a file changed after planning", facts, remedy="plan again")


def _whole(path: Path, chunks: Iterable[bytes]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", buffering=0) as target:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[target.write(rest) :]
        os.rename(temporary, path)
    except OSError as error:
        raise explained(error, str(path)) from error


def flush(path: Path) -> None:
    """Bring a file or folder to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explained(error, str(path)) from error


def written(plan: Plan, staging: Path) -> list[Path]:
    """Return every file of a plan and then every folder below the staging folder and itself: what must reach the disk."""
    names = [file.name for file in plan.files] + [asset.name for asset in plan.assets] + [text.name for text in plan.texts]
    names += [raw.name for raw in plan.raws]
    paths = [staging / name for name in names]
    folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(staging)}
    return [*paths, *sorted(folders | {staging}, reverse=True)]


def publish(staging: Path, out: Path) -> None:
    """Make the staging folder the target: from one moment to the next everything is there."""
    out = out.absolute()
    try:
        (staging / journal.NAME).unlink(missing_ok=True)
        flush(staging)
        os.rename(staging, out)
    except OSError as error:
        raise explained(error, str(out)) from error
    flush(out.parent)
