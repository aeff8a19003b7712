"""What a value of a config can be: a key's table says its kind, and a rule raises ``Senseless`` on purpose.

Whatever else a rule raises is a mistake in the table, and goes up as one.
"""

from types import GenericAlias, UnionType
from typing import Any, get_args, get_origin

Kind = type | GenericAlias | UnionType  # a key of NAMES, a list of one, or both: int | list[int]

NAMES = {int: "an int", float: "a float", bool: "a bool", str: "a str", dict: "a record"}
ROOM = {int: (1 << 63, "an int of 64 bits"), float: (1 << 128, "a finite number")}  # f32 has none as large


class Senseless(ValueError):
    """What a config says makes no sense; the text is what would."""


def expect(held: object, what: str) -> None:
    """Raise Senseless where what is expected does not hold."""
    if not held:
        raise Senseless(what)


def of_kind(kind: Kind, value: object) -> Any:  # noqa: ANN401 - the kind says what
    """Return a value of a kind: an integer serves as a float, a tuple as a list; raise Senseless for one of another.

    >>> of_kind(float, 1), of_kind(int | list[int], (1, 2))
    (1.0, [1, 2])
    >>> of_kind(list[int], [True])
    Traceback (most recent call last):
    carnet.dialects.senses.Senseless: an int
    """
    if isinstance(kind, UnionType):
        kind = get_args(kind)[isinstance(value, list | tuple)]
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise Senseless("a list")
        return [of_kind(get_args(kind)[0], each) for each in value]
    plain: Any = get_origin(kind) or kind
    expect(
        isinstance(value, (int, float) if plain is float else plain) and isinstance(value, bool) == (plain is bool),
        NAMES[plain],
    )
    if isinstance(value, int | float) and plain in ROOM:
        largest, what = ROOM[plain]
        expect(abs(value) < largest, what)
    return float(value) if plain is float and isinstance(value, int) else value
