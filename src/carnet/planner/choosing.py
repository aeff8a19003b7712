"""Which stored tensors of a target become codes, which stay as they are, and what a config says of those.

A program codes modules of one class, and which class holds a weight shows in how it is stored: a linear layer as ``[out, in]`` under
``X.weight``. The rows of inputs, ``[in, out]``, are transformers' Conv1D; a matrix for each expert without ``.weight`` is a parameter
of a module that holds all of them.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from carnet.dialects.entry import Entry, as_linear, is_conv1d, is_matrix_beside
from carnet.dialects.rows import Dialect, modules_of
from carnet.errors import BadRequest, NotSupported
from carnet.formats.stored import Key
from carnet.model.fields import Config
from carnet.model.model import holds, value
from carnet.model.tensors import HEAD, LINEAR, Tensor
from carnet.planner.given_scales import by_views
from carnet.quantize.recipes import Recipe, columns_of_a_block
from carnet.quantize.styles import STYLES, Kept, Style, kept


@dataclass(frozen=True, slots=True)
class Coded:
    """One stored tensor of the target that is written as codes."""

    entry: Entry
    own: str  # element type that it is assembled in; "" where its codes are those of the source
    base: str  # what the names of its codes and scales begin with
    kept: tuple[Kept, ...]  # named after that


def choose(
    recipe: Recipe,
    exclude: Sequence[str],
    off: frozenset[str],
    wanted: Sequence[Entry],
    dtypes: Mapping[Key, str],
    *,
    static: bool,
) -> dict[Key, Coded]:
    """Return the entries that are coded, those of a Conv1D turned round; ``off`` are the weights whose quantizers are off."""
    modules = {module_of(entry) for entry in wanted if exclude}
    for pattern in exclude:
        if not any(_is_excluded(module, (pattern,)) for module in modules):
            example = next(module_of(entry) for entry in wanted if _linear(entry))
            raise BadRequest(f"no module of the target is called {pattern!r}", {"option": "--exclude", "example": example})
    linear = {like for like, entry in kinds(wanted).items() if _linear(entry)}
    chosen = [
        entry for entry in wanted if id(entry.like) in linear and not (exclude and _is_excluded(module_of(entry), exclude))
    ]
    chosen = [entry for entry in chosen if not is_off(entry, off)]
    _refuse(recipe, chosen)
    found, alike = dict[Key, Coded](), dict[tuple[int, str], tuple[Kept, ...]]()
    turned = {like for like, entry in kinds(chosen).items() if is_conv1d(entry)}
    for entry in chosen:
        own, entry = dtypes[entry.unit, entry.name], as_linear(entry) if id(entry.like) in turned else entry
        if (like := (id(entry.like), own)) not in alike:
            alike[like] = tuple(kept(recipe, "", entry.shape, own, static=static))
        found[entry.unit, entry.name] = Coded(entry, own, entry.name.removesuffix("weight"), alike[like])
    if not found:
        raise BadRequest("nothing is left to quantize", {"excluded": ", ".join(exclude) or "nothing"})
    if STYLES[recipe.style].whole_experts:
        _check_experts(wanted, found)
    return found


def is_off(entry: Entry, off: frozenset[str]) -> bool:
    """Say whether a weight in a stored tensor was trained under a quantizer that was off."""
    return bool(off) and any(tensor in off for tensor, _ in by_views(entry, ()))


def kinds(wanted: Sequence[Entry]) -> dict[int, Entry]:
    """Return one entry of each that are alike, by what they have in common: of thousands of experts a few hundred are looked at."""
    return {id(entry.like): entry for entry in wanted}


def module_of(entry: Entry) -> str:
    """Name the module of a weight, or the parameter itself where it has a name of its own in one."""
    return entry.name.removesuffix(".weight")


def _is_excluded(module: str, patterns: Sequence[str]) -> bool:
    """Say whether a pattern names a module, or the one that has it as a parameter."""
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def _refuse(recipe: Recipe, chosen: Sequence[Entry]) -> None:
    """Refuse what carnet or the program of a style cannot code, and what its blocks do not divide; what can be left plain is named."""
    broken = {like for like, entry in kinds(chosen).items() if not _divides(recipe, entry)}
    for why, entries in (
        (_stacked(recipe), [*filter(_is_parameter, chosen)]),
        (f"to {recipe.style} a Conv1D is not a linear layer", _conv1ds(recipe, chosen)),
        (f"a block of {recipe.scheme} would not be whole", [entry for entry in chosen if id(entry.like) in broken]),
    ):
        if entries:
            first = entries[0]
            patterns = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", module_of(entry)) for entry in entries})
            facts = {"tensor": first.name, "shape": list(first.shape), "others": len(entries) - 1, "because": why}
            if not _divides(recipe, first):
                facts["needs"] = f"a number of columns that {columns_of_a_block(recipe)} divides"
            remedy = " ".join(f"--exclude '{pattern}'" for pattern in patterns)
            raise NotSupported(f"{first.name!r} cannot be quantized as {recipe.name}", facts, remedy=remedy)


def _stacked(recipe: Recipe) -> str:
    """Say why experts in one tensor are not coded; of modelopt as its exports of GPT-OSS and Llama 4 show."""
    if not STYLES[recipe.style].stacks_experts:
        return f"{recipe.style} codes a module for each expert, and these are one tensor"
    if recipe.scale.kind == "power":
        return f"modelopt's blocks of {recipe.scheme} lie along the outputs of experts in one tensor, not along their inputs"
    return "modelopt has names of its own for the codes of experts in one tensor, which carnet does not write"


def _is_parameter(entry: Entry) -> bool:
    return not entry.name.endswith(".weight")


def _conv1ds(recipe: Recipe, chosen: Sequence[Entry]) -> list[Entry]:
    turned = {like for like, entry in kinds(chosen).items() if is_conv1d(entry)}
    return [] if STYLES[recipe.style].codes_conv1d else [entry for entry in chosen if id(entry.like) in turned]


def _divides(recipe: Recipe, entry: Entry) -> bool:
    shape = as_linear(entry).shape
    return all(shape) and shape[-1] % columns_of_a_block(recipe) == 0


def _check_experts(wanted: Sequence[Entry], coded: Mapping[Key, Coded]) -> None:
    """Refuse to exclude half of a module: TensorRT-LLM quantizes all weights of the experts of a layer, or none."""
    chosen: dict[Key, bool] = {}
    for entry in wanted:
        if any(map(_of_experts, tensors_of(entry))):
            module = entry.name.rsplit(".", 2)[0]
            is_coded = (entry.unit, entry.name) in coded
            if chosen.setdefault((entry.unit, module), is_coded) != is_coded:
                facts = {"option": "--exclude", "module": module}
                remedy = f"--exclude '{module}.*'"
                raise BadRequest("the experts of a layer are quantized whole or not at all", facts, remedy=remedy)


def tensors_of(entry: Entry) -> list[Tensor]:
    """Return what the canonical tensors in a stored one are."""
    return [name.tensor for name in entry.names]


def _linear(entry: Entry) -> bool:
    return all(tensor.role == LINEAR for tensor in tensors_of(entry))


def _of_experts(tensor: Tensor) -> bool:
    return tensor.each_expert and tensor.role == LINEAR


def plain_modules(
    recipe: Recipe, target: Dialect, config: Config, wanted: Sequence[Entry], coded: Mapping[Key, Coded]
) -> list[str]:
    """Return the modules that a config names as not quantized: what looks like a linear layer to the program that reads it."""
    style = STYLES[recipe.style]
    names = {*_heads(style, target, config), *_plain(style, config, wanted, coded)}
    if style.by_patterns:
        names = set(summarized(names, {module_of(one.entry) for one in coded.values()}))
    return sorted(names, key=lambda name: (name != "lm_head", name))


def summarized(plain: Collection[str], coded: Collection[str]) -> Iterator[str]:
    """Yield for each plain module the pattern of the widest part of the model around it in which nothing is coded.

    modelopt 0.47 torch/export/quant_utils.py _prefix_wildcard_summarize_exclude_modules: engines build modules of their own below a
    part (experts in one, fused projections), and ask for those.

    >>> [*summarized(["layers.1.mlp.up", "lm_head"], ["layers.1.attn.q", "layers.10.mlp.up"])]
    ['layers.1.mlp*', 'lm_head']
    """
    held = sorted(coded)

    def begins_one(text: str) -> bool:
        return (at := bisect_left(held, text)) < len(held) and held[at].startswith(text)

    for name in plain:
        parts = [name[:at] for at, letter in enumerate(name) if letter == "."]
        patterns = [(part, mark) for part in parts for mark in ("", ".") if not mark or part not in coded]
        yield next((f"{part}{mark}*" for part, mark in patterns if not begins_one(part + mark)), name)


def _heads(style: Style, target: Dialect, config: Config) -> Sequence[str]:
    """Return the modules of the head that have no tensor: that of a tied model, another name of it."""
    if target.ranked:
        return ("lm_head",)  # modelopt forgets it where there are stages
    names = modules_of(target, HEAD)[: style.heads_named]
    return names if style.heads_named is None else names[: bool(value(config, "tied"))]


def _plain(style: Style, config: Config, wanted: Sequence[Entry], coded: Mapping[Key, Coded]) -> Iterator[str]:
    listed = {LINEAR, *style.lists}
    for entry in wanted:
        if is_matrix_beside(entry):
            yield module_of(entry)
        if (entry.unit, entry.name) in coded:
            continue
        tensors = [tensor for tensor in tensors_of(entry) if tensor.role in listed]
        if not any(holds(style.only_where.get(tensor.part, {}), config) for tensor in tensors):
            continue
        # where experts are parameters of one module, that module is asked about
        one = _is_parameter(entry) or (style.whole_experts and any(map(_of_experts, tensors)))
        yield module_of(entry).rsplit(".", 1)[0] if one else module_of(entry)
