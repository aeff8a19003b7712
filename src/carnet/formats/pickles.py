"""Unpickle without trust: a pickle may build our own records, and nothing else.

A pickle is a program for a small stack machine; what makes it dangerous is that it may name any function of the installed
Python and call it. Here every name goes to an *allow-list*, which answers with one of our own classes or refuses. Nothing is
imported and nothing named is called. Before the machine runs, the program is scanned: the instructions are those that torch
and pickle write today, every length fits the file, and all of them together make no more than an honest file of this size does.
"""

import io
import pickle
import re
import struct
import threading
from collections.abc import Callable

import numpy as np

from carnet.errors import MADE_AGAIN, BadCheckpoint, CarnetError, MachineFailed, shown

Resolve = Callable[[str, str], object]  # (module, name) -> what stands for it; raises Forbidden
NodeReader = Callable[[object], object]  # persistent id -> what stands for it; raises pickle.UnpicklingError

# instructions of fixed length; the regular expression skips runs of them at the speed of C. Not here, and refused: the text
# instructions of protocol 0, INST and OBJ, the extension registry, LONG4, and out-of-band buffers.
_BARE = b"(012Nabdel]sRtu}Q)\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
_FIXED = re.compile(
    b"(?:[" + re.escape(_BARE) + rb"]|[Khq\x80].|M..|[Jj]....|r..[\x00-\x3f]\x00|[G\x95].{8})*+",  # r: memo below 4 million
    re.DOTALL,
)
_LENGTHS = {  # instruction -> struct of the length that follows it
    ord("\x8a"): "<B", ord("U"): "<B", ord("C"): "<B", ord("\x8c"): "<B",
    ord("T"): "<I", ord("X"): "<I", ord("B"): "<I",
    ord("\x8d"): "<Q", ord("\x8e"): "<Q", ord("\x96"): "<Q",
}  # fmt: skip
_CHUNK = 1 << 20  # bytes that are counted at a time
_TUPLES = (b"t", b"\x85", b"\x86", b"\x87")

# What an instruction makes, in bytes of CPython 3.11: one byte of a program, ``}``, is a table of 64 in memory. A byte of a text or of
# a number that looks like one counts too: of what torch writes the sum is 14 times the file, and what it becomes 10 times.
_COSTS = np.zeros(256, np.uint8)
for _codes, _cost in (
    (b"}", 72), (b"]", 64), (b"(", 72), (b"\x8f\x91", 232), (b"\x81\x92R", 88), (b"\x85\x86\x87", 72), (b"JM\x8aG", 40),
    (b"N)2\x88\x89K\x94hjqr", 8), (b"UCTXB\x8c\x8d\x8e\x96", 64),
):  # fmt: skip
    _COSTS[[*_codes]] = _cost
FREE, FOLD, MOST = 256 << 20, 24, 3 << 30  # bytes that any program may make, times its own size, and in all
_NAMES = 10_000  # globals of different names: training arguments have less than a hundred

# everything that a broken program can make CPython's unpickler raise
_FAULTS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError,
    RecursionError, MemoryError, ImportError, struct.error, AssertionError, SystemError,
)  # fmt: skip


class Forbidden(pickle.UnpicklingError):
    """A pickle named something that the allow-list does not have."""

    def __init__(self, module: str, name: str) -> None:
        self.what = f"{module}.{name}"  # the global, as the pickle spelled it
        super().__init__(self.what)


def load(data: bytes, what: str, where: object, resolve: Resolve, storage: NodeReader) -> object:
    """Return what a pickle builds out of the allow-list; ``what`` names it in errors, ``where`` says the file.

    Raises BadCheckpoint for every fault of the pickle, and runs nothing that it names.
    """
    try:
        depth = _scan(data)
        machine = _Machine(data, resolve, storage)
        return machine.load() if depth < 20_000 else _on_a_deep_stack(machine, depth)
    except CarnetError:
        raise
    except Forbidden as error:
        facts = {"where": where, "found": shown(error.what), "expected": "names of tensors and plain data alone"}
        remedy = "do not load this file with other tools unless you trust who wrote it"
        raise BadCheckpoint(f"{what} names code that carnet does not run", facts, remedy=remedy) from None
    except _FAULTS as error:
        facts = {"where": where, "reason": shown(str(error) or type(error).__name__)}
        raise BadCheckpoint(f"{what} is not a valid pickle", facts, remedy=MADE_AGAIN) from None


