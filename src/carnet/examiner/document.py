"""The carnet itself: the document that a proven crossing leaves beside the weights.

It says which tensors left, which arrived, in which layout, with a digest of each, what else lies in the target, and what was left
behind under which name. A target can be checked against it alone, long after the source is gone. It has a digest over all of itself.
"""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TypedDict

import numpy
import xxhash

from carnet.dialects.entry import Entry
from carnet.dialects.kinds import OWN
from carnet.dialects.vocabulary import Vocabulary
from carnet.errors import BadCheckpoint
from carnet.examiner.asked import FILES
from carnet.examiner.compare import Finding
from carnet.examiner.examine import Examination, Quality
from carnet.examiner.tensor_files import digest, tensor_files_of
from carnet.formats.files import TABLE_LIMIT, digest_file, read_whole
from carnet.formats.jsons import TABLE, parse_object
from carnet.formats.side_files import DOCUMENT
from carnet.formats.stored import Key, Stored, label_of
from carnet.inventory.survey import Inventory
from carnet.plans.columns import Plan
from carnet.storage.protocol import Folder, Stamp
from carnet.storage.schemes import file_at, folder_at
from carnet.version import __version__

VERSION = 3
PROVEN, WRITTEN = "proven", "written, not verified"
DELTA, APPLIED = "delta", "applied"  # what changed from one version to the next, and a folder in which that was applied
SHA256 = "sha256"  # a digest of tensors, where it is asked for
SELF = "self"  # the key of the digest over all others


@dataclass(frozen=True, slots=True)
class Document:
    """A carnet.json that was read."""

    data: Mapping[str, object]
    problems: tuple[Finding, ...]  # what is wrong with it, whatever it is held against
    stamp: Stamp  # of its file

    @property
    def proven(self) -> bool:
        """Say that an examination wrote it."""
        return self.data.get("state") == PROVEN

    @property
    def tells(self) -> bool:
        """Say that it has a digest of every tensor of its target."""
        return self.proven or self.data.get("state") == APPLIED

    @property
    def files(self) -> Mapping[str, str]:
        """Return the digests of the files beside the weights; what is not text is none that a file has."""
        target = self.data.get("target")
        files = target.get("files") if isinstance(target, Mapping) else None
        return {name: str(digest) for name, digest in files.items()} if isinstance(files, Mapping) else {}


def document(
    source: Inventory,
    target: Inventory,
    found: Examination,
    request: Mapping[str, object],
    beside: tuple[Mapping[str, str], Mapping[str, str]],
    words: Mapping[str, object],
) -> dict[str, object]:
    """Return the document of a target that the examiner found to be the source.

    ``beside`` are the digests of its other files, and of the frames around its tensors; ``words`` are what of the
    source's arguments its program did not use, what a target need not do, and what its own must be told.
    """
    files, frames = beside
    also = SHA256 if request.get("digest") == SHA256 else None
    arrived = _side(target, found.target)
    arrived |= {"tensors": {**arrived["tensors"], **_buffers(target, also)}, "files": dict(files), "frames": dict(frames)}
    return sealed(
        {
            "carnet": VERSION,
            "state": PROVEN,
            "request": request,
            "family": source.family.name,
            "config": dict(source.config),
            "vocabulary": vocabulary_data(source.vocabulary),
            "source": {"name": source.checkpoint.root.name, **_side(source, found.source)},
            "target": arrived,
            "dropped": {reason: list(names) for reason, names in found.dropped.items()},
            **_said_words(words),
            "proof": {
                "tensors": found.tensors,
                "elements compared": found.elements,
                "casts": list(found.cast),
                "different": 0,
                **({} if found.quality is None else quality_data(found.quality)),
            },
            "digest": "xxh3-128" if also is None else f"xxh3-128, {also}",
            "versions": versions(),
        }
    )


def merge_data(source: Inventory, found: Examination) -> dict[str, object]:
    """Return what a sum is of: how, and the other sources, by their places among all."""
    merged = source.merged
    if merged is None:
        return {}
    sides = {
        str(at + 2): _side(each, {label: digest for (place, label), digest in found.others.items() if place == at})
        for at, each in enumerate(merged.others)
    }
    weights = merged.factors[1:] if merged.differences else merged.factors
    names = [each.checkpoint.root.name for each in (source, *merged.others)]
    return {"method": merged.method, "weights": list(weights), "keep": list(merged.keep), "names": names, "sources": sides}


