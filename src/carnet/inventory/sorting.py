"""Codes and their scales are told apart from what is a weight as it stands: one key for each weight, that of its name.

What others have published is read in more forms than one; what carnet or a program of a style writes is held to the style's own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from carnet.dialects.entry import Entry, apart, as_linear, turned
from carnet.dtypes import BY_NAME as DTYPES
from carnet.dtypes import FLOATS
from carnet.errors import BadCheckpoint, CarnetError, NotSupported
from carnet.formats.stored import Coded, Key, Stored, label_of, reshaped
from carnet.model.fields import Config
from carnet.model.tensors import HEAD, LINEAR
from carnet.model.tower import tower
from carnet.quantize.lists import excluding
from carnet.quantize.reading import ANEW, Said
from carnet.quantize.recipes import BY_NAME, PACKED, STACKED, Recipe, codes_dtype, scaled_apart
from carnet.quantize.styles import SCALAR, Kept, Style, around, as_loaded, beside, ends_in, is_stacked
from carnet.quantize.styles import kept as kept_beside

CODES = {
    *(codes_dtype(recipe) for recipe in BY_NAME.values()),
    *(dtype for dtype in DTYPES if dtype.startswith(("f4", "f6", "f8"))),
}
BESIDE_TOO = f"where the text is coded, too, cross it --to hf without --dtype, and all goes along as it is; else {ANEW}"
UNNEEDED = ("input", "cache", "shape")  # what stands beside codes and no weight needs


@dataclass(slots=True)
class Sorted:
    """Stored tensors, codes and their scales told apart from what is a weight as it stands."""

    kept: dict[Key, Stored]  # weights, under the names that rows have; one that is coded has the shape that it stands for
    coded: dict[Key, Coded]
    scales: dict[Key, Stored]  # set aside
    problems: list[CarnetError]

    def unbroken(self, entries: Mapping[Key, Entry]) -> dict[Key, Entry]:
        """Return the entries without those of what looks like codes and cannot be read."""
        broken = {
            key: stored.dtype for key, stored in self.kept.items() if stored.dtype not in FLOATS and key not in self.coded
        }
        return {key: entry for key, entry in entries.items() if broken.get(key, entry.dtype) == entry.dtype}


def sort_out(said: Said, kept: Mapping[Key, Stored], where: str, *, published: bool, loaded: bool = False) -> Sorted:
    """Make one key, that of the weight, of codes and their scales; set aside the other scales that the style knows.

    ``loaded`` says that they lie as an engine has them before it packs them.
    """
    left, done = dict(kept), Sorted({}, {}, {}, [])
    said = replace(said, style=as_loaded(said.style)) if loaded else said
    style = said.style
    for key, stored in kept.items():
        recipe = said.recipe_of(stored.name)
        if recipe is not None and is_stacked(style, stored.shape) and not loaded:
            recipe = STACKED.get(recipe.name)
        if recipe is not None and _is_coded(recipe, style, stored, loaded=loaded):
            _take_coded(said, recipe, left.pop(key), left, done, where, published=published, loaded=loaded)
    if said.recipes and not done.kept:
        facts: dict[str, object] = {"where": where, "quantized": said.coded_as}
        done.problems.append(BadCheckpoint("the config says that weights are quantized, and none is", facts))
    places = {place.rsplit("/")[-1] for place in style.cache[:2]} - {""}
    lonely = {style.scales, style.outer, *style.inputs.values(), "weight_shape"} - {""}
    for key, stored in left.items():
        last, label = key[1].rsplit(".", 1)[-1], label_of(key)
        if last in places and said.cache:
            done.scales[key] = stored
        elif last in places or any(ends_in(key[1], each) for each in lonely):
            what = "of the cache, of which the config says nothing" if last in places else "that stands beside no codes"
            remedy = f"--drop '*.{last}' leaves all of this name behind" if last in places else f"--drop '{key[1]}'"
            done.problems.append(
                BadCheckpoint(f"{label!r} is a scale {what}", {"where": where, "tensor": label}, remedy=remedy)
            )
        else:
            done.kept[key] = stored
            if stored.dtype not in FLOATS:
                facts = {
                    "where": where,
                    "tensor": label,
                    "found": stored.dtype,
                    "quantized": said.coded_as or "the cache",
                }
                facts |= {"because": "codes of experts in one tensor are not read"} if ".experts." in key[1] else {}
                what = f"{label!r} is of a type that the config does not explain"
                done.problems.append(NotSupported(what, facts, remedy=ANEW))
    return done


def as_coded(said: Said, one: Coded, entry: Entry) -> Entry:
    """Return the entry of codes: a program that codes transformers' Conv1D stores it as a linear layer, others turn experts round."""
    return (turned if BY_NAME[one.recipe].turned or said.style.turns_experts else as_linear)(entry)


