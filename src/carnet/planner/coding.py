"""What becomes codes: which stored tensors of a target, under which recipe, and the scales that they share.

A weight that is coded is first assembled in *scratch* space, by the same steps that would write it, and coded from there. A scale of a
whole tensor belongs to canonical tensors, never to a rank's part of one: all ranks and all fused parts have the same.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from carnet.algebra.box import Box, intersect, whole
from carnet.architectures.family import Family
from carnet.architectures.known import dialect_of
from carnet.dialects.entries import constants, entries
from carnet.dialects.entry import Entry
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect
from carnet.dtypes import BY_NAME as DTYPES
from carnet.errors import BadRequest, NotSupported
from carnet.formats.stored import Key, dense_strides
from carnet.inventory.source_scales import SourceScales, read_source_scales
from carnet.inventory.survey import Inventory
from carnet.model.fields import Config
from carnet.model.tensors import Canonical
from carnet.planner.choosing import Coded, kinds
from carnet.planner.decoding import begun
from carnet.planner.given_scales import activation_scale, by_views, weight_scale
from carnet.planner.held import Held
from carnet.planner.pieces import cut
from carnet.plans.columns import Gathered
from carnet.plans.request import Request, flag_of
from carnet.quantize.arithmetic import input_scale
from carnet.quantize.reading import Said
from carnet.quantize.recipes import BY_NAME, Recipe, by_style
from carnet.quantize.styles import SCALAR, STYLES, Kept, beside
from carnet.steps import Encoding, Make, Measure, Place, Put, TargetFile, TargetTensor


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

    @property
    def off(self) -> frozenset[str]:
        """Return the weights that were trained under quantizers that are off."""
        return self.source_scales.off


LAYER = re.compile(r".*?layers\.\d+\.")
# options that mean nothing unless something is quantized
BESIDE = ("style", "kv_cache", "kv_scale", "activations", "amax", "exclude")


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
    static = _static(recipe, request.activations)
    amaxes = _amaxes(source.family, source.config, calibration)
    source_scales = read_source_scales(source, by_views) if source_scales is None else source_scales
    return Coding(recipe, request.kv_cache is not None, request.kv_scale, static, request.exclude, amaxes, source_scales)


def _recipe(scheme: str, style: str | None, to: str) -> Recipe:
    """Return the recipe of a scheme in a style that the target may have."""
    known = KINDS[to].styles
    if not known:
        steps = f"two steps: --to hf --quantize {scheme}, then that folder --to {to}, where its codes go along as they are"
        what, way_out = (
            ("is not quantized on the way", steps) if KINDS[to].loads else ("holds no codes", "leave out --quantize")
        )
        raise BadRequest(f"a target of the kind {to!r} {what}", {"option": "--quantize"}, remedy=way_out)
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
    config = {**config, "padded_vocab": None, "tower": ""}
    for entry in entries(dialect_of(family, "hf", config), config, None, coded=True) if calibration else ():
        module = entry.name.removesuffix(".weight")
        for what in ("input", "k", "v"):
            amax = left.pop(f"{module}.{what}_amax", None)
            if amax is not None:
                for name in entry.names:  # the experts of a layer are one canonical tensor: they share the largest
                    found[name, what] = max(amax, found.get((name, what), 0.0))
    if left:
        facts = {"name": min(left), "others": len(left) - 1}
        raise BadRequest("the calibration names a module that the model does not have", facts)
    return found


Laid = Mapping[Key, Sequence[tuple[TargetFile, TargetTensor]]]  # entry -> file and place of each of its stored tensors


@dataclass(frozen=True, slots=True)
class Scaled:
    """A scale that is known, and the stored tensor that it stands beside."""

    beside: Key
    kept: Kept
    value: float


def scratch(coded: Mapping[Key, Coded]) -> tuple[TargetFile, dict[Key, list[tuple[Box, TargetTensor]]]]:
    """Lay out the scratch space: a matrix for each coded weight, or for each expert in one."""
    places: dict[Key, list[tuple[Box, TargetTensor]]] = {}
    boxes = {like: _matrices(entry) for like, entry in kinds([one.entry for one in coded.values()]).items()}
    offset, tensors = 0, []
    for key, one in coded.items():
        places[key] = found = []
        for box in boxes[id(one.entry.like)] if one.own else ():
            tensor = TargetTensor(one.entry.name, one.own, box.shape, offset)
            offset += prod(box.shape) * DTYPES[one.own].nbytes
            tensors.append(tensor)
            found.append((box, tensor))
    return TargetFile("scratch", offset, tuple(tensors), {}, "scratch"), places


def _matrices(entry: Entry) -> list[Box]:
    if len(entry.shape) == 2:
        return [whole(entry.shape)]
    return [Box((expert, 0, 0), (1, *entry.shape[1:])) for expert in range(entry.shape[0])]


def steps(
    coding: Coding,
    coded: Mapping[Key, Coded],
    matrices: Mapping[Key, list[tuple[Box, TargetTensor]]],
    laid: Laid,
    held: Mapping[str, Held],
    cache: Mapping[Key, Scaled],
    gathered: Gathered,
) -> None:
    """Gather what is measured, what is coded, and the scales that are known.

    ``held``: where canonical tensors lie in the source.
    """
    measured: dict[str, tuple[str, int | None]] = {}
    known = dict[tuple[int, str, int], tuple[int, tuple[int, int, int]]]()  # those of all layers have a form in common
    joint = dict[str, list[Canonical]]()  # canonical tensor -> those that share a scale with it
    start, scratch_ = gathered.start((0, 0)), gathered.name("scratch")
    for key, one in coded.items():
        roles = {each.role: place for each, place in zip(one.kept, laid[key], strict=False)}  # then scales of the cache
        (file, codes), (_, scales), outer = roles["codes"], roles["scales"], roles.get("outer")
        here, name, like = gathered.name(file.name), gathered.name(one.entry.name), id(one.entry.like)
        over, over_at = (-1, 0) if outer is None else (here, outer[1].offset)
        for number, (box, tensor) in enumerate(matrices[key]):
            asked = _asked(coding.recipe, one, box, held, joint)
            given = weight_scale(coding.source_scales, coding.recipe, asked, one.own)
            if given is None:
                measured |= asked
            alike = like, one.own, number
            if alike not in known:
                stored = {role: t for role, (_, t) in roles.items()}
                known[alike] = _quantize(coding.recipe, one, tensor, number, stored, gathered)
            form, (codes_gap, scales_gap, over_gap) = known[alike]
            more = gathered.more((None, *asked) if given is None else (given,))
            at = codes.offset + codes_gap
            ids = form, name, start, more, scratch_, here, here, over
            gathered.row((*ids, tensor.offset, at, at, scales.offset + scales_gap, over_at + over_gap))
        for role in ("input", "shape"):
            if role in roles:
                numbers = (_input(coding, one),) if role == "input" else tuple(map(float, one.entry.shape))
                gathered.add(_put(*roles[role], numbers))
    put_scales(cache, laid, gathered)
    _measure(measured, held, gathered)


def put_scales(known: Mapping[Key, Scaled], laid: Laid, gathered: Gathered) -> None:
    """Gather the steps that write scales that are known."""
    for key, scaled in known.items():
        place = next((file, tensor) for file, tensor in laid[scaled.beside] if tensor.name == key[1])
        gathered.add(_put(*place, (scaled.value,)))


def _put(file: TargetFile, tensor: TargetTensor, numbers: tuple[float, ...]) -> Put:
    return Put(tensor.name, tensor.shape, Place(file.name, tensor.offset, dense_strides(tensor.shape), tensor.dtype), numbers)


def _measure(measured: Mapping[str, tuple[str, int | None]], held: Mapping[str, Held], gathered: Gathered) -> None:
    """Gather what finds the largest magnitudes of some canonical tensors, or of one expert of them."""
    known = dict[tuple[int, int | None], list[tuple[int, int, int, int]]]()  # number of the piece, form, start, gap
    for name, (wide, expert) in measured.items():
        cut_, spots = held[wide].cut, held[wide].spots
        alike = id(cut_), expert
        if alike not in known:
            known[alike] = found = []
            for number in range(len(spots)) if expert is None else cut_.near(expert, 1):
                piece = cut_.pieces[number]
                wanted = piece.box if expert is None else Box((expert, *piece.box.start[1:]), (1, *piece.box.shape[1:]))
                shared = intersect(piece.box, wanted)
                if shared is not None:
                    place = cut(piece, shared)
                    form = gathered.form(Measure("", (), shared.shape, begun(place), "", piece.encoding))
                    found.append((number, form, gathered.start(shared.start), place.offset))
        for number, form, start, gap in known[alike]:
            source, scales, outer, source_at, first, scales_at, outer_at = spots[number]
            ids = form, gathered.name(wide), start, gathered.more((name,)), source, -1, scales, outer
            gathered.row((*ids, source_at + gap, 0, first, scales_at, outer_at))


def _asked(
    recipe: Recipe, one: Coded, box: Box, held: Mapping[str, Held], joint: dict[str, list[Canonical]]
) -> dict[str, tuple[str, int | None]]:
    """Return what a matrix's scale follows from: a name for each canonical tensor, or for one expert of it."""
    if recipe.block != (0, 0) and not recipe.scale.outer:
        return {}
    asked = dict[str, tuple[str, int | None]]()
    for name, view in zip(one.entry.names, one.entry.like.views, strict=True):
        if name not in joint:
            joint[name] = _joint(recipe, name, held)
        if not name.tensor.each_expert:
            asked |= {tensor: (tensor, None) for tensor in joint[name]}
            continue
        expert = view.box.start[0] + (box.start[0] if len(one.entry.shape) > 2 else 0)
        asked |= {f"{tensor}[{expert}]": (tensor, expert) for tensor in joint[name]}
    return asked


