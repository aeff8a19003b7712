"""A plan on disk: JSON lines, the last line a digest of those before it.

The first line says what and whence; then come files, texts and assets; then the steps of each target file, as columns with tables of
their own, so that who writes a few of the files reads no other lines::

    {"carnet-plan": 4, "source": "/models/llama", "fingerprint": "9f...", ...}
    {"file": "rank0.safetensors", "nbytes": 96536, "metadata": {}, "tensors": [["lm_head.weight", "bf16", [48, 64], 1504], ...]}
    {"steps": "rank0.safetensors", "forms": [["move", ...], ...], "names": [...], ..., "form": [0, 0, 1, ...], "source_at": [...], ...}
    {"digest": "5be1..."}
"""

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import xxhash

from carnet.errors import BadCheckpoint, BadRequest
from carnet.formats.jsons import TABLE, parse
from carnet.plans.blocks import blocks, unblock
from carnet.plans.columns import Gathered, Plan, Steps
from carnet.plans.values import below, dtype_of, list_of, natural, numbers_of, path_of, table_of, text_of, texts_of
from carnet.steps import NO_FACTORS, SPACES, AssetFile, Make, RawFile, TargetFile, TargetTensor, TextFile, Update
from carnet.storage.opening import failed, reading, replace_file

VERSION = 5
PARTS = b'{"file":', b'{"steps":'  # how the lines begin that are of one target file
MAGIC = b'{"carnet-plan":'
TAIL = 128  # bytes: the last line has fewer
LINE = 256 << 20  # bytes: the line of what is left behind, or of a file, names every tensor
LAST = 1 << 20  # bytes of memory that the last line may take
STEPS = 4_000_000  # of the largest models a plan has a quarter of that
HEAD = (
    "source",
    "fingerprint",
    "request",
    "family",
    "dropped",
    "proof",
    "memory",
    "window",
    "notes",
    "unused",
    "accepted",
    "needs",
)


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan, without line ends."""
    yield _json({"carnet-plan": VERSION, **{name: getattr(plan, name) for name in HEAD}})
    for file in (*plan.files, *([plan.factors] if plan.factors.tensors else []), plan.scratch):
        tensors = [[t.name, t.dtype, t.shape, t.offset] for t in file.tensors]
        head = {"file": file.name, "kind": file.kind, "nbytes": file.nbytes, "metadata": file.metadata}
        yield _json({**head, "tensors": tensors})
    for each in plan.updates:
        yield _json({"update": [each.tensor, each.a, each.b, each.scale, each.experts, each.outputs, each.magnitude]})
    for raw in plan.raws:
        yield _json({"raw": raw.name, "base64": b64encode(raw.data).decode()})
    for text in plan.texts:
        yield _json({"text": text.name, "content": text.text})
    for asset in plan.assets:
        yield _json({"asset": asset.name, "path": asset.path, "nbytes": asset.nbytes, "digest": asset.digest})
    yield from map(_json, blocks(plan.steps))


def digest(plan: Plan) -> str:
    """Return the digest that tells one plan from another."""
    hasher = xxhash.xxh3_128()
    for line in lines(plan):
        hasher.update(f"{line}\n".encode())
    return hasher.hexdigest()


def save(plan: Plan, path: Path) -> None:
    """Write a plan; the file appears whole or not at all. What is there is replaced where it is a plan or empty, and else refused."""
    try:
        with suppress(FileNotFoundError), reading(path, os.O_NOFOLLOW) as there:
            if not MAGIC.startswith(there.read(len(MAGIC))[: len(MAGIC)]):
                raise BadRequest(f"{path} exists and is not a plan", remedy="choose another file")
        replace_file(path, _sealed(plan))
    except OSError as error:
        raise failed("the plan cannot be written", path, error) from error


def _sealed(plan: Plan) -> Iterator[bytes]:
    """Yield the lines of a plan and its digest."""
    hasher = xxhash.xxh3_128()
    for line in lines(plan):
        data = f"{line}\n".encode()
        hasher.update(data)
        yield data
    yield (_json({"digest": hasher.hexdigest()}) + "\n").encode()


def load(path: Path, files: Collection[str] | None = None) -> Plan:
    """Read a plan and check that it is whole; a line at a time is in memory.

    ``files``: of the target files and steps only those of these, with what measures and compares the source; None for all.
    """
    try:
        with reading(path) as file:
            end = _end(file, path)
            file.seek(0)
            return _plan(_rows(file, end, path, files), path, whole=files is None)
    except OSError as error:
        raise failed("the plan cannot be read", path, error) from error
    except BadCheckpoint as error:  # a line that is no JSON
        raise _not_a_plan(path, error.what) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise _not_a_plan(path, f"{type(error).__name__}: {error}") from error


def _end(file: BinaryIO, path: Path) -> int:
    """Return where the last line begins, once it is the digest of those before it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    end = size - len(tail) + tail.rfind(b"\n", 0, -1) + 1
    last, hasher, left = tail[tail.rfind(b"\n", 0, -1) + 1 :], xxhash.xxh3_128(), end
    file.seek(0)
    while left and (piece := file.read(min(left, 1 << 20))):
        hasher.update(piece)
        left -= len(piece)
    if not last.endswith(b"\n") or parse(last, "its last line", path, LAST) != {"digest": hasher.hexdigest()}:
        raise _not_a_plan(path, "the digest in its last line is not that of the lines before it")
    return end


