"""What a machine reads: inspections, plans, verdicts and errors as plain values."""

import json
import re
from collections import Counter
from math import prod
from typing import Any

import numpy as np

from carnet.api import Inspection
from carnet.dtypes import BY_NAME
from carnet.errors import CarnetError
from carnet.examiner.document import quality_data, vocabulary_data
from carnet.examiner.verdict import Verdict
from carnet.formats.stored import label_of
from carnet.inventory.planes import optimizer_of
from carnet.inventory.survey import Inventory
from carnet.plans.columns import Plan, Steps
from carnet.quantize.styles import STYLES
from carnet.steps import Fill, Make, Move, Put, Step, kind

INPUT_SCALES = {name for style in STYLES.values() for name in style.inputs.values()}
CACHE_SCALES = {place.removeprefix("../") for style in STYLES.values() for place in style.cache[:2] if place}


def dump(data: object) -> str:
    """Return JSON for a machine."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=list)


def inspection_data(found: Inspection) -> dict[str, object]:
    """Return an inspection as plain values."""
    checkpoint, inventory = found.checkpoint, found.inventory
    tensors = {
        label_of(key): {"dtype": t.dtype, "shape": list(t.shape), "nbytes": t.nbytes} for key, t in checkpoint.tensors.items()
    }
    data: dict[str, object] = {
        "path": str(checkpoint.root),
        "dialect": checkpoint.dialect,
        "format": checkpoint.format,
        "notes": {**checkpoint.notes, **optimizer_of(checkpoint), **({} if inventory is None else inventory.notes)},
        "family": None if inventory is None else inventory.family.name,
        "families": {} if inventory is None else dict(inventory.others),
        "config": None if inventory is None else dict(inventory.config),
        "tensors": tensors,
        "objects": dict(checkpoint.objects),
        "dropped": {} if inventory is None else {reason: list(names) for reason, names in inventory.dropped.items()},
        "unused": {} if inventory is None else dict(inventory.heard.unused),
        "accepted": {} if inventory is None else dict(inventory.heard.accepted),
        "files": {stamp.file: stamp.nbytes for stamp in checkpoint.stamps},
    }
    if inventory is not None and inventory.said is not None:
        data["quantized"] = quantized_as(inventory)
    return data if found.refusal is None else {**data, "refused": error_data(found.refusal)}


def quantized_as(inventory: Inventory) -> str:
    """Return in one line what a checkpoint's config says about quantized weights."""
    said = inventory.said
    if said is None:
        return "nothing"
    weights = f"{len(inventory.coded)} weights as {said.coded_as}" if said.recipes else "no weight"
    activations = "static" if said.static else "left to the engine"
    return f"{weights}, activations {activations}{', scales of an FP8 cache' if said.cache else ''}"


def error_data(error: CarnetError) -> dict[str, object]:
    """Return an error as plain values."""
    return {"error": error.what, "facts": {label: str(value) for label, value in error.facts.items()}, "try": error.remedy}


def coded(plan: Plan) -> dict[str, Any] | None:
    """Return how much a plan quantizes, as plain values; None where it quantizes nothing."""
    codes = plan.steps.where(lambda form: isinstance(form, Make) and form.function == "quantize")
    if not codes:
        return None
    moves = plan.steps.where(lambda form: isinstance(form, Move | Fill) and form.target.space == "file")
    kept = sum(nbytes * number for nbytes, number in moves.count(_written).items())
    puts = Counter(step.tensor.rsplit(".", 1)[1] for step in plan.steps.only(Put))
    return {
        "recipe": next(codes.only(Make)).encoding.recipe,
        "weights": _weights(codes),
        "scales of the checkpoint": _weights(
            codes.at(np.array([more[:1] != (None,) for more in codes.more])[codes.rows["more"]])
        ),
        "input scales": sum(puts[name] for name in INPUT_SCALES),
        "cache scales": sum(puts[name] for name in CACHE_SCALES),
        "bytes before": plan.scratch.nbytes,
        "bytes after": plan.proof["target bytes"] - kept,
        "bytes kept": kept,
        "kept": sorted({re.sub(r"^layers\.\d+\.", "", moves.names[at]) for at in set(moves.rows["tensor"].tolist())}),
    }


def _written(step: Step) -> int:
    """Return the bytes that a step writes."""
    return prod(step.shape) * BY_NAME[step.target.dtype].nbytes if isinstance(step, Move | Fill) else 0


def _weights(codes: Steps) -> int:
    """Return how many weights are coded, of which each may be several matrices."""
    return len(set(codes.rows[["target", "tensor"]].tolist()))


def plan_data(plan: Plan) -> dict[str, object]:
    """Return the head of a plan as plain values; the steps are in the saved plan."""
    return {
        "source": plan.source,
        "fingerprint": plan.fingerprint,
        "request": dict(plan.request),
        "family": plan.family,
        "quantized": coded(plan),
        "steps": dict(plan.steps.count(kind)),
        "files": {file.name: file.nbytes for file in plan.files},
        "dropped": {reason: list(names) for reason, names in plan.dropped.items()},
        "unused": dict(plan.unused),
        "accepted": dict(plan.accepted),
        "needs": dict(plan.needs),
        "proof": dict(plan.proof),
        "notes": dict(plan.notes),
        "memory": plan.memory,
        "window": plan.window,
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
        **({} if found is None or found.quality is None else quality_data(found.quality)),
        "dropped": {} if found is None else {reason: list(names) for reason, names in found.dropped.items()},
        "vocabulary": None if verdict.vocabulary is None else vocabulary_data(verdict.vocabulary),
        "notes": dict(verdict.notes),
        "unused": dict(verdict.unused),
        "accepted": dict(verdict.accepted),
        "needs": dict(verdict.needs),
        "beside": list(verdict.beside),
        "not compared": list(verdict.unsure),
        "not examined": {file: list(keys) for file, keys in verdict.unexamined.items()},
        "document": verdict.document,
        "findings": [{"what": f.what, "where": f.where, "stored": f.stored, "detail": f.detail} for f in verdict.findings],
    }
