"""The files that a plan names: those of the source, and copies from them into the target."""

from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.storage.protocol import File, Folder, Opened, Target

CHUNK = 8 << 20  # bytes that are copied before a worker looks up


def contained(name: str) -> str:
    """Return the name of a file if it stays below the folder it belongs to.

    >>> contained("rank0/model.safetensors")
    'rank0/model.safetensors'
    """
    parts = name.split("/")
    if not name or "\0" in name or ".." in parts or "" in parts or "." in parts:
        raise BadRequest(f"the plan names a file outside of its folder: {name!r}")
    return name


def sources(root: Folder) -> Opened[File]:
    """Return the files of a folder, opened when they are asked for."""
    return Opened(lambda name: opened(root, contained(name)))


def opened(root: Folder, name: str) -> File:
    """Open a file that was there when the plan was made."""
    try:
        return root.open(name)
    except BadCheckpoint as error:
        if root.kind(name):
            raise
        facts = {"where": root / name, "found": error.what}
        remedy = "bring it back and run the same command again: it resumes"
        raise MachineFailed("a file vanished", facts, remedy=remedy) from None


def copy(source: File, begin: int, target: Target, end: int, nbytes: int, spare: memoryview) -> int:
    """Copy at most so many bytes from file to file and return how many, without this memory where the store can."""
    done = target.copy(source, begin, end, nbytes)
    if not done:
        done = min(nbytes, len(spare))
        source.read_into(begin, spare[:done])
        target.write(end, spare[:done])
    return done
