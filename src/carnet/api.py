"""The five verbs, as functions. The command line adds nothing to them but options and colours."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from carnet import __version__
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, MachineFailed
from carnet.examiner import document as documents
from carnet.examiner.beside import Asked
from carnet.examiner.compare import Finding
from carnet.examiner.examine import Examination, examine
from carnet.examiner.means import choose_means
from carnet.executor.journal import Crossing
from carnet.executor.memory import choose_window, promised_memory
from carnet.executor.run import write
from carnet.executor.staging import Staging, owned, publish, put_file, remove
from carnet.families.known import STORAGE
from carnet.families.megatron_needs import needs
from carnet.families.megatron_programs import LM, program
from carnet.families.vocabulary import Vocabulary
from carnet.formats.amax import read_amax
from carnet.formats.companions import Companions, asset, companions, lacking, left_behind, tokenizer_files
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.formats.files import check_unchanged, digest_of
from carnet.formats.opening import replace_file
from carnet.formats.side_files import side_files
from carnet.formats.stored import Checkpoint
from carnet.formats.tokenizers import Tokens, generation_ids, tokens_of
from carnet.formats.wrapped import arguments_of, program_of, read_config
from carnet.inventory import Inventory, survey, take
from carnet.planner import saved
from carnet.planner.build import build
from carnet.planner.options import PathLike, local, located, nbytes, patterns, whole
from carnet.planner.proof import reprove
from carnet.planner.request import MEMORY, Options, Request, as_data, memory_of
from carnet.steps import Plan, TextFile

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """What a checkpoint is."""

    checkpoint: Checkpoint
    inventory: Inventory | None  # None where carnet does not understand every tensor
    refusal: CarnetError | None  # and why

    def __repr__(self) -> str:
        what = f"refused: {self.refusal.what}" if self.inventory is None and self.refusal is not None else repr(self.inventory)
        return f"Inspection({str(self.checkpoint.root)!r}, {self.checkpoint.dialect} ({self.checkpoint.format}), {what})"


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """Whether a target is its source; false where it is different."""

    source: str  # path; "" where the target was checked against its own document
    target: str  # path
    findings: tuple[Finding, ...]  # empty where it is
    examination: Examination | None  # None where the target was checked against its own document
    nbytes: int  # bytes of the target that were read
    vocabulary: Vocabulary | None = None  # of the source, None where it was not looked at
    notes: Mapping[str, str] = field(default_factory=dict)  # what a person should know: subject -> a line
    unused: Mapping[str, str] = field(
        default_factory=dict
    )  # argument of the source's -> what it says and the program did not do
    accepted: Mapping[str, str] = field(default_factory=dict)  # argument -> what the source does and the target need not
    needs: Mapping[str, Any] = field(default_factory=dict)  # what the program that loads the target must be told

    @property
    def equal(self) -> bool:
        """Say that nothing was found."""
        return not self.findings

    def __bool__(self) -> bool:
        return self.equal

    def __repr__(self) -> str:
        found = "equal" if self.equal else f"different, {len(self.findings)} findings"
        return f"Verdict({found}, target={self.target!r}, source={self.source!r}, {self.nbytes:,} bytes)"


def inspect(
    path: PathLike,
    *,
    drop: str | Sequence[str] = (),
    vocab_size: int | None = None,
    config: PathLike | None = None,
    written_by: str | None = None,
    accept: str | Sequence[str] = (),
) -> Inspection:
    """Read the headers of a checkpoint: a Megatron folder, a Hugging Face folder or a TensorRT-LLM folder.

    Raises CarnetError where the files are damaged; a checkpoint that is whole and strange comes back with the refusal.
    """
    dropped, vocab = patterns("drop", drop), None if vocab_size is None else whole("vocab_size", vocab_size)
    checkpoint = _open(local("ckpt", path), config, written_by, patterns("accept", accept))
    try:
        return Inspection(checkpoint, take(checkpoint, dropped, vocab), None)
    except CarnetError as refusal:
        return Inspection(checkpoint, None, refusal)


def plan(path: PathLike, **options: Unpack[Options]) -> Plan:
    """Plan a crossing and prove that it loses nothing; only headers are read.

    The options are those of the command line, with underscores: ``to="hf"``, ``vocab_size=50257``, ``memory="512M"``; see
    ``carnet.Options``. Raises CarnetError where anything of the source is unknown, lacking or has no place in the target, and
    BadOption where an option says what it never can.
    """
    request, memory, amax = Request.of(options), memory_of(options), options.get("amax")
    checkpoint, lent = (
        _open(local("ckpt", path), options.get("config"), request.written_by, request.accept),
        options.get("tokenizer"),
    )
    folder = None if lent is None else local("tokenizer", lent)
    tokens = _tokens(checkpoint, request.to, folder)
    request = replace(request, tokens=None if tokens is None else tokens.count)
    measured = {} if amax is None else read_amax(local("amax", amax))
    made = build(checkpoint, request, _companions(checkpoint, request.to, folder), tokens, measured)
    note = documents.draft(made.request, made.dropped, made.family, made.fingerprint, _words(made))
    window, threads = choose_window(memory, len(made.steps))
    promised = promised_memory(window, threads, len(made.steps))
    texts = (TextFile(documents.NAME, note), *made.texts)
    return replace(made, texts=texts, memory=promised, window=window, threads=threads)


def run(plan: Plan | PathLike, out: PathLike, *, device: str = "cpu", progress: Progress | None = None) -> Path:
    """Carry out a plan: write the target beside ``out`` and put it in place when it is complete.

    ``device`` is where matrices are quantized: "cpu" or "cuda"; the bytes are the same.
    Called again after an interruption it finishes the work. Raises BadRequest where the source is not the one that was planned.
    """
    target = local("out", out, out=True)
    made = plan if isinstance(plan, Plan) else saved.load(local("plan", plan))
    with _written(made, target, progress, device) as (_, publish_it):
        publish_it()
    return target


def verify(
    source: PathLike,
    out: PathLike | None = None,
    *,
    drop: str | Sequence[str] = (),
    vocab_size: int | None = None,
    config: PathLike | None = None,
    written_by: str | None = None,
    read_by: str | None = None,
    accept: str | Sequence[str] = (),
    memory: int | str = MEMORY,
    progress: Progress | None = None,
) -> Verdict:
    """Compare a target with its source, element by element; or, given the target alone, with its own document.

    ``memory`` (bytes) is the peak of private memory that it may use. ``progress`` gets bytes done and bytes in all, on this thread.
    A target that is its source gets its document (``carnet.json``) completed, where carnet wrote it.
    """
    if out is None:
        return _recheck(local("out", source), nbytes("memory", memory), progress)
    ours, target = local("ckpt", source), local("out", out)
    said = documents.load(target)
    asked = (
        Request(to="") if said is None else Request.from_data(said.get("request"))
    )  # nobody says what a stranger was made for
    request = replace(
        asked,
        drop=(*asked.drop, *patterns("drop", drop)),
        vocab=asked.vocab if vocab_size is None else whole("vocab_size", vocab_size),
        config=located("config", config) or asked.config,
        written_by=written_by,
        read_by=read_by,
        accept=patterns("accept", accept),
    )
    verdict, data = _examine(ours, target, request, nbytes("memory", memory), progress)
    if data is not None and said is not None:
        _store(target, data)
    return verdict


def cross(
    path: PathLike,
    out: PathLike,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Verdict:
    """Plan, run and verify; the target appears only when it is proven, with its document."""
    target = local("out", out, out=True)
    made = plan(path, **options)
    memory = memory_of(options)
    writing, examining = _phases(made, progress or (lambda done, total: None))
    with _written(made, target, writing, device) as (staging, publish_it):
        verdict, data = _examine(Path(path), staging.folder, Request.from_data(made.request), memory, examining)
        if data is not None:
            put_file(documents.NAME, [documents.text(data).encode()], staging, sync=True)
            publish_it()
    return replace(verdict, target=str(target))


def _phases(made: Plan, progress: Progress) -> tuple[Progress, Progress]:
    """Return the progress of writing and of examining under one total in bytes, which is known from the start."""
    examined, written = made.proof["source bytes"] + 2 * made.proof["target bytes"], 0  # read to compare, and for digests

    def writing(done: int, total: int) -> None:
        nonlocal written
        written = total
        progress(done, total + examined)

    def examining(done: int, total: int) -> None:
        progress(written + (examined * done // total if total else examined), written + examined)

    return writing, examining


def _words(made: Plan) -> dict[str, object]:
    return {"unused": made.unused, "accepted": made.accepted, "needs": made.needs}


@contextmanager
def _written(made: Plan, out: Path, progress: Progress | None, device: str) -> Iterator[tuple[Staging, Callable[[], None]]]:
    """Own the target and write it: (where it lies, what puts it in place if the source is still what it was at the beginning)."""
    source = Path(made.source)
    checkpoint = open_checkpoint(source)
    if fingerprint(checkpoint) != made.fingerprint:
        raise BadRequest("the source is not the one that was planned", {"where": source}, remedy="plan again")
    reprove(made, {stamp.file: stamp.nbytes for stamp in checkpoint.stamps})
    seen = digest_of(repr(checkpoint.stamps).encode())
    with owned(made, Crossing(saved.digest(made), seen), source, out) as staging:
        try:
            write(made, source, staging, progress=progress, device=device)
            check_unchanged(source, checkpoint.stamps)
            yield staging, partial(_publish, made, checkpoint, staging)
        except BadCheckpoint:
            remove(made, staging)  # what was written is of no state that the source ever had, or never will be right
            raise


def _publish(made: Plan, source: Checkpoint, staging: Staging) -> None:
    check_unchanged(source.root, source.stamps)
    publish(made, staging)


def _examine(
    source: Path, target: Path, request: Request, memory: int, progress: Progress | None
) -> tuple[Verdict, dict[str, object] | None]:
    inventory = take(
        _open(source, request.config, request.written_by, request.accept), request.drop, request.vocab, request.tokens
    )
    checkpoint = _meant(open_checkpoint(target), request.read_by)
    found = examine(
        inventory,
        checkpoint,
        means=choose_means(memory, len(inventory.checkpoint.tensors) + len(checkpoint.tensors)),
        progress=progress or (lambda done, total: None),
        asked=_asked(request),
    )
    for used in (inventory.checkpoint, checkpoint):
        check_unchanged(used.root, used.stamps)
    nbytes = sum(stamp.nbytes for stamp in checkpoint.stamps)
    left, lacks = _beside(inventory.checkpoint, checkpoint)
    found = replace(found, dropped={**found.dropped, **left})
    notes = {"vocabulary": str(inventory.vocabulary), **lacks}
    verdict = Verdict(
        str(source),
        str(target),
        found.findings,
        found,
        nbytes,
        inventory.vocabulary,
        notes,
        inventory.heard.unused,
        inventory.heard.accepted,
    )
    if not verdict.equal:
        return verdict, None
    arrived = survey(checkpoint, like=inventory.config)[0]
    told = _needs(arrived, request) if request.to == "megatron" else {}
    words = {"unused": inventory.heard.unused, "accepted": inventory.heard.accepted, "needs": told}
    return replace(verdict, needs=told), documents.document(inventory, arrived, found, as_data(request), __version__, words)


def _meant(target: Checkpoint, read_by: str | None) -> Checkpoint:
    """Return a target as the program reads it that a person names; its own word for another program than Megatron-LM does not count."""
    own = target.program if target.program.startswith(LM) else LM
    return replace(target, program=read_by or own) if target.dialect == "megatron" else target


def _needs(target: Inventory, request: Request) -> dict[str, object]:
    """Return what the program that loads a target must be told."""
    reader = None if request.read_by is None else program(request.read_by, "--read-by")
    return needs(target.checkpoint.config, reader, local=request.spelling == "local").data


def _asked(request: Request) -> Asked:
    """Return what the examiner should know of a request; a file of calibration that is gone by now says nothing."""
    found = read_amax(Path(request.amax)) if request.amax is not None and Path(request.amax).is_file() else {}
    return Asked(request.dtype, found, request.cache_scale)


def _open(path: PathLike, config: PathLike | None, written_by: str | None = None, accept: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint; a config that is given stands in place of its own, a program that is named in place of what shows."""
    checkpoint = replace(open_checkpoint(Path(path)), accept=tuple(accept))
    if config is not None:
        said = read_config(local("config", config))
        if checkpoint.dialect == "megatron":
            own = {key: checkpoint.config[key] for key in STORAGE if key in checkpoint.config}
            checkpoint = replace(checkpoint, program=program_of(said))
            said = {**own, **arguments_of(said, str(config))}
        checkpoint = replace(checkpoint, config=said)
    if written_by is None:
        return checkpoint
    if checkpoint.dialect != "megatron":
        facts = {"found": f"{checkpoint.dialect} ({checkpoint.format})"}
        raise BadRequest("--written-by is for a checkpoint of Megatron's", facts, remedy="leave it out")
    program(written_by, "--written-by")  # now, whatever else may be wrong
    return replace(checkpoint, program=written_by)


