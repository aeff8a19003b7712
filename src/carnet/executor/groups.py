"""Target tensors that are *alike*: of one shape, and written by steps of the same forms at the same places in them.

What is found out about one of them, as how it is cut into jobs, holds for all: the layers and experts of a model are a few groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carnet.errors import BadRequest
from carnet.executor.cutting import Writer, reach
from carnet.plans.columns import Plan, Steps, fall_into
from carnet.steps import Make, Step, TargetTensor, kind


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors alike."""

    tensor: TargetTensor  # the first of them
    files: NDArray[np.int64]  # of each, as the plan's steps number them
    offsets: NDArray[np.int64]  # of each in its file, bytes
    steps: NDArray[np.int64]  # tensor, step in it -> number of the step in the plan
    coded: NDArray[np.int64] | None  # of matrices in scratch space the number of the step that codes each
    adapted: bool  # whether adapters change what is in them


def groups_of(plan: Plan) -> Iterator[Group]:
    """Yield the groups of all target tensors that steps write, but for those of no element."""
    steps, files = plan.steps, [*plan.files, plan.scratch]
    known = {name: number for number, name in enumerate(steps.names)}
    held = [(file, tensor) for file in files for tensor in file.tensors if 0 not in tensor.shape]
    spots = {(file.space, file.name): 2 * known.get(file.name, len(known)) + (file.space == "scratch") for file in files}
    where = np.array([spots[file.space, file.name] for file, _ in held], np.int64)
    offset = np.array([tensor.offset for _, tensor in held], np.int64)
    spaces = np.array([_written(form) for form in steps.forms], np.int64)[steps.rows["form"]]
    written = np.flatnonzero(spaces >= 0)
    rows = steps.rows[written]
    tensor = fall_into((where, offset, offset), (rows["target"].astype(np.int64) * 2 + spaces[written], rows["target_at"]))
    if len(tensor) and tensor.min() < 0:
        lost = steps[int(written[np.argmin(tensor)])]
        where_to = steps.names[rows["target"][np.argmin(tensor)]]
        raise BadRequest(f"the plan writes {lost.tensor} outside of every target tensor", {"where": where_to})
    coder = _coders(steps)
    coded = np.array([coder.get(tensor.offset, -1) if file.space == "scratch" else -1 for file, tensor in held], np.int64)
    forms = dict[tuple[object, ...], int]()
    form = np.array([forms.setdefault((tensor.shape, tensor.dtype), len(forms)) for _, tensor in held], np.int64)
    coded_form = np.where(coded < 0, -1, steps.rows["form"][coded]) if len(steps) else coded
    changed = [known[each.tensor] for each in plan.updates if each.tensor in known]
    adapted = np.zeros(len(held), np.int64)
    adapted[tensor[np.isin(rows["tensor"], changed)]] = 1
    order = np.argsort(tensor, kind="stable")
    number = np.bincount(tensor, minlength=len(held))
    begin = np.cumsum(number) - number
    alike = dict[tuple[int, ...], list[int]]()
    for count in sorted(set(number.tolist()) - {0}):
        these = np.flatnonzero(number == count)
        inside = order[begin[these, None] + np.arange(count)]
        gaps = rows["target_at"][inside] - offset[these, None]
        alone = (form[these, None], coded_form[these, None], adapted[these, None])
        facts = np.concatenate([*alone, rows["form"][inside], gaps], axis=1)
        for key, at in zip(map(tuple, facts.tolist()), these.tolist(), strict=True):
            alike.setdefault(key, []).append(at)
    for members in alike.values():
        these = np.array(members)
        (file, first), count = held[members[0]], number[members[0]]
        inside = written[order[begin[these, None] + np.arange(count)]]
        coders = coded[these] if file.space == "scratch" else None
        yield Group(first, where[these] // 2, offset[these], inside, coders, bool(adapted[members[0]]))


def writers_of(plan: Plan) -> dict[tuple[str, int], list[tuple[int, int, int]]]:
    """Return for each target tensor, by file and offset, the steps that write it, each with its first byte in it and its end."""
    found = dict[tuple[str, int], list[tuple[int, int, int]]]()
    for group in groups_of(plan):
        spans = [reach(plan.steps[at]) for at in group.steps[0].tolist()]
        spans = [(begin - int(group.offsets[0]), end - int(group.offsets[0])) for begin, end in spans]
        for file, offset, steps in zip(group.files.tolist(), group.offsets.tolist(), group.steps.tolist(), strict=True):
            found[plan.steps.names[file], offset] = [(at, *span) for at, span in zip(steps, spans, strict=True)]
    return found


def _written(step: Step) -> int:
    """Return 0 where a step writes into a file, 1 where into scratch space, -1 where it does not or codes what is there."""
    if not isinstance(step, Writer) or kind(step) == "quantize" or 0 in step.shape or step.target.space == "factors":
        return -1
    return int(step.target.space == "scratch")


def _coders(steps: Steps) -> dict[int, int]:
    """Return the number of the step that codes the matrix at an offset of the scratch space."""
    codes = np.array([isinstance(form, Make) and kind(form) == "quantize" for form in steps.forms], bool)
    numbers = np.flatnonzero(codes[steps.rows["form"]])
    return dict(zip(steps.rows["source_at"][numbers].tolist(), numbers.tolist(), strict=True))
