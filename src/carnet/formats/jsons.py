"""Read JSON from strangers: one object, no name twice, no number that JSON does not have, no endless nesting."""

import json
import math
from typing import NoReturn

from carnet.errors import BadCheckpoint
from carnet.formats.files import shown


def parse_object(data: bytes, name: str, where: object) -> dict[str, object]:
    """Return the object that some JSON bytes hold; ``name`` and ``where`` are for the error.

    >>> parse_object(b'{"a": [1, 2]}', "config.json", "/model")
    {'a': [1, 2]}
    """
    try:
        parsed: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise BadCheckpoint(f"{name} is nested too deeply", {"where": where}) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadCheckpoint(f"{name} is not valid JSON", {"where": where, "reason": shown(str(error))}) from None
    if not isinstance(parsed, dict):
        raise BadCheckpoint(f"{name} is not a JSON object", {"where": where, "found": type(parsed).__name__})
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(doubled)!r} is there twice")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large a number")
    return value
