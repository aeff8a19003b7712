"""Write a pickle without the classes that it names: a *program* of protocol 2, which every unpickler of torch reads.

::

    Made(Global("argparse", "Namespace"), {"tp": 2})   ->   c argparse Namespace  )  \\x81  }  ( X tp K 2 u  b
                                                            name the class, make one, a table of its fields, give it them

Texts and names are written once and recalled by number after that, so that a table of 100,000 rows stays small.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

PROTOCOL = b"\x80\x02"
STOP = b"."


@dataclass(frozen=True, slots=True)
class Global:
    """A class or a function, by name: ``Global("torch", "bfloat16")``."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function or a class returns for these arguments: a torch.Size, a member of an enum."""

    function: Global
    args: tuple["Value", ...]


@dataclass(frozen=True, slots=True)
class Made:
    """An object whose fields are set without calling its class's __init__."""

    kind: Global
    state: "Value"


Value = (
    None
    | bool
    | int
    | float
    | str
    | list["Value"]
    | tuple["Value", ...]
    | Mapping[str, "Value"]
    | Mapping[int, "Value"]
    | Global
    | Call
    | Made
)  # a table's keys are texts, or numbers


def dumps(value: Value) -> bytes:
    """Return the pickle of a value.

    >>> import pickle
    >>> pickle.loads(dumps({"a": [1, -2.5, None], "b": ("x", 1 << 40)}))
    {'a': [1, -2.5, None], 'b': ('x', 1099511627776)}
    """
    program = Program()
    program.push(value)
    return program.finished()


def integer(value: int) -> bytes:
    """Return the instruction that pushes an integer: the shortest one, as Python's own pickler chooses it.

    >>> integer(255), integer(256), integer(-1), integer(1 << 31)
    (b'K\\xff', b'M\\x00\\x01', b'J\\xff\\xff\\xff\\xff', b'\\x8a\\x05\\x00\\x00\\x00\\x80\\x00')
    """
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    raw = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
    if len(raw) > 255:
        raise ValueError("the integer is too large")
    return b"\x8a" + len(raw).to_bytes(1, "little") + raw


def text(value: str) -> bytes:
    """Return the instruction that pushes a text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(value: Global) -> bytes:
    """Return the instruction that pushes a global."""
    if not (value.module + value.name).replace(".", "").replace("_", "").isalnum():
        raise ValueError(f"{value} is not a name of Python")
    return f"c{value.module}\n{value.name}\n".encode("ascii")


def put(number: int) -> bytes:
    """Return the instruction that remembers what was pushed last under a number."""
    return b"q" + number.to_bytes(1, "little") if number < 256 else b"r" + struct.pack("<I", number)


def get(number: int) -> bytes:
    """Return the instruction that pushes what was remembered under a number."""
    return b"h" + number.to_bytes(1, "little") if number < 256 else b"j" + struct.pack("<I", number)


class Program:
    """Instructions so far, and what they remember. Every ``push`` leaves one more value on the unpickler's stack."""

    def __init__(self) -> None:
        self.code = bytearray(PROTOCOL)
        self._known: dict[str | Global | tuple[int, ...], bytes] = {}  # what is remembered -> the instruction that recalls it

    def finished(self) -> bytes:
        """Return the pickle, whose value is what was pushed."""
        return bytes(self.code + STOP)

    def recall(self, key: str | Global | tuple[int, ...]) -> bool:
        """Push what is remembered under a key; say whether there is anything."""
        known = self._known.get(key)
        if known is None:
            return False
        self.code += known
        return True

    def remember(self, key: str | Global | tuple[int, ...]) -> None:
        """Remember the value that was pushed last."""
        number = len(self._known)
        self.code += put(number)
        self._known[key] = get(number)

    def text(self, value: str) -> None:
        """Push a text."""
        if not self.recall(value):
            self.code += text(value)
            self.remember(value)

    def name(self, value: Global) -> None:
        """Push a global."""
        if not self.recall(value):
            self.code += named(value)
            self.remember(value)

    def push(self, value: Value) -> None:
        """Push any value."""
        match value:
            case None:
                self.code += b"N"
            case bool():
                self.code += b"\x88" if value else b"\x89"
            case int():
                self.code += integer(value)
            case float():
                self.code += b"G" + struct.pack(">d", value)
            case str():
                self.text(value)
            case Global():
                self.name(value)
            case _:
                self._push_nested(value)

    def _push_nested(
        self, value: "list[Value] | tuple[Value, ...] | Mapping[str, Value] | Mapping[int, Value] | Call | Made"
    ) -> None:
        match value:
            case list():
                self.code += b"]("
                self._push_each(value)
                self.code += b"e"
            case tuple():
                self._push_tuple(value)
            case Call():
                self.name(value.function)
                self._push_tuple(value.args)
                self.code += b"R"
            case Made():
                self.name(value.kind)
                self.code += b")\x81"
                self.push(value.state)
                self.code += b"b"
            case Mapping():
                self.code += b"}("
                for key, item in value.items():
                    self.push(key)
                    self.push(item)
                self.code += b"u"

    def _push_tuple(self, value: tuple[Value, ...]) -> None:
        if 0 < len(value) < 4:
            self._push_each(value)
            self.code += (b"\x85", b"\x86", b"\x87")[len(value) - 1]
        elif value:
            self.code += b"("
            self._push_each(value)
            self.code += b"t"
        else:
            self.code += b")"

    def _push_each(self, values: "list[Value] | tuple[Value, ...]") -> None:
        for value in values:
            self.push(value)
