"""Which store a path or URL is in: a row a scheme."""

import os
from collections.abc import Callable
from importlib import import_module
from urllib.parse import unquote

from carnet.errors import BadOption, MachineFailed, shown
from carnet.storage.buckets import told
from carnet.storage.objects import ObjectFolder, Shared
from carnet.storage.posix import PosixFolder
from carnet.storage.protocol import Folder

PathLike = str | os.PathLike[str]


def _of_machine(url: str) -> Folder:
    """Return the folder of this machine that a URL names.

    >>> str(_of_machine("file:///models/my%20llama"))
    '/models/my llama'
    """
    return PosixFolder.at(local_path(url))


def _in_bucket(module: str, kind: str) -> Callable[[str], Folder]:
    """Return what makes folders in buckets of a kind, which a module of this package has; its library comes with an extra."""

    def at(url: str) -> Folder:
        scheme, _, rest = url.partition("://")
        bucket, _, path = rest.partition("/")
        if not bucket:
            raise BadOption("a URL names no bucket", {"found": shown(url)}, remedy=f"{scheme}://BUCKET/FOLDER")
        if "@" in bucket:
            remedy = "give them where the store's own tools look for them: the environment, profiles"
            raise BadOption("a URL has no credentials", {"bucket": shown(bucket.rpartition("@")[2])}, remedy=remedy)
        if {".", ".."} & {*path.split("/")}:
            raise BadOption("a URL names a folder as it is", {"found": shown(url)}, remedy="leave out `.` and `..`")
        try:
            with told("cannot use this store", shown(url)):
                made = getattr(import_module(f"carnet.storage.{module}"), kind).at(f"{scheme}://{bucket}")
        except ModuleNotFoundError as error:
            facts = {"where": shown(url), "missing": error.name}
            raise MachineFailed(
                f"what reads {scheme}:// is not installed", facts, remedy="pip install 'carnet[cloud]'"
            ) from error
        return ObjectFolder(Shared(made), "/".join(part for part in path.split("/") if part))

    return at


_obstore, _msc = _in_bucket("obstores", "ObstoreBucket"), _in_bucket("multistorage", "MscBucket")
SCHEMES: dict[str, Callable[[str], Folder]] = {
    "": PosixFolder.at,
    "file": _of_machine,
    "s3": _obstore,
    "gs": _obstore,
    "az": _obstore,
    "msc": _msc,
}


def folder_at(path: PathLike | Folder) -> Folder:
    """Return the folder of a path or URL.

    >>> str(folder_at("/models/llama") / "iter_0000001")
    '/models/llama/iter_0000001'
    """
    if not isinstance(path, str | os.PathLike):
        return path
    said = os.fspath(path)
    scheme, colon, _ = said.partition("://")
    return SCHEMES.get(scheme if colon else "", PosixFolder.at)(said)


def local_path(url: str) -> str:
    """Return the path of this machine that a file's URL names.

    >>> local_path("file:///models/llama")
    '/models/llama'
    """
    host, slash, path = url.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise BadOption("a URL of this machine has three slashes", {"found": shown(url)}, remedy=f"file:///{host}{slash}{path}")
    return f"/{unquote(path)}"


def is_place(path: str) -> bool:
    """Say whether a path or URL means the same wherever it is read.

    >>> is_place("/models/llama"), is_place("models/llama")
    (True, False)
    """
    scheme, colon, _ = path.partition("://")
    return path.startswith("/") or bool(colon and scheme in SCHEMES)


def file_at(path: PathLike) -> tuple[Folder, str]:
    """Return the folder of a file and its name there.

    >>> file_at("/models/llama/config.json")[1]
    'config.json'
    """
    folder, name = os.path.split(os.fspath(path))
    return folder_at(folder or "."), name


def lies_in(path: PathLike, folder: Folder) -> bool:
    """Say whether a path of this machine is a folder or lies in it, whatever links lead there."""
    inside, outer = (os.path.realpath(each) for each in (path, str(folder)))
    return not folder.far and os.path.commonpath([inside, outer]) == outer
