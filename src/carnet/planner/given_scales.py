"""The scales of a checkpoint in the words of a recipe: what stands in place of what would be measured or calibrated."""

from collections.abc import Collection, Iterator

import numpy as np

from carnet.dialects.entry import Entry
from carnet.errors import NotSupported
from carnet.inventory.source_scales import SourceScales, Which
from carnet.model.tensors import canonical
from carnet.quantize.arithmetic import input_scale, outer_scale, rounded, scales
from carnet.quantize.recipes import WHOLE, Recipe


def by_views(entry: Entry, at: tuple[int, ...]) -> Iterator[Which]:
    """Yield whose scales a state beside a stored weight holds; ``at`` is its layer and its expert, where these share a name."""
    leading = [dim[0] for dim in entry.reading.pattern.dims if dim in (("layer",), ("expert",))]
    for view in entry.views:
        by_expert = canonical(view.tensor).tensor.each_expert
        first, count = (view.box.start[0], view.box.shape[0]) if by_expert else (0, 1)
        inside = True
        for axis, (kind, index) in enumerate(zip(leading, at, strict=False)):
            step = index - view.origin[axis]
            inside = inside and 0 <= step < (count if kind == "expert" else 1)
            if kind == "expert":
                first, count = first + step, 1
        if inside:
            yield view.tensor, "input"
            for expert in range(first, first + count):
                yield f"{view.tensor}[{expert}]" if by_expert else view.tensor, "weight"


def weight_scale(source_scales: SourceScales, recipe: Recipe, names: Collection[str], own: str) -> float | None:
    """Return the scale of a whole tensor that these tensors share, where the checkpoint says one for each of them.

    Of a scale from training only a format of the same kind is the heir: e4m3 with one scale a tensor.
    """
    if not source_scales.scales and not source_scales.amaxes:
        return None
    factors = [found for name in names if (found := source_scales.scales.get((name, "weight"))) is not None]
    if recipe.scheme == "fp8" and factors and len(factors) == len(names):
        return _kept(recipe, max(factors), own)
    amaxes = [found for name in names if (found := source_scales.amaxes.get((name, "weight"))) is not None]
    if not amaxes or len(amaxes) < len(names):
        return None
    amax = rounded(np.full((1, 1), max(amaxes), np.float32), "own", own)
    return float(scales(recipe, amax, own)[1][0, 0] if recipe.block == WHOLE else outer_scale(recipe, float(amax[0, 0]), own))


def activation_scale(source_scales: SourceScales, recipe: Recipe, names: Collection[str], own: str) -> float | None:
    """Return the scale of the activations that these tensors are multiplied with, None where the checkpoint says nothing of it."""
    factors = [found for name in names if (found := source_scales.scales.get((name, "input"))) is not None]
    if recipe.scheme == "fp8" and factors:
        return _kept(recipe, max(factors), own)
    amaxes = [found for name in names if (found := source_scales.amaxes.get((name, "input"))) is not None]
    return input_scale(recipe, max(amaxes), own) if amaxes else None


def _kept(recipe: Recipe, factor: float, own: str) -> float:
    """Return a scale as the style keeps it."""
    with np.errstate(over="ignore"):
        found = float(rounded(np.array([factor], np.float32), recipe.scale.division, own)[0])
    if not 0 < found < np.inf:
        raise NotSupported("a scale of the checkpoint does not fit the type of the weights", {"scale": factor, "type": own})
    return found
