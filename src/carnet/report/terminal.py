"""What a person reads: facts and tables for a terminal."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, prod
from typing import Any

from carnet.api import Inspection
from carnet.architectures.wrappers import inside_of
from carnet.deltas import Applied, Made
from carnet.dialects.kinds import KINDS, SHARDS
from carnet.errors import shown
from carnet.examiner.document import layouts
from carnet.examiner.examine import Quality
from carnet.examiner.verdict import Verdict
from carnet.fleet.cluster import Node
from carnet.formats.stored import Stored, label_of
from carnet.inventory.planes import optimizer_of
from carnet.inventory.survey import others_of
from carnet.model.adapters import bare, in_words
from carnet.model.fields import Config
from carnet.plans.columns import Plan
from carnet.plans.request import OPTIONS, Request, as_data
from carnet.report.data import coded, quantized_as
from carnet.report.tables import TIED, table
from carnet.report.tables import facts_in_lines as _facts
from carnet.steps import kind

DATA = as_data(Request())  # a request of which nothing is said
ROOM = 160  # letters of a value in a line
MOST = 10  # findings that a person reads
RIGHT = ("bytes", "tensors", "parts")  # columns of numbers


def size(nbytes: float) -> str:
    """Return a number of bytes as people say it.

    >>> size(999), size(2_430_000_000)
    ('999 B', '2.43 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def node_lines(nodes: Sequence[Node], width: int | None) -> list[str]:
    """Return a line for each machine of a cluster: what it has done, and how quickly while it was at work."""
    rows = list[list[str]]()
    for node in nodes:
        rate = f"{size(node.nbytes / max(node.seconds, 1e-9))}/s"
        rows.append([node.name, node.address, f"{node.cores}", f"{node.tasks:,}", size(node.nbytes), rate])
    return table(["node", "address", "cores", "tasks", "bytes", "a task's rate"], rows, width, ("cores", "tasks", "bytes"))


def delta_lines(made: Made, width: int | None) -> Iterator[str]:
    """Yield what a delta is."""
    yield from _facts(
        {
            "delta": f"{shown(made.base_version)} to {shown(made.version)}",
            "changed": f"{made.changed:,} of {made.tensors:,} tensors, {made.elements:,} elements "
            f"({made.elements / max(made.whole, 1):.2%})",
            "frames": f"{size(made.packed)} for {size(made.nbytes)} ({made.packed / max(made.nbytes, 1):.2%})",
            "target": made.target,
        },
        width,
    )


def applied_lines(done: Applied, width: int | None) -> Iterator[str]:
    """Yield what was applied."""
    unsure = "those that changed have their checksum; the deltas have no digest of the others"
    blind = "none: frames alone have checksums, and nothing says that the base is the right one; carnet verify ... --against"
    yield from _facts(
        {
            "applied": f"{shown(done.base_version)} to {shown(done.version)}",
            "changed": f"{done.changed:,} of {done.tensors:,} tensors",
            "proof": f"{done.tensors:,} tensors have the digests that the deltas say"
            if done.proven
            else unsure
            if done.checked
            else blind,
            "target": done.target,
        },
        width,
    )


def inspection_lines(found: Inspection, width: int | None, *, every: bool) -> Iterator[str]:
    """Yield what a checkpoint is; with ``every``, a line for each stored tensor."""
    checkpoint, inventory = found.checkpoint, found.inventory
    held = {} if inventory is None else layouts(inventory)
    kept = {key: t for key, t in checkpoint.tensors.items() if inventory is None or key in held}
    dtypes = Counter(t.dtype for t in kept.values())
    facts = {
        "checkpoint": checkpoint.root,
        "kind": f"{checkpoint.dialect} ({checkpoint.format})",
        **checkpoint.notes,
        "family": "unknown" if inventory is None else inventory.family.name,
        **({} if inventory is None else others_of(inventory.others)),
        "weights": f"{sum(prod(t.shape) for t in kept.values()):,} elements in {len(kept)} stored tensors, "
        f"{size(sum(t.nbytes for t in kept.values()))} ({', '.join(dtypes)})",
        **optimizer_of(checkpoint),
    }
    yield from _facts(facts, width)
    if inventory is not None:
        quantized = {} if inventory.said is None else {"quantized": quantized_as(inventory)}
        words = words_of(inventory.heard.unused, inventory.heard.accepted, {})
        fields = _config(bare(inventory.config), few=width is None)
        inside = {**inside_of(inventory.config), **in_words(inventory.config)}
        facts = {**inside, **quantized, **inventory.notes, **fields, **words, "left behind": _dropped(inventory.dropped)}
        yield from _facts(facts, width)
    if every:
        rows = [
            (label_of(key), t.dtype, _shape(t), size(t.nbytes), held.get(key, "-")) for key, t in checkpoint.tensors.items()
        ]
        yield from _rows(("stored tensor", "type", "shape", "bytes", "layout: canonical tensors"), rows, width)


def _shape(stored: Stored) -> str:
    return " x ".join(map(str, stored.shape)) or "scalar"


def plan_lines(plan: Plan, width: int | None) -> Iterator[str]:
    """Yield what a plan will do."""
    kinds = plan.steps.count(kind)
    facts = {
        "source": plan.source,
        "family": plan.family,
        "target": _target(plan),
        **_quantized(plan),
        "steps": ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()),
        "memory": f"at most {size(plan.memory)} private, in windows of {size(plan.window)}",
        "proof": f"{plan.proof['source tensors']} source tensors, {size(plan.proof['source bytes'])}: every element used once"
        + (f", {size(plan.proof['source padding bytes'])} of padding left out" if plan.proof["source padding bytes"] else "")
        + (f", {plan.proof['copies checked equal']} copies to be compared" if plan.proof["copies checked equal"] else ""),
        "": f"{plan.proof['target tensors']} target tensors, {size(plan.proof['target bytes'])}: every element written once",
        **words_of(plan.unused, plan.accepted, plan.needs),
        "left behind": _dropped(plan.dropped),
        **plan.notes,
    }
    yield from _facts(facts, width)
    rows = [(file.name, f"{len(file.tensors):,}", size(file.nbytes)) for file in plan.files[:40]]
    if len(plan.files) > 40:
        rows.append((f"and {len(plan.files) - 40} more", "", ""))
    rows += [(text.name, "", size(len(text.text))) for text in plan.texts]
    rows += [(asset.name, "", size(asset.nbytes)) for asset in plan.assets]
    yield from _rows(("file", "tensors", "bytes"), rows, width)


