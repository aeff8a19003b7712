"""The types of what a person says, for type checkers: a line for each option; what it means stands at the fields of ``Request``."""

from collections.abc import Sequence
from typing import TypedDict

from carnet.plans.options import PathLike


class Common(TypedDict, total=False):
    """The options that crossings of files and of live weights have in common."""

    dtype: str | None
    family: str | None
    parallel_embedding: str | None
    quantize: str | None
    style: str | None
    kv_cache: str | None
    kv_scale: float | None
    digest: str | None
    activations: str | None
    exclude: str | Sequence[str]


class Options(Common, total=False):
    """The options of ``carnet.plan`` and ``carnet.cross``; what they mean stands at the fields of ``Request``."""

    request: PathLike  # a file with any of the others, which stand over it
    to: str
    tp: int
    pp: int
    ep: int
    memory: int | str
    threads: int | None
    spelling: str
    drop: str | Sequence[str]
    vocab_size: int | None
    shard_size: int | str
    tokenizer: PathLike | None
    config: PathLike | None
    amax: PathLike | None
    written_by: str | None
    read_by: str | None
    engine_version: str | None
    tower: PathLike | None
    accept: Sequence[str]
    also: str | None
    adapter: PathLike | None
    adapter_scale: float | None
    adapter_alpha: float | None
    adapter_base: str | None


class Comparison(TypedDict, total=False):
    """What a target was asked to be, where neither its source nor a plan says it: the same words as for the crossing."""

    request: PathLike | None  # a file of options, of which those count that are listed here
    dtype: str | None
    drop: str | Sequence[str]
    vocab_size: int | None
    config: PathLike | None
    family: str | None
    kv_scale: float | None
    digest: str | None
    amax: PathLike | None
    tokenizer: PathLike | None  # folder whose tokenizer was brought along
    written_by: str | None
    read_by: str | None
    tower: PathLike | None  # folder that lends what is beside the text model
    accept: str | Sequence[str]
    also: str | None
    adapter: PathLike | None
    adapter_scale: float | None
    adapter_alpha: float | None


class Verifying(Comparison, total=False):
    """The options of ``carnet.verify``."""

    plan: PathLike | None
    seal: bool
    memory: int | str
    threads: int | None


class Budget(TypedDict, total=False):
    """The options of ``carnet.finish`` that are a request's, too."""

    memory: int | str
    threads: int | None


class Looking(TypedDict, total=False):
    """The options of ``carnet.inspect``, which mean what they do for a crossing."""

    drop: str | Sequence[str]
    vocab_size: int | None
    tokenizer: PathLike | None  # folder whose tokenizer says the vocabulary
    config: PathLike | None
    family: str | None
    written_by: str | None
    accept: str | Sequence[str]
    adapter: PathLike | None
    adapter_scale: float | None
    adapter_alpha: float | None
