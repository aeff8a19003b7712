"""What a person asks for: the options of a crossing, and the request that follows from them.

An option is one field of ``Request`` (its default, what it may be, how its help reads, who can use it) and one line of ``Options`` in
``typed`` (its type). The command line, ``--request FILE`` and Python are read by the same table; plans and documents keep the
request as plain values under the same names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, get_type_hints

from carnet.dialects.kinds import KINDS, OWN, SHARDS, Kind
from carnet.errors import BadOption, BadRequest
from carnet.plans import words
from carnet.plans.options import DTYPES, factor, fits, located, nbytes, near, number, patterns, whole, word, wrong

BRIDGE, READER = "bridge", "megatron-bridge"  # a spelling, and the program that it is for, one of PROGRAMS in programs.py
MEMORY = 512_000_000  # bytes; the peak of private memory where nothing is said


MOST, SOURCE, TARGET, NUMBERS, MACHINE = (
    "",
    "Source",
    "Target",
    "Numbers",
    "Machine",
)  # groups of options, "" for what most people need
Words = Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Option:
    """How a person writes an option: what the command line, its help and a file of options are made from."""

    value: str  # "word", "whole", "size", "number", "path", "folder", "patterns" or "program"
    group: str
    help: str
    words: Words = tuple  # what a word may be, or what it stands for too; asked for when it is needed
    flag: str = ""  # on the command line, where it is not the option's name
    metavar: str = ""
    compared: bool = False  # steers a comparison: `carnet verify` has it too
    used_by: Callable[[Kind], bool] = lambda kind: True  # which kinds of targets it is for

    def read(self, name: str, value: object) -> Any:  # noqa: ANN401  of the type of its field
        """Return what carnet works with; raise BadOption where it can never be that."""
        if self.value == "word":
            known = self.words()
            return word(name, value, known if isinstance(known, Mapping) else {each: each for each in known})
        return READERS[self.value](name, value)


def _program(name: str, value: object) -> str:
    from carnet.dialects.megatron.programs import program

    if not isinstance(value, str):
        raise wrong(name, value, "the name of a program")
    program(value, flag_of(name))
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise wrong(name, value, "a text")
    return value


READERS: Mapping[str, Callable[[str, object], Any]] = {
    "text": _text,
    "whole": whole,
    "size": nbytes,
    "number": number,
    "path": located,
    "folder": located,
    "patterns": patterns,
    "program": _program,
    "adapter": lambda name, value: value if value == OWN else located(name, value),
    "factor": factor,
}


def _is(default: object, value: str, group: str, text: str, **more: Any) -> Any:  # noqa: ANN401  a field of its own type
    return field(default=default, metadata={"option": Option(value, group, text, **more)})


@dataclass(frozen=True, slots=True)
class Request:
    """A wish for a target."""

    to: str = _is("", "word", MOST, "What the target is for.", words=lambda: tuple(KINDS))
    tp: int = _is(1, "whole", MOST, "Ranks that share each layer.")
    pp: int = _is(1, "whole", MOST, "Pipeline stages.")
    dtype: str | None = _is(
        None,
        "word",
        MOST,
        "Cast the weights.  [default: as they are]",
        words=lambda: DTYPES,
        metavar="[bf16|fp16|fp32]",
        compared=True,
    )
    quantize: str | None = _is(
        None,
        "word",
        MOST,
        "Write the linear layers' weights as codes and scales; see below.",
        words=words.schemes,
        metavar="SCHEME",
    )
    config: str | None = _is(
        None, "path", SOURCE, "config.json or YAML in place of the checkpoint's own arguments.", compared=True
    )
    family: str | None = _is(
        None,
        "word",
        SOURCE,
        "Whose model it is, where Megatron's arguments fit several families; `carnet inspect` says which.",
        words=words.families,
        flag="--as",
        metavar="FAMILY",
        compared=True,
    )
    vocab_size: int | None = _is(
        None, "whole", SOURCE, "True size of the vocabulary, where the checkpoint does not say it.", compared=True
    )
    tokens: int | None = None  # how many the tokenizer has that goes along, where that is sure
    drop: tuple[str, ...] = _is(
        (),
        "patterns",
        SOURCE,
        "Leave behind the stored tensors with names like this. May be repeated.",
        metavar="PATTERN",
        compared=True,
    )
    written_by: str | None = _is(
        None,
        "program",
        SOURCE,
        "What trained a Megatron checkpoint, where it does not show: megatron-lm==0.17, megatron-bridge, nemo.",
        words=words.programs,
        metavar="PROGRAM",
        compared=True,
    )
    tower: str | None = _is(
        None,
        "folder",
        SOURCE,
        "Folder of a class that also sees, which lends what is beside the text model of a Megatron checkpoint.",
        metavar="DIRECTORY",
        compared=True,
        used_by=lambda kind: kind.companions or kind.arguments,
    )
    accept: tuple[str, ...] = _is(
        (),
        "patterns",
        SOURCE,
        "Do without what this argument of Megatron's, or this key of a config, does; `pruned`: shapes tell widths. May be repeated.",
        metavar="NAME",
        compared=True,
    )
    adapter: str | None = _is(
        None,
        "adapter",
        SOURCE,
        "Folder of adapters (LoRA) that are added to the weights they are for; `own` for those in the checkpoint.",
        metavar="DIRECTORY",
        compared=True,
        used_by=lambda kind: not kind.alone,
    )
    adapter_scale: float | None = _is(
        None, "factor", SOURCE, "What is added is taken this many times.  [default: 1]", metavar="X", compared=True
    )
    also: str | None = _is(
        None,
        "word",
        SOURCE,
        "What goes along with the weights: the optimizer's state, for a training that goes on.",
        words=lambda: ("optimizer",),
        flag="--with",
        compared=True,
        used_by=lambda kind: kind.arguments,
    )
    adapter_alpha: float | None = _is(
        None,
        "number",
        SOURCE,
        "Alpha of the adapters (LoRA), where nothing beside them says it: their factor is alpha over the rank.",
        compared=True,
    )
    ep: int = _is(1, "whole", TARGET, "Ranks that share the experts; they are among the tp.")
    parallel_embedding: str | None = _is(
        None,
        "word",
        TARGET,
        "How ranks share the embedding.  [default: as NVIDIA's converter does]",
        words=words.embeddings,
        used_by=lambda kind: bool(kind.embeddings),
    )
    shard_size: int = _is(  # transformers' own default
        5_000_000_000, "size", TARGET, "Bytes of a file at most.", used_by=lambda kind: kind.files == SHARDS
    )
    spelling: str = _is(
        "te",
        "word",
        TARGET,
        "Whose names: Transformer Engine's layers, the local ones, or those of Megatron-Bridge, with its run_config.yaml.",
        words=lambda: ("te", "local", BRIDGE),
        used_by=lambda kind: kind.arguments,
    )
    read_by: str | None = _is(
        None,
        "program",
        TARGET,
        "What will load the target.  [default: megatron-lm, any since 0.16]",
        words=words.programs,
        metavar="PROGRAM",
        compared=True,
        used_by=lambda kind: kind.arguments,
    )
    adapter_base: str | None = _is(
        None,
        "text",
        TARGET,
        "What the base model of the adapters is called where they will be loaded: a name, or a path.  [default: as the source says]",
        metavar="NAME",
        used_by=lambda kind: kind.adapters,
    )
    engine_version: str | None = _is(
        None,
        "word",
        TARGET,
        "Release of the engine that will load the target: its names are its own.  [default: the first]",
        words=words.releases,
        metavar="RELEASE",
        used_by=lambda kind: bool(kind.releases),
    )
    digest: str | None = _is(
        None,
        "word",
        TARGET,
        "Have this digest of every tensor in carnet.json, beside xxh3.",
        words=lambda: ("sha256",),
        compared=True,
    )
    style: str | None = _is(
        None,
        "word",
        NUMBERS,
        "Whose names and arithmetic; see below.  [default: modelopt for hf; trtllm has its own]",
        words=words.styles,
        metavar="STYLE",
    )
    activations: str | None = _is(
        None,
        "word",
        NUMBERS,
        "Store a scale for activations, or leave it to the engine.  [default: as the scheme has it]",
        words=lambda: ("static", "dynamic"),
    )
    amax: str | None = _is(None, "path", NUMBERS, "What `carnet calibrate` found: activations, keys and values.", compared=True)
    exclude: tuple[str, ...] = _is(
        (), "patterns", NUMBERS, "Modules to leave as they are, by name. May be repeated.", metavar="PATTERN"
    )
    kv_cache: str | None = _is(
        None, "word", NUMBERS, "Store scales for a cache of keys and values in FP8.", words=lambda: ("fp8",)
    )
    kv_scale: float | None = _is(
        None, "number", NUMBERS, "That scale, the same for all layers, where --amax does not say it.", compared=True
    )

    @property
    def names(self) -> str:
        """Return whose names a Megatron target has."""
        return "te" if self.spelling == BRIDGE else self.spelling

    @property
    def reader(self) -> str | None:
        """Return the program that will load a Megatron target, None for any release of Megatron-LM."""
        return self.read_by or (READER if self.spelling == BRIDGE else None)

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Return what ``Options`` ask for; raise BadOption where that makes no sense, whatever the checkpoint."""
        only(KNOWN, options)
        read = {
            name: OPTIONS[name].read(name, value)
            for name, value in options.items()
            if name in OPTIONS and (value is not None or DEFAULTS[name] is not None)
        }
        if "to" not in read:
            raise BadOption("a crossing needs to know what its target is for", {"lacking": "to", "known": ", ".join(KINDS)})
        made, kind = cls(**read), KINDS[read["to"]]
        for name, option in OPTIONS.items():
            if not option.used_by(kind) and getattr(made, name) != DEFAULTS[name]:
                fit = [each.name for each in KINDS.values() if option.used_by(each)]
                what = f"{name} is for a target of the kind {' or '.join(map(repr, fit))}"
                raise BadOption(what, {"to": kind.name, "option": flag_of(name)}, remedy="leave it out")
        if kind.releases and made.engine_version is None:
            made = replace(made, engine_version=kind.releases[0])
        if made.spelling == BRIDGE and made.reader != READER:
            raise BadOption(f"--spelling {BRIDGE} is for {READER}", {"option": "--read-by"}, remedy="leave it out")
        return made

    @classmethod
    def from_data(cls, data: object) -> Self:
        """Return the request that a plan or a document keeps; raise BadRequest where it keeps none."""
        if not isinstance(data, Mapping):
            raise BadRequest("a request is a mapping", {"found": type(data).__name__})
        only(DEFAULTS, data)
        for name, kind in get_type_hints(cls).items():
            if name in data and not fits(data[name], kind):
                raise BadRequest(f"{name!r} of a request cannot be {data[name]!r}")
        if "to" not in data:
            raise BadRequest("a request says what its target is for", {"lacking": "to"})
        plain: dict[str, Any] = {**data, **{name: tuple(value) for name, value in data.items() if isinstance(value, list)}}
        return cls(**plain)