def in_parts(coded: dict[Key, Coded], found: dict[Key, Entry], where: str) -> Iterator[CarnetError]:
    """Tell codes that an engine joins the rows of each part that has scales of its own; leave out what has others, and yield it."""
    for key, one in [*coded.items()]:
        recipe, parts = BY_NAME[one.recipe], tuple(rows for rows, _ in apart(found[key]))
        wanted = {each.name: each for each in kept_beside(recipe, key[1], one.shape, "f32", static=True, parts=parts)}
        for stored in (*one.parts[1:], *one.others):
            if stored.shape != (right := wanted[stored.name].shape):
                facts = {"where": where, "tensor": stored.label, "expected": list(right), "found": list(stored.shape)}
                yield BadCheckpoint(f"the scale {stored.label!r} has another shape than it must have", facts)
                coded.pop(key, None)
                found.pop(key, None)
        if key in coded:
            coded[key] = replace(one, parts_of=parts if scaled_apart(recipe) else ())


def _is_coded(recipe: Recipe, style: Style, stored: Stored, *, loaded: bool) -> bool:
    codes = style.codes_of(recipe)
    named = stored.name.endswith(f"_{codes}") if loaded else is_stacked(style, stored.shape)
    if not (named or ends_in(stored.name, codes)) or stored.dtype != codes_dtype(recipe):
        return False
    apart = recipe.block[1] // PACKED[recipe.packing]  # bytes of a block
    return stored.shape[3:] == (apart,) if style.blocks_apart else len(stored.shape) > 1


def _take_coded(
    said: Said,
    recipe: Recipe,
    codes: Stored,
    left: dict[Key, Stored],
    done: Sorted,
    where: str,
    *,
    published: bool,
    loaded: bool,
) -> None:
    """Take codes together with everything that the style keeps beside them."""
    base = codes.name.removesuffix(said.style.codes_of(recipe))
    weight = base if is_stacked(said.style, codes.shape) and not loaded else base + said.style.weight
    if said.style.blocks_apart:
        codes = reshaped(codes, (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))
    *experts, rows, columns = around(recipe, codes.shape)
    key, shape = (codes.unit, weight), (*experts, rows, columns * PACKED[recipe.packing])
    scale = left.get((codes.unit, base + said.style.scales))
    own = scale.dtype if scale is not None and scale.dtype in FLOATS else "f32"
    found: dict[str, Stored] = {}
    done.kept[key] = replace(codes, name=key[1], shape=shape)
    complete = True
    for each in kept_beside(recipe, key[1], shape, own, static=said.static, parts=(rows,) if loaded else ()):
        if each.role == "codes":
            continue
        stored = left.pop((codes.unit, each.name), None)
        each = replace(each, shape=stored.shape) if stored is not None and loaded else each  # which its entry will tell
        problem = _wrong(each, stored, codes, where, published=published)
        if problem is not None:
            done.problems.append(problem)
            complete = complete and each.role not in ("scales", "outer")
        if stored is not None:
            found[each.role] = stored
            if each.role not in ("scales", "outer"):
                done.scales[stored.unit, stored.name] = stored
    if complete:
        others = tuple(stored for role, stored in found.items() if role not in ("scales", "outer"))
        done.coded[key] = Coded(recipe.name, shape, codes, found["scales"], found.get("outer"), others)


