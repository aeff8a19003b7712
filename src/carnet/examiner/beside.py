"""What stands beside codes and is no part of a weight: scales of activations and of the cache, the shape of what is packed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import isfinite, prod

import numpy as np

from carnet.algebra.box import volume, whole
from carnet.architectures.known import dialect_of
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry, apart, is_matrix_beside
from carnet.dialects.rows import modules_of
from carnet.dtypes import array_type
from carnet.examiner.asked import Asked
from carnet.examiner.codes import numbers
from carnet.examiner.compare import Finding, Side
from carnet.examiner.matrix import own_type
from carnet.examiner.scales import LARGEST, input_scale, kept_scale, name_scales
from carnet.formats.stored import Key, Stored, label_of
from carnet.inventory.sorting import cache_scales
from carnet.model.tensors import HEAD, LINEAR, PLAIN, Canonical
from carnet.quantize.lists import excluding
from carnet.quantize.reading import Said
from carnet.quantize.recipes import BY_NAME, Recipe
from carnet.quantize.styles import STYLES

Amaxes = Mapping[tuple[str, str], float]  # (canonical tensor, "input", "k" or "v") -> the largest magnitude that was seen


def check_beside(source: Side, target: Side, asked: Asked) -> Iterator[Finding]:
    """Yield what is wrong with the numbers that stand beside codes."""
    said = target.inventory.said
    if said is None:
        return
    known = _known(source, asked)
    cached = {which: amax for which, amax in source.source_scales.amaxes.items() if which[1] in ("k", "v")}
    if joined := said == source.inventory.said and any(side.inventory.dialect.kind.loads for side in (source, target)):
        yield from _moved(source, target)
    else:
        yield from _inputs(source, target, asked, known)
        yield from _lost(source, target)
    yield from _cache(source, target, said, asked, {**cached, **known})
    for one in target.inventory.coded.values():
        for stored in one.others:
            found = numbers(target.tensor_files, stored).reshape(-1)
            if stored.name.endswith(".weight_shape") and found.tolist() != list(one.shape):
                yield Finding("another shape", stored.name, stored.label, f"expected {list(one.shape)}, found {found.tolist()}")
    if not joined and (
        said != source.inventory.said or source.inventory.coded.keys() != target.inventory.coded.keys()
    ):  # else the lists are the source's own, which name its modules
        yield from _ignored(target, said)


def _before(source: Side, target: Side, key: Key) -> float | None:
    """Return a scale of the source's that a target keeps, whose codes are the source's own."""
    stored = source.inventory.scales.get(key) if source.inventory.said == target.inventory.said else None
    return None if stored is None else float(numbers(source.tensor_files, stored).reshape(-1)[0])


def _lost(source: Side, target: Side) -> Iterator[Finding]:
    """Yield the scales beside the source's codes that a target lacks whose codes these are."""
    kept = source.inventory.said == target.inventory.said
    for key in source.inventory.scales.keys() - target.inventory.scales.keys() if kept else ():
        yield Finding("missing", key[1], label_of(key), "the source has it")


def _moved(source: Side, target: Side) -> Iterator[Finding]:
    """Check the scales of activations that lie beside the same codes under other names: each tensor has the number that it had."""
    before, after = (dict(_stated(side)) for side in (source, target))
    for which, (found, stored) in after.items():
        expected = before.get(which, (None, None))[0]
        if found != expected:
            yield Finding("activations: scales differ", which[0], stored.label, f"expected {expected}, found {found:g}")
    for which in before.keys() - after.keys():
        yield Finding("missing", which[0], before[which][1].label, "the source has a scale of activations for it")


def _stated(of: Side) -> Iterator[tuple[tuple[Canonical, int], tuple[float, Stored]]]:
    """Yield whose activations a checkpoint has a scale of: a tensor, or one expert of it (else 0), the number and where it stands."""
    for key, one in of.inventory.coded.items():
        recipe, entry = BY_NAME[one.recipe], of.inventory.entries[key]
        name = STYLES[recipe.style].inputs.get(recipe.scheme)
        for stored in (each for each in one.others if name and each.name.endswith((f".{name}", f"_{name}"))):
            held = numbers(of.tensor_files, stored).astype(np.float64).reshape(prod(one.shape[:-2]), -1)
            for part, (_, members) in enumerate(apart(entry)):
                for at in members:
                    tensor = entry.names[at]
                    first = entry.reading.shares["expert"].start if tensor.tensor.each_expert else 0
                    for expert, each in enumerate(held):
                        yield (tensor, first + expert), (float(each[part if len(each) > 1 else 0]), stored)


def _known(source: Side, asked: Asked) -> Amaxes:
    """Tie what calibration found to canonical tensors: the largest, where experts have one each."""
    found: dict[tuple[str, str], float] = {}
    config = {**source.inventory.config, "padded_vocab": None, "tower": ""}
    spelled = dialect_of(source.inventory.family, "hf", config)
    for entry in entries(spelled, config, None, coded=True) if asked.amax else ():
        for what in ("input", "k", "v"):
            amax = asked.amax.get(f"{entry.name.removesuffix('.weight')}.{what}_amax")
            for view in entry.views if amax is not None else ():
                found[view.tensor, what] = max(found.get((view.tensor, what), 0.0), amax or 0.0)
    return found


