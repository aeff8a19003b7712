"""A plan on disk: JSON lines, one row a line, the last line a digest of those before it.

The first line says what and whence; then come files, texts and assets; then the steps, short, because a large model has a hundred
thousand::

    {"carnet-plan": 2, "source": "/models/llama", "fingerprint": "9f...", ...}
    {"file": "rank0.safetensors", "nbytes": 96536, "metadata": {}, "tensors": [["lm_head.weight", "bf16", [48, 64], 1504], ...]}
    ["move", "layers.0.attention.q", [0, 0, 0, 0], [1, 2, 16, 64], ["__0_0.distcp", 704, [...], "bf16", "file"], ["rank0", ...]]
    {"digest": "5be1..."}
"""

import json
import os
from base64 import b64decode, b64encode
from collections.abc import ItemsView, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import BinaryIO, get_args

import xxhash

from carnet.dtypes import BY_NAME
from carnet.errors import BadCheckpoint, BadRequest, MachineFailed
from carnet.formats.jsons import TABLE, is_text, parse
from carnet.steps import (
    AssetFile,
    Encoding,
    Fill,
    Function,
    Make,
    Measure,
    Move,
    Place,
    Plan,
    Put,
    RawFile,
    Same,
    Space,
    Step,
    TargetFile,
    TargetTensor,
    TextFile,
)
from carnet.storage.opening import reading, replace_file

