"""What a torch pickle may name, and the record that stands for each.

Two allow-lists. The *strict* one, for tensors, knows tensors and refuses all else. The *lenient* one, for training arguments
(which are full of enums of the training program), lets an unknown class become an inert record that only remembers its name
and arguments; it still refuses every name out of a module that holds machinery and not data.
"""

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn, Self

from carnet.dtypes import BY_NAME, BY_STORAGE, BY_TORCH
from carnet.formats.machinery import is_machinery
from carnet.formats.pickles import MEMBERS, Forbidden, Listed, Sealed


@dataclass(frozen=True, slots=True)
class StorageType(Sealed):
    """A torch storage class."""

    dtype: str  # carnet's name; "" for an untyped storage, whose elements are bytes

    def __setstate__(self, state: object) -> None:
        """Refuse BUILD: a frozen dataclass would otherwise take new fields."""
        raise pickle.UnpicklingError("a storage class takes no state")


@dataclass(frozen=True, slots=True)
class Storage(Sealed):
    """A torch storage: one flat run of elements in a zip entry of its own."""

    dtype: str  # carnet's name; "" for bytes
    key: str  # the entry is <prefix>/data/<key>
    length: int  # elements

    def __setstate__(self, state: object) -> None:
        """Refuse BUILD: a frozen dataclass would otherwise take new fields."""
        raise pickle.UnpicklingError("a storage takes no state")


@dataclass(frozen=True, slots=True)
class PickledTensor(Sealed):
    """A torch tensor: a strided view of a storage."""

    storage: Storage
    dtype: str  # carnet's name
    offset: int  # elements, from the start of the storage
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements

    def __setstate__(self, state: object) -> None:
        """Refuse BUILD: a frozen dataclass would otherwise take new fields."""
        raise pickle.UnpicklingError("a tensor takes no state")


class Inert(Sealed):
    """Something of the training program: its name, and what it was made from. It does nothing."""

    __slots__ = ("args", "items", "state")
    name = ""  # "megatron.core.enums.ModelType"; each class that `placeholder` makes has its own

    def __new__(cls, *args: object, **_: object) -> Self:
        """Remember the arguments."""
        made = object.__new__(cls)
        made.args = args
        made.items = 0
        made.state = None
        return made

    args: tuple[object, ...]
    items: int
    state: object

    def __setstate__(self, state: object) -> None:
        """Remember the state."""
        self.state = state

    def append(self, _: object) -> None:
        """Count an element of a list-like thing."""
        self.items += 1

    add = append

    def extend(self, more: Iterable[object]) -> None:
        """Count the elements of a list-like thing."""
        self.items += sum(1 for _ in more)

    def __setitem__(self, key: object, value: object) -> None:
        self.items += 1

    def __str__(self) -> str:
        simple = (isinstance(arg, (str, int, float, bool)) and len(str(arg)) < 100 for arg in self.args[:8])
        plain = (repr(arg) if short else "..." for arg, short in zip(self.args, simple, strict=False))
        return f"{self.name.rpartition('.')[2]}({', '.join(plain)})"


class Namespace(Sealed):
    """An argparse.Namespace or a SimpleNamespace."""

    __slots__ = ("fields",)

    def __init__(self, **_: object) -> None:
        self.fields: dict[object, object] = {}

    def __setstate__(self, state: object) -> None:
        """Take the arguments."""
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("the arguments are no table")
        self.fields = state


class Ordered(dict[object, object]):
    """An OrderedDict; its attributes (a module's `_metadata`) are let go."""

    __slots__ = ()

    def __init__(self, pairs: object = ()) -> None:
        super().__init__(pairs if isinstance(pairs, (list, dict)) else [])

    def __setstate__(self, state: object) -> None:
        """Let attributes go."""


class _Size(Sealed):
    def __new__(cls, sizes: object = ()) -> tuple[object, ...]:  # type: ignore[misc]
        return tuple(sizes) if isinstance(sizes, (tuple, list)) else _refuse("torch.Size")


class _Collection(Sealed):
    """A set, a frozenset or a bytearray: made from what is already there, never from a count."""

    def __new__(cls, items: object = ()) -> tuple[object, ...]:  # type: ignore[misc]
        return tuple(items) if isinstance(items, (tuple, list)) else (items,)


class _Rebuild(Sealed):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""

    def __new__(cls, storage: object, offset: object, shape: object, strides: object, *_: object) -> PickledTensor:  # type: ignore[misc]
        if not isinstance(storage, Storage) or not storage.dtype:
            return _refuse("tensor without a typed storage")
        return _tensor(storage, storage.dtype, offset, shape, strides)


class _RebuildUntyped(Sealed):
    """torch._utils._rebuild_tensor_v3: FP8 and other types that have no storage class."""

    def __new__(  # type: ignore[misc]
        cls, storage: object, offset: object, shape: object, strides: object, *rest: object
    ) -> PickledTensor:
        dtype = rest[2] if len(rest) > 2 else None  # after requires_grad and the hooks
        known = BY_TORCH.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else None
        if not isinstance(storage, Storage) or storage.dtype or known is None:
            return _refuse("tensor of unknown element type")
        return _tensor(storage, known.name, offset, shape, strides)


