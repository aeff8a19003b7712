"""What a person asked of a target, as far as it steers a comparison.

It comes from the person (options, or a plan that they hold) and from the source, never from the target: what is examined does not say
what it is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from carnet.formats.amax import read_amax
from carnet.formats.files import shown as printable


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a comparison."""

    dtype: str | None = None  # the type that weights were cast to; None for that of the source
    drop: tuple[str, ...] = ()  # patterns of names of the source that were left behind
    vocab: int | None = None  # true size of the vocabulary, where the source does not say it
    tokens: int | None = None  # that the tokenizer has which goes along
    config: str | None = None  # stands in place of the source's own
    family: str | None = None  # whose model the source is, where its config names none
    written_by: str | None = None  # the program that trained the source
    read_by: str | None = None  # and the one that is to load the target
    accept: tuple[str, ...] = ()  # arguments whose effect is given up
    cache_scale: float | None = None  # of all keys and values
    amax: Mapping[str, float] = field(default_factory=dict)  # what calibration found, by the names of Hugging Face modules


OPTIONS = {  # field of a request that steers a comparison -> the option that says it
    "dtype": "--dtype",
    "drop": "--drop",
    "vocab": "--vocab-size",
    "tokens": "--tokenizer DIR, tokens",
    "config": "--config",
    "family": "--as",
    "cache_scale": "--kv-scale",
    "amax": "--amax",
    "written_by": "--written-by",
    "read_by": "--read-by",
    "accept": "--accept",
}

FILES = ("config", "amax")  # fields of a request that name a file


def asked_of(request: Mapping[str, object]) -> Asked:
    """Return what steers a comparison of a request that is kept as plain values: in a plan, or made of options."""
    dtype, drop, vocab, tokens, config, family, scale, amax, writer, reader, accept = (request.get(name) for name in OPTIONS)
    return Asked(
        dtype=dtype if isinstance(dtype, str) else None,
        drop=tuple(map(str, drop)) if isinstance(drop, list | tuple) else (),
        vocab=vocab if isinstance(vocab, int) else None,
        tokens=tokens if isinstance(tokens, int) else None,
        config=config if isinstance(config, str) else None,
        family=family if isinstance(family, str) else None,
        written_by=writer if isinstance(writer, str) else None,
        read_by=reader if isinstance(reader, str) else None,
        accept=tuple(map(str, accept)) if isinstance(accept, list | tuple) else (),
        cache_scale=float(scale) if isinstance(scale, int | float) else None,
        amax=read_amax(Path(amax)) if isinstance(amax, str) else {},
    )


def words(said: Mapping[str, object]) -> list[str]:
    """Return the options that say what a request says, as they are written on the command line.

    >>> words({"dtype": "bf16", "drop": ["*extra"], "vocab": None, "amax": {"name": "amax.safetensors"}})
    ['--dtype bf16', "--drop '*extra'", '--amax amax.safetensors']
    """
    return [word for name in OPTIONS for word in _words(name, said.get(name))]


def _words(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [f"{OPTIONS[name]} {_quoted(each)}" for each in value]
    return [f"{OPTIONS[name]} {_quoted(value['name'] if isinstance(value, Mapping) and 'name' in value else value)}"]


def _quoted(value: object) -> str:
    return quote(printable(str(value)))
