"""The examination: every element, every config field, every padding of a target against its source.

It starts from two folders, whoever wrote them, and knows nothing of a plan. What it finds is exact: bits for moves, the nearest
value for casts, and zeros where a target pads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from carnet.algebra.box import Box
from carnet.architectures.eagle import ENTER, LEAVE
from carnet.dialects.configs import lookup
from carnet.dtypes import array_type
from carnet.errors import CarnetError
from carnet.examiner.asked import Asked
from carnet.examiner.beside import check_beside
from carnet.examiner.buffers import check_buffers
from carnet.examiner.codes import MEANT, meant
from carnet.examiner.compare import Finding, Side
from carnet.examiner.desk import Elsewhere, desk_of
from carnet.examiner.diagnose import name_damages
from carnet.examiner.judge import Judgement, ratio
from carnet.examiner.means import Means, Order, Tally
from carnet.examiner.tensor_files import blocks, region
from carnet.examiner.training import check_training
from carnet.examiner.types import check_types
from carnet.formats.stored import Checkpoint, Key, label_of
from carnet.inventory.survey import Inventory, Lacking, survey
from carnet.model.fields import FIELDS, Config
from carnet.model.model import matters, value
from carnet.model.tensors import Canonical
from carnet.pool import Progress

NOTHING = Asked()
WORST = 5  # stored weights that are named for what they lose
SHOWN = 240  # letters of a text that differs


@dataclass(frozen=True, slots=True)
class Quality:
    """How well codes stand for the numbers that they were made from."""

    weights: int  # stored weights that were held against numbers
    saturated: int  # numbers more than half a step beyond the largest code
    snr: float  # dB, over all of them; infinite where nothing is lost
    worst: tuple[tuple[str, float, int], ...]  # the stored weights that lose most: name, dB, saturated
    each: tuple[Judgement, ...] = ()  # of every one what was found in it


@dataclass(frozen=True, slots=True)
class Examination:
    """What the examiner found."""

    findings: tuple[Finding, ...]  # empty where the target is the source
    tensors: int  # canonical tensors compared
    different: int  # of them, with a finding
    elements: int  # of the target, compared one by one
    cast: tuple[str, ...]  # "f32 -> bf16": the casts that were allowed for
    dropped: Mapping[str, tuple[str, ...]]  # reason -> names of the source that the target is not expected to have
    source: Mapping[str, str]  # digest of every stored tensor of the source
    target: Mapping[str, str]  # and of the target
    others: Mapping[tuple[int, str], str]  # and of those that are added to the source, each by its place among them
    quality: Quality | None = None  # None where no codes were held against numbers
    unsure: tuple[str, ...] = ()  # tensors of the target, no weights, of which nobody says what they must hold


def examine(
    source: Inventory,
    checkpoint: Checkpoint,
    *,
    means: Means,
    progress: Progress = lambda done, total: None,
    asked: Asked = NOTHING,
    order: Order | None = None,
    elsewhere: Elsewhere | None = None,
) -> tuple[Examination, Inventory | None]:
    """Compare a target with an understood source; return the target too, as far as it is understood.

    ``progress`` gets bytes done and bytes in all, on this thread: every stored byte of the target is compared and digested, of
    the source digested. ``order`` says when the tensors of a target are there that is still being written, None where all is.
    ``elsewhere`` does the tasks in the place of this process.
    """
    try:
        target, problems = survey(checkpoint, like=source.config, carried=source.said)
    except CarnetError as error:  # its config says nothing that carnet understands
        for _ in order([]) if order is not None else ():
            pass  # until all is written: what is looked at next must not change any more
        return Examination((_problem(error, "config"),), 0, 0, 0, (), source.dropped, {}, {}, {}), None
    desk = desk_of(source, target, means, asked.request.dtype, asked.request.digest, foreign=asked.foreign)
    ours, theirs = desk.ours, desk.theirs
    names = [*ours.shapes]
    findings = [
        *_config(source, target),
        *check_training(source, target),
        *_surplus(ours, theirs),
        *check_types(ours, theirs, asked.request.dtype),
    ]
    # what the target lacks is found below, tensor by tensor
    findings += [_problem(error, "") for error in problems if not isinstance(error, Lacking)]
    tally = Tally(progress, sum(map(desk.nbytes, desk.tasks)))
    try:
        done = desk.work(tally.add, order) if elsewhere is None else elsewhere(tally.add)
        suspects = (suspect for name in names for suspect in done.compared[name].found)
        findings += name_damages(ours, theirs, suspects, means.whole)
        judged = [done.judged[key] for key in desk.codes]
        for one in judged:
            findings += one.findings
        wrong, unsure = check_buffers(ours, theirs)
        findings += [*check_beside(ours, theirs, asked), *_padding(theirs), *wrong]
    finally:
        desk.close()
    casts = {(a, b) for name in names for a in _types(ours, name) for b in _types(theirs, name)}
    found = Examination(
        tuple(findings),
        len(names),
        len({where for finding in findings for where in finding.where.split(", ")} & {*map(str, names)}),
        sum(one.elements for one in done.compared.values()) + sum(one.elements for one in judged),
        tuple(sorted(f"{a} -> {b}" for a, b in casts if a != b)),
        source.dropped,
        done.source,
        done.target,
        done.others,
        _quality(judged),
        tuple(unsure),
    )
    return found, target


def _quality(judged: Sequence[Judgement]) -> Quality | None:
    if not judged:
        return None
    signal, noise = sum(one.signal for one in judged), sum(one.noise for one in judged)
    worst = sorted(judged, key=lambda one: one.snr)[:WORST]
    shown = tuple((one.label, one.snr, one.saturated) for one in worst)
    return Quality(len(judged), sum(one.saturated for one in judged), ratio(signal, noise), shown, tuple(judged))


def _types(of: Side, name: Canonical) -> set[str]:
    return {part.stored.dtype if part.coded is None else part.coded.recipe for part in of.parts.get(name, [])}


def _problem(error: CarnetError, where: str) -> Finding:
    facts = {label: fact for label, fact in error.facts.items() if label not in ("where", "tensor")}
    detail = ", ".join(f"{label} {fact}" for label, fact in facts.items())
    return Finding(error.what, where or str(error.facts.get("tensor", "config")), str(error.facts.get("tensor", "")), detail)


def fields_apart(one: Config, other: Config) -> Iterator[tuple[str, object, object]]:
    """Yield the canonical fields that two models differ in; those that say nothing about the weights only where both say them."""
    for field in FIELDS:
        ours, theirs = (value(each, field.name) if matters(each, field.name) else field.neutral for each in (one, other))
        silent = field.soft and (ours is None or theirs is None)
        if not (field.storage or silent or ours == theirs):
            yield field.name, ours, theirs


def _config(source: Inventory, target: Inventory) -> list[Finding]:
    findings = [
        Finding("config field differs", name, "config.json", _apart(f"{ours!r}", f"{theirs!r}"))
        for name, ours, theirs in fields_apart(source.config, target.config)
    ]
    for key in (LEAVE, ENTER) if value(target.config, "aux_layers") else ():
        if not lookup(target.checkpoint.config, key):
            detail = f"{key} is not said: an engine that looks there would take the states of other layers"
            findings.append(Finding("config field differs", "aux_layers", "config.json", detail))
    dtypes = {target.checkpoint.tensors[key].dtype for key in target.entries if key not in target.coded}
    if str(value(target.config, "dtype")) not in dtypes:
        detail = f"the config says {value(target.config, 'dtype')!r}, the tensors are {', '.join(sorted(dtypes))}"
        findings.append(Finding("config field differs", "dtype", "config.json", detail))
    return findings


def _apart(expected: str, found: str) -> str:
    """Say what differs: of long texts what is around the first letter of which that is so."""
    if max(len(expected), len(found)) > SHOWN:
        same = next((at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
        first = max(0, same - SHOWN // 4)
        expected, found = (f"...{text[first : first + SHOWN]}..." for text in (expected, found))
    return f"expected {expected}, found {found}"


def _surplus(source: Side, target: Side) -> list[Finding]:
    extra = sorted(target.shapes.keys() - source.shapes.keys())
    return [Finding("not in the source", name, "", "the target has a tensor that the source lacks") for name in extra]


def _padding(target: Side) -> list[Finding]:
    """Check that what a target pads is zero."""
    findings = []
    for key, entry in target.inventory.entries.items():
        for box in entry.padding:
            if any(_anything(target, key, part) for part in blocks(box, target.tensor_files.block // 4)):
                label = label_of(key)
                findings.append(
                    Finding("padding is not zero", entry.padded, label, f"rows from {box.start[0]}, {box.shape[0]} of them")
                )
    return findings


def _anything(of: Side, key: Key, box: Box) -> bool:
    """Say whether a box of a stored tensor holds anything but zeros."""
    coded = of.inventory.coded.get(key)
    if coded is not None:
        return bool(meant(of.tensor_files, coded, box).view(array_type(MEANT)).any())
    return bool(region(of.tensor_files, of.inventory.checkpoint.tensors[key], box).any())
