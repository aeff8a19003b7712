"""Configs as plain values: what is set below a dotted key, and when two values are one."""

from collections.abc import Collection, Iterator, Mapping


def leaves(raw: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every value that is set (null counts as not set)."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}"


def put(out: dict[str, object], key: str, value: object) -> None:
    """Set a value under a dotted key."""
    *above, last = key.split(".")
    for part in above:
        inner = out.get(part)
        if not isinstance(inner, dict):
            inner = out[part] = {}
        out = inner
    out[last] = value


def left_out(raw: Mapping[str, object], keys: Collection[str], prefix: str = "") -> dict[str, object]:
    """Return a config without some dotted keys.

    >>> left_out({"a": {"b": 1, "c": 2}, "d": 3}, ["a.b", "d"])
    {'a': {'c': 2}}
    """
    kept = {key: value for key, value in raw.items() if f"{prefix}{key}" not in keys}
    return {
        key: left_out(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value for key, value in kept.items()
    }


def equal(a: object, b: object) -> bool:
    """Compare as JSON does not: True is not 1, but 1 is 1.0."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
