"""The examination: every element, every config field, every padding of a target against its source.

It starts from two folders, whoever wrote them, and knows nothing of a plan. What it finds is exact: bits for moves, the nearest
value for casts, and zeros where a target pads.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from carnet.box import Box, volume
from carnet.dtypes import BY_NAME
from carnet.errors import CarnetError
from carnet.examiner.compare import Finding, Side, compare, side
from carnet.examiner.shelves import digest, region
from carnet.families.model import matters, value
from carnet.families.words import FIELDS
from carnet.formats.stored import Checkpoint
from carnet.inventory import Inventory, survey

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Examination:
    """What the examiner found."""

    findings: tuple[Finding, ...]  # empty where the target is the source
    tensors: int  # canonical tensors compared
    elements: int  # of the target, compared one by one
    cast: tuple[str, ...]  # "f32 -> bf16": the casts that were allowed for
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names of the source that the target is not expected to have
    source: Mapping[str, str]  # digest of every stored tensor of the source
    target: Mapping[str, str]  # and of the target


def examine(
    source: Inventory, checkpoint: Checkpoint, *, threads: int, progress: Progress = lambda done, total: None
) -> Examination:
    """Compare a target with an understood source. ``progress`` gets bytes done and bytes in all."""
    try:
        target, problems = survey(checkpoint, like=source.config)
    except CarnetError as error:  # its config says nothing that carnet understands
        return Examination((_problem(error, "config"),), 0, 0, (), source.dropped, {}, {})
    ours, theirs = side(source), side(target)
    names = [*ours.shapes]
    findings = [*_config(source, target), *_surplus(ours, theirs)]
    # what the target lacks is found below, tensor by tensor
    findings += [_problem(error, "") for error in problems if not error.what.startswith("the checkpoint lacks")]
    tally = Tally(progress, total=2 * _nbytes(target) + _nbytes(source))
    with ThreadPoolExecutor(threads) as pool:
        results = [*pool.map(lambda name: tally.add(compare(ours, theirs, name), _part_bytes(theirs, name)), names)]
        for result in results:
            findings += result[1]
        findings += _padding(theirs)
        ours_digest = dict(pool.map(lambda key: tally.add(_digest(ours, key), _stored_bytes(ours, key)), source.entries))
        theirs_digest = dict(pool.map(lambda key: tally.add(_digest(theirs, key), _stored_bytes(theirs, key)), target.entries))
    casts = {(p.stored.dtype, q.stored.dtype) for name in names for p in ours.parts[name] for q in theirs.parts.get(name, [])}
    return Examination(
        tuple(findings),
        len(names),
        sum(count for count, _ in results),
        tuple(sorted(f"{a} -> {b}" for a, b in casts if a != b)),
        source.dropped,
        ours_digest,
        theirs_digest,
    )


def _problem(error: CarnetError, where: str) -> Finding:
    facts = {label: fact for label, fact in error.facts.items() if label not in ("where", "tensor")}
    detail = ", ".join(f"{label} {fact}" for label, fact in facts.items())
    return Finding(error.what, where or str(error.facts.get("tensor", "")), str(error.facts.get("tensor", "")), detail)


class Tally:
    """Count bytes as threads report them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, result: T, nbytes: int) -> T:
        """Count what a result took, and hand it on."""
        self._done += nbytes
        self._progress(self._done, self._total)
        return result


def _config(source: Inventory, target: Inventory) -> list[Finding]:
    """Compare the canonical fields; those that say nothing about the weights only where both say them."""
    findings = []
    for field in FIELDS:
        ours, theirs = (
            value(side.config, field.name) if matters(side.config, field.name) else field.neutral for side in (source, target)
        )
        silent = field.soft and (ours is None or theirs is None)
        if field.storage or silent or ours == theirs:
            continue
        findings.append(Finding("config field differs", field.name, "config.json", f"expected {ours!r}, found {theirs!r}"))
    dtypes = {target.checkpoint.tensors[key].dtype for key in target.entries}
    if str(value(target.config, "dtype")) not in dtypes:
        detail = f"the config says {value(target.config, 'dtype')!r}, the tensors are {', '.join(sorted(dtypes))}"
        findings.append(Finding("config field differs", "dtype", "config.json", detail))
    return findings


def _surplus(source: Side, target: Side) -> list[Finding]:
    extra = sorted(target.shapes.keys() - source.shapes.keys())
    return [Finding("not in the source", name, "", "the target has a tensor that the source lacks") for name in extra]


def _padding(target: Side) -> list[Finding]:
    """Check that what a target pads is zero."""
    findings = []
    for key, entry in target.inventory.entries.items():
        for box in entry.padding:
            if region(target.shelves, target.inventory.checkpoint.tensors[key], box).any():
                label = "/".join(filter(None, key))
                findings.append(
                    Finding("padding is not zero", entry.padded, label, f"rows from {box.start[0]}, {box.shape[0]} of them")
                )
    return findings


def _digest(of: Side, key: tuple[str, str]) -> tuple[str, str]:
    return "/".join(filter(None, key)), digest(of.shelves, of.inventory.checkpoint.tensors[key])


def _nbytes(of: Inventory) -> int:
    stored = (of.checkpoint.tensors[key] for key in of.entries)
    return sum(volume(Box((), tensor.shape)) * BY_NAME[tensor.dtype].nbytes for tensor in stored)


def _stored_bytes(of: Side, key: tuple[str, str]) -> int:
    tensor = of.inventory.checkpoint.tensors[key]
    return volume(Box((), tensor.shape)) * BY_NAME[tensor.dtype].nbytes


def _part_bytes(of: Side, name: str) -> int:
    return sum(volume(part.box) * BY_NAME[part.stored.dtype].nbytes for part in of.parts.get(name, []))
