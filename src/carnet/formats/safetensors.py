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

from carnet.algebra.box import Box, whole
from carnet.dtypes import BY_NAME, BY_SAFETENSORS
from carnet.errors import MADE_AGAIN, BadCheckpoint, NotSupported, shown
from carnet.formats.files import Sighting, digest_of
from carnet.formats.impostors import NEEDED, name_impostor
from carnet.formats.jsons import parse_object
from carnet.formats.stored import Chunk, Stored, dense_strides
from carnet.steps import TargetFile, TargetTensor
from carnet.storage.protocol import File, Folder, read_at

HEADER_LIMIT = 100_000_000  # bytes: MAX_HEADER_SIZE of safetensors/src/tensor.rs


@dataclass(frozen=True, slots=True)
class Header:
    """Everything that the header of one file says."""

    tensors: tuple[Stored, ...]  # in the order in which they lie
    metadata: Mapping[str, str]  # __metadata__; empty for none
    seen: Sighting


def read_header(root: Folder, name: str, unit: str = "") -> Header:
    """Return the header of the file ``name`` below ``root``; raise BadCheckpoint where a byte of it is unaccounted for.

    ``unit`` is what holds its tensors.
    """
    file = root.open(name)
    raw = _raw_header(file)
    facts = {"where": root / name}
    parsed = parse_object(raw, f"the header of {shown(name)}", root)
    metadata = _metadata(parsed.pop("__metadata__", {}), facts)
    known = dict[tuple[int, ...], tuple[Box, tuple[int, ...]]]()  # of thousands of tensors few differ in shape
    found = list[tuple[int, int, int, Stored]]()  # begin, end, what tells two empty ones apart
    for tensor, value in parsed.items():
        dtype, shape, begin, end = _described(tensor, value, facts)
        if shape not in known:
            known[shape] = whole(shape), dense_strides(shape)
        box, strides = known[shape]
        stored = Stored(unit, tensor, dtype, box.shape, (Chunk(box, name, 8 + len(raw) + begin, strides),))
        found.append((begin, end, len(found), stored))
    found.sort()
    _check_contiguous(found, 8 + len(raw), file)
    return Header(tuple([stored for *_, stored in found]), metadata, Sighting(file.stamp, digest_of(raw)))


def layout_file(name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> TargetFile:
    """Return where each (name, carnet dtype, shape) of a new file will lie: in the order given, after an 8-aligned header.

    >>> file = layout_file("a.safetensors", [("w", "bf16", (2, 3))], {})
    >>> file.nbytes, file.tensors[0].offset
    (84, 72)
    """
    names = {tensor for tensor, _, _ in tensors}
    if len(names) != len(tensors) or "__metadata__" in names:
        raise ValueError(f"names of {name} are not distinct, or one is __metadata__")
    header, offsets = _header_json(tensors, metadata)
    start = 8 + len(header)
    placed = [TargetTensor(*tensor, start + offset) for tensor, offset in zip(tensors, offsets, strict=False)]
    return TargetFile(name, start + offsets[-1], tuple(placed), dict(metadata))


def render_header(file: TargetFile) -> bytes:
    """Return the first bytes of a file, up to its first tensor: the length and the padded JSON."""
    header, _ = _header_json([(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors], file.metadata)
    return struct.pack("<Q", len(header)) + header


def _header_json(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """Return the padded JSON, and where each tensor begins after it; last, where they end."""
    said = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    parts = [f'"__metadata__":{said(dict(metadata))}'] if metadata else []
    known = dict[tuple[str, tuple[int, ...]], tuple[str, int]]()  # of the thousands of tensors of a file few differ in these
    offsets = [0]
    for name, dtype, shape in tensors:
        if (like := known.get((dtype, shape))) is None:
            nbytes = BY_NAME[dtype].nbytes * math.prod(shape)
            like = known[dtype, shape] = said({"dtype": BY_NAME[dtype].safetensors, "shape": shape})[:-1], nbytes
        begun, nbytes = like
        end = offsets[-1] + nbytes
        parts.append(f'{said(name)}:{begun},"data_offsets":[{offsets[-1]},{end}]}}')
        offsets.append(end)
    text = f"{{{','.join(parts)}}}".encode()
    return text + b" " * (-len(text) % 8), offsets


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


def _described(name: str, value: object, facts: Mapping[str, object]) -> tuple[str, tuple[int, ...], int, int]:
    """Return the type and shape of one tensor of the header, where it begins and ends, checked against each other."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        expected = {"expected": "dtype, shape and data_offsets", "found": shown(str(value))}
        raise BadCheckpoint(f"the tensor {shown(name)!r} is not described as safetensors describes one", {**facts, **expected})
    dtype = BY_SAFETENSORS.get(str(value["dtype"]))
    if dtype is None:
        spelled = {"found": shown(str(value["dtype"])), "known": ", ".join(BY_SAFETENSORS)}
        raise NotSupported(f"the tensor {shown(name)!r} has an unknown element type", {**facts, **spelled})
    shape, place = value["shape"], value["data_offsets"]
    lists = isinstance(shape, list) and isinstance(place, list) and len(shape) <= 64 and len(place) == 2
    if not lists or not _are_naturals([*shape, *place]) or place[0] > place[1]:
        found = {"shape": shown(str(shape)), "offsets": shown(str(place))}
        raise BadCheckpoint(f"the tensor {shown(name)!r} has an impossible shape or place", {**facts, **found})
    nbytes = dtype.nbytes * math.prod(shape)
    if nbytes != place[1] - place[0]:
        found = {"shape": str(tuple(shape)), "expected": f"{nbytes} bytes", "found": f"{place[1] - place[0]} bytes"}
        raise BadCheckpoint(f"the tensor {shown(name)!r} does not have the bytes that its shape needs", {**facts, **found})
    return dtype.name, tuple(shape), place[0], place[1]


def _are_naturals(numbers: list[object]) -> bool:
    """Say whether these are sizes or offsets: integers from 0 to 2**63; a JSON true is an int to Python."""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _check_contiguous(found: Sequence[tuple[int, int, int, Stored]], start: int, file: File) -> None:
    """Raise BadCheckpoint unless tensors, each with its begin and end after the header, follow each other to the end of the file."""
    last = 0
    for begin, end, _, stored in found:
        if begin != last:
            fault = "overlaps the tensor before it" if begin < last else "leaves a hole before it"
            facts = {"expected": f"byte {start + last}", "found": f"byte {start + begin}"}
            raise BadCheckpoint(
                f"the tensor {shown(stored.name)!r} {fault}", {"where": f"{file.where}/{file.stamp.file}", **facts}
            )
        last = end
    if start + last != file.stamp.nbytes:
        facts = {"where": file.where, "expected": f"{start + last} bytes", "found": f"{file.stamp.nbytes} bytes"}
        raise BadCheckpoint(f"{shown(file.stamp.file)} is not as long as its header says", facts, remedy="copy the file again")
