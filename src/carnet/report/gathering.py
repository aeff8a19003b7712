"""Gathering what a report tells: of a target by its document, with its source by an examination, of a checkpoint by its headers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from carnet import api, lineage
from carnet.api import Inspection
from carnet.errors import BadRequest, CarnetError, shown
from carnet.examiner import document as documents
from carnet.examiner.desk import Desk
from carnet.examiner.document import Document
from carnet.examiner.pictures import damages, losses
from carnet.examiner.verdict import Verdict
from carnet.examining import desk as desk_of
from carnet.formats.detect import open_checkpoint
from carnet.formats.side_files import DOCUMENT, SIGNATURE
from carnet.inventory.planes import open_with
from carnet.inventory.survey import Inventory, others_of, survey
from carnet.plans import saved
from carnet.plans.options import here, local
from carnet.plans.request import memory_of, threads_of
from carnet.plans.typed import Comparison
from carnet.progress import Callback
from carnet.report.column import column
from carnet.report.flow import flow
from carnet.report.held import Held, held_by
from carnet.report.loss import kinds
from carnet.report.page import (
    DIFFERENT,
    EQUAL,
    NAMED,
    REFUSED,
    SAID,
    SEEN,
    UNEXAMINED,
    Loss,
    Page,
    finite,
)
from carnet.report.running import Run
from carnet.report.said import again, look, named_in, rows_of, summed
from carnet.report.tables import TIED
from carnet.report.terminal import DATA, beside_of, words_of
from carnet.storage.schemes import PathLike, folder_at

ALWAYS = ("to", "tp", "pp")  # of a request, whatever they are by themselves
PICTURES = 6  # tensors that are drawn of each sort
UNSEEN = "how long it took and what memory it had was not recorded: carnet cross --report draws it"
SHORT = "{:.2g} s, too short to be drawn"


def of_checkpoint(found: Inspection) -> Page:
    """Return what a checkpoint is, as its headers say it."""
    rows, refusal, checkpoint = held_by(found), found.refusal, found.checkpoint
    facts = {"kind": f"{checkpoint.dialect} ({checkpoint.format})", **checkpoint.notes}
    if found.inventory is not None:
        facts |= {"family": found.inventory.family.name, **others_of(found.inventory.others), **found.inventory.notes}
    said = {} if refusal is None else {"refused": refusal.what, **{k: str(v) for k, v in refusal.facts.items()}}
    inventory = found.inventory
    return Page(
        found.checkpoint.root.name,
        "",
        SEEN if refusal is None else REFUSED,
        {**said, **facts},
        flow(rows, []),
        [] if inventory is None else column(inventory, rows),
        dropped=None if inventory is None else inventory.dropped,
    )


def of_target(
    out: PathLike,
    source: PathLike | None = None,
    *,
    verdict: Verdict | None = None,
    run: Run | None = None,
    plan: PathLike | None = None,
    at: Mapping[str, PathLike] | None = None,
    beside: Iterable[PathLike] = (),
    progress: Callback | None = None,
    **options: Any,  # noqa: ANN401  those of a comparison, and memory and threads
) -> Page:
    """Return what a target is; with a ``verdict``, or a ``source`` to find one, what an examination found."""
    path = local("out", out)
    folder = folder_at(path)
    said = documents.load(folder) if folder.kind() else None
    _refuse(path, folder.kind(), said, source)
    space = {name: options[name] for name in ("memory", "threads") if options.get(name) is not None}
    asked = {name: value for name, value in options.items() if name in Comparison.__optional_keys__}
    if source is not None and verdict is None:
        verdict = api.verify(source, out, plan=plan, progress=progress, **space, **asked)
        said = documents.load(folder) if folder.kind() else None  # that of a run alone is finished by now
    desk = None if source is None or not folder.kind() else _desk(source, path, plan, space, asked)
    try:
        return _page(path, source, said, verdict, desk, run, at or {}, beside)
    finally:
        if desk is not None:
            desk.close()


def _refuse(path: str, there: str, said: Document | None, source: PathLike | None) -> None:
    """Raise BadRequest where there is nothing to tell."""
    if said is None and source is None:
        remedy = "name its source too: carnet report OUT SRC -o FILE; or carnet inspect OUT --html FILE"
        what = f"there is no {DOCUMENT}, so a target alone says little" if there else f"{path} does not exist"
        raise BadRequest(what, {"where": path}, remedy=remedy)
    if said is not None and said.data.get("state") == documents.DELTA:
        raise BadRequest(
            "a delta is no target: there is nothing to draw", {"where": path}, remedy="draw what carnet apply makes"
        )
    if said is not None and "merge" in said.data and source is not None:
        remedy = (
            "carnet report OUT -o FILE draws what its document says; carnet verify CKPT CKPT... OUT --weights X,Y examines it"
        )
        raise BadRequest("a sum is not examined for a report", {"where": path}, remedy=remedy)


def _desk(source: PathLike, out: str, plan: PathLike | None, space: Mapping[str, Any], asked: Mapping[str, Any]) -> Desk | None:
    """Return both sides, None where one of them cannot be understood."""
    ours, target = folder_at(local("ckpt", source)), folder_at(out)
    try:
        if plan is not None:
            request: Mapping[str, object] = saved.load(here("plan", plan)).request
        else:
            request, _ = api.request_of(open_checkpoint(target).dialect, Comparison(**asked))  # type: ignore[typeddict-item]
        return desk_of(ours, target, request, memory_of(space), threads_of(space))
    except CarnetError:
        return None


def _page(
    path: str,
    source: PathLike | None,
    said: Document | None,
    verdict: Verdict | None,
    desk: Desk | None,
    run: Run | None,
    at: Mapping[str, PathLike],
    beside: Iterable[PathLike],
) -> Page:
    data: Mapping[str, Any] = {} if said is None else said.data
    look(data, folder_at(path) / DOCUMENT)
    target = None if desk is not None else _looked(path, data)
    inventory = desk.theirs.inventory if desk is not None else None if target is None else target.inventory
    if desk is not None:
        ours, theirs = (held_by(_seen(side.inventory)) for side in (desk.ours, desk.theirs))
    else:
        ours, theirs = _ours(source, data), [] if target is None else summed(data, held_by(target))
    problems = () if said is None else said.problems
    findings = problems if verdict is None else verdict.findings
    few = list(problems) if verdict is None else verdict.few(NAMED)
    quality = None if verdict is None or verdict.examination is None else verdict.examination.quality
    named = data.get("source")
    origin_name = str(named.get("name")) if isinstance(named, Mapping) else ""
    return Page(
        folder_at(path).name,
        named_in(data) if source is None else folder_at(local("ckpt", source)).name,
        _state(said, verdict),
        _facts(verdict, data, ours, theirs),
        flow(ours, theirs, origin_name or "source") if ours else flow(theirs, []),  # of its source nothing is known
        [] if inventory is None else column(inventory, theirs),
        _loss(quality, data, theirs),
        losses(desk, quality.each, PICTURES) if desk is not None and quality is not None else (),
        damages(desk, verdict.few(NAMED), PICTURES) if desk is not None and verdict is not None else (),
        few,
        Counter(finding.what for finding in findings),
        run,
        UNSEEN if run is None or not run.samples else SHORT.format(run.samples[-1].seconds),
        _dropped(data, verdict),
        _request(data),
        _origin(said, signed=folder_at(path).kind(SIGNATURE) != ""),
        _lineage(path, said, {**({origin_name: source} if source is not None and origin_name else {}), **at}, beside),
        {} if said is None else said.files,
    )


def _seen(inventory: Inventory) -> Inspection:
    return Inspection(inventory.checkpoint, inventory, None)


def _looked(path: str, data: Mapping[str, Any]) -> Inspection | None:
    """Return a target by its headers, read as its document says; None where there is none."""
    config, request = data.get("config"), data.get("request")
    also = request.get("also") if isinstance(request, Mapping) else None
    try:
        checkpoint = open_with(folder_at(path), None if also is None else str(also))
    except CarnetError:
        return None
    try:
        return Inspection(checkpoint, survey(checkpoint, like=dict(config) if isinstance(config, Mapping) else None)[0], None)
    except CarnetError as refusal:
        return Inspection(checkpoint, None, refusal)


def _ours(source: PathLike | None, data: Mapping[str, Any]) -> list[Held]:
    """Return the rows of a source: by its headers, or by a document, which says of the vocabulary what is padding."""
    if source is not None:
        return held_by(api.inspect(source))
    said, rows = data.get("vocabulary"), rows_of(data)
    if not isinstance(said, Mapping) or not said["rows"]:
        return rows
    share = min(said["left out as padding"] / said["rows"], 1)
    padded = {"embed", "head"}
    return [replace(row, padding=round(row.nbytes * share)) if padded & {*row.elements} else row for row in rows]


def _state(said: Document | None, verdict: Verdict | None) -> str:
    if verdict is not None:
        return EQUAL if verdict.equal else DIFFERENT
    if said is not None and said.problems:
        return DIFFERENT
    return SAID if said is not None and said.tells else UNEXAMINED


def _facts(verdict: Verdict | None, data: Mapping[str, Any], ours: Sequence[Held], theirs: Sequence[Held]) -> dict[str, str]:
    """Return what a person reads first."""
    proof = data.get("proof")
    found = None if verdict is None else verdict.examination
    lines = dict[str, str]()
    if data.get("family"):
        lines["family"] = str(data["family"])
    for label, rows in (("source holds", ours), ("target holds", theirs)):
        kept = [row for row in rows if not row.left]
        if kept:
            types = ", ".join(dict.fromkeys(row.recipe or row.dtype for row in kept if not row.beside))
            lines[label] = f"{len(kept):,} stored tensors ({types})"
    if found is not None:
        lines["compared"] = f"{found.tensors:,} tensors, {found.elements:,} elements, each one"
        lines |= {"cast": ", ".join(found.cast)} if found.cast else {}
    elif isinstance(proof, Mapping):
        lines["was compared"] = f"{proof.get('tensors', 0):,} tensors, {proof.get('elements compared', 0):,} elements, each one"
        lines |= {"cast": ", ".join(map(str, proof["casts"]))} if proof.get("casts") else {}
    if verdict is not None:
        lines |= {**words_of(verdict.unused, verdict.accepted, verdict.needs), **verdict.notes, **beside_of(verdict)}
    else:
        unused, accepted = (each if isinstance(each, Mapping) else {} for each in map(data.get, ("unused", "accepted")))
        lines |= words_of(unused, accepted, {})
    return {label: str(line).replace(TIED, " ") for label, line in lines.items()}


def _loss(quality: Any, data: Mapping[str, Any], theirs: Sequence[Held]) -> Loss | None:  # noqa: ANN401  Quality or None
    if quality is not None:
        worst = tuple((name, finite(snr), saturated) for name, snr, saturated in quality.worst)
        return Loss(quality.weights, quality.saturated, finite(quality.snr), worst, tuple(kinds(quality, theirs)))
    proof = data.get("proof")
    codes = proof.get("codes") if isinstance(proof, Mapping) else None
    if not isinstance(codes, Mapping):
        return None
    worst = tuple((each["tensor"], each["snr dB"], each["saturated"]) for each in codes["worst"])
    return Loss(codes["weights"], codes["saturated"], codes["snr dB"], worst)


def _dropped(data: Mapping[str, Any], verdict: Verdict | None) -> Mapping[str, Sequence[str]]:
    if verdict is not None and verdict.examination is not None:
        return verdict.examination.dropped
    said = data.get("dropped")
    return said if isinstance(said, Mapping) else {}


def _request(data: Mapping[str, Any]) -> dict[str, str]:
    """Return what was asked for, without what nobody said."""
    said = data.get("request")
    lines = dict[str, str]()
    for name, value in said.items() if isinstance(said, Mapping) else ():
        if name in ALWAYS or value not in (None, [], "", False, DATA.get(name)):
            named = f"{value['name']} ({value.get('digest')})" if isinstance(value, Mapping) and "name" in value else value
            lines[str(name)] = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    return lines


def _origin(said: Document | None, *, signed: bool) -> dict[str, str]:
    if said is None:
        return {}
    data: Mapping[str, Any] = said.data
    versions = data.get("versions")
    lines = {name: str(version) for name, version in versions.items()} if isinstance(versions, Mapping) else {}
    lines |= {
        "document": str(data.get("state")),
        "its digest": str(data.get(documents.SELF)),
        "digests": str(data.get("digest")),
    }
    for label, side in (("source", data.get("source")), ("target", data.get("target"))):
        if isinstance(side, Mapping) and side.get("format"):
            name = f"{side['name']}, " if "name" in side else ""
            lines[label] = f"{name}{side.get('dialect')} ({side['format']})"
    lines |= {"to examine it again": again(data)} if said.proven else {}
    return lines | {"signature": "model.sig is there; carnet verify OUT --signature checks it" if signed else "none"}


def _lineage(
    path: str, said: Document | None, at: Mapping[str, PathLike], beside: Iterable[PathLike]
) -> lineage.Lineage | None:
    if said is None or not said.tells:
        return None
    try:
        return lineage.follow(path, at=at, beside=beside)
    except CarnetError as error:
        return lineage.Lineage((lineage.Stage(path, "", "", (), problem=shown(error.what)),))