def _target(plan: Plan) -> str:
    """Return what was asked for: what every target of the kind has, and what is not as it is by itself."""
    kind, said = KINDS[Request.from_data(plan.request).to], []
    always = ["to", *(("tp", "pp") if kind.files != SHARDS else ()), *(("ep", "spelling") if kind.arguments else ())]
    for name, value in plan.request.items():
        if name in always or (name in OPTIONS and value != DATA[name] and OPTIONS[name].used_by(kind)):
            words = ", ".join(value) if isinstance(value, list) else value
            said.append(f"{name}{TIED}{size(value) if OPTIONS[name].value == 'size' and isinstance(value, int) else words}")
    return "  ".join(said)


def _quantized(plan: Plan) -> dict[str, str]:
    """Return what a plan makes codes of, and what it leaves as it is."""
    coding = coded(plan)
    if coding is None:
        return {}
    activations = f"{coding['input scales']}, static" if coding["input scales"] else "left to the engine"
    brought = coding["scales of the checkpoint"]
    if coding["input scales"] and plan.request.get("amax") is None:  # nothing else could say them
        activations += ", the checkpoint's own"
    elif coding["input scales"] and brought:
        activations += ", as --amax says or else the checkpoint"
    weights = f"scales of {brought} weights, the checkpoint's own; " if brought else ""
    cache = f", of cached keys and values {coding['cache scales']}" if coding["cache scales"] else ""
    return {
        "quantized": f"{coding['weights']} weights as {coding['recipe']}: {size(coding['bytes before'])} become "
        f"{size(coding['bytes after'])} of codes and scales",
        " ": f"{weights}scales of activations {activations}{cache}",
        "as they are": f"{size(coding['bytes kept'])}: {', '.join(coding['kept'])}",
    }


def verdict_lines(verdict: Verdict, width: int | None) -> Iterator[str]:
    """Yield whether a target is its source, and where it is not."""
    found = verdict.examination
    if verdict.equal and found is not None:
        casts = f", cast {', '.join(found.cast)}" if found.cast else ""
        said = {
            "equal": f"{verdict.target} is {verdict.source}{casts}",
            "compared": f"{found.tensors} tensors, {found.elements:,} elements, each one",
            **_quality(found.quality),
            **words_of(verdict.unused, verdict.accepted, verdict.needs),
            "left behind": _dropped(found.dropped),
            **verdict.notes,
            **beside_of(verdict),
        }
        yield from _facts(said, width)
    elif verdict.equal:
        said = {"equal": f"{verdict.target} is {verdict.source or 'what its carnet says'}", "read": size(verdict.nbytes)}
        yield from _facts({**said, **verdict.notes, **beside_of(verdict)}, width)
    else:
        kinds = Counter(finding.what for finding in verdict.findings)
        said = {"different": f"{verdict.target} is not {verdict.source or 'what its carnet says'}"}
        if len(verdict.findings) > MOST:
            told = [f"{count:,} {what}" for what, count in kinds.most_common()]
            said |= {"findings": f"{len(verdict.findings):,}: {few(told)}"}
        if verdict.is_other and found is not None:
            said["another model"] = f"{found.different:,} of {found.tensors:,} tensors differ: it is not a copy of this source"
        yield from _facts(said, width)
        worst = verdict.few(MOST)
        rows = [(finding.what, finding.where, finding.stored, finding.detail) for finding in worst]
        yield from _rows(("what", "where", "stored tensor or file", "detail"), rows, width)
        if len(verdict.findings) > len(worst):
            yield f"and {len(verdict.findings) - len(worst):,} more: --json lists them all"