def _wrong(wanted: Kept, stored: Stored | None, beside: Stored, where: str, *, published: bool) -> CarnetError | None:
    """Say what is wrong with a tensor that must stand beside codes, or beside a projection.

    What others have published may keep scales in another float type, with other dimensions of one, and may lack what no weight needs.
    """
    label = label_of((beside.unit, wanted.name))
    facts = {"where": where, "tensor": label, "beside": label_of((beside.unit, beside.name))}
    if stored is None and published and wanted.role in UNNEEDED:
        return None
    if stored is None:
        return BadCheckpoint(f"the scale {label!r} is missing", facts)
    same_kind = stored.dtype in FLOATS and wanted.dtype in FLOATS and wanted.role != "codes"
    if published and same_kind and _without_ones(stored.shape) == _without_ones(wanted.shape):
        return None
    if (stored.dtype, stored.shape) != (wanted.dtype, wanted.shape):
        facts |= {"expected": f"{wanted.dtype} {list(wanted.shape)}", "found": f"{stored.dtype} {list(stored.shape)}"}
        return BadCheckpoint(f"the scale {label!r} has another type or shape than it must have", facts)
    return None


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def check_lists(said: Said, coded: Mapping[Key, Coded], where: str) -> Iterator[CarnetError]:
    """Yield what is stored as codes though the config says that it is not quantized: programs would read the codes as weights."""
    excluded = excluding(said)
    found = {key: words for key in coded if (words := excluded(key[1])) is not None}
    for key, words in list(found.items())[:1]:
        label = label_of(key)
        facts = {"where": where, "tensor": label, "others": len(found) - 1, "said by": words}
        remedy = "--config with a config.json that does not exclude it, if it is to be read as codes"
        yield BadCheckpoint(f"{label!r} is stored as codes, and the config says that it is not quantized", facts, remedy=remedy)


def coded_beside(config: Config, where: str) -> list[CarnetError]:
    """Return what is wrong with codes in a tower, where no config goes along that says them: programs would read them as weights."""
    found = [each for each in tower(config) if each.dtype in CODES and len(each.dims) > 1]
    facts = {"where": where, "tensor": found[0].name, "found": found[0].dtype, "others": len(found) - 1} if found else {}
    what = "carnet reads no codes beside the text model"
    return [NotSupported(what, facts, remedy=BESIDE_TOO)] if found else []


def unlisted(said: Said | None, named: Mapping[Key, Entry], coded: Mapping[Key, Coded]) -> list[str]:
    """Name the modules that are plain though the config says that they are quantized: engines would look for their scales."""
    if said is None or not said.recipes:
        return []
    roles, excluded = {LINEAR, *({HEAD} & said.style.lists)}, excluding(said)
    plain = [key for key, entry in named.items() if all(name.tensor.role in roles for name in entry.names)]
    return sorted({key[1].removesuffix(".weight") for key in plain if key not in coded and excluded(key[1]) is None})


def check_cache(
    said: Said, named: Mapping[Key, Entry], scales: Mapping[Key, Stored], where: str, *, published: bool
) -> Iterator[CarnetError]:
    """Yield what is wrong with the scales of cached keys and values: there is one beside each projection that makes them."""
    places = {place.rsplit("/")[-1] for place in said.style.cache[:2]} - {""}
    left = {key for key in scales if key[1].rsplit(".", 1)[-1] in places} if said.cache else set[Key]()
    for key, name in cache_scales(said, named):
        stored = scales.get((key[0], name))
        own = stored.dtype if stored is not None and stored.dtype in FLOATS else "f32"
        dtype = own if said.style.cache[2] == "own" else said.style.cache[2]
        problem = _wrong(
            Kept("cache", name, dtype, SCALAR[said.style.scalar]), stored, Stored(*key, "", (), ()), where, published=published
        )
        if problem is not None:
            yield problem
        left.discard((key[0], name))
    for key in sorted(left):
        label = label_of(key)
        yield BadCheckpoint(f"{label!r} is a scale that stands beside no keys or values", {"where": where, "tensor": label})


def cache_scales(said: Said, named: Mapping[Key, Entry]) -> Iterator[tuple[Key, str]]:
    """Yield the names of the scales of the cache, each once, with the entry that it stands beside."""
    seen: set[Key] = set()
    for key, entry in named.items() if said.cache else ():
        for name in entry.names:
            what = name.tensor.cached
            if what and (at := (key[0], beside(entry.name, said.style.cache["kv".index(what)]))) not in seen:
                seen.add(at)
                yield key, at[1]
