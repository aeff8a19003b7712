"""The carnet itself: the document that a proven crossing leaves beside the weights.

It says which tensors left, which arrived, in which layout, with a digest of each, and what was left behind under which name. A target
can be checked against it alone, long after the source is gone.
"""

import json
import os
import platform
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TypedDict

import numpy

from carnet.errors import BadCheckpoint
from carnet.examiner.compare import Finding
from carnet.examiner.examine import Examination, Progress, Quality
from carnet.examiner.means import Means, Tally, each
from carnet.examiner.shelves import Shelves, close, digest, stored_bytes
from carnet.families.entries import Entry
from carnet.families.vocabulary import Vocabulary
from carnet.formats.files import TABLE_LIMIT, digest_file, read_whole
from carnet.formats.jsons import TABLE, parse
from carnet.formats.stored import Checkpoint, Stored
from carnet.inventory import Inventory, Key

NAME = "carnet.json"
VERSION = 1
JOURNAL = "journal.jsonl"  # of a crossing that is still being written


def document(
    source: Inventory,
    target: Inventory,
    found: Examination,
    request: Mapping[str, object],
    version: str,
    words: Mapping[str, object],
) -> dict[str, object]:
    """Return the document of a target that the examiner found to be the source.

    ``words`` are what of the source's arguments its program did not use, what a target need not do, and what its own must be told.
    """
    return {
        "carnet": VERSION,
        "state": "proven",
        "request": request,
        "family": source.family.name,
        "config": dict(source.config),
        "vocabulary": vocabulary_data(source.vocabulary),
        "source": {"name": source.checkpoint.root.name, **_side(source, found.source)},
        "target": {**_side(target, found.target), "files": _files(target.checkpoint)},
        "dropped": {reason: list(names) for reason, names in found.dropped.items()},
        **_said_words(words),
        "proof": {
            "tensors": found.tensors,
            "elements compared": found.elements,
            "casts": list(found.cast),
            "different": 0,
            **({} if found.quality is None else quality_data(found.quality)),
        },
        "digest": "xxh3-128",
        "versions": {"carnet": version, "python": platform.python_version(), "numpy": numpy.__version__},
    }


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


def draft(
    request: Mapping[str, object],
    dropped: Mapping[str, tuple[str, ...]],
    family: str,
    fingerprint: str,
    words: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Return the document of a target that was written and not yet examined."""
    return text(
        {
            "carnet": VERSION,
            "state": "written, not verified",
            "request": request,
            "family": family,
            "source": {"fingerprint": fingerprint},
            "dropped": {reason: list(names) for reason, names in dropped.items()},
            **_said_words(words),
        }
    )


def text(data: Mapping[str, object]) -> str:
    """Return a document as it stands in its file."""
    # names of files need not be Unicode: what cannot be written stands as JSON's own \\udcff
    return json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def load(out: Path) -> dict[str, object] | None:
    """Return the document of a target, None where it has none."""
    if not os.path.lexists(out / NAME):
        return None
    data = parse(read_whole(out, NAME, TABLE_LIMIT)[0], NAME, out, TABLE)
    if not isinstance(data, dict) or data.get("carnet") != VERSION:
        raise BadCheckpoint("this is no carnet that this version can read", {"where": out / NAME})
    return data


def recheck(checkpoint: Checkpoint, data: Mapping[str, object], means: Means, progress: Progress) -> tuple[int, list[Finding]]:
    """Compare a target with its own document: (bytes read, what is wrong). ``progress`` is as for ``examine``."""
    said = _said(data, checkpoint.root / NAME)
    findings = list[Finding]()
    tensors = {"/".join(filter(None, key)): stored for key, stored in checkpoint.tensors.items()}
    digests = _digests(
        checkpoint.root, {label: tensors[label] for label in said["tensors"] if label in tensors}, means, progress
    )
    for label, facts in said["tensors"].items():
        if label not in tensors:
            findings.append(Finding("missing", label, label, "the carnet names it, the target lacks it"))
            continue
        stored = tensors[label]
        now = {"dtype": stored.dtype, "shape": list(stored.shape), "digest": digests[label]}
        for fact, found in now.items():
            if facts.get(fact) != found:
                findings.append(Finding(f"{fact} differs", label, label, f"expected {facts.get(fact)}, found {found}"))
    now_there = _files(checkpoint)
    for name in sorted(said["files"].keys() | now_there.keys()):
        expected, there = said["files"].get(name), now_there.get(name)
        if expected is not None and expected != there:
            findings.append(Finding("file differs", name, name, f"expected {expected}, found {there or 'no file'}"))
    new = [*(tensors.keys() - said["tensors"].keys()), *(now_there.keys() - said["files"].keys())]
    findings += [Finding("not in the carnet", label, label, "the target holds it") for label in sorted(new)]
    return sum(stamp.nbytes for stamp in checkpoint.stamps), findings


def _digests(root: Path, tensors: Mapping[str, Stored], means: Means, progress: Progress) -> dict[str, str]:
    """Return the digest of every stored tensor."""
    shelves, stored = Shelves(root, means.block), [*tensors.values()]
    tally = Tally(progress, sum(map(stored_bytes, stored)))
    try:
        found = each(stored, lambda one: digest(shelves, one), stored_bytes, means.threads, tally.add)
    finally:
        close(shelves)
    return dict(zip(tensors, found, strict=True))


class Said(TypedDict):
    """What a document says of its target."""

    tensors: dict[str, Mapping[str, object]]  # label -> facts
    files: dict[str, object]  # name -> digest


def _said(data: Mapping[str, object], where: Path) -> Said:
    target = data.get("target")
    found = [target.get(key) if isinstance(target, Mapping) else None for key in Said.__annotations__]
    tensors, files = ([*part.items()] if isinstance(part, Mapping) else None for part in found)
    if tensors is None or files is None or not all(isinstance(facts, Mapping) for _, facts in tensors):
        raise BadCheckpoint("the carnet does not say what the target holds", {"where": where})
    for name, _ in files:
        if PurePath(name).name != name:
            raise BadCheckpoint("the carnet names a file that is not in its folder", {"where": where, "file": name})
    return {"tensors": dict(tensors), "files": dict(files)}


def _side(of: Inventory, digests: Mapping[str, str]) -> dict[str, object]:
    tensors = {}
    for key, held in layouts(of).items():
        label, stored = "/".join(filter(None, key)), of.checkpoint.tensors[key]
        tensors[label] = {"dtype": stored.dtype, "shape": list(stored.shape), "digest": digests[label], "layout": held}
    return {"dialect": of.dialect.name, "format": of.checkpoint.format, "tensors": tensors}


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


def _files(target: Checkpoint) -> dict[str, str]:
    """Return the digest of every file of a target that holds no tensors: configs, index, tokenizer."""
    data = {chunk.file for stored in target.tensors.values() for chunk in stored.chunks}
    root = target.root
    others = sorted(path.name for path in root.iterdir() if path.is_file() and path.name not in {*data, NAME, JOURNAL})
    return {name: digest_file(root, name)[1] for name in others}
