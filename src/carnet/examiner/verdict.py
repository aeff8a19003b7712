"""The verdict on a target: its weights against the source, everything else in its folder, and the claims of its document."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from carnet.dialects.kinds import KINDS, STORE
from carnet.dialects.vocabulary import Vocabulary
from carnet.errors import BadCheckpoint, BadRequest
from carnet.examiner import document as documents
from carnet.examiner.account import Account, Known, account
from carnet.examiner.asked import Asked
from carnet.examiner.claims import check_claims, is_of_another, shown
from carnet.examiner.compare import Finding
from carnet.examiner.containers import check_containers
from carnet.examiner.desk import Elsewhere, means_for
from carnet.examiner.document import Document
from carnet.examiner.examine import Examination, examine
from carnet.examiner.frames import frames
from carnet.examiner.means import Means, Order, Tally, choose_means, each
from carnet.examiner.tensor_files import digest, tensor_files_of
from carnet.examiner.unexamined import check_words, unexamined
from carnet.formats.companions import lacking, left_behind
from carnet.formats.detect import fingerprint
from carnet.formats.files import check_unchanged
from carnet.formats.side_files import DOCUMENT, side_files
from carnet.formats.stored import Checkpoint, Stored, label_of
from carnet.formats.tokenizers import generation_eos
from carnet.formats.torch_dist_files import TRACKER
from carnet.inventory.planes import open_with
from carnet.inventory.survey import Inventory
from carnet.pool import Progress
from carnet.storage.journal_lines import is_journal
from carnet.storage.protocol import Folder, names_in

CARNET = "the carnet"  # as one who says what files hold
PLAN = "the plan"
NEARLY_ALL = 0.9  # of the tensors: where so many differ, the target is another model
OTHER = "carnet.json tells of a crossing from another source; that part of it was not compared"


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """Whether a target is its source; false where it is different."""

    source: str  # path; "" where the target was checked against its own document
    target: str  # path
    findings: tuple[Finding, ...]  # empty where it is
    examination: Examination | None  # None where the target was checked against its own document
    nbytes: int  # bytes of the target that were read
    beside: tuple[str, ...] = ()  # files that no program reads
    unsure: tuple[str, ...] = ()  # files that programs read, and tensors, of which nobody says what they must hold
    document: str = ""  # what is to be said of its document
    vocabulary: Vocabulary | None = None  # of the source, None where it was not looked at
    notes: Mapping[str, str] = field(default_factory=dict)  # what a person should know: subject -> a line
    unused: Mapping[str, str] = field(
        default_factory=dict
    )  # argument of the source's -> what it says and the program did not do
    accepted: Mapping[str, str] = field(default_factory=dict)  # argument -> what the source does and the target need not
    needs: Mapping[str, Any] = field(default_factory=dict)  # what the program that loads the target must be told
    unexamined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # file -> keys that nothing was compared with

    @property
    def equal(self) -> bool:
        """Say that nothing was found."""
        return not self.findings

    @property
    def is_other(self) -> bool:
        """Say whether nearly no tensor of the target is that of the source: it is another model."""
        found = self.examination
        return found is not None and 0 < NEARLY_ALL * found.tensors <= found.different

    def few(self, most: int) -> list[Finding]:
        """Return some of many findings, in their order: of each kind the first, then the second of each."""
        of_kind = Counter[str]()
        turns = list[tuple[int, int]]()
        for at, finding in enumerate(self.findings):
            turns.append((of_kind[finding.what], at))
            of_kind[finding.what] += 1
        return [self.findings[at] for at in sorted(at for _, at in sorted(turns)[:most])]

    def __bool__(self) -> bool:
        return self.equal

    def __repr__(self) -> str:
        found = "equal" if self.equal else f"different, {len(self.findings)} findings"
        return f"Verdict({found}, target={self.target!r}, source={self.source!r}, {self.nbytes:,} bytes)"


@dataclass(frozen=True, slots=True)
class Proof:
    """A verdict, and the document that a target which is equal deserves."""

    verdict: Verdict
    data: Mapping[str, object] | None  # None where it is different
    unfinished: bool = False  # the target's own run wrote it and nothing has changed since, but for the proof


def examine_target(
    source: Inventory,
    target: Folder,
    *,
    checkpoint: Checkpoint,
    source_path: Folder,
    needs: Callable[[Inventory], Mapping[str, object]],
    asked: Asked,
    request: Mapping[str, object],
    known: Sequence[Known],
    memory: int,
    threads: int | None,
    progress: Progress,
    staged: bool = False,
    order: Order | None = None,
    elsewhere: Elsewhere | None = None,
) -> Proof:
    """Compare a target with its source in every way.

    ``request`` is what was asked for, as plain values, for the document; ``known`` are those who say what other files hold.
    ``memory`` (bytes) and ``threads`` (None for one a core) are what the examination may use.
    A target that is ``staged`` is being made by this run. ``order`` says when its tensors are there, None where all are;
    ``elsewhere`` does the tasks in the place of this process.
    """
    means = means_for(source, checkpoint, memory, threads)
    below, wrong = _below(target, checkpoint), list[Finding]()
    at = _placed(order, below)
    found, arrived = examine(source, checkpoint, means=means, progress=progress, asked=asked, order=at, elsewhere=elsewhere)
    if order is not None:  # what was seen before it was written is what is there now
        there = open_with(target, source.checkpoint.also)
        if there.digest != checkpoint.digest or there.tensors != checkpoint.tensors:
            wrong = [
                Finding(
                    "written otherwise than planned", "config", "", "its headers or config are not those that were examined"
                )
            ]
        checkpoint = replace(there, program=checkpoint.program)
    left, lacks = _lacking(source.checkpoint, checkpoint)
    lacks = lacks if source.family.hf.texts else {}
    found = replace(found, dropped={**found.dropped, **left})
    said, findings = (None, []) if staged else _loaded(target)
    findings = [
        *found.findings,
        *wrong,
        *check_containers(source.checkpoint, checkpoint),
        *_untracked(target, checkpoint),
        *findings,
    ]
    findings += [] if arrived is None else check_words(source, arrived)
    own = {DOCUMENT, *filter(is_journal, names_in(target))} if staged else {DOCUMENT}
    believed = [*known, *([] if said is None else [Known(CARNET, said.files, whole=True, accused=True)])]
    beside = _account(target, checkpoint, believed, own)
    blamed = {finding.stored for finding in findings}
    findings += [finding for finding in beside.findings if finding.stored not in blamed]  # a file that has one has it said
    others = () if source.merged is None else source.merged.others
    for used in (source.checkpoint, checkpoint, *(other.checkpoint for other in others)):
        check_unchanged(used.root, used.stamps)
    check_unchanged(target, [] if said is None else [said.stamp])
    data, note, told, unsaid = None, "", dict[str, object](), dict[str, tuple[str, ...]]()
    if arrived is not None and (found.target or not found.findings):
        around = beside.files, frames(checkpoint)
        asks = documents.request_data(request)
        asks |= {} if any(each.who == PLAN for each in known) else shown(source, arrived)
        told = {} if found.findings else dict(needs(arrived))  # of another model a program may have nothing to be told
        said_words = {
            "unused": source.heard.unused,
            "accepted": source.heard.accepted,
            "needs": told,
            "families": source.others,
            "merge": documents.merge_data(source, found),
        }
        data = documents.document(source, arrived, found, asks, around, said_words)
        unsaid = unexamined(source, arrived, {name for each in known if not each.accused for name in each.files})
        if said is not None and said.data.get("state") != documents.APPLIED:  # which tells of no crossing
            note = OTHER if is_of_another(said.data, data) else ""
            findings += check_claims(said.data, data, source, arrived, whole=not findings)
    nbytes = sum(stamp.nbytes for stamp in checkpoint.stamps)
    verdict = Verdict(
        str(source_path),
        str(target),
        tuple(findings),
        found,
        nbytes,
        beside.beside,
        (*beside.unsure, *found.unsure),
        note,
        vocabulary=source.vocabulary,
        notes={**source.notes, "vocabulary": str(source.vocabulary), **lacks},
        unused=source.heard.unused,
        accepted=source.heard.accepted,
        needs=told,
        unexamined=unsaid,
    )
    if not verdict.equal:
        return Proof(verdict, None)
    if data is None or said is None or not _is_unfinished(said, source):
        return Proof(verdict, data)
    return Proof(verdict, documents.sealed({**data, "request": said.data["request"]}), unfinished=True)


def _loaded(target: Folder) -> tuple[Document | None, list[Finding]]:
    """Return the document of a target, and what is wrong with it; where it cannot be read at all that is one more finding."""
    try:
        said = documents.load(target)
    except BadCheckpoint as error:
        detail = ", ".join(f"{label} {fact}" for label, fact in error.facts.items() if label != "where")
        return None, [
            Finding("the carnet cannot be believed", DOCUMENT, DOCUMENT, f"{error.what}: {detail}" if detail else error.what)
        ]
    return (None, []) if said is None else (said, [*said.problems])


def _untracked(target: Folder, checkpoint: Checkpoint) -> list[Finding]:
    """Return what is wrong where Megatron would not find the iteration: without its tracker file it begins with random weights."""
    below = _below(target, checkpoint)
    if KINDS[checkpoint.dialect].files != STORE or not below or target.kind(TRACKER):
        return []
    return [Finding("missing", TRACKER, TRACKER, f"nothing tells Megatron to load {below[:-1]}")]


def _placed(order: Order | None, below: str) -> Order | None:
    """Return an order that is asked about files of a checkpoint, where it knows those of the target that this lies in."""
    if order is None or not below:
        return order
    return lambda needs: order([[(below + file, offset) for file, offset in spots] for spots in needs])


def _below(target: Folder, checkpoint: Checkpoint) -> str:
    """Return where a checkpoint lies in its target, with a slash at the end: "" or "iter_0000001/"."""
    below = str(checkpoint.root).removeprefix(str(target)).strip("/")
    return f"{below}/" if below else ""


def _account(target: Folder, checkpoint: Checkpoint, known: Sequence[Known], own: Collection[str]) -> Account:
    below = _below(target, checkpoint)
    data = {below + chunk.file for stored in checkpoint.tensors.values() for chunk in stored.chunks}
    # a rank whose layers do nothing has a file that holds no tensor
    data |= {below + stamp.file for stamp in checkpoint.stamps if stamp.file.endswith(".safetensors")}
    read = {below + stamp.file for stamp in checkpoint.stamps} | ({TRACKER} if below else set())
    return account(target, data=data, read=read - data, known=known, own=own)


def _lacking(source: Checkpoint, target: Checkpoint) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the side files that a target does not have, and what it lacks."""
    if not KINDS[target.dialect].companions:
        return {}, {}
    own, theirs = (frozenset(stamp.file for stamp in each.stamps) for each in (source, target))
    left = left_behind(source.root, own, target.root) if KINDS[source.dialect].companions else {}
    return left, lacking(side_files(target.root, theirs), target.config.get("eos_token_id"), generation_eos(target.root))


