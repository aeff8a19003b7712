"""Values of a plan that was read from a file: each is of its kind, or raises TypeError or ValueError."""

import os
from collections.abc import ItemsView
from pathlib import PurePosixPath
from typing import Any

from carnet.dtypes import BY_NAME
from carnet.formats.jsons import is_text

AXES = 64  # numpy has no arrays of more
FOLDERS, LONGEST = 32, 255 - len(".partial")  # of a file name, and bytes of its parts: what a disk takes, whatever is added


def list_of(name: str, value: object) -> list[Any]:
    """Return a list."""
    _is(list, name, value)
    return value  # type: ignore[return-value]  # seen in the line above


def table_of(name: str, value: object) -> ItemsView[str, object]:
    """Return the keys and values of a table."""
    _is(dict, name, value)
    return value.items()  # type: ignore[attr-defined, no-any-return]  # as above


def texts_of(name: str, value: object) -> dict[str, str]:
    """Return a table of texts."""
    return {text_of(name, key): text_of(name, said) for key, said in table_of(name, value)}


def natural(name: str, value: object) -> int:
    """Return a number of bytes or elements."""
    if type(value) is not int or not 0 <= value <= 1 << 62:
        raise TypeError(f"{name} is not a number from 0 to 2**62")
    return value


def text_of(name: str, value: object) -> str:
    """Return a text that can be written."""
    if not isinstance(value, str) or not is_text(value):
        raise TypeError(f"{name} is not text")
    return value


def path_of(name: str, value: object) -> str:
    """Return a path of some machine, whose bytes need not be Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is not a path")
    os.fsencode(value)
    return value


def _is(kind: type, name: str, value: object) -> None:
    if type(value) is not kind:
        raise TypeError(f"{name} is not a {kind.__name__}")


def dtype_of(word: object) -> str:
    """Return carnet's name of an element type."""
    return BY_NAME[str(word)].name


def below(name: object) -> str:
    """Return the name of a file that stays below its folder."""
    path = PurePosixPath(text_of("file", name))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"the file name {name!r} leaves the folder")
    if len(path.parts) > FOLDERS or max(len(part.encode()) for part in path.parts) > LONGEST:
        raise ValueError("a file name is longer than any")
    return str(path)


def numbers_of(name: str, value: object) -> tuple[int, ...]:
    """Return a tuple of integers, one for each axis of a tensor."""
    if (
        not isinstance(value, list)
        or len(value) > AXES
        or not all(type(each) is int and abs(each) <= 1 << 62 for each in value)
    ):
        raise TypeError(f"{name} is not a list of integers")
    return tuple(value)
