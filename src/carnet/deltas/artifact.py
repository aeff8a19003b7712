"""The folder of a delta: an index that says what it is of, and shards whose every tensor is the zstd frame of one that changed.

::

    model.safetensors.index.json       version, base_version, xor, zstd, how checksums are computed; which shard has which tensor
    model-00000-of-00002.safetensors   name: U8 [bytes of the frame]; __metadata__: name -> checksum of the whole new tensor
    carnet.json                        the digests of all tensors (``chain``)

As written by slime/backends/megatron_utils/update_weight/update_weight_from_disk_delta.py (THUDM/slime@624b824a8) and
modelexpress_rl/train/methods/canonical_delta.py (modelexpress==0.7.0), and read by sglang's patch in slime, which takes every
*.safetensors of the folder, and by modelexpress_rl/inference/receiver.py, which takes those of the index.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import xxhash

from carnet.deltas import chain
from carnet.errors import MADE_AGAIN, BadCheckpoint, BadRequest, NotSupported, shown
from carnet.formats.files import TABLE_LIMIT, check_plain, read_whole
from carnet.formats.folder import INDEX
from carnet.formats.jsons import parse_object
from carnet.formats.safetensors import read_header
from carnet.storage.protocol import Folder, Stamp, asked, names_in

WHOLE, COMPRESSED = "", "compressed_delta"  # what a checksum is of: the new tensor, or its frame
SCOPES = (WHOLE, COMPRESSED)
SAYS = {"delta_encoding": "xor", "compression_format": "zstd"}  # of the index, beside what differs


class Checksum(Protocol):
    """What computes a checksum."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """Return what it is of all of them."""


class Adler32:
    """Adler-32 as the folder has it: from 1, eight digits.

    >>> made = Adler32()
    >>> made.update(memoryview(b"Wikipedia"))
    >>> made.hexdigest()
    '11e60398'
    """

    def __init__(self) -> None:
        self._value = 1

    def update(self, data: memoryview, /) -> None:
        """Take more bytes."""
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        """Return it in hex."""
        return f"{self._value:08x}"


ADLER = "adler32"
CHECKSUMS: Mapping[str, Callable[[], Checksum]] = {ADLER: Adler32, "xxh3-128": xxhash.xxh3_128}


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a tensor that changed lies in a delta."""

    file: str
    offset: int  # bytes
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """The folder of a delta, as its headers tell it."""

    where: Folder
    version: str
    base_version: str
    checksum: str  # name of its checksums
    scope: str  # one of SCOPES
    frames: Mapping[str, Frame]  # of the tensors that changed
    link: chain.Link | None  # None where its writer says nothing of digests
    stamps: tuple[Stamp, ...]


def read(where: Folder) -> Artifact:
    """Return the delta in a folder; raise BadCheckpoint where it is damaged, NotSupported where it is of another form."""
    remedy = "name the folder of a delta: its index says delta_encoding"
    if INDEX not in (there := names_in(where)):
        raise BadRequest("no delta is here", {"where": where, "lacks": INDEX}, remedy=remedy)
    raw, seen = read_whole(where, INDEX, TABLE_LIMIT)
    parsed = parse_object(raw, INDEX, where)
    metadata, weights = parsed.get("metadata"), parsed.get("weight_map")
    if not isinstance(metadata, dict) or "delta_encoding" not in metadata:
        raise BadRequest("this is no delta but a checkpoint", {"where": where}, remedy=remedy)
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise BadCheckpoint(f"{INDEX} has no weight_map of names", {"where": where}, remedy=MADE_AGAIN)
    scope = metadata.get("checksum_scope", WHOLE)
    known: Mapping[str, tuple[object, ...]] = {
        **{key: (value,) for key, value in SAYS.items()},
        "checksum_format": tuple(CHECKSUMS),
        "checksum_scope": SCOPES,
    }
    for key, values in known.items():
        if (said := scope if key == "checksum_scope" else metadata.get(key)) not in values:
            facts = {"where": where, "found": shown(str(said)), "known": ", ".join(filter(None, map(str, values)))}
            raise NotSupported(f"a delta whose {key} is {shown(repr(said))} is not read", facts)
    version, base = (_version(metadata, key, where) for key in ("version", "base_version"))
    files = sorted(set(weights.values()))
    for name in files:
        check_plain(where, name, INDEX)
    others = [name for name in there if name.endswith(".safetensors") and name not in files]
    if others:  # slime's engines would apply it
        facts = {"where": where, "found": shown(", ".join(others[:4]))}
        raise BadCheckpoint(f"shards that {INDEX} does not name are beside it", facts, remedy=MADE_AGAIN)
    frames, stamps = dict[str, Frame](), [seen.stamp]
    for name, header in zip(files, asked(where, lambda name: read_header(where, name), files), strict=True):
        stamps.append(header.seen.stamp)
        for stored in header.tensors:
            if stored.dtype != "u8" or len(stored.shape) != 1 or stored.name in frames:
                facts = {"where": where / name, "expected": "u8 [bytes], once", "found": f"{stored.dtype} {list(stored.shape)}"}
                raise BadCheckpoint(f"{shown(stored.name)!r} is no frame of a delta", facts, remedy=MADE_AGAIN)
            checksum = header.metadata.get(stored.name)
            if checksum is None:
                raise BadCheckpoint(f"the frame of {shown(stored.name)!r} has no checksum", {"where": where / name})
            frames[stored.name] = Frame(name, stored.chunks[0].offset, stored.nbytes, checksum)
    found = {name: frame.file for name, frame in frames.items()}
    if found != weights:
        name = min(name for name in weights.keys() | found.keys() if weights.get(name) != found.get(name))
        facts = {"where": where, "expected": weights.get(name, "not in the index"), "found": found.get(name, "in no shard")}
        raise BadCheckpoint(f"{INDEX} and the shards disagree on {shown(name)!r}", facts, remedy=MADE_AGAIN)
    link = chain.load(where, version, base, frames.keys())
    stamps += [] if link is None else [link.stamp]
    return Artifact(where, version, base, str(metadata["checksum_format"]), str(scope), frames, link, tuple(stamps))


def _version(metadata: Mapping[str, object], key: str, where: Folder) -> str:
    said = metadata.get(key)
    if not isinstance(said, str) or not said:
        raise BadCheckpoint(f"the index of a delta says no {key}", {"where": where / INDEX}, remedy=MADE_AGAIN)
    return said


def index(version: str, base_version: str, checksum: str, scope: str, weights: Mapping[str, str]) -> str:
    """Return the text of an index; ``weights`` say in which shard each tensor lies."""
    more = {"checksum_scope": scope} if scope else {}
    metadata = {"version": version, "base_version": base_version, **SAYS, "checksum_format": checksum, **more}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weights.items()))}, ensure_ascii=False)
