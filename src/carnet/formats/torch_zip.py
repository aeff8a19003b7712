"""Locate what a ``torch.save`` zip holds without reading a tensor: the zip may be a file, or an *item* inside one.

::

    item start                                                                    item end
    | archive/data.pkl | ... | archive/data/0 (64-byte aligned) | ... | directory | end record |
      the tensor's shape       the tensor's bytes, stored as they are   where each entry lies

Two reads an item: its head, where the pickle lies, and its tail, where the directory lies. Entries are never compressed.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from carnet.dtypes import BY_NAME, array_type
from carnet.errors import MADE_AGAIN, BadCheckpoint, shown
from carnet.formats.pickles import load
from carnet.formats.torch_frames import CENTRAL, END, END64, LOCAL, LOCATOR64
from carnet.formats.torch_pickles import PickledTensor, Storage, lenient, storage_of, strict
from carnet.storage.protocol import File, read_at

HEAD, TAIL = 2048, 2048  # bytes read at once from each end of an item: enough for all of what torch writes around one tensor
DIRECTORY_LIMIT = 64 << 20  # bytes
ENTRIES_LIMIT = 500_000  # a rank of the largest models has some thousand storages
PICKLE_LIMIT = 256 << 20  # bytes

_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True, slots=True)
class TensorItem:
    """Where one tensor's bytes lie."""

    dtype: str  # carnet's name
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements
    offset: int  # bytes, from the start of the file to the first element


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry of the directory."""

    name: str
    start: int  # bytes, from the start of the zip to the local header
    nbytes: int  # of the data
    crc: int


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a zip in a file, its two ends already read."""

    file: File
    offset: int  # bytes, from the start of the file to the start of the zip
    nbytes: int
    head: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip and its directory."""

    span: Span
    entries: Mapping[str, ZipEntry]  # name without torch's one folder ("archive/") -> entry
    end: int  # bytes, from the start of the zip to the directory: no entry reaches beyond


def tensor_item(file: File, offset: int, nbytes: int) -> TensorItem:
    """Return what and where the one tensor in a zip at ``offset`` is; no global but those of tensors is accepted."""
    archive = open_archive(file, offset, nbytes)
    tensor = _unpickled(archive, strict)
    if not isinstance(tensor, PickledTensor):
        raise _bad(archive.span, "holds no tensor", {"found": type(tensor).__name__})
    itemsize = BY_NAME[tensor.dtype].nbytes
    start = offset + locate_storage(archive, tensor.storage, itemsize) + tensor.offset * itemsize
    return TensorItem(tensor.dtype, tensor.shape, tensor.strides, start)


def object_item(file: File, offset: int, nbytes: int) -> tuple[object, bytes, Archive]:
    """Return the plain object that a zip at ``offset`` holds, the pickle that says so, and the zip."""
    archive = open_archive(file, offset, nbytes)
    return _unpickled(archive, lenient), _pickle(archive), archive


def value_item(file: File, offset: int, nbytes: int, resolve: Callable[[str, str], object] = lenient) -> tuple[object, Archive]:
    """Return what a zip at ``offset`` holds out of another allow-list, and the zip that its tensors lie in."""
    archive = open_archive(file, offset, nbytes)
    return _unpickled(archive, resolve), archive


def number_of(archive: Archive, tensor: PickledTensor) -> float:
    """Return the one number of a tensor that has no other."""
    held = np.frombuffer(storage_bytes(archive, tensor.storage), array_type(tensor.dtype))
    return float(held[tensor.offset])


def storage_bytes(archive: Archive, storage: Storage) -> bytes:
    """Return the bytes of a small storage."""
    itemsize = BY_NAME[storage.dtype].nbytes if storage.dtype else 1
    start = locate_storage(archive, storage, itemsize)
    return _between(archive.span, start, storage.length * itemsize)


def ends(offset: int, nbytes: int) -> list[tuple[int, int]]:
    """Return the places (offset, bytes) of a zip that are read first; one read serves a small item whole."""
    return [(offset, min(HEAD, nbytes)), *([(offset + nbytes - TAIL, TAIL)] if nbytes > HEAD else [])]


def open_archive(file: File, offset: int, nbytes: int) -> Archive:
    """Return the directory of a zip that fills ``nbytes`` bytes of a file from ``offset``."""
    if nbytes < END.size or offset < 0 or offset + nbytes > file.stamp.nbytes:
        found = {"expected": f"at least {END.size} bytes, inside the file", "found": f"{nbytes} bytes"}
        raise _bad(Span(file, offset, nbytes, b"", b""), "is not a torch.save zip", found)
    read = [read_at(file, *place) for place in ends(offset, nbytes)]
    head, tail = read[0], read[-1]
    span = Span(file, offset, nbytes, head, tail)
    if head[:4] != b"PK\3\4":
        raise _bad(span, "is not a torch.save zip", {"expected": "PK\\x03\\x04", "found": repr(head[:4])})
    try:
        begin, size, count = _directory_place(span)
        entries = _directory(_between(span, begin, size), count)
    except (struct.error, ValueError) as error:
        raise _bad(span, "has a damaged zip directory", {"reason": shown(str(error))}) from None
    prefix = entries[0].name.partition("/")[0] + "/" if entries else ""
    named = {entry.name.removeprefix(prefix): entry for entry in entries if entry.name.startswith(prefix)}
    if len(named) != len(entries) or any(entry.start + LOCAL.size + entry.nbytes > begin for entry in entries):
        raise _bad(span, "has a damaged zip directory", {"reason": "entries double, reach into it or lie in two folders"})
    return Archive(span, named, begin)


def locate_storage(archive: Archive, storage: Storage, itemsize: int) -> int:
    """Return the bytes from the start of the zip to a storage, once the directory agrees on its size and byte order."""
    order = archive.entries.get("byteorder")
    if order is not None and _content(archive, order) != b"little":
        raise _bad(archive.span, "is not little-endian", {"found": shown(repr(_content(archive, order)))})
    entry = archive.entries.get(f"data/{storage.key}")
    if entry is None:
        raise _bad(archive.span, f"lacks the entry data/{storage.key}", {})
    expected = storage.length * itemsize if storage.dtype else storage.length
    if entry.nbytes != expected:
        found = {"entry": shown(entry.name), "expected": f"{expected} bytes", "found": f"{entry.nbytes} bytes"}
        raise _bad(archive.span, "has a storage of another size than its pickle says", found)
    return _data_start(archive, entry)


def _unpickled(archive: Archive, resolve: Callable[[str, str], object]) -> object:
    return load(_pickle(archive), _what(archive.span), archive.span.file.where, resolve, storage_of)


def _pickle(archive: Archive) -> bytes:
    entry = archive.entries.get("data.pkl")
    if entry is None or entry.nbytes > PICKLE_LIMIT:
        raise _bad(archive.span, "lacks the entry data.pkl", {})
    return _content(archive, entry)


def _content(archive: Archive, entry: ZipEntry) -> bytes:
    """Return one small entry's bytes, checked against its checksum."""
    data = _between(archive.span, _data_start(archive, entry), entry.nbytes)
    if entry.crc and zlib.crc32(data) != entry.crc:  # 0: torch.serialization.set_crc32_options(False)
        found = {"entry": shown(entry.name), "expected": f"crc {entry.crc:08x}", "found": f"crc {zlib.crc32(data):08x}"}
        raise _bad(archive.span, "has an entry whose checksum is wrong", found)
    return data