def _rows(file: BinaryIO, end: int, path: Path, files: Collection[str] | None) -> Iterator[dict[str, object]]:
    """Yield the value of every line before the last one that is not of other files."""
    names = None if files is None else [json.dumps(name).encode() + b"," for name in ("", "scratch", "factors", *files)]
    ours = None if names is None else tuple(part + name for part in PARTS for name in names)
    at = 0
    while at < end:
        line = file.readline(min(LINE, end - at))
        at += len(line)
        if not line.endswith(b"\n"):
            raise ValueError("a line does not end")
        if ours is not None and line.startswith(PARTS) and not line.startswith(ours):
            continue
        row = parse(line, "a line", path, TABLE, float)
        if not isinstance(row, dict):
            raise TypeError("a line is not a table")
        yield row


def _plan(rows: Iterator[dict[str, object]], path: Path, *, whole: bool) -> Plan:
    head = next(rows, {})
    version = head.get("carnet-plan")
    if version != VERSION:
        made = f"another carnet made it: a plan of version {version!r}, where this one reads version {VERSION}"
        raise _not_a_plan(path, "its first line is not that of a plan" if version is None else made)
    files, updates, raws, texts, assets, steps = list[TargetFile](), list[Update](), [], [], [], Gathered()
    for row in rows:
        if "steps" in row:
            steps.take(unblock(row))
            if len(steps) > STEPS:
                raise ValueError("it has too many steps")
        elif "file" in row:
            tensors = tuple(_tensor(each) for each in list_of("tensors", row["tensors"]))
            metadata = texts_of("metadata", row["metadata"])
            files.append(TargetFile(below(row["file"]), natural("nbytes", row["nbytes"]), tensors, metadata, _kind(row)))
        elif "update" in row:
            updates.append(_update(row["update"]))
        elif "raw" in row:
            raws.append(RawFile(below(row["raw"]), b64decode(text_of("base64", row["base64"]), validate=True)))
        elif "text" in row:
            texts.append(TextFile(below(row["text"]), text_of("content", row["content"])))
        else:
            name, digest_ = below(row["asset"]), text_of("digest", row["digest"])
            assets.append(AssetFile(name, path_of("path", row["path"]), natural("nbytes", row["nbytes"]), digest_))
    gathered, scratch = steps.steps(), files.pop()
    factors = files.pop() if files and files[-1].space == "factors" else NO_FACTORS
    if scratch.kind != "scratch" or any(file.space != "file" for file in files):
        raise ValueError("the last file is the scratch space, and no other; before it may be the factors of adapters")
    dropped = {
        reason: tuple(text_of(reason, n) for n in list_of(reason, said))
        for reason, said in table_of("dropped", head["dropped"])
    }
    return Plan(
        source=path_of("source", head["source"]),
        fingerprint=text_of("fingerprint", head["fingerprint"]),
        request=dict(table_of("request", head["request"])),
        family=text_of("family", head["family"]),
        dropped=dropped,
        proof={key: natural(key, count) for key, count in table_of("proof", head["proof"])},
        memory=natural("memory", head["memory"]),
        window=natural("window", head["window"]),
        files=tuple(files),
        raws=tuple(raws),
        texts=tuple(texts),
        assets=tuple(assets),
        steps=gathered,
        scratch=scratch if whole else _assembled(scratch, gathered),
        factors=factors,
        updates=tuple(updates),
        unused=texts_of("unused", head["unused"]),
        accepted=texts_of("accepted", head["accepted"]),
        needs={key: _said(key, said) for key, said in table_of("needs", head["needs"])},
        notes=texts_of("notes", head["notes"]),
    )


def _assembled(scratch: TargetFile, steps: Steps) -> TargetFile:
    """Return the scratch space with the matrices alone that steps assemble."""
    held = {step.source.offset for step in steps.only(Make) if step.function == "quantize"}
    return replace(scratch, tensors=tuple([tensor for tensor in scratch.tensors if tensor.offset in held]))


def _tensor(row: object) -> TargetTensor:
    name, dtype, lengths, offset = list_of("tensor", row)
    shape = tuple([natural("shape", length) for length in numbers_of("shape", lengths)])
    return TargetTensor(text_of("tensor", name), dtype_of(dtype), shape, natural("offset", offset))


def _update(row: object) -> Update:
    tensor, a, b, scale, experts, outputs, magnitude = list_of("update", row)
    if type(scale) is not float or type(experts) is not bool:
        raise ValueError("what an adapter adds is not valid")
    names = text_of("tensor", tensor), text_of("a", a), text_of("b", b)
    return Update(*names, scale, experts, natural("outputs", outputs), text_of("magnitude", magnitude))


def _kind(row: Mapping[str, object]) -> str:
    if row["kind"] not in ("safetensors", "torch_dist", *SPACES):
        raise ValueError("a file of an unknown kind")
    return str(row["kind"])


def _said(name: str, value: object) -> str | list[str]:
    return text_of(name, value) if isinstance(value, str) else [text_of(name, each) for each in list_of(name, value)]


def _not_a_plan(path: Path, reason: str) -> BadRequest:
    return BadRequest(
        "this is not a plan that carnet can run", {"where": path, "reason": reason}, remedy="make it again with `carnet plan`"
    )


def _json(data: object) -> str:
    # ASCII alone, so that any path of any machine can be written, and a line ends only where it ends
    return json.dumps(data, separators=(",", ":"), default=dict)