def versions() -> dict[str, str]:
    """Return the versions of the programs that write a document."""
    return {"carnet": __version__, "python": platform.python_version(), "numpy": numpy.__version__}


def vocabulary_data(said: Vocabulary) -> dict[str, object]:
    """Return how many rows of the source are tokens, and how many were left out."""
    return {"rows": said.rows, "kept": said.tokens, "left out as padding": said.padding, "because": said.because}


def quality_data(quality: Quality) -> dict[str, object]:
    """Return what codes lose; a ratio that is infinite has no number in JSON."""
    worst = [{"tensor": name, "snr dB": decibel(snr), "saturated": saturated} for name, snr, saturated in quality.worst]
    found = {"weights": quality.weights, "saturated": quality.saturated, "snr dB": decibel(quality.snr), "worst": worst}
    return {"codes": found}


def decibel(ratio: float) -> float | None:
    """Return a ratio in dB as documents have it."""
    return round(ratio, 3) if isfinite(ratio) else None


def _said_words(words: Mapping[str, object]) -> dict[str, object]:
    return {name: said for name, said in words.items() if said}


def draft(plan: Plan, words: Mapping[str, object] = MappingProxyType({})) -> str:
    """Return the document of a target that was written and not yet examined: it knows the small files that the plan writes."""
    return text(
        sealed(
            {
                "carnet": VERSION,
                "state": WRITTEN,
                "request": request_data(plan.request),
                "family": plan.family,
                "source": {"name": folder_at(plan.source).name, "fingerprint": plan.fingerprint},
                "target": {"files": planned(plan)},
                "dropped": {reason: list(names) for reason, names in plan.dropped.items()},
                **_said_words(words),
                "digest": "xxh3-128",
                "versions": versions(),
            }
        )
    )


def planned(plan: Plan) -> dict[str, str]:
    """Return the digests of the files without tensors that a plan writes."""
    texts = {text.name: xxhash.xxh3_128_hexdigest(text.text.encode()) for text in plan.texts if text.name != DOCUMENT}
    raws = {raw.name: xxhash.xxh3_128_hexdigest(raw.data) for raw in plan.raws}
    return dict(sorted({**texts, **raws, **{asset.name: asset.digest for asset in plan.assets}}.items()))


def request_data(request: Mapping[str, object]) -> dict[str, object]:
    """Return a request as documents have it: of a file that was named, its name and its digest, not where it lay."""
    return {name: _named(name, value) if isinstance(value, str) else value for name, value in request.items()}


def _named(name: str, value: str) -> object:
    if name == "adapter":  # the digests of its tensors are among those of the source
        return value if value == OWN else folder_at(value).name
    return _file(value) if name in FILES else value


def _file(path: str) -> dict[str, str]:
    folder, name = file_at(path)
    return {"name": name, "digest": digest_file(folder, name)[1]}


def sealed(data: Mapping[str, object]) -> dict[str, object]:
    """Return a document with the digest over all of itself."""
    whole = {key: value for key, value in data.items() if key != SELF}
    return {**whole, SELF: xxhash.xxh3_128_hexdigest(text(whole).encode())}


def text(data: Mapping[str, object]) -> str:
    """Return a document as it stands in its file."""
    # names of files need not be Unicode: what cannot be written stands as JSON's own \\udcff
    return json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def load(out: Folder) -> Document | None:
    """Return the document of a target, None where it has none; raise BadCheckpoint where it cannot be read."""
    if not out.kind(DOCUMENT):
        return None
    raw, seen = read_whole(out, DOCUMENT, TABLE_LIMIT)
    data = parse_object(raw, DOCUMENT, out, TABLE)
    if data.get("carnet") != VERSION:
        facts = {"where": out / DOCUMENT, "version": str(data.get("carnet"))[:20], "known": VERSION}
        raise BadCheckpoint(
            "this is not a carnet that this version can read",
            facts,
            remedy="remove it; carnet verify CKPT OUT --seal writes a new one",
        )
    said = Document(data, tuple(_problems(raw, data)), seen.stamp)
    for name in said.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise BadCheckpoint("the carnet names a file that is not in its folder", {"where": out / DOCUMENT, "file": name})
    return said


