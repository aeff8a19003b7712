"""What becomes codes: which stored tensors of a target, under which recipe, and the scales that they share.

A weight that is coded is first assembled in *scratch* space, by the same steps that would write it, and coded from there. A scale of a
whole tensor belongs to canonical tensors, never to a rank's part of one: all ranks and all fused parts have the same.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from carnet.algebra.box import Box, intersect, whole
from carnet.architectures.family import Family
from carnet.dialects.entries import Entry, entries
from carnet.dialects.kinds import KINDS
from carnet.dtypes import BY_NAME as DTYPES
from carnet.errors import BadRequest, NotSupported
from carnet.formats.stored import Key, dense_strides
from carnet.inventory.source_scales import SourceScales, read_source_scales
from carnet.inventory.survey import Inventory
from carnet.model.fields import Config
from carnet.model.tensors import Canonical, canonical
from carnet.planner.choosing import Coded
from carnet.planner.given_scales import activation_scale, weight_scale
from carnet.planner.pieces import Shelf, cut
from carnet.plans.request import Request, flag_of
from carnet.quantize.arithmetic import input_scale
from carnet.quantize.recipes import BY_NAME, Recipe, by_style
from carnet.quantize.styles import SCALAR, STYLES, Kept, beside
from carnet.steps import Encoding, Make, Measure, Place, Put, Step, TargetFile, TargetTensor


@dataclass(frozen=True, slots=True)
class Coding:
    """What a person asks of quantizing, with what was found in the files that it names."""

    recipe: Recipe
    cache: bool  # scales of an FP8 cache of keys and values are wanted
    cache_scale: float | None  # the one that a person names for all layers
    static: bool  # activations have a scale of their own
    exclude: tuple[str, ...]  # patterns of module names that stay as they are
    amaxes: Mapping[
        tuple[str, str], float
    ]  # (canonical tensor, "input", "k" or "v") -> the largest magnitude seen in calibration
    source_scales: SourceScales  # what the checkpoint itself says: it counts where a person says nothing


# options that mean nothing unless something is quantized
BESIDE = ("style", "kv_cache", "kv_scale", "activations", "amax", "exclude")
LARGEST = 3.4028235e38  # of f32


def asked(
    request: Request, source: Inventory, calibration: Mapping[str, float], source_scales: SourceScales | None = None
) -> Coding | None:
    """Return what a request asks of quantizing, None where it asks nothing; ``source_scales`` None where they are to be read."""
    if request.quantize is None:
        for name in BESIDE:
            if getattr(request, name) not in (None, ()):
                raise BadRequest("nothing is quantized", {"option": flag_of(name)}, remedy="add --quantize SCHEME")
        return None
    recipe = _recipe(request.quantize, request.style, request.to)
    style = STYLES[recipe.style]
    if request.kv_cache is not None and not style.cache[0]:
        raise BadRequest(f"the style {style.name!r} has no place for the scales of a cache", {"option": "--kv-cache"})
    if request.kv_scale is not None and request.kv_cache is None:
        raise BadRequest("nothing needs the scale of a cache", {"option": "--kv-scale"}, remedy="add --kv-cache fp8")
    if request.kv_scale is not None and not 0 < request.kv_scale < LARGEST:
        raise BadRequest("the scale of a cache is a positive number", {"option": "--kv-scale", "found": request.kv_scale})
    static = _static(recipe, request.activations)
    amaxes = _amaxes(source.family, source.config, calibration)
    source_scales = read_source_scales(source) if source_scales is None else source_scales
    return Coding(recipe, request.kv_cache is not None, request.kv_scale, static, request.exclude, amaxes, source_scales)


def _recipe(scheme: str, style: str | None, to: str) -> Recipe:
    """Return the recipe of a scheme in a style that the target may have."""
    known = KINDS[to].styles
    if not known:
        raise BadRequest(f"a target of the kind {to!r} holds no codes", {"option": "--quantize"}, remedy="leave out --quantize")
    style = style or known[0]
    if style not in known:
        facts = {"option": "--style", "target": to, "known": ", ".join(known)}
        raise BadRequest(f"a target of the kind {to!r} has no style {style!r}", facts)
    schemes = by_style()
    if scheme not in schemes[style]:
        others = [name for name in known if scheme in schemes[name]]
        facts = {"option": "--quantize", "known": ", ".join(schemes[style])}
        remedy = f"--style {others[0]}" if others else None
        raise BadRequest(f"there is no scheme {scheme!r} in the style {style!r}", facts, remedy=remedy)
    return BY_NAME[f"{style}/{scheme}"]


def _static(recipe: Recipe, activations: str | None) -> bool:
    """Say whether activations have a scale that is stored."""
    has = recipe.scheme in STYLES[recipe.style].inputs
    facts = {"option": "--activations", "scheme": recipe.scheme, "style": recipe.style}
    if activations not in (None, "static", "dynamic"):
        raise BadRequest(f"the scales of activations cannot be {activations!r}", {**facts, "known": "static, dynamic"})
    if activations == "static" and not has:
        raise BadRequest("the scheme has no place for a scale of activations", facts, remedy="leave out --activations")
    if activations == "dynamic" and has and recipe.scheme not in STYLES[recipe.style].dynamic:
        raise BadRequest("the scheme needs a scale of activations", facts, remedy="use --activations static, with --amax FILE")
    return has and activations != "dynamic"


def _amaxes(family: Family, config: Config, calibration: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Tie what calibration found, under the names of Hugging Face modules, to canonical tensors."""
    left = dict(calibration)
    found: dict[tuple[str, str], float] = {}
    for entry in entries(family.hf, {**config, "padded_vocab": None}, None) if calibration else ():
        module = entry.name.removesuffix(".weight")
        for what in ("input", "k", "v"):
            amax = left.pop(f"{module}.{what}_amax", None)
            if amax is not None:
                for view in entry.views:  # the experts of a layer are one canonical tensor: they share the largest
                    found[view.tensor, what] = max(amax, found.get((view.tensor, what), 0.0))
    if left:
        facts = {"name": min(left), "others": len(left) - 1}
        raise BadRequest("the calibration names a module that the model does not have", facts)
    return found


