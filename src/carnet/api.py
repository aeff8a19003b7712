"""The verbs, as functions. The command line adds nothing to them but options and colours."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from carnet.dialects.kinds import KINDS
from carnet.errors import BadRequest, CarnetError, MachineFailed, NotSupported
from carnet.examiner import document as documents
from carnet.examiner.account import Known
from carnet.examiner.means import choose_means
from carnet.examiner.verdict import PLAN, Proof, Verdict, recheck
from carnet.examining import examine, open_source
from carnet.executor.adapting import fitting
from carnet.executor.owning import held, part_of, proven
from carnet.executor.run import finish as finish_parts
from carnet.executor.run import write, write_part
from carnet.formats.amax import read_amax
from carnet.formats.companions import Companions, asset, companions, tokenizer_files
from carnet.formats.detect import open_checkpoint
from carnet.formats.side_files import DOCUMENT, SIGNATURE
from carnet.formats.stored import Checkpoint
from carnet.formats.tokenizers import Tokens, generation_ids, tokens_of
from carnet.inventory.survey import Inventory, take
from carnet.planner.build import build
from carnet.plans import saved
from carnet.plans.columns import Plan
from carnet.plans.options import here, local
from carnet.plans.request import MEMORY, Request, as_data, memory_of, only, threads_of
from carnet.plans.request_file import gathered
from carnet.plans.typed import Comparison, Looking, Options
from carnet.progress import Callback, Told, verb
from carnet.proving import prove, write_and_prove
from carnet.steps import TextFile
from carnet.storage.protocol import Folder
from carnet.storage.schemes import PathLike, folder_at


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """What a checkpoint is."""

    checkpoint: Checkpoint
    inventory: Inventory | None  # None where carnet does not understand every tensor
    refusal: CarnetError | None  # and why

    def __repr__(self) -> str:
        what = f"refused: {self.refusal.what}" if self.inventory is None and self.refusal is not None else repr(self.inventory)
        return f"Inspection({str(self.checkpoint.root)!r}, {self.checkpoint.dialect} ({self.checkpoint.format}), {what})"


@verb
def inspect(path: PathLike, **options: Unpack[Looking]) -> Inspection:
    """Read the headers of a checkpoint: a folder of Megatron's, of Hugging Face's or PEFT's, or of an engine's ranks.

    Raises CarnetError where the files are damaged; a checkpoint that is whole and strange comes back with the refusal.
    """
    only(Looking.__optional_keys__, options)
    lent = options.pop("tokenizer", None)
    said = Request.of({**options, "to": "hf"})
    checkpoint = open_source(local("ckpt", path), said)
    counted = None if lent is None else tokens_of(folder_at(local("tokenizer", lent))).count
    try:
        return Inspection(checkpoint, take(checkpoint, said.drop, said.vocab_size, counted), None)
    except CarnetError as refusal:
        return Inspection(checkpoint, None, refusal)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep the garbage collector away: looking through a million records that all stay takes half of the planning time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@verb
@_no_collections()
def plan(path: PathLike, **options: Unpack[Options]) -> Plan:
    """Plan a crossing and prove that it loses nothing; only headers are read.

    The options are those of the command line, with underscores: ``to="hf"``, ``vocab_size=50257``, ``memory="512M"``; see
    ``carnet.Options``. Raises CarnetError where anything of the source is unknown, lacking or has no place in the target, and
    BadOption where an option says what it never can.
    """
    said = gathered(options)
    request, memory, lent = Request.of(said), memory_of(said), said.get("tokenizer")
    checkpoint = open_source(local("ckpt", path), request)
    folder = None if lent is None else folder_at(local("tokenizer", lent))
    tokens = _tokens(checkpoint, request.to, folder)
    request = replace(request, tokens=None if tokens is None else tokens.count)
    measured = {} if request.amax is None else read_amax(request.amax)
    made = build(checkpoint, request, _companions(checkpoint, request.to, folder), tokens, measured)
    _refuse_reordered(made)
    texts = (TextFile(DOCUMENT, documents.draft(made, _words(made))), *made.texts)
    return fitting(replace(made, texts=texts, memory=memory))


def _refuse_reordered(made: Plan) -> None:
    """Raise NotSupported where a target would hold what its program has in an order of its own."""
    kind = KINDS[str(made.request["to"])]
    lost = next((name for name in made.steps.names if kind.reorders and name.endswith(kind.reorders)), None)
    if lost is not None:
        remedy = "--to hf, which it reads too; `carnet expect` tells what it must hold"
        raise NotSupported(f"{kind.name} has experts in an order that its kernels choose", {"tensor": lost}, remedy=remedy)


@verb
def run(
    plan: Plan | PathLike,
    out: PathLike,
    *,
    part: tuple[int, int] | None = None,
    threads: int | None = None,
    progress: Callback | None = None,
) -> Path | str:
    """Carry out a plan: write the target beside ``out`` and put it in place when it is complete; return its path, or its URL.

    ``part``, (3, 64), does one of so many parts and leaves the rest to other processes, on any machines that see the same disk; parts
    may run in any order and at once, and ``finish`` puts the target in place.
    ``threads`` is how many are at work, None for one a core, as far as the plan's memory has room for them.
    Called again after an interruption it finishes the work. Raises BadRequest where the source is not the one that was planned.
    """
    said, workers = local("out", out, out=True), threads_of({"threads": threads})
    share, told = None if part is None else part_of(part), Told(progress, "preparing")
    made = _saved(plan)
    with held(proven(made), folder_at(said), share) as target:
        root, staging = target.source.root, target.staging
        if share is None:
            write(made, root, staging, progress=told.amount, phase=told.phase, threads=workers)
            target.publish()
        else:
            write_part(made, root, staging, share, progress=told.amount, phase=told.phase, threads=workers)
            target.check()
    return said if "://" in said else Path(said)


@verb
def finish(
    plan: Plan | PathLike,
    out: PathLike,
    *,
    verify: bool = False,
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
) -> Verdict | None:
    """Put a target in place whose every part was written; with ``verify`` only when it is proven, as ``cross`` does.

    Returns the verdict where there is one. Raises BadRequest, which names the parts that are not written.
    """
    said, made, told = local("out", out, out=True), _saved(plan), Told(progress, "preparing")
    space, workers = memory_of({"memory": memory}), threads_of({"threads": threads})
    with held(proven(made), folder_at(said)) as target:
        finish_parts(made, target.source.root, target.staging, phase=told.phase, threads=workers)
        target.check()
        if verify:
            return replace(prove(made, target, space, workers, told.amount, told.phase), target=said)
        target.publish()
    return None


@verb
def clean(out: PathLike) -> list[str]:
    """Remove what a crossing into ``out`` left that was not finished, and nothing else; return the names of what it was.

    Raises BadRequest where no unfinished crossing is there, or one that still runs.
    """
    return folder_at(local("out", out, out=True)).cleared()


def _saved(plan: Plan | PathLike) -> Plan:
    return plan if isinstance(plan, Plan) else saved.load(here("plan", plan))


@verb
def verify(
    source: PathLike,
    out: PathLike | None = None,
    *,
    plan: PathLike | None = None,
    seal: bool = False,
    memory: int | str = MEMORY,
    threads: int | None = None,
    progress: Callback | None = None,
    **options: Unpack[Comparison],
) -> Verdict:
    """Compare a target with its source, element by element; or, given the target alone, with its own document.

    What a target was asked to be comes from ``options`` or from a saved ``plan``, never from the target: its document is compared, not
    believed. ``tokenizer`` is the folder whose tokenizer was brought along. Nothing is written into a target, but its document
    (``carnet.json``): with ``seal`` where it is equal and everything in it is accounted for, and where the run of this source that
    wrote it left the document unfinished.
    ``memory`` (bytes) is the peak of private memory that it may use, ``threads`` how many are at work, None for one a core.
    ``progress`` is called with a ``carnet.Progress``. Raises CarnetError where one of the two cannot be read, or changes meanwhile;
    what differs is a verdict that is false.
    """
    space, workers, tokenizer = memory_of({"memory": memory}), threads_of({"threads": threads}), options.get("tokenizer")
    asked = any(value not in (None, ()) for value in options.values())
    only(Comparison.__optional_keys__, options)
    if out is None and (asked or seal or plan is not None):
        raise BadRequest("a target alone is compared with its carnet: no option changes that", remedy="name the source too")
    told = Told(progress, "examining")
    if out is None:
        alone = local("out", source)
        return replace(recheck(folder_at(alone), space, workers, told.amount), target=alone)
    if plan is not None and asked:
        raise BadRequest("the plan says what was asked for", {"plan": plan}, remedy="leave out the other options, or the plan")
    known, said = list[Known](), (local("ckpt", source), local("out", out))
    ours, target = map(folder_at, said)
    if plan is not None:
        made = saved.load(here("plan", plan))
        request, known = made.request, [Known(PLAN, documents.planned(made), whole=True)]
    else:
        request, tokenizer = request_of(open_checkpoint(target).dialect, options)
    if tokenizer is not None:
        known = [Known("--tokenizer", folder=folder_at(local("tokenizer", tokenizer)))]
    proof = examine(ours, target, request, known, space, workers, told.amount)
    proof = replace(proof, verdict=replace(proof.verdict, source=said[0], target=said[1]))
    return _sealed(target, proof) if seal or proof.unfinished else proof.verdict


def request_of(to: str, options: Comparison) -> tuple[Mapping[str, object], PathLike | None]:
    """Return what options ask of a target, as a plan would keep it, and the folder of its tokenizer."""
    said = {name: value for name, value in gathered(options).items() if name in Comparison.__optional_keys__}
    tokenizer = said.get("tokenizer")
    lent = None if tokenizer is None else folder_at(local("tokenizer", tokenizer))
    tokens = None if lent is None else tokens_of(lent)
    return as_data(replace(Request.of({**said, "to": to}), tokens=None if tokens is None else tokens.count)), tokenizer


def _sealed(target: Folder, proof: Proof) -> Verdict:
    """Write the document that a target deserves; one that its own run left open stays so where the disk cannot be written to."""
    if proof.data is None:
        return proof.verdict
    if proof.verdict.unsure and not proof.unfinished:
        first, found = proof.verdict.unsure[0], proof.verdict.examination
        is_tensor = found is not None and first in found.unsure
        facts = {"tensor" if is_tensor else "file": first, "in all": len(proof.verdict.unsure)}
        remedy = "remove it: its loader makes it anew" if is_tensor else "--tokenizer DIR, the folder that it is from"
        raise BadRequest(
            f"nobody says what a {'tensor' if is_tensor else 'file'} of the target must hold", facts, remedy=remedy
        )
    if target.kind(SIGNATURE):
        return replace(
            proof.verdict, document=f"{DOCUMENT} stays as it was signed; remove {SIGNATURE} first to have it written"
        )
    try:
        target.put(DOCUMENT, [documents.text(proof.data).encode()])
    except MachineFailed:
        if proof.unfinished:
            return proof.verdict
        raise
    return replace(proof.verdict, document=f"{DOCUMENT} is written")


@verb
def cross(
    path: PathLike,
    out: PathLike,
    *,
    progress: Callback | None = None,
    **options: Unpack[Options],
) -> Verdict:
    """Plan, run and verify; the target appears only when it is proven, with its document.

    A tensor is examined as soon as it is whole, while others are written; what is compared is read from the target's files.
    ``progress`` is called with a ``carnet.Progress``: planning, scales, writing, flushing, examining. Called again after an
    interruption it finishes the work. Raises CarnetError where ``plan`` does, and where source, target or machine refuse; a target that
    differs is no error but a verdict that is false, and is not put in place.
    """
    said, wish, told = local("out", out, out=True), gathered(options), Told(progress, "planning")
    made, memory, threads = plan(path, **wish), memory_of(wish), threads_of(wish)
    choose_means(memory, len(made.steps))  # refused here, not when all is written
    with held(proven(made), folder_at(said)) as target:
        verdict = write_and_prove(made, target, memory, threads, told.amount, told.phase)
    return replace(verdict, source=local("ckpt", path), target=said)


def _companions(checkpoint: Checkpoint, to: str, tokenizer: Folder | None) -> Companions:
    """Return what goes along with the weights: all that is beside them in a folder of the same layout, or the tokenizer alone."""
    if KINDS[checkpoint.dialect].companions and KINDS[to].companions:
        return companions(checkpoint.root, checkpoint.config, _own(checkpoint), tokenizer)
    lent = {} if tokenizer is None else tokenizer_files(tokenizer)
    return Companions(tuple(asset(folder, name) for name, folder in lent.items()))


def _own(checkpoint: Checkpoint) -> frozenset[str]:
    return frozenset(stamp.file for stamp in checkpoint.stamps)


def _tokens(checkpoint: Checkpoint, to: str, tokenizer: Folder | None) -> Tokens | None:
    """Return what is known of the tokens; Megatron's folders have no generation config that could keep the ids."""
    if tokenizer is not None:
        return tokens_of(tokenizer)
    return (
        Tokens(None, 0, generation_ids(checkpoint.root))
        if KINDS[checkpoint.dialect].companions and KINDS[to].arguments
        else None
    )


def _words(made: Plan) -> dict[str, object]:
    return {"unused": made.unused, "accepted": made.accepted, "needs": made.needs}
