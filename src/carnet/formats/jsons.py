"""Read JSON from strangers: one object, no name twice, no number that JSON does not have, no more than fits its purpose.

A few bytes of JSON can become many of memory (``[],`` is three, and 64 as a list). So before anything is parsed the bytes are
*scanned*: how deeply they nest, and how many lists, tables, texts and numbers they would become. What the largest models of today
write stays far below the bounds: 200,000 tensors in one header come to a third of ``TABLE``.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from carnet.errors import MADE_AGAIN, BadCheckpoint, shown
from carnet.formats.files import TEXT_LIMIT, read_whole
from carnet.formats.impostors import name_impostor
from carnet.storage.protocol import Folder

DEPTH = 64
CONFIG = 96 << 20  # bytes of memory that a config, or one line of something longer, may take once it is parsed
TABLE = 768 << 20  # and what lists every tensor: a header, an index, a carnet
_TRUSTED = 4096  # bytes: as little as this does no harm, however it is filled
_CHUNK = 1 << 18  # bytes that are scanned at a time

# bytes of CPython 3.11, measured, that each of these becomes; a comma stands for the place of a value in its list, and a number
_LIST, _TABLE, _TEXT, _PAIR, _COMMA = 88, 112, 56, 80, 40
_MARKS = np.isin(np.arange(256), [*b'"[]{},:'])
_LEVELS = np.zeros(256, np.int8)
_LEVELS[[*b"[{"]], _LEVELS[[*b"]}"]] = 1, -1
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def infinity(text: str) -> float:
    """Return what Python writes where a number is infinite; raise ValueError for what is no number at all.

    >>> infinity("-Infinity")
    -inf
    """
    return _refuse_constant(text) if text == "NaN" else float(text)


def read_object(root: Folder, name: str, limit: int = TEXT_LIMIT) -> dict[str, object]:
    """Return the object that a JSON file of a folder holds, as Python writes it; ``limit`` is in bytes."""
    return parse_object(read_whole(root, name, limit)[0], name, root, constant=infinity)


def parse_object(
    data: bytes, name: str, where: object, memory: int = TABLE, constant: Callable[[str], object] = _refuse_constant
) -> dict[str, object]:
    """Return the object that some JSON bytes hold; ``name`` and ``where`` are for the error, ``memory`` (bytes) is what it may take.

    >>> parse_object(b'{"a": [1, 2]}', "config.json", "/model")
    {'a': [1, 2]}
    """
    parsed = parse(data, name, where, memory, constant)
    if not isinstance(parsed, dict):
        found = {"where": where, "found": type(parsed).__name__}
        raise BadCheckpoint(f"{name} is not a JSON object", found, remedy=MADE_AGAIN)
    if _SURROGATE.search(data):
        _check_texts(parsed, name, where)
    return parsed


def parse(data: bytes, name: str, where: object, memory: int, constant: Callable[[str], object] = _refuse_constant) -> object:
    """Return any value of JSON; its texts may hold what is not text (halves of surrogates), as names of files do.

    ``constant`` says what NaN and Infinity are, which JSON does not have and Python writes: configs have ``infinity``.
    """
    try:
        check_shape(data, memory)
        parsed: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant, parse_float=_finite
        )
    except _TooDeep:
        facts = {"where": where, "expected": f"at most {DEPTH} levels"}
        raise BadCheckpoint(f"{name} is nested too deeply", facts, remedy=MADE_AGAIN) from None
    except RecursionError:
        raise BadCheckpoint(f"{name} is nested too deeply", {"where": where}, remedy=MADE_AGAIN) from None
    except _TooLarge as error:
        facts = {"where": where, "expected": f"at most {memory:,} bytes of memory", "found": f"{error.memory:,}, once parsed"}
        raise BadCheckpoint(f"{name} is too large for what it should hold", facts, remedy=MADE_AGAIN) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        impostor = name_impostor(data)
        if impostor is not None:
            raise BadCheckpoint(f"{name} is {impostor[0]}", {"where": where}, remedy=impostor[1]) from None
        facts = {"where": where, "reason": shown(str(error))}
        raise BadCheckpoint(f"{name} is not valid JSON", facts, remedy=MADE_AGAIN) from None
    return parsed


class _TooDeep(Exception):
    """More levels than ``DEPTH``."""


class _TooLarge(Exception):
    """More memory than allowed."""

    def __init__(self, memory: int) -> None:
        self.memory = memory  # bytes, as far as it was counted
        super().__init__(memory)


def check_shape(data: bytes, memory: int) -> None:
    """Raise where JSON bytes nest too deeply, or would take more than ``memory`` bytes; they need not be valid."""
    if len(data) <= _TRUSTED:
        return
    wide = 1 if data.isascii() else 4  # bytes that CPython needs for each character, at worst
    needed = 2 * wide * len(data)  # as text, and its parts
    state = _State(0, 0, 0)
    for at in range(0, len(data), _CHUNK):
        cost, deepest, state = _scanned(np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - at), at), state)
        needed += cost
        if deepest > DEPTH:
            raise _TooDeep
        if needed > memory:
            raise _TooLarge(needed)


@dataclass(frozen=True, slots=True)
class _State:
    """Where a chunk of bytes begins."""

    inside: int  # 1 within a text
    escaped: int  # 1 after a backslash that is itself not escaped
    depth: int


def _scanned(chunk: NDArray[np.uint8], begin: _State) -> tuple[int, int, _State]:
    """Return what a chunk costs, how deeply it nests, and where the next begins."""
    marks, escaped = chunk[_MARKS[chunk]], 0
    if begin.escaped or (chunk == ord("\\")).any():  # a quote is none after an odd number of backslashes
        place = np.arange(len(chunk))
        last = np.maximum.accumulate(np.where(chunk == ord("\\"), -1 - begin.escaped, place))  # that is not a backslash, so far
        odd = (place - last) % 2 == 1  # an odd run of backslashes ends here
        hidden = np.concatenate(([bool(begin.escaped)], odd[:-1]))
        marks, escaped = chunk[_MARKS[chunk] & ~hidden], int(odd[-1])
    quotes = marks == ord('"')
    inside = (np.cumsum(quotes, dtype=np.int32) + begin.inside) & 1  # after each mark; a closing quote is outside
    bare = marks[inside == 0]
    kinds = np.bincount(bare, minlength=128)
    depths = np.cumsum(_LEVELS[bare], dtype=np.int64) + begin.depth
    cost = _LIST * kinds[ord("[")] + _TABLE * kinds[ord("{")] + _PAIR * kinds[ord(":")] + _COMMA * kinds[ord(",")]
    cost += _TEXT * (np.count_nonzero(quotes) + 1) // 2
    ends = (int(inside[-1]) if len(marks) else begin.inside), escaped, (int(depths[-1]) if len(bare) else begin.depth)
    return int(cost), int(depths.max(initial=0)), _State(*ends)


def _check_texts(parsed: object, name: str, where: object) -> None:
    """Raise BadCheckpoint where a text is none that can be written: half of a surrogate pair."""
    waiting = [parsed]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and not is_text(value):
            raise BadCheckpoint(f"{name} holds a text that is no Unicode", {"where": where, "found": shown(value)})


def is_text(value: str) -> bool:
    """Say whether a text can be written as UTF-8: names of tensors must, names of files need not.

    >>> is_text("weight"), is_text("\\ud800extra")
    (True, False)
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(doubled)!r} is there twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large a number")
    return value