@dataclass(frozen=True, slots=True)
class Scaled:
    """A scale that is known, and the stored tensor that it stands beside."""

    beside: Key
    kept: Kept
    value: float


def scratch(coded: Mapping[Key, Coded]) -> tuple[TargetFile, dict[Key, list[tuple[Box, TargetTensor]]]]:
    """Lay out the scratch space: a matrix for each coded weight, or for each expert in one."""
    places: dict[Key, list[tuple[Box, TargetTensor]]] = {}
    offset, tensors = 0, []
    for key, one in coded.items():
        for box in _matrices(one.entry):
            tensor = TargetTensor(one.entry.name, one.own, box.shape, offset)
            offset += prod(box.shape) * DTYPES[one.own].nbytes
            tensors.append(tensor)
            places.setdefault(key, []).append((box, tensor))
    return TargetFile("scratch", offset, tuple(tensors), {}, "scratch"), places


def _matrices(entry: Entry) -> list[Box]:
    if len(entry.shape) == 2:
        return [whole(entry.shape)]
    return [Box((expert, 0, 0), (1, *entry.shape[1:])) for expert in range(entry.shape[0])]


def steps(
    coding: Coding,
    coded: Mapping[Key, Coded],
    matrices: Mapping[Key, list[tuple[Box, TargetTensor]]],
    laid: Mapping[tuple[str, str], tuple[TargetFile, TargetTensor]],
    held: Mapping[str, Shelf],
    cache: Mapping[Key, Scaled],
) -> Iterator[Step]:
    """Yield what is measured, what is coded, and the scales that are known.

    ``laid``: (unit, stored name) -> file and place of each tensor of the target; ``held``: where canonical tensors lie in the source.
    """
    measured: dict[str, tuple[str, int | None]] = {}
    for key, one in coded.items():
        for number, (box, tensor) in enumerate(matrices[key]):
            asked = _asked(coding.recipe, one, box, held)
            given = weight_scale(coding.source_scales, coding.recipe, asked, one.own)
            measured |= asked if given is None else {}
            step = _quantize(coding.recipe, one, tensor, number, {k.role: laid[key[0], k.name] for k in one.kept}, tuple(asked))
            yield step if given is None else replace(step, amax=(), given=given)
        for each in one.kept:
            file, place = laid[key[0], each.name]
            at = Place(file.name, place.offset, dense_strides(place.shape), place.dtype)
            if each.role == "input":
                yield Put(each.name, each.shape, at, (_input(coding, one),))
            elif each.role == "shape":
                yield Put(each.name, each.shape, at, tuple(map(float, one.entry.shape)))
    for key, scaled in cache.items():
        file, place = laid[key]
        at = Place(file.name, place.offset, dense_strides(place.shape), place.dtype)
        yield Put(scaled.kept.name, place.shape, at, (scaled.value,))
    for name, (wide, expert) in measured.items():
        for piece in held[wide].pieces if expert is None else held[wide].between(expert, 1):
            wanted = piece.box if expert is None else Box((expert, *piece.box.start[1:]), (1, *piece.box.shape[1:]))
            shared = intersect(piece.box, wanted)
            if shared is not None:
                yield Measure(wide, shared.start, shared.shape, cut(piece, shared), name, piece.encoding)


def _asked(recipe: Recipe, one: Coded, box: Box, held: Mapping[str, Shelf]) -> dict[str, tuple[str, int | None]]:
    """Return what a matrix's scale follows from: a name for each canonical tensor, or for one expert of it."""
    if recipe.block != (0, 0) and not recipe.scale.outer:
        return {}
    asked = dict[str, tuple[str, int | None]]()
    for view in one.entry.views:
        name = canonical(view.tensor)
        by_expert = name.tensor.each_expert
        expert = view.box.start[0] + box.start[0] if by_expert else None
        if by_expert and len(one.entry.shape) == 2:
            expert = view.box.start[0]
        for tensor in _joint(recipe, name, held):
            asked[tensor if expert is None else f"{tensor}[{expert}]"] = (tensor, expert)
    return asked