def beside_of(verdict: Verdict) -> dict[str, str]:
    """Return the files of a target, and the keys of its configs, that were not compared with anything, as lines."""
    unexamined = (f"{file}: {few(keys)}" for file, keys in verdict.unexamined.items())
    lines = {
        "lying beside": ", ".join(verdict.beside),
        "not compared": ", ".join(verdict.unsure),
        "not examined": "; ".join(unexamined),
        "document": verdict.document,
    }
    return {label: line for label, line in lines.items() if line}


def few(names: Sequence[str], most: int = 8) -> str:
    """Return some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def fit_lines(
    facts: Mapping[str, object],
    misfits: Sequence[Sequence[str]],
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    width: int | None,
) -> Iterator[str]:
    """Yield whether a checkpoint fills the model of a spec, then what does not go together, or what fills what."""
    yield from _facts(facts, width)
    if misfits:
        yield from _rows(("what", "name", "the spec asks for", "the checkpoint holds"), misfits, width, 50)
    else:
        yield from _rows(head, lines, width)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, most: int | None = None) -> Iterator[str]:
    """Yield a table, or the first of its rows and how many more there are."""
    yield from table(head, rows[:most], width, RIGHT)
    if most is not None and len(rows) > most:
        yield f"and {len(rows) - most} more"


def _quality(quality: Quality | None) -> dict[str, str]:
    """Return how well codes stand for numbers, as lines of a few words each."""
    if quality is None:
        return {}
    lines = [f"{decibels(snr)} {name}" + (f" ({count:,} cut off)" if count else "") for name, snr, count in quality.worst]
    worst = {("worst" if at == 0 else " " * at): line for at, line in enumerate(lines)}
    said = f"{quality.weights} weights, each code the nearest, each scale as the weights ask"
    return {"quantized": said, "signal to noise": f"{decibels(quality.snr)}, {quality.saturated:,} numbers cut off", **worst}


def decibels(ratio: float) -> str:
    """Return a ratio in dB as people read it."""
    return f"{ratio:.1f} dB" if isfinite(ratio) else "exact"


def words_of(unused: Mapping[str, str], accepted: Mapping[str, str], needs: Mapping[str, Any]) -> dict[str, str]:
    """Return what the source's program did not use, what a target does without, and what its own program must be told."""
    kinds = {"not used": unused, "done without": accepted}
    lines = {label: "; ".join(f"{name} {said}" for name, said in words.items()) for label, words in kinds.items() if words}
    if needs:
        known = needs["releases"]
        releases = f" {known[0]}" + (f" to {known[-1]}" if len(known) > 1 else "") if known else ""
        lines["needs"] = f"{needs['program']}{releases}: {' '.join(needs['say']) or 'nothing said'}"
        own = [f"{name}{TIED}{_short(said)}" for name, said in needs.get("fields", {}).items()]
        found = needs.get("provider", "a class or a spec of its own")
        lines |= {"besides": f"{found}, for what no argument says: {' '.join(own)}"} if own else {}
    return lines


def _short(value: object) -> str:
    """Return a value in words that a line has room for."""
    text = f"{value}"
    return text if len(text) <= ROOM else f"{text[: ROOM - 3]}..."


def _dropped(dropped: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{reason} ({len(names)})" for reason, names in dropped.items()) or "nothing"


def _config(config: Config, *, few: bool) -> dict[str, object]:
    """Return a model's fields, in lines of a few each or in one that a terminal folds; a name stays with its value."""
    said = [
        f"{name}{TIED}{value:g}" if isinstance(value, float) else f"{name}{TIED}{value}"
        for name, value in config.items()
        if value is not None and not (isinstance(value, str) and len(value) > ROOM)  # those stand under "inside"
    ]
    step = 6 if few else max(1, len(said))
    lines = ["  ".join(said[at : at + step]) for at in range(0, len(said), step)]
    return {("config" if at == 0 else " " * at): line for at, line in enumerate(lines)}
