"""Which store a path or URL is in: a row a scheme."""

import os
from collections.abc import Callable

from carnet.storage.posix import PosixFolder
from carnet.storage.protocol import Folder

PathLike = str | os.PathLike[str]

SCHEMES: dict[str, Callable[[str], Folder]] = {"": PosixFolder.at}


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
