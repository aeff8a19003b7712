"""What a person reads and what a machine reads: tables for a terminal, JSON for everything else."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from carnet.api import Inspection, Verdict
from carnet.dtypes import BY_NAME
from carnet.errors import CarnetError
from carnet.examiner.document import layout
from carnet.families.words import Config
from carnet.formats.stored import Stored
from carnet.steps import Plan

LABEL = 18  # columns of a label


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


def dump(data: object) -> str:
    """Return JSON for a machine."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=list)


def nbytes_of(stored: Stored) -> int:
    """Return the bytes of a stored tensor's elements."""
    return prod(stored.shape) * BY_NAME[stored.dtype].nbytes


def inspection_data(found: Inspection) -> dict[str, object]:
    """Return an inspection as plain values."""
    checkpoint, inventory = found.checkpoint, found.inventory
    tensors = {
        "/".join(filter(None, key)): {"dtype": t.dtype, "shape": list(t.shape), "nbytes": nbytes_of(t)}
        for key, t in checkpoint.tensors.items()
    }
    data: dict[str, object] = {
        "path": str(checkpoint.root),
        "dialect": checkpoint.dialect,
        "format": checkpoint.format,
        "notes": dict(checkpoint.notes),
        "family": None if inventory is None else inventory.family.name,
        "config": None if inventory is None else dict(inventory.config),
        "tensors": tensors,
        "objects": dict(checkpoint.objects),
        "dropped": {} if inventory is None else {reason: list(names) for reason, names in inventory.dropped.items()},
        "files": {stamp.file: stamp.nbytes for stamp in checkpoint.stamps},
    }
    return data if found.refusal is None else {**data, "refused": error_data(found.refusal)}


def error_data(error: CarnetError) -> dict[str, object]:
    """Return an error as plain values."""
    return {"error": error.what, "facts": {label: str(value) for label, value in error.facts.items()}, "try": error.remedy}


def show_inspection(found: Inspection, console: Console, *, every: bool) -> None:
    """Print what a checkpoint is; with ``every``, a line for each stored tensor."""
    checkpoint, inventory = found.checkpoint, found.inventory
    kept = {key: t for key, t in checkpoint.tensors.items() if inventory is None or key in inventory.entries}
    dtypes = Counter(t.dtype for t in kept.values())
    facts = {
        "checkpoint": checkpoint.root,
        "kind": f"{checkpoint.dialect} ({checkpoint.format})",
        **checkpoint.notes,
        "family": "unknown" if inventory is None else inventory.family.name,
        "weights": f"{sum(prod(t.shape) for t in kept.values()):,} elements in {len(kept)} stored tensors, "
        f"{size(sum(map(nbytes_of, kept.values())))} ({', '.join(dtypes)})",
    }
    _facts(console, facts)
    if inventory is not None:
        _facts(console, {**_config(inventory.config), "left behind": _dropped(inventory.dropped)})
    if every:
        table = _table("stored tensor", "type", "shape", "bytes", "layout: canonical tensors")
        for key, stored in checkpoint.tensors.items():
            held = layout(inventory.entries[key]) if inventory is not None and key in inventory.entries else "-"
            shape = " x ".join(map(str, stored.shape)) or "scalar"
            table.add_row("/".join(filter(None, key)), stored.dtype, shape, size(nbytes_of(stored)), held)
        console.print(table)


