"""The ``.metadata`` file of torch.distributed.checkpoint: which tensors there are, their chunks, and the item that holds each.

It is one bare pickle of a ``Metadata`` object (torch/distributed/checkpoint/metadata.py). The classes are replaced by records
that take the fields and nothing else; what the save plan says a second time (``all_local_plans``) is let go.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, Self

from carnet.algebra.box import Box
from carnet.errors import BadCheckpoint, NotSupported, shown
from carnet.formats.jsons import is_text
from carnet.formats.pickles import MEMBERS, Forbidden, Listed, Sealed, load
from carnet.formats.torch_pickles import DTYPE_GLOBALS, TENSOR_GLOBALS, is_shape

METADATA_LIMIT = 512 << 20  # bytes: 3 million chunks

Index = tuple[str, tuple[int, ...] | None]  # name and, for a chunk of a tensor, its first index


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the metadata describes it."""

    dtype: str  # torch's spelling, as "torch.bfloat16"
    shape: tuple[int, ...]  # elements, global
    boxes: tuple[Box, ...]  # its chunks


@dataclass(frozen=True, slots=True)
class Item:
    """One run of bytes of a data file: a complete torch.save zip."""

    file: str  # relative path, as written: not yet checked
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoreMetadata:
    """Everything that ``.metadata`` says."""

    tensors: Mapping[str, TensorEntry]
    objects: frozenset[str]  # names of pickled things that are no tensors
    items: Mapping[Index, Item]


def parse_metadata(data: bytes, where: object) -> StoreMetadata:
    """Return what the bytes of ``.metadata`` say; raise BadCheckpoint where they are no honest metadata."""
    if len(data) > METADATA_LIMIT:
        raise BadCheckpoint(".metadata is too large", {"where": where, "found": f"{len(data)} bytes"})
    root = load(data, ".metadata", where, _resolve, _no_storage)
    try:
        fields = _fields(root, _Metadata)
        described = _table(fields.get("state_dict_metadata"))
        placed = _table(fields.get("storage_data"))
        tensors = {_name(name): _tensor(value) for name, value in described.items() if not isinstance(value, _BytesMetadata)}
        objects = frozenset(_name(name) for name, value in described.items() if isinstance(value, _BytesMetadata))
        items = {_index(key): _item(value) for key, value in placed.items()}
        if len(items) != len(placed):
            _refuse("two items have the same name and place")
    except _Unexpected as error:
        raise BadCheckpoint(".metadata does not say what it should", {"where": where, "reason": str(error)}) from None
    return StoreMetadata(tensors, objects, items)


class _Unexpected(Exception):
    """A field is missing or of another type."""


class _Record(Sealed):
    """An object of a known class: its fields."""

    __slots__ = ("state",)
    state: object

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Metadata(_Record):
    __slots__ = ()


class _MetadataIndex(_Record):
    __slots__ = ()


class _TensorMetadata(_Record):
    __slots__ = ()


class _BytesMetadata(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Properties(_Record):
    __slots__ = ()


class _StorageInfo(_Record):
    __slots__ = ()


class _Ignored(_Record, Listed):
    """Part of a save plan, or an enum: made and let go."""

    __slots__ = ()

    def __new__(cls, *_: object) -> Self:
        return object.__new__(cls)


_CHECKPOINT = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_GLOBALS: dict[tuple[str, str], object] = {
    **DTYPE_GLOBALS,
    **MEMBERS,
    ("torch", "Size"): TENSOR_GLOBALS["torch", "Size"],
    ("collections", "OrderedDict"): TENSOR_GLOBALS["collections", "OrderedDict"],
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Metadata,
    (_MCORE, "MCoreMetadata"): _Metadata,  # megatron-core 0.15
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _MetadataIndex,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _TensorMetadata,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _BytesMetadata,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): _Properties,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _Ignored,
    (_MCORE, "MCoreSavePlan"): _Ignored,  # megatron-core up to 0.15
    # StorageMeta remembers the path that it was saved to; Python 3.13 renamed the module
    **{(module, "PosixPath"): _Ignored for module in ("pathlib", "pathlib._local")},
    **{(f"{_CHECKPOINT}.metadata", name): _Ignored for name in ("_MEM_FORMAT_ENCODING", "StorageMeta")},
    **{
        (f"{_CHECKPOINT}.planner", name): _Ignored
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
}


def _resolve(module: str, name: str) -> object:
    try:
        return _GLOBALS[module, name]
    except KeyError:
        raise Forbidden(module, name) from None


def _no_storage(_: object) -> NoReturn:
    raise pickle.UnpicklingError("metadata holds no storages")


def _fields(value: object, kind: type[_Record]) -> dict[object, object]:
    """Return the fields of a record of this kind."""
    state = getattr(value, "state", None) if type(value) is kind else None
    # a dataclass pickles as its __dict__; with slots as (None, fields)
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
        state = state[1]
    return state if isinstance(state, dict) else _refuse(f"a {kind.__name__.strip('_')} is missing or has no fields")


def _table(value: object) -> dict[object, object]:
    return value if isinstance(value, dict) else _refuse("a table is missing")


def _name(value: object) -> str:
    return value if isinstance(value, str) and is_text(value) else _refuse(f"a name is not text but {type(value).__name__}")


def _shape(value: object, what: str) -> tuple[int, ...]:
    return value if isinstance(value, tuple) and is_shape(value) else _refuse(f"{what} is not a shape")


def _tensor(value: object) -> TensorEntry:
    fields = _fields(value, _TensorMetadata)
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, _Properties) and hasattr(properties, "state") else None
    # torch writes a tuple whose first is the type; before 2.3 a table
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if not isinstance(dtype, str) or not dtype.startswith("torch."):
        _refuse("a tensor has no element type")
    shape, chunks = _shape(fields.get("size"), "a tensor's size"), fields.get("chunks")
    if not isinstance(chunks, list):
        _refuse("a tensor has no chunks")
    return TensorEntry(dtype, shape, tuple(_box(chunk, len(shape)) for chunk in chunks))


def _box(value: object, rank: int) -> Box:
    fields = _fields(value, _Chunk)
    start, shape = _shape(fields.get("offsets"), "a chunk's offset"), _shape(fields.get("sizes"), "a chunk's size")
    return Box(start, shape) if len(start) == len(shape) == rank else _refuse("a chunk has another rank than its tensor")


def _index(value: object) -> Index:
    fields = _fields(value, _MetadataIndex)
    offset = fields.get("offset")
    return _name(fields.get("fqn")), None if offset is None else _shape(offset, "an item's offset")


def _item(value: object) -> Item:
    fields = _fields(value, _StorageInfo)
    file, offset, nbytes = _name(fields.get("relative_path")), fields.get("offset"), fields.get("length")
    if type(offset) is not int or type(nbytes) is not int or not (0 <= offset < 1 << 62 and 0 < nbytes < 1 << 62):
        return _refuse(f"an item of {shown(file)} has an impossible place")
    if fields.get("transform_descriptors"):
        raise NotSupported(f"the items of {shown(file)} are transformed (compressed)", remedy="save without DCP extensions")
    return Item(file, offset, nbytes)


def _refuse(reason: str) -> NoReturn:
    raise _Unexpected(reason)
