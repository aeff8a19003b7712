"""FP8 on the way: weights become codes where they are, under scales that all ranks share, and half the bytes travel.

The largest magnitude of a tensor is that of all its parts, wherever they lie: each rank measures its own, and one all-reduce finds
the largest. Where the training brings scales along (Transformer Engine, ModelOpt), those count, and nothing is measured.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from carnet.algebra.box import Box
from carnet.dialects.entry import Entry
from carnet.dtypes import array_type
from carnet.errors import BadCheckpoint
from carnet.formats.extra_state import NAME, Scales, scales_in
from carnet.formats.stored import Key
from carnet.inventory.source_scales import SourceScales, largest_of, tie_source_scales
from carnet.live.binding import CARNET, TORCH, Located, chunks_of, tensors_of
from carnet.live.control import Control
from carnet.live.moves import Transfer, matrix_name
from carnet.live.virtual import Source
from carnet.planner.given_scales import by_views
from carnet.quantize.arithmetic import whole_scale
from carnet.quantize.codes import E4M3
from carnet.quantize.recipes import BY_NAME, Recipe
from carnet.steps import Make, Measure, Put, Step

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


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of a matrix."""

    recipe: Recipe
    own: str  # element type of the weights
    divisor: torch.Tensor  # [1], f32, where the weights are
    stored: float  # as the target keeps it


def measure(control: Control, source: Source, located: Located, steps: Iterable[Step]) -> dict[str, float]:
    """Return the largest magnitude under each name that a plan measures, over all ranks; infinity where there is no number."""
    wanted = [step for step in steps if isinstance(step, Measure)]
    names = {name: at for at, name in enumerate(sorted({step.amax for step in wanted}))}
    own = np.zeros(len(names), np.float32)
    at, found = [], []
    for step in wanted:
        if source.holders(step.source.file, step.source.offset)[0] == control.rank:
            for _, view in located.find(step.tensor, Box(step.start, step.shape)):
                at.append(names[step.amax])
                found.append(_largest(view))
    if found:
        values = _floats(found)
        np.maximum.at(own, at, np.where(np.isfinite(values), values, np.inf))
    every = control.largest(torch.from_numpy(own)).tolist()
    return {name: every[place] for name, place in names.items()}


def refuse_infinite(located: Located, moves: Iterable[Transfer], steps: Iterable[Step]) -> None:
    """Refuse weights that are no numbers where the scale is known and nothing was measured, of the moves that this rank sends."""
    given = {matrix_name(step): step.tensor for step in steps if isinstance(step, Make) and step.given is not None}
    names, found = [], []
    for move in moves:
        for _, view in located.find(move.tensor, move.box) if move.code in given else ():
            names.append(given[move.code])
            found.append(_largest(view))
    for name, value in zip(names, _floats(found) if found else (), strict=True):
        if not np.isfinite(value):
            raise _no_number(name)


def _no_number(tensor: str) -> BadCheckpoint:
    return BadCheckpoint(f"a weight of {tensor} is not a number, so it has no scale", {"tensor": tensor})


def _floats(found: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """Bring numbers from the device, all at once."""
    return torch.stack(list(found)).cpu().float().numpy()


def _largest(view: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude, in the tensor's own type; NaN where there is one."""
    if view.is_cuda and view.dtype == torch.bfloat16:
        from carnet.live import kernels

        return kernels.largest(view.contiguous().view(torch.int16).view(-1)).view(torch.bfloat16)
    low, high = view.aminmax()
    return torch.maximum(-low, high)


def scales(steps: Iterable[Step], amaxes: Mapping[str, float], device: torch.device) -> dict[str, Scale]:
    """Return the scale of every matrix that is coded, by name; raise BadCheckpoint where a weight is not a number."""
    coded = [step for step in steps if isinstance(step, Make)]
    found = []
    for step in coded:
        largest = 0.0 if step.given is not None else max(amaxes[name] for name in step.amax)
        if not np.isfinite(largest):
            raise _no_number(step.tensor)
        stored, divisor = whole_scale(BY_NAME[step.encoding.recipe], largest, step.source.dtype, step.given)
        found.append((float(stored[0, 0]), divisor))
    # a tensor on the same device: a quotient by a plain number is a product with its inverse on GPUs
    divisors = torch.tensor([divisor for _, divisor in found], dtype=torch.float32).view(-1, 1).to(device).unbind()
    return {
        matrix_name(step): Scale(BY_NAME[step.encoding.recipe], step.source.dtype, divisor, stored)
        for step, (stored, _), divisor in zip(coded, found, divisors, strict=True)
    }


def encode(weights: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return the codes of weights (e4m3, their shape), the same bits as carnet.quantize.arithmetic makes."""
    divisor = scale.divisor.to(weights.device)
    if weights.is_cuda and weights.dtype == torch.bfloat16 and scale.own == "bf16":
        from carnet.live import kernels

        return kernels.whole(scale.recipe, weights.contiguous().view(torch.int16), divisor).view(torch.float8_e4m3fn)
    quotients = weights.to(TORCH[scale.own]).float() / divisor
    if scale.recipe.quotient == "own":
        quotients = quotients.to(TORCH[scale.own]).float()
    return quotients.clamp_(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)


def numbers(step: Put, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of a step, rounded as a file has them."""
    values = step.values * prod(step.shape) if len(step.values) == 1 else step.values
    made = np.array(values, np.float64).astype(array_type(CARNET[dtype])).astype(np.float64)
    return torch.from_numpy(made).view(step.shape).to(dtype)
