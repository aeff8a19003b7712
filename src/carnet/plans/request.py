"""What a person asks for: the options of a crossing, and the request that follows from them.

An option is one line of ``Options``, one field of ``Request`` with its default, and one option of the command line. What a person may
write in more than one way is read once, in ``Request.of``; plans and documents keep the request as plain values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, Self, TypedDict, get_args, get_origin, get_type_hints

from carnet.dialects.kinds import KINDS
from carnet.errors import BadOption, BadRequest
from carnet.plans.options import DTYPES, PathLike, located, nbytes, near, number, patterns, whole, word

TARGETS = tuple(KINDS)
EMBEDDINGS = tuple(dict.fromkeys(way for kind in KINDS.values() for way in kind.embeddings))
SPELLINGS = ("te", "local")  # whose names a Megatron target has
CACHES = ("fp8",)
ACTIVATIONS = ("static", "dynamic")
MEMORY = 512_000_000  # bytes; the peak of private memory where nothing is said


class Common(TypedDict, total=False):
    """The options that crossings of files and of live weights have in common."""

    dtype: str | None
    family: str | None
    parallel_embedding: str | None
    quantize: str | None
    style: str | None
    kv_cache: str | None
    kv_scale: float | None
    activations: str | None
    exclude: str | Sequence[str]


class Options(Common, total=False):
    """The options of ``carnet.plan`` and ``carnet.cross``; what they mean stands at the fields of ``Request``."""

    to: Required[str]
    tp: int
    pp: int
    ep: int
    memory: int | str  # bytes, or a size as on the command line: the peak of private memory that the crossing may use
    spelling: str
    drop: str | Sequence[str]
    vocab_size: int | None
    shard_size: int | str
    tokenizer: PathLike | None  # folder whose tokenizer goes along
    config: PathLike | None
    amax: PathLike | None
    written_by: str | None
    read_by: str | None
    accept: Sequence[str]


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
    family: str | None = None  # whose model the source is, where its config names none; None for the first that it could be
    quantize: str | None = None  # scheme: carnet.quantize.recipes
    style: str | None = None  # whose names and arithmetic: "modelopt", "compressed-tensors", "deepseek"; trtllm has its own
    cache: str | None = None  # "fp8" for scales of the cache of keys and values
    cache_scale: float | None = None  # the scale of that cache in all layers, in place of what calibration found
    activations: str | None = None  # "static" or "dynamic" (no scale is stored for them); None as the scheme has it
    amax: str | None = None  # path of what calibration found
    exclude: tuple[str, ...] = ()  # patterns of module names that stay as they are
    written_by: str | None = None  # the program whose words a Megatron source's arguments are
    read_by: str | None = None  # megatron: the program that will load the target; None for any release since 0.16
    accept: tuple[str, ...] = ()  # arguments of a Megatron source whose effect the target may be without

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Return what ``Options`` ask for; raise BadRequest where that makes no sense, whatever the checkpoint."""
        only(Options.__required_keys__ | Options.__optional_keys__, options)
        if "to" not in options:
            raise BadOption("a crossing needs to know what its target is for", {"lacking": "to", "known": ", ".join(TARGETS)})
        read = {option: READERS[option](option, value) for option, value in options.items() if option not in ASIDE}
        made = cls(**{FIELDS.get(option, option): value for option, value in read.items()})
        if made.read_by is not None and not KINDS[made.to].arguments:
            raise BadOption("read_by is for a target of the kind 'megatron'", {"to": made.to}, remedy="leave it out")
        return made

    @classmethod
    def from_data(cls, data: object) -> Self:
        """Return the request that a plan or a document keeps; raise BadRequest where it keeps none."""
        if not isinstance(data, Mapping):
            raise BadRequest("a request is a mapping", {"found": type(data).__name__})
        only(set(cls.__dataclass_fields__), data)
        for field, kind in get_type_hints(cls).items():
            if field in data and not _is(data[field], kind):
                raise BadRequest(f"{field!r} of a request cannot be {data[field]!r}")
        if "to" not in data:
            raise BadRequest("a request says what its target is for", {"lacking": "to"})
        plain: dict[str, Any] = {**data, **{name: tuple(value) for name, value in data.items() if isinstance(value, list)}}
        return cls(**plain)


def as_data(request: Request) -> Mapping[str, object]:
    """Return a request as plain values, for the plan and the document."""
    plain = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def memory_of(options: Mapping[str, object]) -> int:
    """Return the bytes of private memory that a crossing may use."""
    return nbytes("memory", options.get("memory", MEMORY))


Reader = Callable[[str, object], Any]


def _among(known: Iterable[str], *, needed: bool = False) -> Callable[[str, object], str | None]:
    return lambda name, value: None if value is None and not needed else word(name, value, {each: each for each in known})


def _style(name: str, value: object) -> str | None:
    from carnet.quantize.recipes import by_style

    return _among(by_style())(name, value)


def _scheme(name: str, value: object) -> str | None:
    from carnet.quantize.recipes import schemes

    return _among(schemes())(name, value)


def _family(name: str, value: object) -> str | None:
    from carnet.architectures.known import FAMILIES

    return _among(family.name for family in FAMILIES)(name, value)


def _program(name: str, value: object) -> str | None:
    from carnet.dialects.megatron.programs import program

    if value is not None:
        program(str(value), name)
    return None if value is None else str(value)


READERS: Mapping[str, Reader] = {  # option -> how what a person gives is read
    "to": _among(TARGETS, needed=True),
    **dict.fromkeys(("tp", "pp", "ep"), whole),
    "dtype": lambda name, value: None if value is None else word(name, value, DTYPES),
    "spelling": _among(SPELLINGS, needed=True),
    "parallel_embedding": _among(EMBEDDINGS),
    **dict.fromkeys(("drop", "exclude"), patterns),
    "vocab_size": lambda name, value: None if value is None else whole(name, value),
    "shard_size": nbytes,
    **dict.fromkeys(("config", "amax"), located),
    "family": _family,
    "quantize": _scheme,
    "style": _style,
    "kv_cache": _among(CACHES),
    "kv_scale": number,
    "activations": _among(ACTIVATIONS),
    "accept": patterns,
    **dict.fromkeys(("written_by", "read_by"), _program),
}


def only(known: Iterable[str], said: Iterable[str]) -> None:
    """Raise BadOption where something is said that nobody knows."""
    for name in said:
        if name not in known:
            raise BadOption(f"no option is called {name!r}{near(str(name), known)}")


def _is(value: object, kind: object) -> bool:
    """Say whether a plain value is of the kind of a field; a list stands for a tuple."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (float in kinds and type(value) is int)
