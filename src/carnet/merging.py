"""Merging: the same model in several checkpoints becomes one, whose tensors are sums of theirs, proven.

Every checkpoint, whatever its layout, is planned into the one target in f32; what they would write is added up window by window
(``executor.summing``), and the examiner adds up what the checkpoints themselves hold. All that is no weight is the first one's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, isfinite
from typing import Unpack

import numpy as np

from carnet import api
from carnet.errors import BadOption, BadRequest, shown
from carnet.examiner.account import Known as Beside
from carnet.examiner.asked import asked_of
from carnet.examiner.examine import fields_apart
from carnet.examiner.verdict import Verdict
from carnet.examining import examine, families, understood
from carnet.executor.groups import writers_of
from carnet.executor.owning import Known, held, known
from carnet.executor.summing import Sums, Term
from carnet.formats.detect import open_checkpoint
from carnet.formats.files import digest_of
from carnet.inventory.merged import DIFFERENCES, LINEAR, METHODS, Merged, named
from carnet.inventory.survey import Inventory
from carnet.model.model import canonical_shapes
from carnet.plans import saved
from carnet.plans.columns import Plan
from carnet.plans.options import PathLike, local, patterns
from carnet.plans.request import ASIDE, MEMORY, Request, flag_of, memory_of, only, threads_of
from carnet.plans.request_file import gathered
from carnet.plans.typed import Comparison, Options
from carnet.progress import Callback, Told, verb
from carnet.proving import write_and_prove
from carnet.steps import Move, Product
from carnet.storage.protocol import Crossing, Folder
from carnet.storage.schemes import folder_at

NUMBERS = "a sum is written as numbers", "merge first, then quantize: carnet cross OUT OUT2 --quantize ..."
OTHERS = {  # options of a crossing that a sum has no use for -> why, and what to do
    "quantize": NUMBERS,
    "kv_cache": NUMBERS,
    "adapter": ("a sum is of whole checkpoints", "add the adapters first: carnet cross BASE OUT --adapter ..."),
    "also": ("a sum is of weights, which no optimizer's state belongs to", "leave it out"),
}


@dataclass(frozen=True, slots=True)
class Wish:
    """How checkpoints are to be added up."""

    factors: tuple[float, ...]  # of each, f32
    method: str
    keep: tuple[str, ...]

    @classmethod
    def of(cls, count: int, weights: Sequence[float], method: str, keep: str | Sequence[str]) -> "Wish":
        """Return what a person said of so many checkpoints; raise BadOption where that is no sum."""
        if method not in METHODS:
            raise BadOption(f"method cannot be {shown(repr(method))}", {"known": ", ".join(METHODS)})
        if count < 2:
            raise BadOption("a sum is of two checkpoints or more", {"found": count})
        given, expected = tuple(map(float, weights)), count - (method == DIFFERENCES)
        if len(given) != expected:
            facts = {"expected": f"{expected}, one for each checkpoint", "found": len(given)}
            facts |= {"expected": f"{expected}, one for each checkpoint after the base"} if method == DIFFERENCES else {}
            raise BadOption("there are not as many weights as checkpoints", facts)
        with np.errstate(over="ignore"):
            factors = tuple(float(np.float32(each)) for each in given)
        if not all(map(isfinite, factors)):
            raise BadOption("a weight is a number of 32 bits", {"found": ", ".join(map(str, given))})
        return cls((1.0, *factors) if method == DIFFERENCES else factors, method, patterns("keep", keep))

    def said(self, folders: Sequence[Folder]) -> str:
        """Return the sum as a person writes it."""
        base, *others = folders
        if self.method == DIFFERENCES:
            pairs = zip(self.factors[1:], others, strict=True)
            return " + ".join([str(base), *(f"{factor:g} x ({each} - {base})" for factor, each in pairs)])
        return " + ".join(f"{factor:g} x {each}" for factor, each in zip(self.factors, folders, strict=True))

    @property
    def notes(self) -> dict[str, str]:
        """Return what a person should know of it: subject -> a line."""
        total = fsum(self.factors)
        whole = self.method == DIFFERENCES or abs(total - 1) < len(self.factors) * 2**-24
        found = {"weights": "" if whole else f"they sum to {total:g}", "kept": ", ".join(self.keep)}
        return {subject: line for subject, line in found.items() if line}


@verb
def merge(
    sources: Sequence[PathLike],
    out: PathLike,
    weights: Sequence[float],
    *,
    method: str = LINEAR,
    keep: str | Sequence[str] = (),
    progress: Callback | None = None,
    **options: Unpack[Options],
) -> Verdict:
    """Write the sum of several checkpoints of one model, and prove it; the target appears only then, with its document.

    ``linear``: each checkpoint times its weight; weights are taken as they are, whatever they sum to. ``task_arithmetic``: the first is
    the base, and what each other one differs from it is added, times its weight. Sums are in f32, in the order of ``sources``, and
    rounded once. ``keep`` are patterns of tensors that are the first's alone, by canonical or stored names; ``options`` are those
    of ``cross``.

    Raises BadRequest where the checkpoints are not of one model.
    """
    said, asked = local("out", out, out=True), {"to": "hf", **gathered(options)}
    wish, told = Wish.of(len(sources), weights, method, keep), Told(progress, "planning")
    _refuse_others(asked)
    memory, threads = memory_of(asked), threads_of(asked)
    folders = [folder_at(local("ckpt", each)) for each in sources]
    kin = _kin(folders, Request.of({name: value for name, value in asked.items() if name not in ASIDE}))
    asked["family"] = kin[0]
    plain = api.plan(sources[0], **asked)
    first, merged = _merged(folders, kin, asked_of(plain.request).request, wish)
    _refuse_codes(folders, (first, *merged.others), coded=asked.get("dtype") is None)
    each = zip(folders, kin, (first, *merged.others), wish.factors, strict=True)
    terms = [
        Term.of(api.plan(str(folder), **{**asked, "dtype": "f32", "family": family}), of.checkpoint.root, factor)
        for folder, family, of, factor in each
    ]
    sums = Sums.of(plain, terms, merged.kept((*named(first), *_targets(plain))), differences=merged.differences)
    _refuse_computed(plain)
    _refuse_integers(plain, sums)
    _refuse_idle(wish, first, plain)
    made = sums.planned(plain)
    with held(_known(made, terms, wish), folder_at(said)) as target:
        sums.check_copies(made)
        verdict = write_and_prove(made, target, memory, threads, told.amount, told.phase, sums, merged)
    return _told(verdict, wish, folders, said)


@verb
def verify(
    sources: Sequence[PathLike],
    out: PathLike,
    weights: Sequence[float],
    *,
    method: str = LINEAR,
    keep: str | Sequence[str] = (),
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
    **options: Unpack[Comparison],
) -> Verdict:
    """Compare a target with the sum of several checkpoints, element by element; the words are those of ``merge``.

    Raises BadRequest where the checkpoints are not of one model; what differs is a verdict that is false.
    """
    only(Comparison.__optional_keys__, options)
    _refuse_others(options)
    wish, said = Wish.of(len(sources), weights, method, keep), local("out", out)
    folders, target = [folder_at(local("ckpt", each)) for each in sources], folder_at(said)
    request, tokenizer = api.request_of(open_checkpoint(target).dialect, options)
    beside = [] if tokenizer is None else [Beside("--tokenizer", folder=folder_at(local("tokenizer", tokenizer)))]
    kin = _kin(folders, asked_of(request).request)
    request = {**request, "family": kin[0]}
    _, merged = _merged(folders, kin, asked_of(request).request, wish)
    space, workers = memory_of({"memory": memory}), threads_of({"threads": threads})
    told = Told(progress, "examining")
    proof = examine(folders[0], target, request, beside, space, workers, told.amount, merged=merged)
    return _told(proof.verdict, wish, folders, said)


def _told(verdict: Verdict, wish: Wish, folders: Sequence[Folder], target: str) -> Verdict:
    return replace(verdict, source=wish.said(folders), target=target, notes={**wish.notes, **verdict.notes})


def _kin(folders: Sequence[Folder], said: Request) -> list[str | None]:
    return families([open_checkpoint(each) for each in folders], said)


def _merged(folders: Sequence[Folder], kin: Sequence[str | None], said: Request, wish: Wish) -> tuple[Inventory, Merged]:
    """Return the first checkpoint and how the others are added to it; raise BadRequest where they are not of one model."""
    first, *others = (understood(each, replace(said, family=family)) for each, family in zip(folders, kin, strict=True))
    for each in others:
        _check_alike(first, each)
    return first, Merged(tuple(others), wish.factors, wish.method, wish.keep)


def _check_alike(one: Inventory, other: Inventory) -> None:
    """Raise BadRequest where two checkpoints are not of one model."""
    facts: dict[str, object] = {"one": one.checkpoint.root, "other": other.checkpoint.root}
    for name, ours, theirs in fields_apart(one.config, other.config):
        facts |= {f"one's {name}": shown(str(ours))[:200], f"other's {name}": shown(str(theirs))[:200]}
        raise BadRequest(f"the checkpoints are of different models: {name} differs", facts)
    ours, theirs = canonical_shapes(one.config), canonical_shapes(other.config)
    odd = sorted(ours.items() ^ theirs.items())
    if odd:
        facts |= {"tensor": odd[0][0], "in all": len({name for name, _ in odd})}
        raise BadRequest(f"the checkpoints do not have the same tensors: {odd[0][0]}", facts)


def _refuse_others(asked: Mapping[str, object]) -> None:
    """Raise BadRequest where an option of a crossing is given that a sum has no use for."""
    for name, (what, remedy) in OTHERS.items():
        if asked.get(name) is not None:
            raise BadRequest(what, {"option": flag_of(name)}, remedy=remedy)


def _refuse_codes(folders: Sequence[Folder], of: Sequence[Inventory], *, coded: bool) -> None:
    """Raise BadRequest where a checkpoint is quantized, and nobody says what its codes become."""
    for folder, each in zip(folders, of, strict=True):
        if each.coded and coded:
            facts = {"where": folder, "tensor": next(iter(each.coded))[1], "in all": len(each.coded)}
            raise BadRequest(
                "a checkpoint holds codes, and these have no sum", facts, remedy="say what they become: --dtype bf16"
            )


def _refuse_computed(plan: Plan) -> None:
    """Raise BadRequest where a target holds what is computed of weights: of a sum, and not the sum of what is computed of each."""
    made = plan.steps.where(lambda form: isinstance(form, Product) or (isinstance(form, Move) and form.function != ""))
    step = next(iter(made.at(slice(1))), None)
    if step is not None:
        what = f"the target holds what is computed of {step.tensor}"
        raise BadRequest(what, remedy="merge first, then cross the sum: carnet cross OUT OUT2 --to ...")


def _refuse_integers(plan: Plan, sums: Sums) -> None:
    """Raise BadRequest where a tensor that is no number of floating point would be summed."""
    name = sums.integer(plan)
    if name is not None:
        raise BadRequest(f"{name} holds integers, which have no sum", remedy=f"take those of the first: --keep '{name}'")


def _refuse_idle(wish: Wish, first: Inventory, plan: Plan) -> None:
    """Raise BadOption where a pattern names nothing."""
    pairs = [*named(first), *_targets(plan)]
    for pattern in wish.keep:
        if not Merged((), (), wish.method, (pattern,)).kept(pairs):
            raise BadOption(f"--keep {shown(repr(pattern))} names no tensor", {"such as": ", ".join(pairs[0])})


def _targets(plan: Plan) -> list[tuple[str, str]]:
    """Return every canonical tensor of a plan with the target tensors that have a part of it."""
    names = {(file.name, tensor.offset): tensor.name for file in plan.files for tensor in file.tensors}
    return [(plan.steps[at].tensor, names[place]) for place, steps in writers_of(plan).items() for at, _, _ in steps]


def _known(plan: Plan, terms: Sequence[Term], wish: Wish) -> Known:
    """Open the source of a plan as one that others are added to: work goes on where it stopped only if none of them has changed."""
    of = known(plan, saved.digest(plan))
    each = [known(term.plan, saved.digest(term.plan)).crossing for term in terms]
    whole = [of.crossing, *each]
    plans, seen, identity = (
        digest_of(repr([said, wish]).encode())
        for said in ([c.plan for c in whole], [c.source for c in whole], [c.identity for c in whole])
    )
    return replace(of, crossing=Crossing(plans, seen, identity, beside=tuple(term.source for term in terms[1:])))
