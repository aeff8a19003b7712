"""Codes on the way: weights become codes where they are, under scales that all ranks share, and half the bytes travel, or a quarter.

The largest magnitude of a tensor is that of all its parts, wherever they lie: each rank measures its own, and one all-reduce finds
the largest. Where the training brings scales along (Transformer Engine, ModelOpt), those count, and nothing is measured.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from carnet.algebra.box import Box
from carnet.dialects.entry import Entry
from carnet.errors import BadCheckpoint
from carnet.formats.extra_state import NAME, Scales, scales_in
from carnet.formats.stored import Key
from carnet.inventory.source_scales import SourceScales, largest_of, tie_source_scales
from carnet.live.batches import Job, batch, pairs
from carnet.live.binding import Located, chunks_of, tensors_of
from carnet.live.control import Control
from carnet.live.encoding import Coder
from carnet.live.moves import Transfer, matrix_name
from carnet.live.virtual import Source
from carnet.planner.given_scales import by_views
from carnet.quantize.arithmetic import outer_scale, rounded, scales, whole_scale
from carnet.quantize.recipes import BY_NAME, WHOLE, Recipe
from carnet.steps import Make, Measure, Step

MANY = 1 << 20  # more numbers are scales of blocks


def brings(states: object) -> bool:
    """Say whether the states of a rank may have scales of their own."""
    names = (name for chunk in chunks_of(states) for name, value in tensors_of(chunk).items() if value is not None)
    return any(name.endswith(("_extra_state", "_amax")) for name in names)


def source_scales_of(control: Control, entries: Mapping[Key, Entry], states: Sequence[tuple[str, Any]]) -> SourceScales:
    """Return the scales that all ranks together bring along; ``states``: the unit and the state of each chunk of this rank."""
    own = [_source_scales(f"rank {control.rank}", unit, entries, tensors_of(state)) for unit, state in states]
    return largest_of(control.gather(largest_of(own)))


def _source_scales(where: str, unit: str, entries: Mapping[Key, Entry], held: Mapping[str, Any]) -> SourceScales:
    found: dict[Key, dict[tuple[int, ...], Scales]] = {}
    for name, value in held.items():
        match = NAME.fullmatch(name)
        data = _bytes(value) if match is not None else b""
        scales = scales_in(data, name, where) if data else None
        if match is not None and scales is not None:
            found[unit, match["module"]] = {(): scales}

    def numbers(_: str, name: str) -> np.ndarray[Any, Any] | None:
        value = held.get(name)
        plain = isinstance(value, torch.Tensor) and name.endswith("_amax") and value.numel() < MANY
        return value.detach().float().cpu().numpy() if plain and isinstance(value, torch.Tensor) else None

    return tie_source_scales({key: entry for key, entry in entries.items() if key[0] == unit}, found, numbers, where, by_views)


def _bytes(value: object) -> bytes:
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        return value.detach().cpu().numpy().tobytes()
    return b""


class Gauge:
    """What is measured before anything is coded: of each scale of a whole matrix the largest magnitude, over all ranks.

    Of what needs none (its scales are known, or those of blocks) too: what is not a number has no code.
    """

    def __init__(
        self, control: Control, source: Source, located: Located, moves: Iterable[Transfer], steps: Sequence[Step]
    ) -> None:
        self._control = control
        self._made = [step for step in steps if isinstance(step, Make)]
        measured = [step for step in steps if isinstance(step, Measure)]
        others = {matrix_name(step): step for step in self._made if not _is_measured(step)}
        self._names = {name: at for at, name in enumerate(sorted({step.amax for step in measured} | others.keys()))}
        boxes = [
            (step.amax, step.tensor, Box(step.start, step.shape))
            for step in measured
            if source.holders(step.source.file, step.source.offset)[0] == control.rank
        ]
        boxes += [
            (move.coded.matrix, move.tensor, move.box)
            for move in moves
            if move.coded is not None and move.coded.part == "codes" and move.coded.matrix in others
            if move.sender == control.rank
        ]
        views = [(self._names[name], view) for name, tensor, box in boxes for _, view in located.find(tensor, box)]
        on_gpu = [(at, view, seen) for at, view in views if (seen := pairs(view)) is not None]
        self._batch, left = batch(Job(seen, seen, at) for at, _, seen in on_gpu)
        self._alone = [each for each in views if pairs(each[1]) is None] + [on_gpu[number][:2] for number in left]

    def read(self) -> dict[str, float]:
        """Return what was found under each name; raise BadCheckpoint on all ranks where a weight is not a number."""
        own = np.zeros(len(self._names), np.float32)
        if self._batch is not None:
            from carnet.live import kernels

            own = kernels.largest(self._batch, len(own)).cpu().numpy()
        if self._alone:
            values = torch.stack([_largest(view).float() for _, view in self._alone]).cpu().numpy()
            np.maximum.at(own, [at for at, _ in self._alone], values)  # NaN stays
        every = self._control.largest(torch.from_numpy(np.where(np.isfinite(own), own, np.inf))).tolist()
        found = {name: every[at] for name, at in self._names.items()}
        for step in self._made:
            if not all(np.isfinite(found[name]) for name in (step.amax if _is_measured(step) else (matrix_name(step),))):
                raise BadCheckpoint(f"a weight of {step.tensor} is not a number, so it has no scale", {"tensor": step.tensor})
        return found


def _is_measured(step: Make) -> bool:
    return step.given is None and bool(step.amax)


def _largest(view: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude, in the tensor's own type; NaN where there is one."""
    low, high = view.aminmax()
    return torch.maximum(-low, high)


def weigh(coder: Coder, steps: Iterable[Step], amaxes: Mapping[str, float], device: torch.device) -> None:
    """Give the coder the scales of a run: of whole matrices, or what stands over the scales of blocks."""
    numbers, stored = np.zeros(len(coder.matrices), np.float32), dict[str, float]()
    alike: dict[tuple[Recipe, str], list[tuple[str, float]]] = defaultdict(list)
    for step in steps:
        if not isinstance(step, Make) or (step.given is None and not step.amax):
            continue  # scales of blocks alone: they travel beside the codes
        name, recipe, own = matrix_name(step), BY_NAME[step.encoding.recipe], step.source.dtype
        largest = 0.0 if step.given is not None else max(amaxes[each] for each in step.amax)
        if recipe.block == WHOLE and step.given is None:
            alike[recipe, own].append((name, largest))  # for all of them at once: numpy is slow with one number
        elif recipe.block == WHOLE:
            kept, numbers[coder.matrices[name][0]] = whole_scale(recipe, largest, own, step.given)
            stored[name] = float(kept[0, 0])
        else:
            amax = float(rounded(np.full(1, largest, np.float32), "own", own)[0])
            over = float(outer_scale(recipe, amax, own)) if step.given is None else step.given
            stored[name] = numbers[coder.matrices[name][0]] = over
    for (recipe, own), many in alike.items():
        amax_of = rounded(np.array([[largest] for _, largest in many], np.float32), "own", own)
        kept, divisors = scales(recipe, amax_of, own)
        numbers[[coder.matrices[name][0] for name, _ in many]] = divisors[:, 0]
        stored |= zip([name for name, _ in many], kept[:, 0].astype(np.float64).tolist(), strict=True)
    coder.numbers, coder.stored = torch.from_numpy(numbers).to(device), stored