def _data_start(archive: Archive, entry: ZipEntry) -> int:
    """Return where an entry's data begins, once its local header agrees with the directory."""
    raw = _between(archive.span, entry.start, LOCAL.size)
    magic, _, flags, method, _, _, crc, packed, size, name_size, extra_size = LOCAL.unpack(raw)
    name = _between(archive.span, entry.start + LOCAL.size, name_size)
    start = entry.start + LOCAL.size + int(name_size) + int(extra_size)
    # with flag 8 the sizes may follow the data instead (zero here); full 32 bits say that they are in a zip64 field
    free = (0, _FULL32) if flags & 8 else (_FULL32,)
    agree = (packed in free or packed == entry.nbytes) and (size in free or size == entry.nbytes)
    agree = agree and (crc == entry.crc or (flags & 8 != 0 and crc == 0)) and name == entry.name.encode()
    if magic != b"PK\3\4" or method or flags & 1 or not agree or start + entry.nbytes > archive.end:
        facts = {"entry": shown(entry.name), "expected": "a stored entry, the same in its header and in the directory"}
        raise _bad(archive.span, "has an entry that contradicts the zip directory", facts)
    return start


def _between(span: Span, start: int, nbytes: int) -> bytes:
    """Return bytes of the zip: from the ends that are already here, else from the file."""
    if start < 0 or start + nbytes > span.nbytes:
        raise _bad(span, "has a part that lies outside of it", {"found": f"{nbytes} bytes from byte {start}"})
    if start + nbytes <= len(span.head):
        return span.head[start : start + nbytes]
    skipped = span.nbytes - len(span.tail)
    if start >= skipped:
        return span.tail[start - skipped : start - skipped + nbytes]
    return read_at(span.file, span.offset + start, nbytes)