KEYS = [
    "carnet",
    "state",
    "request",
    "family",
    "config",
    "vocabulary",
    "source",
    "target",
    "dropped",
    "proof",
    "digest",
    "versions",
    SELF,
]
WORDS = ("unused", "accepted", "needs", "families", "merge")  # keys that are there where there is anything to say
KEYS_OF = {  # state -> the keys that are there
    PROVEN: KEYS,
    WRITTEN: [key for key in KEYS if key not in ("config", "vocabulary", "proof")],
    DELTA: ["carnet", "state", "version", "base_version", "base", "result", "tensors", "counts", "digest", "versions", SELF],
    APPLIED: ["carnet", "state", "chain", "target", "digest", "versions", SELF],
}


def _problems(raw: bytes, data: Mapping[str, object]) -> list[Finding]:
    """Return what is wrong with a document taken by itself."""
    wanted = KEYS_OF.get(str(data.get("state")), KEYS)
    if raw != text(data).encode() or sealed(data) != data:
        return [Finding("the carnet was altered", DOCUMENT, DOCUMENT, "it does not have the digest that it says of itself")]
    if [key for key in data if key not in WORDS] != wanted or str(data.get("state")) not in KEYS_OF:
        return [Finding("the carnet was altered", DOCUMENT, DOCUMENT, f"expected the keys {', '.join(wanted)}")]
    return []


class Described(TypedDict, total=False):
    """What a document says of one side."""

    dialect: str
    format: str
    tensors: dict[str, object]  # label -> facts
    files: dict[str, str]  # of a target: name -> digest
    frames: dict[str, str]


def _side(of: Inventory, digests: Mapping[str, str]) -> Described:
    tensors = dict[str, object]()
    for key, held in layouts(of).items():
        label, stored = label_of(key), of.checkpoint.tensors[key]
        shape = of.entries[key].stored if key in of.entries and key not in of.coded else stored.shape
        tensors[label] = {"dtype": stored.dtype, "shape": list(shape), **_by_name(digests[label]), "layout": held}
    return {"dialect": of.dialect.name, "format": of.checkpoint.format, "tensors": tensors}


def _buffers(of: Inventory, also: str | None) -> dict[str, object]:
    """Return the tensors of a target that are no weights, as the others are described."""
    labels = {label_of(key): stored for key, stored in of.checkpoint.tensors.items() if stored.chunks}
    tensor_files, found = tensor_files_of(of.checkpoint, also=also), dict[str, object]()
    for reason, names in of.dropped.items():
        for label in names:
            if label in labels:
                stored = labels[label]
                found[label] = {**facts(stored, digest(tensor_files, stored)), "layout": reason}
    tensor_files.files.close()
    return found


def facts(stored: Stored, digest: str) -> dict[str, object]:
    """Return what a document says of the bytes of a stored tensor."""
    return {"dtype": stored.dtype, "shape": list(stored.shape), **_by_name(digest)}


def _by_name(digest: str) -> dict[str, str]:
    """Return digests that stand behind each other under their names.

    >>> _by_name("f8 0a")
    {'digest': 'f8', 'sha256': '0a'}
    """
    return dict(zip(("digest", SHA256), digest.split(), strict=False))


def also_of(data: Mapping[str, object]) -> str | None:
    """Return the digest that a document has of tensors beside xxh3, None where it has none."""
    return SHA256 if SHA256 in str(data.get("digest")) else None


def layouts(of: Inventory) -> dict[Key, str]:
    """Return in one line each what stored tensors hold: canonical tensors, or what stands beside their codes."""
    found = {}
    for key, entry in of.entries.items():
        first, *scales = of.stored(key)
        found[first.unit, first.name] = layout(entry)
        found |= {(each.unit, each.name): f"scales of {first.name}" for each in scales}
    return found | dict.fromkeys(of.scales, "beside codes")


def layout(entry: Entry) -> str:
    """Return in one line what a stored tensor holds and how: ``(kv *) hidden: layers.0.attention.q (rep dim), ...``."""
    reading = entry.reading
    stacked = len(reading.tensors) > 1
    held = []
    for name, (_, axes) in zip(reading.tensors[0], reading.pattern.parts, strict=True):
        shown = re.sub(r"\.\d+\.", ".*.", name, count=1) if stacked else name
        held.append(f"{shown} ({' '.join(axes)})" if axes else shown)
    dims = " ".join(f"({' '.join(dim)})" if len(dim) > 1 else dim[0] if dim else "1" for dim in reading.pattern.dims)
    return f"{dims}: {', '.join(held)}"
