"""What can be proven of a plan that was read from a file: its targets, and that each step alone reads inside of its source.

Anyone may have written it. What holds for a form is looked at once; offsets are compared as columns.
"""

from collections.abc import Mapping
from math import prod
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from carnet.dtypes import BY_NAME, FLOATS
from carnet.errors import BadRequest
from carnet.formats.safetensors import layout_file
from carnet.formats.torch_dist_files import frames_of
from carnet.planner.factoring import prove_updates
from carnet.planner.proof import is_inside, prove_written, reads, writes
from carnet.planner.touches import Extent, Ints, Use
from carnet.plans.columns import FAR, Plan, Rows, Steps
from carnet.quantize.recipes import BY_NAME as RECIPES
from carnet.quantize.recipes import PACKED, PER_BYTE, grid, strides
from carnet.steps import Encoding, Fill, Make, Measure, Move, Product, Put, Same, Step, TargetFile
from carnet.storage.schemes import is_place

PAGE, WIDEST = 4096, 1 << 30  # bytes: windows of no plan are smaller or larger


def reprove(plan: Plan, sizes: Mapping[str, int]) -> None:
    """Prove what can be proven of a plan that was read from a file: its targets, and that it reads inside files of these sizes."""
    if plan.window % PAGE or not 0 < plan.window <= min(plan.memory, WIDEST):
        raise BadRequest("the plan promises a memory that cannot be", {"memory": plan.memory, "window": plan.window})
    for path in (plan.source, *(asset.path for asset in plan.assets)):
        if not is_place(path) or "\0" in path:
            raise BadRequest("the plan names a place that is not valid", {"path": path})
    names = [file.name for file in plan.files] + [raw.name for raw in plan.raws]
    names += [text.name for text in plan.texts] + [asset.name for asset in plan.assets]
    if len(set(names)) != len(names) or any("\0" in name for name in names):
        raise BadRequest("files of the plan have the same name, or one that is not valid", {"files": len(names)})
    for file in plan.files:
        if not _is_laid_out(file):
            raise BadRequest("a file of the plan is not laid out as its tensors are", {"file": file.name})
    _prove_alone(plan.steps, sizes)
    prove_written((*plan.files, plan.scratch, plan.factors), plan.steps)
    prove_updates(plan.factors, plan.updates, plan.steps, whole=False)


def _is_laid_out(file: TargetFile) -> bool:
    if any(prod(tensor.shape) > file.nbytes for tensor in file.tensors):
        return False  # before frames and headers are made of sizes that they cannot hold
    if file.kind == "torch_dist":
        return sum(1 for _ in frames_of(file)) > 0
    names = {tensor.name for tensor in file.tensors} - {"__metadata__"}
    tensors = [(t.name, t.dtype, t.shape) for t in file.tensors]
    return len(names) == len(tensors) and layout_file(file.name, tensors, file.metadata) == file


def _prove_alone(steps: Steps, sizes: Mapping[str, int]) -> None:
    """Prove what can be seen of each step: that its places are some, and that it reads inside files of these sizes."""
    measures = steps.where(lambda form: isinstance(form, Measure))
    measured = {steps.more[more][0] for more in sorted(set(measures.rows["more"].tolist()))}
    nbytes = np.array([sizes.get(name, 0) for name in steps.names], np.int64)
    order = np.argsort(steps.rows["form"], kind="stable")
    bounds = np.searchsorted(steps.rows["form"][order], np.arange(len(steps.forms) + 1))
    for form, low, high in zip(steps.forms, bounds, bounds[1:], strict=False):
        if low < high:
            _prove_form(form, steps.at(order[low:high]), nbytes, max(sizes.values()), measured)


