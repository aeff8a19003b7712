"""A safetensors file: a length, a JSON header, then the tensors, with every byte accounted for.

::

    0        8                   8 + length                                  end of file
    +--------+-------------------+-----------+-----------+--- ... ---+-------+
    | length | {"name": {...}}   | tensor    | tensor    |           |       |   offsets count from 8 + length
    +--------+-------------------+-----------+-----------+--- ... ---+-------+

The rules are those of the safetensors README; a file that breaks one is refused, as its own reader does.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carnet.dtypes import BY_NAME, BY_SAFETENSORS
from carnet.errors import MADE_AGAIN, BadCheckpoint, NotSupported, shown
from carnet.formats.files import Sighting, digest_of
from carnet.formats.impostors import NEEDED, name_impostor
from carnet.formats.jsons import parse_object
from carnet.steps import TargetFile, TargetTensor
from carnet.storage.protocol import File, Folder, read_at

HEADER_LIMIT = 100_000_000  # bytes: MAX_HEADER_SIZE of safetensors/src/tensor.rs


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str  # carnet's name
    shape: tuple[int, ...]  # elements
    offset: int  # bytes, from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything that the header of one file says."""

    entries: tuple[Entry, ...]  # in the order in which they lie
    metadata: Mapping[str, str]  # __metadata__; empty for none
    seen: Sighting