def _inputs(source: Side, target: Side, asked: Asked, known: Amaxes) -> Iterator[Finding]:
    """Check the scales of activations; what reads the same activations has the same, on all ranks."""
    groups: dict[tuple[Canonical, ...], list[tuple[Stored, float]]] = defaultdict(list)
    for key, one in target.inventory.coded.items():
        recipe = BY_NAME[one.recipe]
        name = STYLES[recipe.style].inputs.get(recipe.scheme, "")
        for stored in one.others:
            if not name or not stored.name.endswith((f".{name}", f"_{name}")):
                continue
            found = float(numbers(target.tensor_files, stored).reshape(-1)[0])
            entry = target.inventory.entries[key]
            readers = tuple(sorted({reader for name in entry.reading.tensors[0] for reader in name.fellows()}))
            seen = [amax for reader in readers if (amax := known.get((reader, "input"))) is not None]
            own = own_type(source, target, entry, asked.request.dtype)
            right = input_scale(recipe, max(seen), own) if seen else _brought(source, recipe, readers, own)
            before = _before(source, target, (stored.unit, stored.name))
            right = before if right is None else right
            if right is not None:
                right = float(np.float64(right).astype(array_type(stored.dtype)))
                if found != right:
                    yield _wrong("activations: ", entry, stored, found, right)
            elif not (isfinite(found) and found > 0):
                yield Finding("activations: no positive number", entry.reading.tensors[0][0], stored.label, f"found {found:g}")
            if before is None:  # else a source's own, whatever it is
                groups[readers].append((stored, found))
    for readers, held in groups.items():
        odd = next((stored for stored, found in held if found != held[0][1]), None)
        if odd is not None and not any((reader, "input") in known for reader in readers):
            yield Finding("activations: scales differ", ", ".join(readers), odd.label, f"{held[0][0].label} has another")


def _brought(source: Side, recipe: Recipe, readers: Iterable[str], own: str) -> float | None:
    """Return the scale of activations that the source itself says, from training or from calibration."""
    scales, amaxes = (
        [said[reader, "input"] for reader in readers if (reader, "input") in said]
        for said in (source.source_scales.scales, source.source_scales.amaxes)
    )
    if scales and recipe.scheme == "fp8":
        return float(kept_scale(recipe, max(scales), own)[0])
    return input_scale(recipe, max(amaxes), own) if amaxes else None


def _wrong(whose: str, entry: Entry, stored: Stored, found: float, right: float) -> Finding:
    what = name_scales(np.array([found], np.float32), np.array([right], np.float32))
    what = what.replace("they do not follow from the weights", "not what calibration found")
    return Finding(whose + what, ", ".join(entry.reading.tensors[0]), stored.label, f"expected {right:g}, found {found:g}")


def _cache(source: Side, target: Side, said: Said, asked: Asked, known: Amaxes) -> Iterator[Finding]:
    """Check the scales of cached keys and values; of ranks they are never below one, and one serves both."""
    style = said.style
    for key, name in cache_scales(said, target.inventory.entries):
        entry, stored = target.inventory.entries[key], target.inventory.scales.get((key[0], name))
        if stored is None or volume(whole(stored.shape)) != 1:
            continue  # the survey has said so
        found = float(numbers(target.tensor_files, stored).reshape(-1)[0])
        tensors = [name for name in entry.reading.tensors[0] if name.tensor.cached]
        seen = [amax for name in tensors if (amax := known.get((name, name.tensor.cached))) is not None]
        right = asked.request.kv_scale
        if right is None and seen:
            right = max(1.0, max(seen) / LARGEST) if style.one_cache else max(seen) / LARGEST
        if right is None:
            right = _before(source, target, (key[0], name))
        if right is not None:
            right = float(np.float64(right).astype(array_type(stored.dtype)))
            if found != right:
                yield _wrong("cache: ", entry, stored, found, right)
        elif not (isfinite(found) and found > 0):
            yield Finding("cache: no positive number", tensors[0], stored.label, f"found {found:g}")


def _ignored(target: Side, said: Said) -> Iterator[Finding]:
    """Check the names that the config excludes: an engine must look for scales where they are, and nowhere else."""
    if said.recipe is None:
        return
    # what a program calls the head that it builds, whether that has a tensor of its own or not
    heads = modules_of(target.inventory.dialect, HEAD)[slice(*said.style.heads_asked)]
    for file in said.lists:
        excluded_by = excluding(replace(said, lists={file: said.lists[file]}))
        for key, entry in target.inventory.entries.items():
            module, excluded = key[1].removesuffix(".weight"), excluded_by(key[1]) is not None
            if excluded and key in target.inventory.coded:
                detail = "an engine would read codes as weights"
                yield Finding("the config excludes what is quantized", module, file, detail)
            elif not excluded and key not in target.inventory.coded and _is_linear(entry) and module not in heads:
                yield _unsaid(module, file)
        tower = [key[1] for key, entry in target.inventory.entries.items() if is_matrix_beside(entry)]
        if tower and not any(excluded_by(name) for name in tower):
            yield _unsaid(tower[0].removesuffix(".weight"), file)
        if heads and not any(excluded_by(f"{head}.weight") for head in heads):
            yield _unsaid(heads[-1], file)


def _unsaid(module: str, file: str) -> Finding:
    return Finding("the config does not exclude what is plain", module, file, "an engine would look for its scales")


def _is_linear(entry: Entry) -> bool:
    """Say whether a tensor is the weight of a linear layer to engines."""
    return all(name.tensor.role in (LINEAR, PLAIN) for name in entry.reading.tensors[0])