def _prove_form(form: Step, steps: Steps, sizes: Ints, largest: int, measured: set[str | float | None]) -> None:
    rows, used = steps.rows, list[Use]()
    match form:
        case Make(function="quantize"):
            recipe = form.encoding.recipe
            if recipe not in RECIPES or form.shape != form.encoding.shape or min(form.shape) < 1:
                _refuse("a step of the plan makes codes that nobody reads", steps, recipe=recipe)
            for more in sorted(set(rows["more"].tolist())):
                for name in set(steps.more[more][1:]) - measured:
                    alike = steps.at(rows["more"] == more)
                    _refuse("a scale of the plan follows from what no step measures", alike, name=name)
        case Make(encoding=Encoding() as encoding) | Measure(encoding=Encoding() as encoding):
            _prove_encoding(form, encoding, steps, sizes)
        case Measure():
            used = [(form.shape, form.source, "source")]
        case Product():
            if not len(form.shape) == len(form.along) == len(form.source.strides) == len(form.factor.strides) == 3:
                _refuse("a step of the plan multiplies no matrices", steps, "source")
            used = [*reads(form)]
        case Move() | Same() | Fill() | Put():
            used = [*reads(form)]
    assembled = [(form.shape, form.source, "source")] if isinstance(form, Make) and form.function == "quantize" else []
    for shape, place, column in (*used, *writes(form), *assembled):
        if len(shape) != len(place.strides) or min((0, *shape, *place.strides)) < 0:
            _refuse("a step of the plan is not valid", steps, column)
        _refuse_any(rows[f"{column}_at"] < 0, "a step of the plan is not valid", steps, column)
    for shape, place, column in used:
        if 0 not in shape:
            reach = 1 + sum((length - 1) * stride for length, stride in zip(shape, place.strides, strict=True))
            past = _is_past(rows, column, reach * BY_NAME[place.dtype].nbytes, sizes)
            _refuse_any(past, "a step of the plan reads past the end of a file", steps, column)
        if prod(shape) > largest:
            _refuse("a step of the plan is larger than its source", steps, column)


def _prove_encoding(form: Make | Measure, encoding: Encoding, steps: Steps, sizes: Ints) -> None:
    """Prove that a box of codes lies in its matrix, and the matrix and its scales in their files."""
    recipe = RECIPES.get(encoding.recipe)
    high, wide = encoding.shape
    if recipe is None or min(high, wide) < 1 or wide % PACKED[recipe.packing]:
        _refuse("a step of the plan reads codes that nobody writes", steps, recipe=encoding.recipe)
    each, scales, outer, rows = PER_BYTE[recipe.packing], grid(recipe, encoding.shape), encoding.outer, steps.rows
    known = {"linear": FLOATS, "power": ("u8",), "two": ("f8_e4m3",)}[recipe.scale.kind]
    badly = (outer is None) == bool(recipe.scale.outer) or form.source.dtype != "u8" or max((high * wide, *form.shape)) > FAR
    badly |= len(form.shape) != len(form.source.strides) or min((0, *form.shape, *form.source.strides)) < 0
    outside = (rows["first"] < 0) | (rows["first"] % each != 0) | badly
    outside |= rows["first"] > sizes[rows["source"]] * each - min(high * wide, FAR)
    for place, (down, along), dtypes, column in (
        (encoding.scales, scales, known, "scales"),
        (outer, (1, 1), ("f32",), "outer"),
    ):
        if place is not None:
            outside |= place.dtype not in dtypes or place.strides != strides(recipe, (down, along))
            outside |= rows[f"{column}_at"] < 0
            outside |= _is_past(rows, column, down * along * BY_NAME[place.dtype].nbytes, sizes)
    if not outside.any():
        box = Extent("", "", 0, encoding.shape, (wide, 1), "u8", ())
        skip = rows["source_at"] - rows["first"]
        inside = {
            gap: gap >= 0 and is_inside(box, (form.shape, gap, form.source.strides)) for gap in sorted(set(skip.tolist()))
        }
        outside = np.array([not inside[gap] for gap in skip.tolist()])
    _refuse_any(outside, "a step of the plan reads codes outside of their matrix", steps, "source")


def _is_past(rows: Rows, column: str, nbytes: int, sizes: Ints) -> NDArray[np.bool_]:
    """Say which of some places reach past the end of their files; ``nbytes`` may be any number."""
    past: NDArray[np.bool_] = rows[f"{column}_at"] > sizes[rows[column]] - min(nbytes, FAR)
    return past


def _refuse_any(wrong: NDArray[np.bool_], what: str, steps: Steps, column: str) -> None:
    if wrong.any():
        _refuse(what, steps.at(wrong), column)


def _refuse(what: str, steps: Steps, column: str = "", **facts: object) -> NoReturn:
    """Refuse the first of some steps, with the file that a column of it names."""
    file = {"file": steps.names[steps.rows[column][0]]} if column else {}
    raise BadRequest(what, {"tensor": steps[0].tensor, **file, **facts})