def read_header(root: Folder, name: str) -> Header:
    """Return the header of the file ``name`` below ``root``; raise BadCheckpoint where a byte of it is unaccounted for."""
    file = root.open(name)
    raw = _raw_header(file)
    facts = {"where": root / name}
    parsed = parse_object(raw, f"the header of {shown(name)}", root)
    metadata = _metadata(parsed.pop("__metadata__", {}), facts)
    start = 8 + len(raw)
    entries = [_entry(key, value, start, facts) for key, value in parsed.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_contiguous(entries, start, file)
    return Header(tuple(entries), metadata, Sighting(file.stamp, digest_of(raw)))


def layout_file(name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> TargetFile:
    """Return where each (name, carnet dtype, shape) of a new file will lie: in the order given, after an 8-aligned header.

    >>> file = layout_file("a.safetensors", [("w", "bf16", (2, 3))], {})
    >>> file.nbytes, file.tensors[0].offset
    (84, 72)
    """
    names = {tensor for tensor, _, _ in tensors}
    if len(names) != len(tensors) or "__metadata__" in names:
        raise ValueError(f"names of {name} are not distinct, or one is __metadata__")
    start = 8 + len(_header_json(tensors, metadata))
    placed, offset = [], start
    for tensor, dtype, shape in tensors:
        placed.append(TargetTensor(tensor, dtype, shape, offset))
        offset += _nbytes(dtype, shape)
    return TargetFile(name, offset, tuple(placed), dict(metadata))


def render_header(file: TargetFile) -> bytes:
    """Return the first bytes of a file, up to its first tensor: the length and the padded JSON."""
    header = _header_json([(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors], file.metadata)
    return struct.pack("<Q", len(header)) + header


def _header_json(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    said = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    parts = [f'"__metadata__":{said(dict(metadata))}'] if metadata else []
    known = dict[tuple[str, tuple[int, ...]], tuple[str, int]]()  # of the thousands of tensors of a file few differ in these
    offset = 0
    for name, dtype, shape in tensors:
        if (dtype, shape) not in known:
            known[dtype, shape] = said({"dtype": BY_NAME[dtype].safetensors, "shape": shape})[:-1], _nbytes(dtype, shape)
        begun, nbytes = known[dtype, shape]
        parts.append(f'{said(name)}:{begun},"data_offsets":[{offset},{offset + nbytes}]}}')
        offset += nbytes
    text = f"{{{','.join(parts)}}}".encode()
    return text + b" " * (-len(text) % 8)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return BY_NAME[dtype].nbytes * math.prod(shape)


def _raw_header(file: File) -> bytes:
    """Return the JSON bytes, once their length is known to be possible."""
    facts: dict[str, object] = {"where": f"{file.where}/{file.stamp.file}"}
    if file.stamp.nbytes < 8:
        found = {"expected": "at least 8 bytes", "found": f"{file.stamp.nbytes} bytes"}
        raise BadCheckpoint(f"{shown(file.stamp.file)} is too short for a safetensors file", facts | found, remedy=MADE_AGAIN)
    (length,) = struct.unpack("<Q", read_at(file, 0, 8))
    limit = min(HEADER_LIMIT, file.stamp.nbytes - 8)
    if length > limit:
        impostor = name_impostor(read_at(file, 0, min(NEEDED, file.stamp.nbytes)))
        if impostor is not None:
            raise BadCheckpoint(f"{shown(file.stamp.file)} is {impostor[0]}", {"where": file.where}, remedy=impostor[1])
        found = {"expected": f"at most {limit} bytes", "found": f"{length} bytes"}
        raise BadCheckpoint(
            f"the header of {shown(file.stamp.file)} has an impossible length", facts | found, remedy=MADE_AGAIN
        )
    raw = read_at(file, 8, length)
    if not raw.startswith(b"{"):
        found = {"expected": "b'{'", "found": repr(raw[:1])}
        raise BadCheckpoint(f"the header of {shown(file.stamp.file)} does not begin as JSON", facts | found, remedy=MADE_AGAIN)
    return raw


def _metadata(value: object, facts: Mapping[str, object]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadCheckpoint("__metadata__ is not a table of texts", facts)
    return value


def _entry(name: str, value: object, start: int, facts: Mapping[str, object]) -> Entry:
    """Return one tensor of the header, checked against itself."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        expected = {"expected": "dtype, shape and data_offsets", "found": shown(str(value))}
        raise BadCheckpoint(f"the tensor {shown(name)!r} is not described as safetensors describes one", {**facts, **expected})
    dtype = BY_SAFETENSORS.get(str(value["dtype"]))
    if dtype is None:
        spelled = {"found": shown(str(value["dtype"])), "known": ", ".join(BY_SAFETENSORS)}
        raise NotSupported(f"the tensor {shown(name)!r} has an unknown element type", {**facts, **spelled})
    shape = _naturals(value["shape"])
    offsets = _naturals(value["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        found = {"shape": shown(str(value["shape"])), "offsets": shown(str(value["data_offsets"]))}
        raise BadCheckpoint(f"the tensor {shown(name)!r} has an impossible shape or place", {**facts, **found})
    nbytes = dtype.nbytes * math.prod(shape)
    if nbytes != offsets[1] - offsets[0]:
        found = {"shape": str(shape), "expected": f"{nbytes} bytes", "found": f"{offsets[1] - offsets[0]} bytes"}
        raise BadCheckpoint(f"the tensor {shown(name)!r} does not have the bytes that its shape needs", {**facts, **found})
    return Entry(name, dtype.name, shape, start + offsets[0], nbytes)


def _naturals(value: object) -> tuple[int, ...] | None:
    """Return a list of sizes or offsets, or None where one is not an integer from 0 to 2**63."""
    if not isinstance(value, list) or len(value) > 64:
        return None
    # a JSON true is an int to Python
    if not {*map(type, value)} <= {int} or (value and not 0 <= min(value) <= max(value) < 1 << 63):
        return None
    return tuple(value)


def _check_contiguous(entries: Sequence[Entry], start: int, file: File) -> None:
    """Raise BadCheckpoint unless the tensors follow each other from the header to the end of the file."""
    end = start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            facts = {"where": f"{file.where}/{file.stamp.file}", "expected": f"byte {end}", "found": f"byte {entry.offset}"}
            raise BadCheckpoint(f"the tensor {shown(entry.name)!r} {fault}", facts)
        end += entry.nbytes
    if end != file.stamp.nbytes:
        facts = {"where": file.where, "expected": f"{end} bytes", "found": f"{file.stamp.nbytes} bytes"}
        raise BadCheckpoint(f"{shown(file.stamp.file)} is not as long as its header says", facts, remedy="copy the file again")
