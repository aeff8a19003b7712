"""Codes that go along as they are, joined and cut: a Hugging Face folder of codes becomes the files of an engine's ranks, and back.

Codes lie as weights do, and a scale is one number for a block of rows and columns; so each is a tensor of its own, which lies where the
weight does with its axes divided by what one number stands for::

    weight   q 0 0 0 0 | 1 1 1 1     rows "kv rep dim": heads of 4, two in a block of 8
    scales   q 0         1           rows "kv rep 1"

Whatever is divided so is told of the canonical axes alone: both sides have the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from carnet.algebra.box import Box, whole
from carnet.algebra.layout import Pattern, View
from carnet.dialects import kinds
from carnet.dialects.entry import Entry, Like, apart, as_linear
from carnet.dialects.kinds import SHARDS, UNSHARED, Kind
from carnet.dialects.rows import Dialect
from carnet.errors import NotSupported
from carnet.formats.stored import Key, Stored, reshaped
from carnet.inventory.survey import Inventory
from carnet.model.fields import Config
from carnet.model.model import canonical_shapes
from carnet.model.tensors import LINEAR, STATE, Canonical
from carnet.planner.choosing import Coded
from carnet.planner.coding import Laid, Scaled
from carnet.plans.request import Request
from carnet.quantize.recipes import BY_NAME, PACKED, WHOLE, Recipe
from carnet.quantize.styles import STYLES, Kept, beside, kept
from carnet.steps import TargetFile, TargetTensor

CACHE = "cache"  # the scale of what is kept of a tensor's products
REMEDY = "--dtype bf16 dequantizes them"
Shape = tuple[int, ...]


def is_joined(source: Inventory, target: Dialect, request: Request) -> bool:
    """Say whether codes go along under names of another program; refuse those that this program does not load."""
    asked = request.dtype is not None or request.quantize is not None
    sides = source.dialect.kind, target.kind
    both = all(kind.companions and (kind.files == SHARDS or kind.loads) for kind in sides)
    if not source.coded or asked or not both or (source.dialect == target and not target.ranked):
        return False
    engine = next(kind for kind in sides if kind.loads)
    for key, one in source.coded.items():
        why = _refused(source, engine, BY_NAME[one.recipe], source.entries[key], request.ep)
        if why:
            facts = {"tensor": one.codes.label, "quantized": one.recipe, "because": why}
            raise NotSupported(f"{engine.name} does not load these codes as they are", facts, remedy=REMEDY)
    return True


def _refused(source: Inventory, engine: Kind, recipe: Recipe, entry: Entry, ranks: int) -> str:
    """Say why an engine does not load codes as they are published, or why nobody can say how; "" where it does."""
    said, of, loads = source.said, entry.names[0].tensor, engine.loads.get(recipe.name)
    assert said is not None, "codes are told by the config"
    style = STYLES[recipe.style]
    static = recipe.scheme in style.inputs and (of.each_expert or recipe.scheme not in style.dynamic)
    reasons = {
        "its layers have no parameters for them": loads is None,
        "its layers of experts have no parameters for them": of.each_expert and loads == kinds.LINEAR,
        "its kernel decides whether a rank has the scales of all experts": of.each_expert and loads == UNSHARED and ranks > 1,
        "it looks for scales of activations, and there are none": static and not said.static,
        "modules have codes of several kinds": bool(said.each),
        "the scales of a cache of keys and values go to ranks alone": said.cache and source.dialect.ranked,
        "the head is no linear layer": of.role != LINEAR,
        "adapters change what they mean": bool(source.changes.of),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def joined(source: Inventory, target: Dialect, config: Config, wanted: Sequence[Entry]) -> dict[Key, Coded]:
    """Return the entries of a target that are codes, with all that stands beside them."""
    assert source.said is not None, "codes are told by the config"
    recipes, found = _recipes(source), dict[Key, Coded]()
    alike = dict[int, tuple[Kept, ...]]()
    for entry in wanted:
        here = {recipes.get(name) for name in entry.names}
        if here == {None}:
            continue
        recipe, *others = here
        if recipe is None or others:
            facts = {
                "tensor": entry.name,
                "found": ", ".join(sorted("no codes" if each is None else each.name for each in here)),
            }
            raise NotSupported("parts that are joined in one tensor are quantized otherwise", facts, remedy=REMEDY)
        key = entry.unit, entry.name
        if not target.ranked and STYLES[recipe.style].blocks_apart:
            facts = {"tensor": entry.name, "quantized": recipe.name}
            raise NotSupported(
                "a folder has these codes with an axis for blocks, which carnet does not write", facts, remedy=REMEDY
            )
        entry = entry if target.ranked else as_linear(entry)
        if id(entry.like) not in alike:
            parts = tuple(rows for rows, _ in apart(entry)) if target.ranked else ()
            own = str(config["dtype"])
            alike[id(entry.like)] = tuple(kept(recipe, "", entry.shape, own, static=source.said.static, parts=parts))
        found[key] = Coded(entry, "", entry.name.removesuffix("weight"), alike[id(entry.like)])
    return found


def _recipes(source: Inventory) -> dict[Canonical, Recipe]:
    return {name: BY_NAME[one.recipe] for key, one in source.coded.items() for name in source.entries[key].names}


class Parts:
    """Codes and what stands beside them, as tensors of their own."""

    def __init__(self, shapes: Mapping[Canonical, Shape], *, ranked: bool) -> None:
        self._shapes, self._ranked = shapes, ranked
        self._known = dict[tuple[int, str], tuple[Like, tuple[int, ...], list[Shape]]]()  # those of all layers are alike
        self.shapes = dict[Canonical, Shape]()  # of what they hold

    def of(self, entry: Entry, recipe: Recipe, each: Kept, name: str) -> Entry:
        """Return the entry of one stored tensor of a coded weight."""
        shared = each.role == "input" and recipe.block == WHOLE and entry.names[0].tensor.each_expert
        if (key := (id(entry.like), each.role)) not in self._known:
            block = {"codes": (1, PACKED[recipe.packing]), "scales": recipe.block}.get(each.role, WHOLE)
            parts = apart(entry) if self._ranked and not shared else [(entry.shape[-2], tuple(range(len(entry.names))))]
            self._known[key] = _divided(entry, block, each.shape, parts, [self._shapes[name] for name in entry.names])
        like, numbers, shapes = self._known[key]
        names = tuple(_mark(entry.names[at], each.role, shared=shared) for at in numbers)
        self.shapes |= zip(names, shapes, strict=True)
        return Entry(entry.unit, name, like, (names,))


def of_source(source: Inventory) -> tuple[Inventory, dict[Canonical, Shape]]:
    """Return a source whose codes and scales are tensors of their own, and the shapes of all its canonical tensors."""
    shapes = canonical_shapes(source.config)
    parts = Parts(shapes, ranked=source.dialect.ranked)
    entries = {key: entry for key, entry in source.entries.items() if key not in source.coded}
    plain = {name for entry in entries.values() for name in entry.names}
    tensors = {key: source.checkpoint.tensors[key] for key in entries}
    for key, one in source.coded.items():
        inputs = [stored for stored in one.others if not stored.name.endswith(".weight_shape")]
        roles = ("codes", one.codes), ("scales", one.scales), ("outer", one.outer), *(("input", each) for each in inputs)
        for role, stored in roles:
            if stored is not None:
                place = stored.unit, stored.name
                each = Kept(role, stored.name, stored.dtype, stored.shape)
                entries[place] = parts.of(source.entries[key], BY_NAME[one.recipe], each, stored.name)
                tensors[place] = reshaped(stored, entries[place].shape)
    for (unit, name), (mark, stored) in _cached(source).items():
        entries[unit, name] = _number(mark, unit, name, stored.shape)
        tensors[unit, name], parts.shapes[mark] = stored, ()
    checkpoint = replace(source.checkpoint, tensors=tensors)
    held = {name: shape for name, shape in shapes.items() if name in plain} | parts.shapes
    return replace(source, checkpoint=checkpoint, entries=entries, coded={}), held


def places(
    source: Inventory, target: Dialect, coded: Mapping[Key, Coded], laid: Laid, shapes: Mapping[Canonical, Shape]
) -> Iterator[tuple[Entry, Box, TargetFile, TargetTensor]]:
    """Yield where codes and scales come to lie; refuse a target that has numbers which the source has not: ``shapes`` are those."""
    parts, recipes = Parts(canonical_shapes(source.config), ranked=target.ranked), _recipes(source)
    for key, one in coded.items():
        for each, (file, tensor) in zip(one.kept, laid[key], strict=False):  # then constants
            entry = parts.of(one.entry, recipes[one.entry.names[0]], each, tensor.name)
            if any(shapes.get(name) != parts.shapes[name] for name in entry.names):
                facts = {"tensor": tensor.name, "because": "the source has another number of scales for what is joined in it"}
                raise NotSupported("the scales of these codes cannot be joined", facts, remedy=REMEDY)
            yield entry, whole(entry.shape), file, tensor


def cached(
    wanted: Sequence[Entry], target: Dialect, constants: Mapping[Key, Scaled], laid: Laid, shapes: Mapping[Canonical, Shape]
) -> dict[Key, tuple[Entry, Box, TargetFile, TargetTensor]]:
    """Return the constants of a target in whose place a scale of cached keys or values stands, with where that lies."""
    entries, found = {(entry.unit, entry.name): entry for entry in wanted}, {}
    what = {one.name: one.cached for those in target.constants.values() for one in those if one.cached}
    for (unit, name), scaled in constants.items():
        of = next((each for end, each in what.items() if name.endswith(f".{end}")), "")
        for tensor in entries[scaled.beside].names:
            if of and tensor.tensor.cached == of and (mark := _mark(tensor, CACHE, shared=False)) in shapes:
                file, there = next((file, each) for file, each in laid[scaled.beside] if each.name == name)
                entry = _number(mark, unit, name, there.shape)
                found[unit, name] = entry, whole(there.shape), file, there
    return found


def _cached(source: Inventory) -> dict[Key, tuple[Canonical, Stored]]:
    """Return the scales of cached keys and values of a folder, each with the canonical tensor that it is."""
    found = dict[Key, tuple[Canonical, Stored]]()
    for (unit, _), entry in source.entries.items() if source.said is not None and source.said.cache else ():
        for name in entry.names:
            if name.tensor.cached:
                assert source.said is not None, "it has said of the cache"
                key = unit, beside(entry.name, source.said.style.cache["kv".index(name.tensor.cached)])
                if key in source.scales:
                    found[key] = _mark(name, CACHE, shared=False), source.scales[key]
    return found


def _number(mark: Canonical, unit: str, name: str, stored: Shape) -> Entry:
    """Return the entry of one number."""
    view = View("", Box((), ()), (0,) * len(stored), ())
    return Entry(unit, name, Like(stored, stored, (view,), (), "", Pattern("", (), ()), {}, ((),), ""), ((mark,),))


def _mark(name: Canonical, role: str, *, shared: bool) -> Canonical:
    """Name what stands beside a tensor; gate and up of an expert read the same, and may have one scale for it."""
    part = "moe.gate" if shared and name.tensor.part == "moe.up" else name.tensor.part
    return Canonical(replace(name.tensor, part=f"{part} {role}", role=STATE), name.layer)


def _divided(
    entry: Entry, block: tuple[int, int], stored: Shape, parts: Sequence[tuple[int, tuple[int, ...]]], shapes: Sequence[Shape]
) -> tuple[Like, tuple[int, ...], list[Shape]]:
    """Return how numbers lie that stand for blocks of a matrix each, of which tensors they are, and how many are of each in all.

    ``block`` has 0 for all of a part, whose one number is that of its first tensor.
    """
    tall, wide = (
        (len(parts) if block[0] == 0 else -(-entry.shape[-2] // block[0])),
        -(-entry.shape[-1] // (block[1] or entry.shape[-1])),
    )
    views, numbers, found = list[View](), list[int](), list[Shape]()
    for part, (_, members) in enumerate(parts):
        for at in members[:1] if block[0] == 0 else members:
            made = _Divided(entry.like.views[at], shapes[at])
            for dim, size in zip((len(entry.shape) - 2, len(entry.shape) - 1), block, strict=True):
                if not made.divide(dim, size, part if dim == len(entry.shape) - 2 else 0):
                    raise _undivided(entry, block)
            views.append(made.view)
            numbers.append(at)
            found.append(tuple(made.full))
    if entry.padding:
        raise _undivided(entry, block)
    shape = (*entry.shape[:-2], tall, wide)
    return replace(entry.like, shape=shape, stored=stored, views=tuple(views), dtype=""), tuple(numbers), found


class _Divided:
    """A view whose axes are divided by what a number stands for."""

    def __init__(self, view: View, shape: Shape) -> None:
        self.full, self.start, self.count = [*shape], [*view.box.start], [*view.box.shape]
        self.origin, self.dims, self.strides = [*view.origin], [dim for dim, _ in view.places], [s for _, s in view.places]

    @property
    def view(self) -> View:
        """Return it."""
        box = Box(tuple(self.start), tuple(self.count))
        return View("", box, tuple(self.origin), tuple(zip(self.dims, self.strides, strict=True)))

    def divide(self, dim: int, block: int, part: int) -> bool:
        """Divide what lies along a dimension, 0 by all of it; say whether that leaves no block in two."""
        axes = [axis for axis in reversed(range(len(self.full))) if self.dims[axis] == dim and self.strides[axis]]
        if block == 0:
            for axis in axes:
                self._set(axis, 1, 0, 1, 0)
            self.origin[dim] = part
            return True
        if self.origin[dim] % block:
            return False
        self.origin[dim] //= block
        left = block  # what axes further out have still to be divided by
        while axes:
            axis = axes.pop(0)
            full, start, count, stride = self.full[axis], self.start[axis], self.count[axis], self.strides[axis]
            if left == 1:
                if stride % block and count > 1:
                    return False
                self.strides[axis] = max(stride // block, 1)
            elif count > 1 and stride != block // left:
                return False
            elif left % full == 0:
                if count != full:
                    return False
                self._set(axis, 1, 0, 1, 0)
                left //= full
            elif full % left and axes:  # blocks reach over the axis: it and the next are one
                outer = axes[0]
                if self.count[outer] > 1 and (count != full or self.strides[outer] != stride * full):
                    return False
                self._set(axis, full * self.full[outer], start + self.start[outer] * full, count * self.count[outer], stride)
                self._set(outer, 1, 0, 1, 0)
                axes[0] = axis
            else:
                if start % left or (count % left and start + count != full):
                    return False
                self._set(axis, -(-full // left), start // left, -(-count // left), 1)
                left = 1
        return True

    def _set(self, axis: int, full: int, start: int, count: int, stride: int) -> None:
        self.full[axis], self.start[axis], self.count[axis], self.strides[axis] = full, start, count, stride


def _undivided(entry: Entry, block: tuple[int, int]) -> NotSupported:
    because = "a block of its codes would not be whole on a rank, or lies in two tensors that are joined"
    facts = {"tensor": entry.name, "shape": list(entry.shape), "block": list(block), "because": because}
    return NotSupported("codes in these blocks cannot be joined and cut", facts, remedy=REMEDY)