def show_plan(plan: Plan, console: Console) -> None:
    """Print what a plan will do."""
    kinds = Counter(type(step).__name__.lower() for step in plan.steps)
    asked = {k: v for k, v in plan.request.items() if v not in (None, [], "none") and k != "shard"}
    facts = {
        "source": plan.source,
        "family": plan.family,
        "target": "  ".join(f"{name} {value}" for name, value in asked.items()),
        "steps": ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()),
        "memory": f"at most {size(plan.memory)} private, {plan.threads} threads with windows of {size(plan.window)}",
        "proof": f"{plan.proof['source tensors']} source tensors, {size(plan.proof['source bytes'])}: every element used once"
        + (f", {size(plan.proof['source padding bytes'])} of padding left out" if plan.proof["source padding bytes"] else "")
        + (f", {plan.proof['copies checked equal']} copies to be compared" if plan.proof["copies checked equal"] else ""),
        "": f"{plan.proof['target tensors']} target tensors, {size(plan.proof['target bytes'])}: every element written once",
        "left behind": _dropped(plan.dropped),
    }
    _facts(console, facts)
    table = _table("file", "tensors", "bytes")
    for file in plan.files[:40]:
        table.add_row(file.name, f"{len(file.tensors):,}", size(file.nbytes))
    if len(plan.files) > 40:
        table.add_row(f"and {len(plan.files) - 40} more", "", "")
    for text in plan.texts:
        table.add_row(text.name, "", size(len(text.text)))
    for asset in plan.assets:
        table.add_row(asset.name, "", size(asset.nbytes))
    console.print(table)


def plan_data(plan: Plan) -> dict[str, object]:
    """Return the head of a plan as plain values; the steps are in the saved plan."""
    return {
        "source": plan.source,
        "fingerprint": plan.fingerprint,
        "request": dict(plan.request),
        "family": plan.family,
        "steps": dict(Counter(type(step).__name__.lower() for step in plan.steps)),
        "files": {file.name: file.nbytes for file in plan.files},
        "dropped": {reason: list(names) for reason, names in plan.dropped.items()},
        "proof": dict(plan.proof),
        "memory": plan.memory,
        "window": plan.window,
        "threads": plan.threads,
    }


def verdict_data(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as plain values."""
    found = verdict.examination
    return {
        "equal": verdict.equal,
        "source": verdict.source or None,
        "target": verdict.target,
        "bytes": verdict.nbytes,
        "tensors": None if found is None else found.tensors,
        "elements": None if found is None else found.elements,
        "casts": [] if found is None else list(found.cast),
        "dropped": {} if found is None else {reason: list(names) for reason, names in found.dropped.items()},
        "findings": [{"what": f.what, "where": f.where, "stored": f.stored, "detail": f.detail} for f in verdict.findings],
    }


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Print whether a target is its source, and where it is not."""
    found = verdict.examination
    if verdict.equal and found is not None:
        casts = f", cast {', '.join(found.cast)}" if found.cast else ""
        _facts(
            console,
            {
                "equal": f"{verdict.target} is {verdict.source}{casts}",
                "compared": f"{found.tensors} tensors, {found.elements:,} elements, each one",
                "left behind": _dropped(found.dropped),
            },
        )
    elif verdict.equal:
        _facts(console, {"equal": f"{verdict.target} is what its carnet says", "read": size(verdict.nbytes)})
    else:
        _facts(console, {"different": f"{verdict.target} is not {verdict.source or 'what its carnet says'}"})
        table = _table("what", "where", "stored tensor or file", "detail")
        for finding in verdict.findings[:50]:
            table.add_row(finding.what, finding.where, finding.stored, finding.detail)
        console.print(table)
        if len(verdict.findings) > 50:
            console.print(f"and {len(verdict.findings) - 50} more")


def _dropped(dropped: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{reason} ({len(names)})" for reason, names in dropped.items()) or "nothing"


def _facts(console: Console, facts: Mapping[str, object]) -> None:
    for label, value in facts.items():
        console.print(f"{label:<{LABEL}} {value}", highlight=False, markup=False, soft_wrap=True)


def _config(config: Config) -> dict[str, object]:
    """Return a model's fields as lines of a few each."""
    said = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in config.items()
        if value is not None
    ]
    lines = ["  ".join(said[at : at + 6]) for at in range(0, len(said), 6)]
    return {("config" if at == 0 else " " * at): line for at, line in enumerate(lines)}


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("bytes", "tensors") else "left", overflow="fold")
    return table
