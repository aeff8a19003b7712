"""The *frame* of a tensor: all bytes of its ``torch.save`` zip but its own, known from its element type and shape alone.

::

    | prefix: archive/data.pkl, byteorder ..., header of archive/data/0 | the tensor's bytes | suffix: version ..., directory |
    0                                             a multiple of 64 = len(prefix)

A frame is what torch 2.13 writes after ``torch.serialization.set_crc32_options(False)``, byte for byte, but for the checksums of
the entries around the tensor, which are right. The tensor's own stands as 0: no reader of torch compares it; Python's zipfile does.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from carnet.dtypes import BY_NAME
from carnet.formats.torch_opcodes import PROTOCOL, STOP, Global, integer, named, put, text

ALIGNMENT = 64  # bytes: torch's default, serialization.config.save.storage_alignment

# what a zip is made of, after the four bytes that say which
LOCAL = struct.Struct("<4s5H3I2H")  # an entry's header before its data
CENTRAL = struct.Struct("<4s6H3I5H2I")  # the same entry in the directory
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
_FULL = 0xFFFFFFFF  # from here on a number stands in a zip64 field
_UTF8, _TRAILED = 0x800, 0x8  # flags of an entry: its name is UTF-8, its checksum and sizes follow the data
_UNTYPED = ("f8_e4m3", "f8_e5m2")  # types without a storage class of their own: torch/_tensor.py, _rebuild_tensor_v3

# What torch 2.13 writes as .data/serialization_id without checksums: a hash of the entries' names, and one of no checksums.
# It goes to a log and nowhere else (torch/serialization.py, load).
_WITH_DATA, _WITHOUT_DATA = b"1572819951185464302603005401530805769991", b"0290846867776292310400046082544174525093"


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and after a tensor's bytes."""

    prefix: bytes  # its length is a multiple of ALIGNMENT
    suffix: bytes
    nbytes: int  # of the whole item: prefix, tensor and suffix


@dataclass(frozen=True, slots=True)
class _Hole:
    """Content that is not here."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry as the directory says it."""

    name: bytes
    start: int  # bytes, from the start of the zip
    nbytes: int
    crc: int


def frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """Return the frame of a C-contiguous tensor of carnet's ``dtype``.

    >>> framed = frame("bf16", (128, 64))
    >>> len(framed.prefix), framed.nbytes
    (704, 17961)
    """
    nbytes = BY_NAME[dtype].nbytes * prod(shape)
    prefix, suffix = _zip("archive", tensor_pickle(dtype, shape), _Hole(nbytes))
    return Frame(prefix, suffix, len(prefix) + nbytes + len(suffix))


def archive(pickled: bytes, folder: str = "archive") -> bytes:
    """Return the whole zip of a pickle that names no tensor; ``folder`` is the name of its file, as torch has it."""
    return _zip(folder, pickled, None)[0]


def tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the pickle of a tensor whose elements are the entry data/0: the instructions that Python's own pickler gives."""
    row, count = BY_NAME[dtype], prod(shape)
    untyped = dtype in _UNTYPED
    storage = Global("torch.storage", "UntypedStorage") if untyped else Global("torch", row.storage)
    function = Global("torch._utils", "_rebuild_tensor_v3" if untyped else "_rebuild_tensor_v2")
    size = integer(count * row.nbytes if untyped else count)
    code: list[bytes | None] = [PROTOCOL, named(function), None, b"((", text("storage"), None, named(storage), None]
    code += [text("0"), None, text("cpu"), None, size, b"t", None, b"Q", integer(0)]
    code += [*_tuple(shape), *_tuple(_torch_strides(shape))]
    code += [b"\x89", named(Global("collections", "OrderedDict")), None, b")R", None]
    if untyped:
        code += [named(Global("torch", row.torch)), None]
    code += [b"t", None, b"R", None, STOP]
    numbers = iter(range(len(code)))
    # None: remember what was pushed last, under the next number
    return b"".join(put(next(numbers)) if part is None else part for part in code)


