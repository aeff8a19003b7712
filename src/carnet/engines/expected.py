"""What every rank of an engine must hold: the digest of each parameter, and the file that keeps them.

The file's ``checksums`` are what the engine's own comparison takes for a baseline.
"""

import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnet.dialects.rows import Dialect
from carnet.dialects.vllm import digest_key
from carnet.dtypes import FLOATS
from carnet.engines.table import ENGINES
from carnet.errors import BadCheckpoint, BadRequest, shown
from carnet.formats.jsons import read_object
from carnet.model.fields import Config
from carnet.model.tensors import BY_PART
from carnet.steps import TargetFile
from carnet.storage.opening import failed, reading, replace_file
from carnet.storage.protocol import FOLDER
from carnet.storage.schemes import PathLike, file_at
from carnet.version import __version__

MAGIC = "carnet-expected"
EXPERTS = ".experts."  # in the name of every expert of every engine
START = f'{{\n "{MAGIC}"'.encode()
HEX = re.compile("[0-9a-f]+")
LIMIT = 1 << 30  # bytes: nothing that lists every parameter of every rank comes near this


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one rank, as a target stores it."""

    file: str
    name: str
    key: str  # rank and name, as the engine says them
    coded: (
        bool  # an engine may pack it anew: of a module whose weights are codes, or an expert where kernels choose their order
    )


@dataclass(frozen=True, slots=True, repr=False)
class Expected:
    """What every rank of an engine must hold."""

    engine: str
    release: str  # of the engine, whose names these are
    source: str  # where the weights are
    tp: int
    pp: int
    ep: int
    digests: Mapping[str, tuple[str, ...]]  # rank and name -> a digest for each hash that the engine may use
    coded: frozenset[str] = frozenset()  # those that an engine may pack anew

    def __repr__(self) -> str:
        return f"Expected({len(self.digests)} parameters of {self.engine}, tp={self.tp}, pp={self.pp}, ep={self.ep})"

    @property
    def checksums(self) -> dict[str, str]:
        """Return one digest a parameter, under the engine's own names of rank and parameter."""
        return {key: each[0] for key, each in self.digests.items()}


def parameters(
    files: Sequence[TargetFile], dialect: Dialect, config: Config, tp: int, *, ranks: Sequence[int] | None = None
) -> Iterator[Parameter]:
    """Yield the parameters in the files of a target, of which each rank has one; buffers, which have no digest, are left out."""
    engine = ENGINES[dialect.name]
    passing = tuple(f".{one.name}" for those in dialect.constants.values() for one in those)  # gone once weights are packed
    tails = (row.name.rpartition("}.")[2] for row in dialect.rows if BY_PART[row.pattern.parts[0][0]].function)
    passing += tuple(f".{tail}" for tail in tails)  # computed as it is loaded, which devices do with other last bits
    for at, file in zip(range(len(files)) if ranks is None else ranks, files, strict=True):
        modules = {_module(tensor.name) for tensor in file.tensors if tensor.dtype not in FLOATS}
        for tensor in file.tensors:
            key = digest_key(dialect, tensor.name, config)
            if key:
                coded = _module(tensor.name) in modules and not tensor.name.endswith("bias")
                coded |= tensor.name.endswith(passing) or (bool(dialect.kind.reorders) and EXPERTS in tensor.name)
                yield Parameter(file.name, tensor.name, engine.rank.format(pp=at // tp, tp=at % tp) + key, coded)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def as_data(expected: Expected) -> dict[str, object]:
    """Return it as plain values."""
    hashes = zip(*expected.digests.values(), strict=True)
    first, *others = (dict(zip(expected.digests, each, strict=True)) for each in hashes)
    return {
        MAGIC: 1,
        "carnet": __version__,
        "engine": expected.engine,
        "engine version": expected.release,
        "source": expected.source,
        **{name: getattr(expected, name) for name in ("tp", "pp", "ep")},
        "coded": sorted(expected.coded),
        "checksums": first,
        "other checksums": others,  # by the hashes that the engine uses elsewhere
    }


def check_place(path: Path) -> None:
    """Raise BadRequest where digests cannot be saved, because the folder is not there or a file of another kind is."""
    if (folder := file_at(path)[0]).kind() != FOLDER:
        raise BadRequest("the folder of the output does not exist", {"where": folder})
    try:
        with suppress(FileNotFoundError), reading(path, os.O_NOFOLLOW) as there:
            if not START.startswith(there.read(len(START))):
                raise BadRequest(f"{path} exists and holds no expected digests", remedy="choose another file")
    except OSError as error:
        raise failed("the expected digests cannot be written", path, error) from error


def save(expected: Expected, path: Path) -> None:
    """Write it into a file, which appears whole. What is there is replaced where it is such a file or empty, and else refused."""
    check_place(path)
    try:
        replace_file(path, [(json.dumps(as_data(expected), indent=1, ensure_ascii=False) + "\n").encode()])
    except OSError as error:
        raise failed("the expected digests cannot be written", path, error) from error


def load(path: PathLike) -> Expected:
    """Read such a file; raise BadRequest where it is none."""
    folder, name = file_at(path)
    try:
        return _read(read_object(folder, name, LIMIT))
    except BadCheckpoint as error:
        raise BadRequest(f"{path} cannot be read as expected digests", {"found": error.what}, remedy=REMEDY) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadRequest(f"{path} holds no expected digests", {"found": shown(str(error))}, remedy=REMEDY) from error


def _read(data: dict[str, Any]) -> Expected:
    """Return what plain values say; whatever they are, what is raised is an error of values."""
    if data[MAGIC] != 1:
        raise ValueError(f"{MAGIC} {data[MAGIC]}")
    sides = [data["checksums"], *data["other checksums"]]
    digests = {key: tuple(side[key] for side in sides) for key in sides[0].keys()}  # noqa: SIM118  of a mapping alone
    odd = [key for key, each in digests.items() for digest in each if not HEX.fullmatch(digest)]
    if odd or not digests:
        raise ValueError(f"no digest of {odd[0]}" if odd else "no digest at all")
    engine, coded = ENGINES[data["engine"]].name, frozenset(map(str, data["coded"]))
    tp, pp, ep = (operator.index(data[size]) for size in ("tp", "pp", "ep"))
    return Expected(engine, str(data["engine version"]), str(data["source"]), tp, pp, ep, digests, coded)


REMEDY = "name a checkpoint, or a file that `carnet expect CKPT -o FILE` wrote"
