"""Read the states that Transformer Engine leaves beside the weights of a model trained in FP8: ``<module>._extra_state``.

Every version of it pickles the same table and packs it in another way; megatron-core puts the pack into the checkpoint::

    {"scale_fwd": f32 [3 * gemms], "amax_history_fwd": f32 [length, 3 * gemms], "recipe": ..., "extra_fp8_variables": {...}, ...}

    1.x          io.BytesIO with what torch.save writes of the table, or of None     in a zip of torch.save, as a value of its own
    2.0 and on   a tensor of bytes, the table pickled; its tensors are storages      in a store, as the item
                 in the old form of torch.save; no bytes at all where FP8 is off     <module>._extra_state/shard_<layer>_<layers>

The slots of ``scale_fwd`` are the input of each product of matrices, then the weight of each, then the output: transformer_engine
pytorch/csrc/common.h FP8FwdTensors and module/base.py get_extra_state; megatron/core/extensions/transformer_engine.py
_split_extra_state. What is multiplied by a scale becomes a code, so a scale here is the inverse of what engines call one.
ModelOpt packs a table of its own, with the other inside of it: modelopt/torch/opt/plugins/megatron.py.
"""

import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME, array_type
from carnet.errors import BadCheckpoint, NotSupported, shown
from carnet.formats.legacy import rank_folders, read_ranks
from carnet.formats.pickles import MEMBERS, Forbidden, Listed, Resolve, Sealed, load, series
from carnet.formats.stored import Checkpoint, Stored, label_of
from carnet.formats.torch_dist import read_plain_store
from carnet.formats.torch_pickles import TENSOR_GLOBALS, Inert, PickledTensor, Storage, placeholder, storage_of
from carnet.formats.torch_zip import storage_bytes, value_item
from carnet.formats.wrapped import NEMO_WEIGHTS
from carnet.storage.memory import MemoryFile
from carnet.storage.protocol import Folder, Stamp, names_in, read_at

NAME = re.compile(r"(?P<module>.+)\._extra_state(?:/shard_(?P<at>\d+(?:\.\d+)*)_\d+(?:\.\d+)*)?")
LIMIT = 64 << 20  # bytes of one state: 128 experts with a history of 1024 steps have 6 MB
SLOTS = 3  # of a product of matrices: input, weight, output
LARGEST = 448.0  # of e4m3, which the forward pass has in all recipes of delayed scaling

_RECIPES = "transformer_engine.common.recipe"
_LOADERS = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py: how a file without a zip begins

Place = tuple[str, str]  # unit and module
Numbers = NDArray[Any]
Fetch = Callable[[Storage], bytes]  # the bytes of a storage, from wherever the state keeps them


@dataclass(frozen=True, slots=True)
class Scales:
    """What one state says: for each product of matrices, what codes are multiplied by; None where nothing was ever seen."""

    input: tuple[float | None, ...]
    weight: tuple[float | None, ...]
    off: bool = False  # ModelOpt's quantizer of the weight does nothing


def read_states(
    checkpoint: Checkpoint, wants: Callable[[str, str], bool] = lambda unit, name: True
) -> dict[Place, dict[tuple[int, ...], Scales]]:
    """Return what the wanted states of a checkpoint say, by unit and module, then by layer and expert where these share a name.

    States without scales are left out, but for those whose quantizer is off. Raises BadCheckpoint where one is none that Transformer
    Engine writes.
    """
    found: dict[Place, dict[tuple[int, ...], Scales]] = {}
    for unit, name, data in _packed(checkpoint, lambda unit, name: _is_state(name) and wants(unit, name)):
        match = NAME.fullmatch(name)
        scales = scales_in(data, label_of((unit, name)), str(checkpoint.root)) if data else None
        if match is not None and scales is not None:
            at = tuple(map(int, match["at"].split("."))) if match["at"] else ()
            found.setdefault((unit, match["module"]), {})[at] = scales
    return found


def read_numbers(root: Folder, stored: Stored) -> Numbers:
    """Return the elements of a small stored tensor."""
    made = np.zeros(stored.shape, array_type(stored.dtype))
    for chunk in stored.chunks:
        if not prod(chunk.box.shape):
            continue
        item = made.dtype.itemsize
        reach = 1 + sum((size - 1) * stride for size, stride in zip(chunk.box.shape, chunk.strides, strict=True))
        if reach * item > LIMIT:
            raise BadCheckpoint(f"{shown(stored.name)} is too large to be read at once", {"where": root})
        file = root.open(chunk.file)
        raw = read_at(file, chunk.offset, reach * item)
        inside = tuple(slice(low, low + size) for low, size in zip(chunk.box.start, chunk.box.shape, strict=True))
        steps = tuple(stride * item for stride in chunk.strides)
        made[inside] = np.ndarray(chunk.box.shape, made.dtype, raw, 0, steps)
    return made