DEFAULTS: Mapping[str, Any] = {each.name: each.default for each in fields(Request)}
OPTIONS: Mapping[str, Option] = {each.name: each.metadata["option"] for each in fields(Request) if "option" in each.metadata}
ASIDE: Mapping[str, Option] = {  # options of a crossing that are no part of what its target is
    "tokenizer": Option("folder", MOST, "Folder whose tokenizer goes along.", compared=True),
    "memory": Option("size", MACHINE, "Peak of private memory: 512M, 2GiB."),
    "threads": Option("whole", MACHINE, "Threads at work, as far as the memory has room for them.  [default: one a core]"),
    "request": Option("path", MOST, "TOML with any of these options, by their names; what is said beside it counts more."),
}


KNOWN: Mapping[str, Option] = {**OPTIONS, **ASIDE}


def flag_of(name: str) -> str:
    """Return what an option is called on the command line.

    >>> flag_of("family"), flag_of("kv_scale")
    ('--as', '--kv-scale')
    """
    return KNOWN[name].flag or f"--{name.replace('_', '-')}"


def as_data(request: Request) -> Mapping[str, object]:
    """Return a request as plain values, for the plan and the document."""
    plain = {name: getattr(request, name) for name in DEFAULTS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def memory_of(options: Mapping[str, object]) -> int:
    """Return the bytes of private memory that a crossing may use."""
    return nbytes("memory", options.get("memory", MEMORY))


def threads_of(options: Mapping[str, object]) -> int | None:
    """Return how many threads shall be at work, None for what suits the machine."""
    said = options.get("threads")
    return None if said is None else whole("threads", said)


def only(known: Iterable[str], said: Iterable[str]) -> None:
    """Raise BadOption where something is said that nobody knows."""
    for name in said:
        if name not in known:
            raise BadOption(f"no option is called {name!r}{near(str(name), known)}")