class Sealed:
    """Refuse BUILD: the pickle machine must not set attributes on our classes or their instances."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class Listed(Sealed):
    """What may stand for an enum: a member of it is made from its value, or from its name."""

    __slots__ = ()


class _Member(Sealed):
    """``getattr(ModelType, "encoder_or_decoder")``: a member as Python 3.11.0 to 3.11.3 pickle it, Debian 12's among them.

    Lib/enum.py there, ``Enum.__reduce_ex__``; others pickle the value. Nothing is looked up.
    """

    def __new__(cls, owner: object = None, name: object = None, *_: object) -> object:  # type: ignore[misc]
        if not (isinstance(owner, type) and issubclass(owner, Listed) and isinstance(name, str) and name.isidentifier()):
            raise Forbidden("builtins", "getattr")
        return owner(name)  # type: ignore[call-arg]


MEMBERS: dict[tuple[str, str], object] = {(module, "getattr"): _Member for module in ("builtins", "__builtin__")}


class _Machine(pickle.Unpickler):
    """CPython's pickle machine with both of its ways to the outside replaced."""

    def __init__(self, data: bytes, resolve: Resolve, storage: NodeReader) -> None:
        super().__init__(io.BytesIO(data))
        self._resolve = resolve
        self._storage = storage
        self._named: dict[tuple[str, str], object] = {}

    def find_class(self, module: str, name: str, /) -> object:
        """Return what stands for a global."""
        # protocol 4 walks the dots of a name through attributes; no name of an allow-list has any
        if "." in name:
            raise Forbidden(module, name)
        if (module, name) not in self._named:  # what stands for an unknown class is a class, and large
            if len(self._named) >= _NAMES:
                raise pickle.UnpicklingError("it names too many classes")
            self._named[module, name] = self._resolve(module, name)
        return self._named[module, name]

    def persistent_load(self, pid: object, /) -> object:
        """Return what stands for a storage."""
        return self._storage(pid)


def series(data: bytes, count: int) -> tuple[list[bytes], bytes]:
    """Return the pickles that some bytes begin with, and what follows them; raise UnpicklingError where one does not end.

    >>> series(b"N.K\\x07.rest", 2)
    ([b'N.', b'K\\x07.'], b'rest')
    """
    found, start = [], 0
    for _ in range(count):
        stop = _stop(data, start)
        found.append(data[start:stop])
        start = stop
    return found, data[start:]


def _scan(data: bytes) -> int:
    """Check the program's instructions; return a bound on how deeply tuples can be nested in tuples."""
    stop = _stop(data, 0)
    if stop != len(data):
        raise pickle.UnpicklingError(f"{len(data) - stop} bytes follow the pickle's end")
    chunks = (np.frombuffer(data, np.uint8, min(_CHUNK, stop - at), at) for at in range(0, stop, _CHUNK))
    made = sum(int(_COSTS[chunk].sum(dtype=np.int64)) for chunk in chunks)
    if made > min(FREE + FOLD * stop, MOST):
        raise pickle.UnpicklingError(f"{stop:,} bytes that would make {made:,} in memory")
    return sum(data.count(code) for code in _TUPLES)


def _stop(data: bytes, position: int) -> int:
    """Return where the program that begins at a position ends, once all of its instructions are known ones."""
    while True:
        match = _FIXED.match(data, position)
        position = match.end() if match else position
        if position >= len(data):
            raise pickle.UnpicklingError("the pickle ends early")
        code = data[position]
        if code == ord("."):
            return position + 1
        if code == ord("c"):  # GLOBAL: module and name, a line each
            position = data.find(b"\n", data.find(b"\n", position) + 1) + 1
            if position == 0:
                raise pickle.UnpicklingError("the pickle ends early")
            continue
        position = _after_counted(data, position, code)


def _after_counted(data: bytes, position: int, code: int) -> int:
    """Return where the instruction after one with a counted argument begins."""
    layout = _LENGTHS.get(code)
    if layout is None:
        raise pickle.UnpicklingError(f"instruction {code:#04x} at byte {position} is not one that torch writes")
    (length,) = struct.unpack_from(layout, data, position + 1)
    end = position + 1 + struct.calcsize(layout) + int(length)
    if end > len(data):
        raise pickle.UnpicklingError(f"a text of {length} bytes at byte {position} does not fit")
    return end


def _on_a_deep_stack(machine: _Machine, depth: int) -> object:
    """Run a large pickle where even its worst nesting fits the stack.

    CPython hashes nested tuples by recursion in C without a guard (about 64 bytes a level): a hostile dictionary key would
    crash the process. The stack is address space; an honest pickle touches little of it.
    """
    result: list[object] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            result.append(machine.load())
        except Exception as error:  # noqa: BLE001 - raised again below, in the caller's thread
            faults.append(error)

    before = threading.stack_size(min(64 + depth // 2048, 1 << 15) << 20)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    except RuntimeError as error:
        raise MachineFailed(
            "the machine starts no more threads", {"reason": error}, remedy="raise the limit of processes"
        ) from None
    finally:
        threading.stack_size(before)
    thread.join()
    if faults:
        raise faults[0]
    return result[0]