def _recheck(target: Path, memory: int, progress: Progress | None) -> Verdict:
    data = documents.load(target)
    if data is None or data.get("state") != "proven":
        raise BadRequest(
            "the target has no carnet to be checked against",
            {"where": target},
            remedy="name the source too: carnet verify CKPT OUT",
        )
    checkpoint = open_checkpoint(target)
    means = choose_means(memory, len(checkpoint.tensors))
    nbytes, findings = documents.recheck(checkpoint, data, means, progress or (lambda done, total: None))
    check_unchanged(checkpoint.root, checkpoint.stamps)
    return Verdict("", str(target), tuple(findings), None, nbytes)


def _store(folder: Path, data: Mapping[str, object]) -> None:
    path = folder / documents.NAME
    try:
        replace_file(path, [documents.text(data).encode()])
    except OSError as error:
        raise MachineFailed("the carnet cannot be written", {"where": path, "reason": error.strerror}) from error


def _companions(checkpoint: Checkpoint, to: str, tokenizer: Path | None) -> Companions:
    """Return what goes along with the weights: all that is beside them in a folder of the same layout, or the tokenizer alone."""
    if checkpoint.dialect == "hf" and to == "hf":
        return companions(checkpoint.root, checkpoint.config, _own(checkpoint), tokenizer)
    lent = {} if tokenizer is None else tokenizer_files(tokenizer)
    return Companions(tuple(asset(name, path) for name, path in lent.items()))


def _own(checkpoint: Checkpoint) -> frozenset[str]:
    return frozenset(stamp.file for stamp in checkpoint.stamps)


def _tokens(checkpoint: Checkpoint, to: str, tokenizer: Path | None) -> Tokens | None:
    """Return what is known of the tokens; Megatron's folders have no generation config that could keep the ids."""
    if tokenizer is not None:
        return tokens_of(tokenizer)
    return Tokens(None, 0, generation_ids(checkpoint.root)) if checkpoint.dialect == "hf" and to == "megatron" else None


def _beside(source: Checkpoint, target: Checkpoint) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the side files that a target does not have, and what it lacks."""
    if target.dialect != "hf":
        return {}, {}
    left = left_behind(source.root, _own(source), target.root) if source.dialect == "hf" else {}
    return left, lacking(side_files(target.root, _own(target)), target.config.get("eos_token_id"))