class _RebuildParameter(Sealed):
    """torch._utils._rebuild_parameter, and with attributes, which are let go."""

    def __new__(cls, data: object, *_: object) -> PickledTensor:  # type: ignore[misc]
        return data if isinstance(data, PickledTensor) else _refuse("parameter without a tensor")


class _RebuildSubclass(Sealed):
    """torch._tensor._rebuild_from_type_v2: a function of this list, a subclass, the function's arguments, attributes."""

    def __new__(cls, rebuild: object, _kind: object, args: object, _state: object = None) -> PickledTensor:  # type: ignore[misc]
        if not isinstance(args, tuple) or rebuild not in (_Rebuild, _RebuildUntyped, _RebuildParameter):
            return _refuse("tensor subclass of an unknown kind")
        made: object = rebuild(*args)
        return made if isinstance(made, PickledTensor) else _refuse("tensor subclass of an unknown kind")


class _Parameter(Sealed):
    """A class that is named beside a tensor and never made."""

    def __new__(cls, *_: object) -> Self:
        return _refuse("parameter that is made directly")


_OTHER_DTYPES = (  # torch types that no tensor carnet moves has, and that optimizer states and arguments do
    "uint16", "uint32", "uint64", "complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2", "quint8", "qint8", "qint32",
)  # fmt: skip

DTYPE_GLOBALS: dict[tuple[str, str], object] = {("torch", name): f"torch.{name}" for name in (*BY_TORCH, *_OTHER_DTYPES)}

# the strict allow-list; sources: torch/_utils.py, torch/_tensor.py, torch/storage.py
TENSOR_GLOBALS: dict[tuple[str, str], object] = {
    **DTYPE_GLOBALS,
    **{("torch", name): StorageType(dtype.name) for name, dtype in BY_STORAGE.items()},
    ("torch.storage", "UntypedStorage"): StorageType(""),
    ("torch", "Size"): _Size,
    ("torch", "Tensor"): _Parameter,
    ("torch.nn.parameter", "Parameter"): _Parameter,
    ("torch._utils", "_rebuild_tensor"): _Rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildUntyped,
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _RebuildSubclass,
    ("collections", "OrderedDict"): Ordered,
}

_PLAIN_GLOBALS: dict[tuple[str, str], object] = {
    ("argparse", "Namespace"): Namespace,
    ("types", "SimpleNamespace"): Namespace,
    **{("builtins", name): _Collection for name in ("set", "frozenset", "list", "tuple", "bytearray")},
    ("builtins", "dict"): Ordered,
    **MEMBERS,
}


def strict(module: str, name: str) -> object:
    """Return what stands for a global in a tensor's pickle; raise Forbidden for all that is not on the list."""
    try:
        return TENSOR_GLOBALS[module, name]
    except KeyError:
        raise Forbidden(module, name) from None


def lenient(module: str, name: str) -> object:
    """Return what stands for a global among training arguments; raise Forbidden for what can only be code."""
    module = "builtins" if module == "__builtin__" else module
    known = TENSOR_GLOBALS.get((module, name)) or _PLAIN_GLOBALS.get((module, name))
    if known is not None:
        return known
    if is_machinery(module, name):
        raise Forbidden(module, name)
    return placeholder(f"{module}.{name}", Listed)


def placeholder(name: str, *more: type) -> type[Inert]:
    """Return a class that stands for a class of this dotted name; ``Listed`` where it may be an enum."""
    return type("Placeholder", (Inert, *more), {"__slots__": (), "name": name})


def storage_of(pid: object) -> Storage:
    """Return the storage that a persistent id of torch names: ("storage", class, key, place, elements)."""
    if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
        _, kind, key, _, length = pid
        plain = isinstance(key, str) and key.isascii() and key.isalnum() and len(key) < 32
        if isinstance(kind, StorageType) and plain and type(length) is int and 0 <= length < 1 << 60:
            return Storage(kind.dtype, str(key), length)
    return _refuse("storage of an unknown kind")


def is_shape(value: object) -> bool:
    """Say whether a value is a tuple of sizes: integers from 0 to 2**60, at most 64 of them."""
    return isinstance(value, tuple) and len(value) <= 64 and all(type(size) is int and 0 <= size < 1 << 60 for size in value)


def _tensor(storage: Storage, dtype: str, offset: object, shape: object, strides: object) -> PickledTensor:
    """Return a tensor whose every element lies in its storage."""
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and is_shape(shape) and is_shape(strides)):
        return _refuse("tensor with an impossible shape")
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        return _refuse("tensor with an impossible place")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    held = storage.length if storage.dtype else storage.length // BY_NAME[dtype].nbytes
    if math.prod(shape) and last >= held:
        return _refuse("tensor that reaches beyond its storage")
    return PickledTensor(storage, dtype, offset, shape, strides)


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f"a {what}")