def _joint(recipe: Recipe, name: Canonical, held: Collection[str]) -> list[Canonical]:
    """Return the canonical tensors that share a whole tensor's scale with this one, itself included."""
    style = STYLES[recipe.style]
    if name.tensor.reads not in style.joint.get(recipe.scheme, ()) or name.tensor.part in style.alone:
        return [name]
    return [each for each in name.fellows() if each in held and each.tensor.part not in style.alone]


def _quantize(
    recipe: Recipe, one: Coded, tensor: TargetTensor, number: int, stored: Mapping[str, TargetTensor], gathered: Gathered
) -> tuple[int, tuple[int, int, int]]:
    """Return the form of coding a matrix, and how many bytes after those of the first its codes, scales and the one over them lie."""
    count = len(_matrices(one.entry))

    def gap(role: str) -> int:
        return number * (prod(stored[role].shape) // count) * DTYPES[stored[role].dtype].nbytes if role in stored else 0

    def place(role: str) -> Place:
        held = stored[role]
        width = held.shape[-1] if len(held.shape) > 1 else 1
        if role == "scales" and recipe.block[0] != 0 and len(held.shape) == 4:
            width = held.shape[2]
        return Place("", 0, (width, 1), held.dtype)

    rows, columns = tensor.shape[-2:]
    source = Place("", 0, (columns, 1), tensor.dtype, "scratch")
    encoding = Encoding(recipe.name, (rows, columns), 0, place("scales"), place("outer") if "outer" in stored else None)
    form = Make("quantize", "", (), (rows, columns), source, place("codes"), encoding)
    return gathered.form(form), (gap("codes"), gap("scales"), gap("outer"))


def _input(coding: Coding, one: Coded) -> float:
    """Return the scale of a weight's activations: that of the largest input among what is fused or shares it."""
    names = []
    for name in one.entry.names:
        names += name.fellows()
    found = [amax for name in names if (amax := coding.amaxes.get((name, "input"))) is not None]
    own = activation_scale(coding.source_scales, coding.recipe, names, one.own) if not found else None
    if own is not None:
        return own
    if not found:
        dynamic = coding.recipe.scheme in STYLES[coding.recipe.style].dynamic
        otherwise = ", or use --activations dynamic" if dynamic else ""
        if coding.amaxes:  # transformers computes no layer that predicts further tokens, and NVIDIA publishes them plain
            layer, module = LAYER.match(one.entry.name), one.entry.name.removesuffix(".weight")
            left = f"{layer[0]}*" if layer else module
            otherwise += f", or leave what it does not reach as it is: --exclude '{left}'"
        raise _unknown(coding, one.entry, "input", otherwise)
    return input_scale(coding.recipe, max(found), one.own)


def cache_tensors(coding: Coding | None, wanted: Sequence[Entry], dtypes: Mapping[Key, str]) -> dict[Key, Scaled]:
    """Return the scales of cached keys and values, by unit and name."""
    if coding is None or not coding.cache:
        return {}
    style = STYLES[coding.recipe.style]
    found: dict[Key, Scaled] = {}
    for entry in wanted:
        for tensor in entry.names:
            what = tensor.tensor.cached
            if not what:
                continue
            name = beside(entry.name, style.cache["kv".index(what)])
            scale = _cache_scale(coding, entry, tensor, what)
            if style.one_cache and (entry.unit, name) in found:
                scale = max(scale, found[entry.unit, name].value)
            dtype = dtypes[entry.unit, entry.name] if style.cache[2] == "own" else style.cache[2]
            found[entry.unit, name] = Scaled((entry.unit, entry.name), Kept("cache", name, dtype, SCALAR[style.scalar]), scale)
    if not found:
        raise NotSupported("the family has no keys and values of a kind whose cache can have scales")
    return found


def constant_tensors(target: Dialect, wanted: Sequence[Entry], said: Said | None, own: str) -> dict[Key, Scaled]:
    """Return what a program stores beside some tensors that is no weight, by unit and name; of codes more than of weights."""
    found: dict[Key, Scaled] = {}
    for entry, one, name in constants(target, wanted, "" if said is None else said.style.name, own):
        found[entry.unit, name] = Scaled((entry.unit, entry.name), Kept("constant", name, one.dtype, one.shape), one.value)
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