def _tuple(values: tuple[int, ...]) -> list[bytes | None]:
    numbers = [integer(value) for value in values]
    if not numbers:
        return [b")"]
    return [*numbers, (b"\x85", b"\x86", b"\x87")[len(numbers) - 1], None] if len(numbers) < 4 else [b"(", *numbers, b"t", None]


def _torch_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return torch's strides of a contiguous tensor, which count an empty dimension as one."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _zip(folder: str, pickled: bytes, hole: _Hole | None) -> tuple[bytes, bytes]:
    """Return the zip's bytes before the hole and after it; all of them before it where there is none."""
    contents: list[tuple[str, bytes | _Hole]] = [
        ("data.pkl", pickled),
        (".format_version", b"1"),
        (".storage_alignment", str(ALIGNMENT).encode("ascii")),
        ("byteorder", b"little"),
        *([("data/0", hole)] if hole else []),
        ("version", b"3\n"),
        (".data/serialization_id", _WITH_DATA if hole else _WITHOUT_DATA),
    ]
    parts, prefix, skipped = bytearray(), b"", 0
    entries: list[_Entry] = []
    for name, content in contents:
        start = skipped + len(parts)
        if isinstance(content, _Hole):
            entry = _Entry(f"{folder}/{name}".encode(), start, content.nbytes, 0)
            prefix = bytes(parts + _header(entry))
            skipped = len(prefix) + content.nbytes
            parts = bytearray(_trailer(entry))
        else:
            entry = _Entry(f"{folder}/{name}".encode(), start, len(content), zlib.crc32(content))
            parts += _header(entry) + content + _trailer(entry)
        entries.append(entry)
    parts += _directory(entries, skipped + len(parts))
    return (prefix, bytes(parts)) if hole else (bytes(parts), b"")


def _header(entry: _Entry) -> bytes:
    """Return an entry's local header, filled up so that the data begins aligned (caffe2/serialize/inline_container.cc)."""
    wide = _wide(entry, packed=0)  # torch has not packed anything yet where it writes the header
    begin = entry.start + LOCAL.size + len(entry.name) + len(wide) + 4
    padding = -begin % ALIGNMENT
    extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return LOCAL.pack(b"PK\3\4", 0, _flags(entry), 0, 0, 0, 0, 0, 0, len(entry.name), len(extra)) + entry.name + extra


def _trailer(entry: _Entry) -> bytes:
    """Return what follows an entry's data."""
    if not entry.nbytes:
        return b""
    sizes = "<4sI2Q" if _wide(entry, packed=entry.nbytes) else "<4s3I"
    return struct.pack(sizes, b"PK\7\x08", entry.crc, entry.nbytes, entry.nbytes)


def _flags(entry: _Entry) -> int:
    return _UTF8 | _TRAILED if entry.nbytes else _UTF8


def _wide(entry: _Entry, *, packed: int) -> bytes:
    """Return the zip64 field of an entry that lies or reaches beyond 4 GiB, and nothing for any other."""
    numbers = [entry.nbytes, packed] if entry.nbytes >= _FULL else []
    numbers += [entry.start] if entry.start >= _FULL else []
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _directory(entries: Sequence[_Entry], begin: int) -> bytes:
    parts = bytearray()
    for entry in entries:
        wide, size = _wide(entry, packed=entry.nbytes), min(entry.nbytes, _FULL)
        lengths = (len(entry.name), len(wide), 0)
        fields = (0, 0, _flags(entry), 0, 0, 0, entry.crc, size, size, *lengths, 0, 0, 0, min(entry.start, _FULL))
        parts += CENTRAL.pack(b"PK\1\2", *fields) + entry.name + wide
    count, size = len(entries), len(parts)
    parts += END64.pack(b"PK\6\6", END64.size - 12, 0x31E, 45, 0, 0, count, count, size, begin)
    parts += LOCATOR64.pack(b"PK\6\7", 0, begin + size, 1)
    return bytes(parts + END.pack(b"PK\5\6", 0, 0, count, count, size, min(begin, _FULL), 0))