VERSION = 2
MAGIC = b'{"carnet-plan":'
TAIL = 128  # bytes: the last line has fewer
LINE = 256 << 20  # bytes: the line of what is left behind, or of a file, names every tensor
STEP = 1 << 20  # bytes of memory that the line of one step may take
STEPS = 4_000_000  # of the largest models a plan has a quarter of that
SPACES: Mapping[object, Space] = {space: space for space in get_args(Space)}
FUNCTIONS = get_args(Function)
KINDS: Mapping[str, type[Step]] = {
    "move": Move,
    "make": Make,
    "fill": Fill,
    "same": Same,
    "measure": Measure,
    "put": Put,
}
HEAD = (
    "source",
    "fingerprint",
    "request",
    "family",
    "dropped",
    "proof",
    "memory",
    "window",
    "threads",
    "notes",
    "unused",
    "accepted",
    "needs",
)


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan, without line ends."""
    yield _json({"carnet-plan": VERSION, **{name: getattr(plan, name) for name in HEAD}})
    for file in (*plan.files, plan.scratch):
        tensors = [[t.name, t.dtype, t.shape, t.offset] for t in file.tensors]
        head = {"file": file.name, "kind": file.kind, "nbytes": file.nbytes, "metadata": file.metadata}
        yield _json({**head, "tensors": tensors})
    for raw in plan.raws:
        yield _json({"raw": raw.name, "base64": b64encode(raw.data).decode()})
    for text in plan.texts:
        yield _json({"text": text.name, "content": text.text})
    for asset in plan.assets:
        yield _json({"asset": asset.name, "path": asset.path, "nbytes": asset.nbytes, "digest": asset.digest})
    words = {kind: word for word, kind in KINDS.items()}
    for step in plan.steps:
        yield _json([words[type(step)], *(_flat(getattr(step, name)) for name in step.__slots__)])


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
                raise BadRequest(f"{path} exists and is no plan", remedy="choose another file")
        replace_file(path, _sealed(plan))
    except OSError as error:
        raise MachineFailed("the plan cannot be written", {"where": path, "reason": error.strerror}) from error


def _sealed(plan: Plan) -> Iterator[bytes]:
    """Yield the lines of a plan and its digest."""
    hasher = xxhash.xxh3_128()
    for line in lines(plan):
        data = f"{line}\n".encode()
        hasher.update(data)
        yield data
    yield (_json({"digest": hasher.hexdigest()}) + "\n").encode()


def load(path: Path) -> Plan:
    """Read a plan and check that it is whole; a line at a time is in memory."""
    try:
        with reading(path) as file:
            end = _end(file, path)
            file.seek(0)
            return _plan(_rows(file, end, path), path)
    except OSError as error:
        raise MachineFailed("the plan cannot be read", {"where": path, "reason": error.strerror}) from error
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
    if not last.endswith(b"\n") or parse(last, "its last line", path, STEP) != {"digest": hasher.hexdigest()}:
        raise _not_a_plan(path, "the digest in its last line is not that of the lines before it")
    return end


def _rows(file: BinaryIO, end: int, path: Path) -> Iterator[dict[str, object] | list[object]]:
    """Yield the value of every line before the last one."""
    at = 0
    while at < end:
        line = file.readline(min(LINE, end - at))
        at += len(line)
        if not line.endswith(b"\n"):
            raise ValueError("a line does not end")
        row = parse(line, "a line", path, STEP if line.startswith(b"[") else TABLE, float)
        if not isinstance(row, dict | list):
            raise TypeError("a line is neither a step nor a file")
        yield row


def _plan(rows: Iterator[dict[str, object] | list[object]], path: Path) -> Plan:
    head = next(rows, None)
    version = head.get("carnet-plan") if isinstance(head, dict) else None
    if not isinstance(head, dict) or version != VERSION:
        made = f"another carnet made it: a plan of version {version!r}, where this one reads version {VERSION}"
        raise _not_a_plan(path, "its first line is not that of a plan" if version is None else made)
    files, raws, texts, assets, steps = [], [], [], [], list[Step]()
    for row in rows:
        if isinstance(row, list):
            steps.append(_step(row))
            if len(steps) > STEPS:
                raise ValueError("it has too many steps")
        elif "file" in row:
            tensors = tuple(_tensor(each) for each in _list("tensors", row["tensors"]))
            metadata = {_text("metadata", key): _text("metadata", said) for key, said in _table("metadata", row["metadata"])}
            files.append(TargetFile(_below(row["file"]), _natural("nbytes", row["nbytes"]), tensors, metadata, _kind(row)))
        elif "raw" in row:
            raws.append(RawFile(_below(row["raw"]), b64decode(_text("base64", row["base64"]), validate=True)))
        elif "text" in row:
            texts.append(TextFile(_below(row["text"]), _text("content", row["content"])))
        else:
            name, digest_ = _below(row["asset"]), _text("digest", row["digest"])
            assets.append(AssetFile(name, _path("path", row["path"]), _natural("nbytes", row["nbytes"]), digest_))
    scratch = files.pop()
    if scratch.kind != "scratch" or any(file.kind == "scratch" for file in files):
        raise ValueError("the last file is the scratch space, and no other")
    dropped = {
        reason: tuple(_text(reason, n) for n in _list(reason, said)) for reason, said in _table("dropped", head["dropped"])
    }
    return Plan(
        source=_path("source", head["source"]),
        fingerprint=_text("fingerprint", head["fingerprint"]),
        request=dict(_table("request", head["request"])),
        family=_text("family", head["family"]),
        dropped=dropped,
        proof={key: _natural(key, count) for key, count in _table("proof", head["proof"])},
        memory=_natural("memory", head["memory"]),
        window=_natural("window", head["window"]),
        threads=_natural("threads", head["threads"]),
        files=tuple(files),
        raws=tuple(raws),
        texts=tuple(texts),
        assets=tuple(assets),
        steps=tuple(steps),
        scratch=scratch,
        unused=_texts("unused", head["unused"]),
        accepted=_texts("accepted", head["accepted"]),
        needs={key: _said(key, said) for key, said in _table("needs", head["needs"])},
        notes=_texts("notes", head["notes"]),
    )


def _tensor(row: object) -> TargetTensor:
    name, dtype, shape, offset = _list("tensor", row)
    return TargetTensor(_text("tensor", name), _dtype(dtype), _numbers("shape", shape), _natural("offset", offset))


def _kind(row: Mapping[str, object]) -> str:
    if row["kind"] not in ("safetensors", "torch_dist", "scratch"):
        raise ValueError("a file of an unknown kind")
    return str(row["kind"])


def _list(name: str, value: object) -> list[object]:
    _is(list, name, value)
    return value  # type: ignore[return-value]  # seen in the line above


def _table(name: str, value: object) -> ItemsView[str, object]:
    _is(dict, name, value)
    return value.items()  # type: ignore[attr-defined, no-any-return]  # as above


def _texts(name: str, value: object) -> dict[str, str]:
    return {_text(name, key): _text(name, said) for key, said in _table(name, value)}


def _said(name: str, value: object) -> str | list[str]:
    return _text(name, value) if isinstance(value, str) else [_text(name, each) for each in _list(name, value)]


def _natural(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= 1 << 62:
        raise TypeError(f"{name} is no number from 0 to 2**62")
    return value


def _text(name: str, value: object) -> str:
    """Return a text that can be written."""
    if not isinstance(value, str) or not is_text(value):
        raise TypeError(f"{name} is no text")
    return value


def _path(name: str, value: object) -> str:
    """Return a path of some machine, whose bytes need not be Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is no path")
    os.fsencode(value)
    return value