def _is_unfinished(said: Document, source: Inventory) -> bool:
    """Say whether a document waits for the proof of its own run: of this source as it was when it was planned."""
    of = said.data.get("source")
    return not said.proven and isinstance(of, Mapping) and of.get("fingerprint") == fingerprint(source.checkpoint)


def recheck(target: Folder, memory: int, threads: int | None, progress: Progress) -> Verdict:
    """Compare a target with its own document alone; ``memory``, ``threads`` and ``progress`` are as for ``examine_target``."""
    names_in(target)  # which refuses one that its crossing has not finished
    said = documents.load(target)
    if said is None and not target.kind():
        raise BadRequest(f"{target} does not exist", {"expected": "the folder of a target"})
    if said is not None and said.data.get("state") == documents.DELTA:
        remedy = "carnet verify BASE DELTA --against B"
        raise BadRequest("a delta alone is compared with nothing", {"where": target}, remedy=remedy)
    if said is None or not said.tells:
        remedy = "name the checkpoint that it was made from, too: carnet verify CKPT OUT"
        what = (
            f"{DOCUMENT} is missing" if said is None else f"{DOCUMENT} says that nobody has compared the folder with its source"
        )
        raise BadRequest(f"{what}, so a target alone has nothing to be compared with", {"where": target}, remedy=remedy)
    asked = said.data.get("request")
    also = asked.get("also") if isinstance(asked, Mapping) else None
    checkpoint = open_with(target, None if also is None else str(also))
    findings = [*said.problems, *_retold(checkpoint, said, choose_means(memory, len(checkpoint.tensors), threads), progress)]
    beside = _account(target, checkpoint, [Known(CARNET, said.files, whole=True)], {DOCUMENT})
    check_unchanged(checkpoint.root, checkpoint.stamps)
    check_unchanged(target, [said.stamp])
    nbytes = sum(stamp.nbytes for stamp in checkpoint.stamps)
    return Verdict("", str(target), (*findings, *beside.findings), None, nbytes, beside.beside)