def _joint(recipe: Recipe, name: Canonical, held: Collection[str]) -> list[Canonical]:
    """Return the canonical tensors that share a whole tensor's scale with this one, itself included."""
    style = STYLES[recipe.style]
    if name.tensor.reads not in style.joint.get(recipe.scheme, ()) or name.tensor.part in style.alone:
        return [name]
    return [each for each in name.fellows() if each in held and each.tensor.part not in style.alone]


def _quantize(
    recipe: Recipe,
    one: Coded,
    tensor: TargetTensor,
    number: int,
    places: Mapping[str, tuple[TargetFile, TargetTensor]],
    asked: tuple[str, ...],
) -> Make:
    def place(role: str) -> Place:
        file, stored = places[role]
        width = stored.shape[-1] if len(stored.shape) > 1 else 1
        if role == "scales" and recipe.block[0] != 0 and len(stored.shape) == 4:
            width = stored.shape[2]
        each = prod(stored.shape) // len(one_of_each) * DTYPES[stored.dtype].nbytes
        return Place(file.name, stored.offset + number * each, (width, 1), stored.dtype)

    one_of_each = _matrices(one.entry)
    rows, columns = tensor.shape[-2:]
    source = Place("scratch", tensor.offset, (columns, 1), tensor.dtype, "scratch")
    codes, outer = place("codes"), place("outer") if "outer" in places else None
    encoding = Encoding(recipe.name, (rows, columns), codes.offset, place("scales"), outer)
    return Make("quantize", one.entry.name, (0, 0), (rows, columns), source, codes, encoding, asked)


def _input(coding: Coding, one: Coded) -> float:
    """Return the scale of a weight's activations: that of the largest input among what is fused or shares it."""
    names = []
    for view in one.entry.views:
        names += canonical(view.tensor).fellows()
    found = [amax for name in names if (amax := coding.amaxes.get((name, "input"))) is not None]
    own = activation_scale(coding.source_scales, coding.recipe, names, one.own) if not found else None
    if own is not None:
        return own
    if not found:
        dynamic = coding.recipe.scheme in STYLES[coding.recipe.style].dynamic
        raise _unknown(coding, one.entry, "input", ", or use --activations dynamic" if dynamic else "")
    return input_scale(coding.recipe, max(found), one.own)


def cache_tensors(coding: Coding | None, wanted: Sequence[Entry], dtypes: Mapping[Key, str]) -> dict[Key, Scaled]:
    """Return the scales of cached keys and values, by unit and name."""
    if coding is None or not coding.cache:
        return {}
    style = STYLES[coding.recipe.style]
    found: dict[Key, Scaled] = {}
    for entry in wanted:
        for view in entry.views:
            what = canonical(view.tensor).tensor.cached
            if not what:
                continue
            name = beside(entry.name, style.cache["kv".index(what)])
            scale = _cache_scale(coding, entry, view.tensor, what)
            if style.one_cache and (entry.unit, name) in found:
                scale = max(scale, found[entry.unit, name].value)
            dtype = dtypes[entry.unit, entry.name] if style.cache[2] == "own" else style.cache[2]
            found[entry.unit, name] = Scaled((entry.unit, entry.name), Kept("cache", name, dtype, SCALAR[style.scalar]), scale)
    if not found:
        raise NotSupported("the family has no keys and values of a kind whose cache can have scales")
    return found


def _cache_scale(coding: Coding, entry: Entry, tensor: str, what: str) -> float:
    amax = coding.amaxes.get((tensor, what), coding.source_scales.amaxes.get((tensor, what)))
    if coding.cache_scale is not None:
        return coding.cache_scale
    if amax is None:
        raise _unknown(coding, entry, what, ", or a number with --kv-scale")
    # modelopt torch/export/quant_utils.py get_kv_cache_scaling_factor: for ranks never below one
    return max(1.0, amax / 448.0) if STYLES[coding.recipe.style].one_cache else amax / 448.0


def _unknown(coding: Coding, entry: Entry, what: str, otherwise: str) -> BadRequest:
    """Return the refusal where calibration is needed and does not say enough."""
    facts = {"tensor": entry.name}
    if STYLES[coding.recipe.style].hf_modules:  # whose names the file has
        facts["looked for"] = f"{entry.name.removesuffix('weight')}{what}_amax"
    remedy = f"name a file with --amax (carnet calibrate makes one){otherwise}"
    whose = {"input": "activations", "k": "cached keys", "v": "cached values"}[what]
    return BadRequest(f"nothing says how large the {whose} of {entry.name!r} are", facts, remedy=remedy)