def _is(kind: type, name: str, value: object) -> None:
    if type(value) is not kind:
        raise TypeError(f"{name} is no {kind.__name__}")


def _step(row: list[object]) -> Step:
    kind = KINDS[str(row[0])]
    values = dict(zip((field.name for field in fields(kind)), row[1:], strict=True))
    made = {name: _unflat(kind, name, value) for name, value in values.items()}
    return kind(**made)  # type: ignore[arg-type]


def _unflat(kind: type[Step], name: str, value: object) -> object:
    if name == "encoding" and value is None and kind is Measure:
        return None
    if name == "encoding":
        return _encoding(value)
    if name in ("source", "target", "other"):
        return _place(name, value)
    if name in ("start", "shape"):
        return _numbers(name, value)
    if name == "values" and isinstance(value, list) and all(type(each) is float for each in value):
        return tuple(value)
    if name == "amax" and isinstance(value, list) and kind is Make and all(type(each) is str for each in value):
        return tuple(value)
    if name == "given" and value is None:
        return None
    if name == "function" and value not in FUNCTIONS:
        raise ValueError("a function that is none")
    _is(float if name in ("add", "given") else str, name, value)
    return value


def _place(name: str, value: object) -> Place:
    if not isinstance(value, list):
        raise TypeError(f"{name} is no place")
    file, offset, strides, dtype, space = value
    if space not in SPACES:
        raise ValueError("a space that is none")
    return Place(_below(file), _natural("offset", offset), _numbers("strides", strides), _dtype(dtype), SPACES[space])


def _encoding(value: object) -> Encoding:
    if not isinstance(value, list):
        raise TypeError("encoding is no list")
    recipe, shape, first, scales, outer = value
    _is(str, "recipe", recipe)
    _natural("first", first)
    rows, columns = _numbers("shape", shape)
    return Encoding(recipe, (rows, columns), first, _place("scales", scales), None if outer is None else _place("outer", outer))


def _numbers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and abs(each) <= 1 << 62 for each in value):
        raise TypeError(f"{name} is no list of integers")
    return tuple(value)


def _flat(value: object) -> object:
    if isinstance(value, Encoding):
        return [value.recipe, value.shape, value.first, _flat(value.scales), _flat(value.outer)]
    return [value.file, value.offset, value.strides, value.dtype, value.space] if isinstance(value, Place) else value


def _dtype(word: object) -> str:
    return BY_NAME[str(word)].name


def _below(name: object) -> str:
    """Return the name of a file that stays below its folder."""
    path = PurePosixPath(_text("file", name))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"the file name {name!r} leaves the folder")
    return str(path)


def _not_a_plan(path: Path, reason: str) -> BadRequest:
    return BadRequest(
        "this is no plan that carnet can run", {"where": path, "reason": reason}, remedy="make it again with `carnet plan`"
    )


def _json(data: object) -> str:
    # ASCII alone, so that any path of any machine can be written, and a line ends only where it ends
    return json.dumps(data, separators=(",", ":"), default=dict)