def _directory_place(span: Span) -> tuple[int, int, int]:
    """Return start, size (bytes from the start of the zip) and number of entries of the directory."""
    at = span.nbytes - END.size
    magic, disk, first, here, count, size, begin, comment = END.unpack(_between(span, at, END.size))
    if magic != b"PK\5\6" or disk not in (0, _FULL16) or first not in (0, _FULL16) or here != count or comment:
        raise ValueError("no end record")
    if count == _FULL16 or _FULL32 in (size, begin):
        at -= LOCATOR64.size
        magic, disk, record, _ = LOCATOR64.unpack(_between(span, at, LOCATOR64.size))
        if magic != b"PK\6\7" or disk or record + END64.size > at:
            raise ValueError("no zip64 locator")
        magic, _, _, _, disk, first, here, count, size, begin = END64.unpack(_between(span, record, END64.size))
        if magic != b"PK\6\6" or disk or first or here != count:
            raise ValueError("no zip64 end record")
        at = record
    if begin + size > at or size > DIRECTORY_LIMIT or count > ENTRIES_LIMIT or count * CENTRAL.size > size:
        raise ValueError("the directory does not fit")
    return begin, size, count


def _directory(raw: bytes, count: int) -> list[ZipEntry]:
    entries, position = [], 0
    for _ in range(count):
        fields = CENTRAL.unpack_from(raw, position)
        magic, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, disk, _, _, start = fields
        position += CENTRAL.size
        name = raw[position : position + name_size].decode("utf-8")
        extra = raw[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if magic != b"PK\1\2" or flags & 1 or method or disk or position > len(raw):
            raise ValueError(f"the entry {name} is not plainly stored")
        if _FULL32 in (packed, size, start):
            size, packed, start = _wide(extra, size, packed, start)
        if packed != size:
            raise ValueError(f"the entry {name} has two sizes")
        entries.append(ZipEntry(name, start, size, crc))
    if position != len(raw):
        raise ValueError("bytes are left over")
    return entries


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Return size, packed size and start with the zip64 values in place of those that are full."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position))
            return [next(wide, field) if field == _FULL32 else field for field in fields]
        position += length
    raise ValueError("a zip64 field is missing")


def _what(span: Span) -> str:
    name = shown(span.file.stamp.file)
    return f"{name} at byte {span.offset}" if span.offset else name


def _bad(span: Span, fault: str, facts: Mapping[str, object]) -> BadCheckpoint:
    return BadCheckpoint(f"{_what(span)} {fault}", {"where": span.file.where, **facts}, remedy=MADE_AGAIN)
