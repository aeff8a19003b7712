"""What a person asks for: the options of a crossing, and the request that follows from them.

An option is one line of ``Options``, one field of ``Request`` with its default, and one option of the command line. What a person may
write in more than one way is read once, in ``Request.of``; plans and documents keep the request as plain values.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Required, Self, TypedDict, get_args, get_origin, get_type_hints

from carnet.dtypes import named
from carnet.errors import BadRequest

PathLike = str | os.PathLike[str]

TARGETS = ("hf", "trtllm", "megatron")
EMBEDDINGS = ("none", "rows", "columns")  # how ranks may share the embedding
CASTS = ("bf16", "f16", "f32")
MEMORY = 512 << 20  # bytes; the peak of private memory where nothing is said


class Common(TypedDict, total=False):
    """The options that crossings of files and of live weights have in common."""

    dtype: str | None
    parallel_embedding: str | None
    quantize: str | None
    style: str | None
    kv_cache: str | None
    kv_scale: float | None
    activations: str | None
    exclude: Sequence[str]


class Options(Common, total=False):
    """The options of ``carnet.plan`` and ``carnet.cross``; what they mean stands at the fields of ``Request``."""

    to: Required[str]
    tp: int
    pp: int
    ep: int
    memory: int  # bytes: the peak of private memory that the crossing may use
    spelling: str
    drop: Sequence[str]
    vocab_size: int | None
    shard_size: int
    tokenizer: PathLike | None  # folder whose tokenizer goes along
    config: PathLike | None
    amax: PathLike | None


ASIDE = {"memory", "tokenizer"}  # options of a crossing that are no part of what its target is
FIELDS = {  # option -> field, where a request says it shorter
    "parallel_embedding": "embedding",
    "vocab_size": "vocab",
    "shard_size": "shard",
    "kv_cache": "cache",
    "kv_scale": "cache_scale",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A wish for a target."""

    to: str  # "hf", "trtllm" or "megatron"
    tp: int = 1  # ranks that share every layer
    pp: int = 1  # pipeline stages
    ep: int = 1  # ranks that share the experts; they are among the tp
    dtype: str | None = None  # carnet's name of the element type to cast to; None keeps each tensor's own
    spelling: str = "te"  # megatron: the names of Transformer Engine's spec, or of the local one
    embedding: str | None = None  # trtllm: none (a copy on every rank), rows or columns shared; None as the family's class does
    drop: tuple[str, ...] = ()  # patterns of source names to leave behind
    vocab: int | None = None  # true size of the vocabulary where the source does not say it
    tokens: int | None = None  # how many the tokenizer has that goes along, where that is sure
    shard: int = 5_000_000_000  # hf: bytes of one file, at most (one tensor may be larger); transformers' own default
    config: str | None = None  # path of a config that stands in place of the source's own
    quantize: str | None = None  # scheme: carnet.quantize.recipes
    style: str | None = None  # whose names and arithmetic: "modelopt", "compressed-tensors", "deepseek"; trtllm has its own
    cache: str | None = None  # "fp8" for scales of the cache of keys and values
    cache_scale: float | None = None  # the scale of that cache in all layers, in place of what calibration found
    activations: str | None = None  # "static" or "dynamic" (no scale is stored for them); None as the scheme has it
    amax: str | None = None  # path of what calibration found
    exclude: tuple[str, ...] = ()  # patterns of module names that stay as they are

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Return what ``Options`` ask for; raise BadRequest where that makes no sense, whatever the checkpoint."""
        only(Options.__required_keys__ | Options.__optional_keys__, options)
        named = {FIELDS.get(option, option): value for option, value in options.items() if option not in ASIDE}
        return cls._made({field: READ.get(field, _same)(value) for field, value in named.items()})

    @classmethod
    def from_data(cls, data: object) -> Self:
        """Return the request that a plan or a document keeps; raise BadRequest where it keeps none."""
        if not isinstance(data, Mapping):
            raise BadRequest("a request is a mapping", {"found": type(data).__name__})
        only(set(cls.__dataclass_fields__), data)
        for field, kind in get_type_hints(cls).items():
            if field in data and not _is(data[field], kind):
                raise BadRequest(f"{field!r} of a request cannot be {data[field]!r}")
        return cls._made({field: tuple(value) if isinstance(value, list) else value for field, value in data.items()})

    @classmethod
    def _made(cls, fields: Mapping[str, Any]) -> Self:
        if "to" not in fields:
            raise BadRequest("a request says what the target is for", {"lacking": "to", "known": ", ".join(TARGETS)})
        made = cls(**fields)
        check(made)
        return made


def as_data(request: Request) -> Mapping[str, object]:
    """Return a request as plain values, for the plan and the document."""
    plain = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def check(request: Request) -> None:
    """Raise BadRequest where a wish is none, whatever the checkpoint."""
    if request.to not in TARGETS:
        raise BadRequest(f"no target is called {request.to!r}", {"known": ", ".join(TARGETS)})
    if request.embedding not in (None, *EMBEDDINGS):
        raise BadRequest(f"the embedding cannot be shared by {request.embedding!r}", {"known": ", ".join(EMBEDDINGS)})
    if request.cache not in (None, "fp8"):
        raise BadRequest(f"a cache of keys and values cannot be {request.cache!r}", {"known": "fp8"})
    for name in ("tp", "pp", "ep", "shard"):
        if getattr(request, name) < 1:
            raise BadRequest(f"{name} must be at least 1", {"found": getattr(request, name)})


def _cast_to(word: str | None) -> str | None:
    """Return carnet's name of an element type that weights can be cast to; raise BadRequest for any other."""
    if word is None:
        return None
    dtype = named(word).name
    if dtype not in CASTS:
        raise BadRequest(f"weights cannot be cast to {dtype}", {"known": ", ".join(CASTS)})
    return dtype


def absolute(path: PathLike | None) -> str | None:
    """Return a path that holds wherever it is read again."""
    return None if path is None else str(Path(path).absolute())


def _same(value: object) -> object:
    return value


READ: Mapping[str, Callable[[Any], object]] = {  # field -> how its option is read; the others are taken as they are
    "dtype": _cast_to,
    "drop": tuple,
    "config": absolute,
    "amax": absolute,
    "exclude": tuple,
}


def only(known: Iterable[str], said: Iterable[str]) -> None:
    """Raise BadRequest where something is said that nobody knows."""
    for name in said:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise BadRequest(f"no option is called {name!r}", remedy=f"say {near[0]!r}, if that is meant" if near else None)


def _is(value: object, kind: object) -> bool:
    """Say whether a plain value is of the kind of a field; a list stands for a tuple."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (float in kinds and type(value) is int)