def _packed(checkpoint: Checkpoint, wants: Callable[[str, str], bool]) -> Iterator[tuple[str, str, bytes]]:
    """Yield unit, name and bytes of every wanted state, from wherever a checkpoint keeps them."""
    root = checkpoint.root
    for (unit, name), stored in checkpoint.tensors.items():
        if wants(unit, name) and stored.dtype == "u8":
            _check_size(prod(stored.shape), name, str(root))
            yield unit, name, read_numbers(root, stored).tobytes()
    if rank_folders(names_in(root)):
        for label, value in read_ranks(root, lambda name: False, _is_state).values.items():
            unit, _, name = label.partition("/")
            if wants(unit, name):
                yield unit, name, _bytes(value, _nothing, label, str(root))
    elif any(wants("", name) for name in checkpoint.objects):
        folder = root if root.kind(".metadata") else root / NEMO_WEIGHTS
        for name, item in read_plain_store(folder, lambda name: False).places.items():
            if wants("", name):
                _check_size(item.nbytes, name, str(root))
                file = folder.open(item.file)
                value, archive = value_item(file, item.offset, item.nbytes)
                yield "", name, _bytes(value, partial(storage_bytes, archive), name, str(root))


def _is_state(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def _check_size(nbytes: int, name: str, where: str) -> None:
    if nbytes > LIMIT:
        facts = {"where": where, "expected": f"at most {LIMIT} bytes", "found": f"{nbytes} bytes"}
        raise BadCheckpoint(f"{shown(name)} is too large for a module's state", facts)


def _nothing(storage: Storage) -> bytes:
    raise ValueError(f"a storage {storage.key} out of place")


def _bytes(value: object, fetch: Fetch, name: str, where: str) -> bytes:
    """Return the bytes of a state: a file in memory, a tensor of bytes, or nothing."""
    while isinstance(value, list) and len(value) == 1:  # megatron-core stores a list of all objects of a name
        value = value[0]
    if value is None:
        return b""
    if isinstance(value, PickledTensor) and value.dtype == "u8":
        return _numbers(value, fetch).tobytes()
    if isinstance(value, Inert) and value.name in ("_io.BytesIO", "io.BytesIO"):
        content = value.state[0] if isinstance(value.state, tuple) and value.state else b""
        if isinstance(content, Inert) and content.name == "_codecs.encode":  # as protocol 2 spells bytes
            text = content.args[0] if content.args else ""
            content = text.encode("latin1", "replace") if isinstance(text, str) else text
        if isinstance(content, Inert) and content.name in ("builtins.bytes", "__builtin__.bytes"):
            content = b""
        if isinstance(content, bytes):
            _check_size(len(content), name, where)
            return content
    found = value.name if isinstance(value, Inert) else type(value).__name__
    facts = {"where": where, "expected": "bytes, a tensor of bytes or nothing", "found": shown(found)}
    raise BadCheckpoint(f"{shown(name)} is not a state of a module", facts)


def _numbers(tensor: PickledTensor, fetch: Fetch) -> Numbers:
    """Return the elements of a tensor; the allow-list has seen to it that they lie in its storage."""
    kind = array_type(tensor.dtype)
    if prod(tensor.shape) * kind.itemsize > LIMIT:  # a stride of zero makes much of little
        raise ValueError(f"a tensor of shape {tensor.shape}")
    raw, item = fetch(tensor.storage), kind.itemsize
    return np.array(np.ndarray(tensor.shape, kind, raw, tensor.offset * item, tuple(step * item for step in tensor.strides)))


def scales_in(data: bytes, name: str, where: str, *, wrapped: bool = False) -> Scales | None:
    """Return what the bytes of a state say, None where they say nothing; a wrapped one lies in another.

    Raises BadCheckpoint where they are no state that Transformer Engine writes.
    """
    what = f"the state {shown(name)}"
    try:
        if data[:2] == b"PK":
            file = MemoryFile(where, Stamp(what, len(data), ""), data)
            value, archive = value_item(file, 0, len(data), _resolve)
            return _said(value, partial(storage_bytes, archive), name, where, wrapped=wrapped)
        held: dict[str, bytes] = {}
        value = load(data, what, where, _with_storages(held, what, where), _no_storage)
        return _said(value, lambda storage: held[storage.key], name, where, wrapped=wrapped)
    except (ValueError, TypeError, KeyError, MemoryError) as error:
        raise BadCheckpoint(f"{what} is damaged", {"where": where, "reason": shown(str(error))}) from None


def _said(value: object, fetch: Fetch, name: str, where: str, *, wrapped: bool) -> Scales | None:
    """Return the scales of a table."""
    if isinstance(value, dict) and _is_off(value):
        return Scales((), (), off=True)
    if isinstance(value, dict) and "extra_state" in value and "scale_fwd" not in value:  # ModelOpt's, around the other
        if wrapped:
            raise ValueError("it holds a state in a state in a state")
        data = _bytes(value["extra_state"], fetch, name, where)
        return scales_in(data, name, where, wrapped=True) if data else None
    if value is None or (isinstance(value, dict) and "scale_fwd" not in value):  # of a recipe that keeps none
        return None
    if not isinstance(value, dict):
        raise TypeError(f"it is not a table but {type(value).__name__}")
    extra = value.get("extra_fp8_variables")
    largest = extra.get("fp8_max_fwd", LARGEST) if isinstance(extra, dict) else LARGEST
    if largest != LARGEST:
        found = largest if isinstance(largest, float | int) else type(largest).__name__
        facts = {"where": where, "fp8_max_fwd": found, "expected": LARGEST}
        raise NotSupported(f"the state {shown(name)} scales weights to another format than e4m3", facts)
    scale, history = (_table(value.get(key), fetch) for key in ("scale_fwd", "amax_history_fwd"))
    if scale is None or scale.ndim != 1 or not len(scale) or len(scale) % SLOTS:
        raise ValueError(f"scale_fwd is not a table of {SLOTS} slots")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError("a scale is not a positive number")
    if history is not None and (history.ndim != 2 or history.shape[1] != len(scale)):
        raise ValueError("amax_history_fwd is not a history of the same slots")
    seen = np.zeros(len(scale), np.bool_) if history is None else (history != 0).any(axis=0)
    known = [float(each) if each != 1 or ever else None for each, ever in zip(scale, seen, strict=True)]  # 1: as made
    each = len(scale) // SLOTS
    return Scales(tuple(known[:each]), tuple(known[each : 2 * each]))


def _is_off(value: Mapping[object, object]) -> bool:
    """Say whether a module's quantizer of the weight is off: modelopt/torch/quantization/plugins/megatron.py."""
    states = value.get("modelopt_quantizer_state")
    weight = states.get("weight_quantizer") if isinstance(states, dict) else None
    return isinstance(weight, dict) and weight.get("_disabled") is True


def _table(tensor: object, fetch: Fetch) -> Numbers | None:
    if tensor is None:
        return None
    if not isinstance(tensor, PickledTensor) or tensor.dtype != "f32":
        raise TypeError("a table of scales holds something else")
    return _numbers(tensor, fetch)


_TRANSFORMER_ENGINE = ("extensions.transformer_engine", "transformer.custom_layers.transformer_engine")
_RECORDS = (
    # what a recipe is made of, in versions 1.0 to 2.9
    *(
        (_RECIPES, name)
        for name in (
            *(
                "Recipe",
                "DelayedScaling",
                "Float8CurrentScaling",
                "Float8BlockScaling",
                "MXFP8BlockScaling",
                "NVFP4BlockScaling",
            ),
            *("CustomRecipe", "_FormatHelper", "MMParams", "QParams", "_OverrideLinearPrecision"),
        )
    ),
    *((f"megatron.core.{module}", "TEDelayedScaling") for module in _TRANSFORMER_ENGINE),
    *(("_io", "BytesIO"), ("_codecs", "encode"), ("builtins", "bytes"), ("__builtin__", "bytes")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
)
GLOBALS: dict[tuple[str, str], object] = {
    **TENSOR_GLOBALS,
    **{(module, name): placeholder(f"{module}.{name}") for module, name in _RECORDS},
    (_RECIPES, "Format"): placeholder(f"{_RECIPES}.Format", Listed),
    **MEMBERS,
}


def _resolve(module: str, name: str) -> object:
    try:
        return GLOBALS[module, name]
    except KeyError:
        raise Forbidden(module, name) from None


def _with_storages(held: dict[str, bytes], what: str, where: str) -> Resolve:
    """Return the allow-list with storages that are pickled as bytes, in torch's form without a zip; ``held`` takes their bytes."""

    class _Loaded(Sealed):
        def __new__(cls, data: object) -> Storage:  # type: ignore[misc]
            if not isinstance(data, bytes):
                raise pickle.UnpicklingError("a storage without bytes")
            storage, raw = _unzipped(data, str(len(held)), what, where)
            held[storage.key] = raw
            if sum(map(len, held.values())) > LIMIT:  # the same bytes, loaded again and again
                raise pickle.UnpicklingError("storages that do not fit")
            return storage

    return lambda module, name: _Loaded if (module, name) in _LOADERS else _resolve(module, name)


def _unzipped(data: bytes, key: str, what: str, where: str) -> tuple[Storage, bytes]:
    """Return the one storage that torch.save wrote without a zip: five pickles, the number of elements, the elements."""
    pickles, rest = series(data, 5)
    magic, protocol, system, value, keys = (load(each, what, where, _resolve, _old_storage) for each in pickles)
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise pickle.UnpicklingError("a storage of an unknown form")
    if not isinstance(value, Storage) or keys != [value.key] or len(rest) < 8:
        raise pickle.UnpicklingError("a storage without elements")
    (length,), raw = struct.unpack("<q", rest[:8]), rest[8:]
    itemsize = BY_NAME[value.dtype].nbytes if value.dtype else 1
    if length != value.length or len(raw) != length * itemsize:
        raise pickle.UnpicklingError("a storage of another size than it says")
    return Storage(value.dtype, key, value.length), raw


def _old_storage(pid: object) -> Storage:
    """Return the storage that a persistent id means: as in a zip, with a view after it, of which there is none."""
    whole = isinstance(pid, tuple) and len(pid) == 6 and pid[5] is None
    return storage_of(pid[:5] if isinstance(pid, tuple) and whole else pid)


def _no_storage(_: object) -> NoReturn:
    raise pickle.UnpicklingError("a storage that lies nowhere")
