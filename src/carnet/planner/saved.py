"""A plan on disk: JSON lines, one row a line, the last line a digest of those before it.

The first line says what and whence; then come files, texts and assets; then the steps, short, because a large model has a hundred
thousand::

    {"carnet-plan": 1, "source": "/models/llama", "fingerprint": "9f...", ...}
    {"file": "rank0.safetensors", "nbytes": 96536, "metadata": {}, "tensors": [["lm_head.weight", "bf16", [48, 64], 1504], ...]}
    ["copy", "layers.0.attention.q", [0, 0, 0, 0], [1, 2, 16, 64], ["__0_0.distcp", 704, [...], "bf16"], ["rank0.safetensors", ...]]
    {"digest": "5be1..."}
"""

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from carnet.dtypes import BY_NAME
from carnet.errors import BadRequest, MachineFailed
from carnet.formats.opening import open_regular, read_regular, replace_file
from carnet.steps import (
    SKETCH,
    Add,
    AssetFile,
    Cast,
    Copy,
    Dequantize,
    Fill,
    Legend,
    Measure,
    Place,
    Plan,
    Put,
    Quantize,
    RawFile,
    Same,
    Step,
    TargetFile,
    TargetTensor,
    TextFile,
)

VERSION = 1
MAGIC = b'{"carnet-plan":'
KINDS: Mapping[str, type[Step]] = {
    "copy": Copy,
    "cast": Cast,
    "add": Add,
    "dequantize": Dequantize,
    "fill": Fill,
    "same": Same,
    "measure": Measure,
    "quantize": Quantize,
    "put": Put,
}
HEAD = ("source", "fingerprint", "request", "family", "dropped", "proof", "memory", "window", "threads", "notes")


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan, without line ends."""
    yield _json({"carnet-plan": VERSION, **{name: getattr(plan, name) for name in HEAD}})
    for file in (*plan.files, plan.sketch):
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
        with suppress(FileNotFoundError), open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as there:
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
    """Read a plan and check that it is whole."""
    try:
        content = read_regular(path)
    except OSError as error:
        raise MachineFailed("the plan cannot be read", {"where": path, "reason": error.strerror}) from error
    last = content.rfind(b"\n", 0, -1) + 1  # where the last line begins
    try:
        sealed = content.endswith(b"\n") and json.loads(content[last:]) == {"digest": xxhash.xxh3_128_hexdigest(content[:last])}
        if not sealed:
            raise _not_a_plan(path, "the digest in its last line is not that of the lines before it")
        return _plan([json.loads(row) for row in content[:last].split(b"\n")[:-1]], path)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, AttributeError) as error:
        raise _not_a_plan(path, f"{type(error).__name__}: {error}") from error


def _plan(rows: list[dict[str, object] | list[object]], path: Path) -> Plan:
    head = rows[0]
    if not isinstance(head, dict) or head.get("carnet-plan") != VERSION:
        raise _not_a_plan(path, "its first line is not that of a plan of this version")
    files, raws, texts, assets, steps = [], [], [], [], []
    for row in rows[1:]:
        if isinstance(row, list):
            steps.append(_step(row))
        elif "file" in row:
            tensors = tuple(TargetTensor(str(n), _dtype(d), tuple(s), int(o)) for n, d, s, o in row["tensors"])  # type: ignore[attr-defined]
            files.append(TargetFile(_below(row["file"]), int(row["nbytes"]), tensors, dict(row["metadata"]), str(row["kind"])))  # type: ignore[call-overload]
        elif "raw" in row:
            raws.append(RawFile(_below(row["raw"]), b64decode(str(row["base64"]), validate=True)))
        elif "text" in row:
            texts.append(TextFile(_below(row["text"]), str(row["content"])))
        else:
            assets.append(AssetFile(_below(row["asset"]), str(row["path"]), int(row["nbytes"]), str(row["digest"])))  # type: ignore[call-overload]
    sketch = files.pop()
    if sketch.name != SKETCH or any(file.name == SKETCH for file in files):
        raise ValueError("the last file is the sketch, and no other")
    known: dict[str, Any] = {name: head[name] for name in HEAD}
    for name in ("source", "fingerprint", "family"):
        _is(str, name, known[name])
    for name in ("memory", "window", "threads"):
        _is(int, name, known[name])
    known["dropped"] = {reason: tuple(names) for reason, names in known["dropped"].items()}
    return Plan(
        **known,
        files=tuple(files),
        raws=tuple(raws),
        texts=tuple(texts),
        assets=tuple(assets),
        steps=tuple(steps),
        sketch=sketch,
    )


def _is(kind: type, name: str, value: object) -> None:
    if type(value) is not kind:
        raise TypeError(f"{name} is no {kind.__name__}")


def _step(row: list[object]) -> Step:
    kind = KINDS[str(row[0])]
    values = dict(zip((field.name for field in fields(kind)), row[1:], strict=True))
    made = {name: _unflat(kind, name, value) for name, value in values.items()}
    return kind(**made)  # type: ignore[arg-type]


def _unflat(kind: type[Step], name: str, value: object) -> object:
    if name in ("scales", "outer", "legend") and value is None and (name, kind) != ("legend", Dequantize):
        return None
    if name == "legend":
        return _legend(value)
    if name in ("source", "target", "other", "scales", "outer"):
        return _place(name, value)
    if name in ("start", "shape"):
        return _numbers(name, value)
    if name == "values" and isinstance(value, list) and all(type(each) is float for each in value):
        return tuple(value)
    if isinstance(value, list) and kind is Quantize and all(type(each) is str for each in value):
        return tuple(value)
    if name == "given" and value is None:
        return None
    _is(float if name in ("value", "given") else str, name, value)
    return value


def _place(name: str, value: object) -> Place:
    if not isinstance(value, list):
        raise TypeError(f"{name} is no place")
    file, offset, strides, dtype = value
    _is(int, "offset", offset)
    return Place(_below(file), offset, _numbers("strides", strides), _dtype(dtype))


def _legend(value: object) -> Legend:
    if not isinstance(value, list):
        raise TypeError("legend is no list")
    recipe, shape, first, scales, outer = value
    _is(str, "recipe", recipe)
    _is(int, "first", first)
    rows, columns = _numbers("shape", shape)
    return Legend(recipe, (rows, columns), first, _place("scales", scales), None if outer is None else _place("outer", outer))


def _numbers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise TypeError(f"{name} is no list of integers")
    return tuple(value)


def _flat(value: object) -> object:
    if isinstance(value, Legend):
        return [value.recipe, value.shape, value.first, _flat(value.scales), _flat(value.outer)]
    return [value.file, value.offset, value.strides, value.dtype] if isinstance(value, Place) else value


def _dtype(word: object) -> str:
    return BY_NAME[str(word)].name


def _below(name: object) -> str:
    """Return the name of a file that stays below its folder."""
    path = PurePosixPath(str(name))
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