def _retold(checkpoint: Checkpoint, said: Document, means: Means, progress: Progress) -> list[Finding]:
    """Compare the tensors of a target, and what stands around them, with what its document says of them."""
    target = said.data.get("target")
    tensors, around = (target.get(key) if isinstance(target, Mapping) else None for key in ("tensors", "frames"))
    if not isinstance(tensors, Mapping) or not isinstance(around, Mapping):
        raise BadCheckpoint("the carnet does not say what the target holds", {"where": checkpoint.root})
    findings = list[Finding]()
    held = {label_of(key): stored for key, stored in checkpoint.tensors.items() if stored.chunks}
    digests = _digests(
        checkpoint, {label: held[label] for label in tensors if label in held}, means, progress, documents.also_of(said.data)
    )
    for label, expected in tensors.items():
        if label not in held:
            findings.append(Finding("missing", label, label, "the carnet names it, the target lacks it"))
            continue
        for fact, found in documents.facts(held[label], digests[label]).items():
            wanted = expected.get(fact) if isinstance(expected, Mapping) else None
            if wanted != found:
                findings.append(Finding(f"{fact} differs", label, label, f"expected {wanted}, found {found}"))
    new = sorted(held.keys() - tensors.keys())
    findings += [Finding("not in the carnet", label, label, "the target holds it") for label in new]
    now = {} if findings else frames(checkpoint)  # what changes tensors changes headers
    for name in sorted(now.keys() | around.keys()) if not findings else ():
        if now.get(name) != around.get(name):
            detail = f"expected {around.get(name)}, found {now.get(name)}"
            findings.append(Finding("what stands around its tensors differs", name, name, detail))
    return findings


def _digests(
    checkpoint: Checkpoint, tensors: Mapping[str, Stored], means: Means, progress: Progress, also: str | None
) -> dict[str, str]:
    """Return the digest of every stored tensor."""
    tensor_files, stored = tensor_files_of(checkpoint, means.block, also), [*tensors.values()]
    tally = Tally(progress, sum(one.nbytes for one in stored))
    try:
        found = each(stored, lambda one: digest(tensor_files, one), lambda one: one.nbytes, means.threads, tally.add)
    finally:
        tensor_files.files.close()
    return dict(zip(tensors, found, strict=True))
