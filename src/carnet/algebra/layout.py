"""A *pattern* says how canonical tensors lie in a stored one; from it and the sizes follow strided *views*.

``(kv *) hidden`` with q = ``rep dim``, k = ``dim``, v = ``dim`` is Megatron's fused attention weight: rows grouped by KV head, each
group holding its query rows, then its key rows, then its value rows::

    kv 0: q q q q k v | kv 1: q q q q k v | ...          "*" is where the parts are joined

Parts that follow each other and have a "*" among the same axes of their own take turns there, equally wide: of q = g = ``kv rep * dim``
each head's query rows come before its gate's.

The text has no direction: the same views read a source and write a target. Parallelism is a *share* of a named axis: a rank holds
an interval of ``kv`` or ``ffn`` or ``layer``, and the pattern is folded with that interval in place of the whole axis.
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from carnet.algebra.box import Box
from carnet.algebra.strided import within
from carnet.errors import BadRequest

JOIN = "*"
Parts = (
    Mapping[str, str] | Sequence[tuple[str, str]]
)  # canonical tensor -> its axes in place of the join; pairs, if one is there twice
TOKEN = re.compile(
    r"(?P<space> +)|(?P<axis>[a-z][a-z_]*)(?!\w)|(?P<join>\*)|(?P<one>1)(?!\w)|(?P<open>\()|(?P<close>\))|(?P<stray>\w+|.)",
    re.DOTALL,
)


class BadPattern(ValueError):
    """A pattern of a table that says nothing: what is wrong with it, and where."""

    def __init__(self, what: str, text: str, at: int) -> None:
        line = "".join(char if char.isprintable() else "?" for char in text)  # as long as the text: the caret counts
        super().__init__(f"{what}\n  {line}\n  {' ' * at}^")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern: the stored dimensions, outermost axis first, and what stands in place of the join."""

    text: str  # as written, for messages
    dims: tuple[tuple[str, ...], ...]  # per stored dimension the axes folded into it; "*" where parts are joined
    parts: tuple[tuple[str, tuple[str, ...]], ...]  # (canonical tensor, axes in place of "*"), in stored order

    def turns(self) -> list[tuple[int, int]]:
        """Return of each part which it is of those that take turns, and how many do: (0, 1) of one that stands alone.

        >>> parse("* hidden", {"q": "kv * dim", "gate": "kv * dim", "k": "kv dim"}).turns()
        [(0, 2), (1, 2), (0, 1)]
        """
        alike = [axes if JOIN in axes else at for at, (_, axes) in enumerate(self.parts)]
        runs = (len([*run]) for _, run in itertools.groupby(alike))
        return [(which, many) for many in runs for which in range(many)]


@dataclass(frozen=True, slots=True)
class Share:
    """The indices of one axis that are held somewhere; those past ``size`` are padding."""

    start: int  # first index
    stop: int  # one past the last index; may reach past ``size``
    size: int  # the true number of indices of the axis

    @property
    def held(self) -> int:
        """Count the true indices in this share."""
        return max(0, min(self.stop, self.size) - self.start)


@dataclass(frozen=True, slots=True)
class View:
    """Where a box of one canonical tensor lies in one stored tensor.

    The element with canonical index ``box.start + i`` has the stored index ``origin[d] + sum(i[a] * stride)`` over the axes a whose
    place is (d, stride). An axis that only the stored name shows (``experts.7``) has the place (0, 0).
    """

    tensor: str  # canonical name
    box: Box  # canonical indices
    origin: tuple[int, ...]  # stored index of the box's first element, per stored dimension
    places: tuple[tuple[int, int], ...]  # per canonical axis: (stored dimension, stride in indices of it)


@dataclass(frozen=True, slots=True)
class Slot:
    """One part of a folded pattern, before it is tied to a canonical tensor's axis order."""

    tensor: str
    origin: tuple[int, ...]  # per stored dimension
    places: Mapping[str, tuple[int, int]]  # axis -> (stored dimension, stride)


@dataclass(frozen=True, slots=True)
class Fold:
    """A pattern with sizes: the stored shape, where each part starts, and what is padding."""

    shape: tuple[int, ...]  # elements
    slots: tuple[Slot, ...]
    padding: tuple[Box, ...]  # boxes of the stored tensor that no canonical tensor has


def parse(text: str, parts: Parts, known: Collection[str] | None = None) -> Pattern:
    """Parse a pattern; ``parts`` gives the axes in place of ``*`` for each canonical tensor, in stored order.

    Raises BadPattern where it says nothing, or names an axis that is not ``known`` (None: any may be).

    >>> parse("(kv *) hidden", {"q": "rep dim", "k": "dim", "v": "dim"}).dims
    (('kv', '*'), ('hidden',))
    >>> parse("out 1 in", {"conv": ""}).dims
    (('out',), (), ('in',))
    """
    pairs = [*parts.items()] if isinstance(parts, Mapping) else parts
    joined = [axes for _, axes in pairs] != [""]
    dims = _dims(text, known)
    axes = {axis for folded in dims for axis in folded}
    if not parts:
        raise BadPattern("no tensor is in it", text, 0)
    if joined and JOIN not in axes:
        raise BadPattern("nothing says where the parts are joined", text, len(text))
    if JOIN in axes and not joined:
        raise BadPattern("there is only one part to join", text, text.index(JOIN))
    texts = [part for _, part in pairs]
    kinds = ("axis join" if texts.count(part) > 1 else "axis" for part in texts)  # alone, it would take turns with none
    read = (_dims(part, known, axes - {JOIN}, kind) for part, kind in zip(texts, kinds, strict=True))
    inner = ((tensor, tuple(axis for (axis,) in dims)) for (tensor, _), dims in zip(pairs, read, strict=True))
    return Pattern(text, dims, tuple(inner))


def _dims(
    text: str, known: Collection[str] | None, outside: Collection[str] = (), kinds: str = "axis join one open close"
) -> tuple[tuple[str, ...], ...]:
    """Read the dimensions of a pattern, or of a part of it whose ``outside`` has axes already; tokens are of the ``kinds`` alone."""
    dims: list[tuple[str, ...]] = []
    seen = set(outside)
    folded: list[str] = []
    opened: int | None = None
    for token in TOKEN.finditer(text):
        word, at, kind = token[0], token.start(), str(token.lastgroup)
        if kind == "space":
            continue
        if kind not in kinds.split():
            raise BadPattern(f"{word!r} means nothing here", text, at)
        if kind == "open" and opened is not None:
            raise BadPattern("a bracket stands in a bracket", text, at)
        if kind == "close" and opened is None:
            raise BadPattern("nothing opens this bracket", text, at)
        if kind == "close" and not folded:
            raise BadPattern("a bracket holds no axis", text, at)
        if kind == "one" and opened is not None:
            raise BadPattern("a 1 is a dimension of its own", text, at)
        if word in seen:
            raise BadPattern(f"{word!r} stands here for the second time", text, at)
        if kind == "axis" and known is not None and word not in known:
            raise BadPattern(f"there is no axis {word!r}", text, at)
        match kind:
            case "open":
                opened = at
            case "close":
                dims.append(tuple(folded))
                folded, opened = [], None
            case "one":
                dims.append(())
            case _:
                seen.add(word)
                if opened is None:
                    dims.append((word,))
                else:
                    folded.append(word)
    if opened is not None:
        raise BadPattern("nothing closes this bracket", text, opened)
    return tuple(dims)


def fold(pattern: Pattern, shares: Mapping[str, Share]) -> Fold:
    """Fold a pattern with the share of every axis it names.

    >>> sizes = {"kv": Share(0, 2, 2), "rep": Share(0, 3, 3), "dim": Share(0, 4, 4), "hidden": Share(0, 8, 8)}
    >>> folded = fold(parse("(kv *) hidden", {"q": "rep dim", "k": "dim"}), sizes)
    >>> folded.shape, folded.slots[1].origin, folded.slots[1].places["kv"]
    ((32, 8), (12, 0), (0, 16))
    """
    lengths = {axis: share.stop - share.start for axis, share in shares.items()}
    widths = [math.prod(lengths[axis] for axis in axes if axis != JOIN) for _, axes in pattern.parts]
    lengths[JOIN] = sum(widths)
    shape = tuple(math.prod(lengths[axis] for axis in axes) for axes in pattern.dims)
    slots, start = [], 0
    for (tensor, inner), width, turn in zip(pattern.parts, widths, pattern.turns(), strict=True):
        slots.append(_slot(pattern, tensor, inner, start - turn[0] * width, lengths, turn))
        start += width
    return Fold(shape, tuple(slots), _padding(pattern, shape, shares))


def _slot(
    pattern: Pattern, tensor: str, inner: tuple[str, ...], start: int, lengths: Mapping[str, int], turn: tuple[int, int]
) -> Slot:
    """Place one part: walk each dimension from its innermost axis outwards, the stride growing by what was passed."""
    origin, places = [0] * len(pattern.dims), {}
    for dim, axes in enumerate(pattern.dims):
        stride = 1
        for axis in reversed(axes):
            if axis == JOIN:
                origin[dim] = start * stride
                step = stride
                for part in reversed(inner):
                    if part == JOIN:
                        origin[dim] += turn[0] * step
                        step *= turn[1]
                    else:
                        places[part] = (dim, step)
                        step *= lengths[part]
            else:
                places[axis] = (dim, stride)
            stride *= lengths[axis]
    return Slot(tensor, tuple(origin), places)


def _padding(pattern: Pattern, shape: tuple[int, ...], shares: Mapping[str, Share]) -> tuple[Box, ...]:
    """Return the stored boxes that lie past the true size of an axis, disjoint."""
    boxes, start, extent = [], [0] * len(shape), list(shape)
    for dim, axes in enumerate(pattern.dims):
        padded = [axis for axis in axes if axis != JOIN and shares[axis].held < shares[axis].stop - shares[axis].start]
        if not padded:
            continue
        if len(axes) > 1:
            raise ValueError(f"pattern {pattern.text!r} pads the axis {padded[0]!r} inside a folded dimension")
        held = shares[padded[0]].held
        boxes.append(Box((*start[:dim], held, *start[dim + 1 :]), (*extent[:dim], extent[dim] - held, *extent[dim + 1 :])))
        extent[dim] = held
    return tuple(boxes)


def view(slot: Slot, tensor: str, axes: Sequence[str], shares: Mapping[str, Share], at: Mapping[str, int]) -> View:
    """Tie a slot to a canonical tensor's axes.

    ``shares`` gives the box along each axis; ``at`` gives, for an axis of the slot that is not an axis of the tensor (the layer of a
    stacked weight), the index at which this tensor lies, counted from the start of the share.
    """
    origin = list(slot.origin)
    for axis, index in at.items():
        dim, stride = slot.places[axis]
        origin[dim] += index * stride
    box = Box(tuple(shares[axis].start for axis in axes), tuple(shares[axis].held for axis in axes))
    return View(tensor, box, tuple(origin), tuple(slot.places.get(axis, (0, 0)) for axis in axes))


def clip(view: View, stored: Box) -> list[Box]:
    """Return the canonical boxes of a view that lie in a box of the stored tensor.

    >>> rows = View("q", Box((0, 0, 0), (2, 2, 8)), (0, 0), ((0, 4), (0, 1), (1, 1)))
    >>> clip(rows, Box((1, 0), (4, 8)))
    [Box(start=(0, 1, 0), shape=(1, 1, 8)), Box(start=(1, 0, 0), shape=(1, 1, 8))]
    """
    per_dim = []
    for dim, (low, length) in enumerate(zip(stored.start, stored.shape, strict=True)):
        axes = [axis for axis, (place, stride) in enumerate(view.places) if place == dim and stride]
        spans = within(
            [view.box.shape[a] for a in axes], [view.places[a][1] for a in axes], view.origin[dim], low, low + length
        )
        per_dim.append((axes, spans))
    boxes = []
    for choice in itertools.product(*(spans for _, spans in per_dim)):
        start, shape = list(view.box.start), list(view.box.shape)
        for (axes, _), spans_of_dim in zip(per_dim, choice, strict=True):
            for axis, (first, count) in zip(axes, spans_of_dim, strict=True):
                start[axis] += first
                shape[axis] = count
        boxes.append(Box(tuple(start), tuple(shape)))
    return boxes


def stored_boxes(view: View, shape: Sequence[int]) -> list[Box]:
    """Return the boxes of the stored tensor that a view covers: one for each run of indices that do not touch.

    >>> stored_boxes(View("q", Box((0, 0, 0), (2, 2, 8)), (0, 0), ((0, 4), (0, 1), (1, 1))), (8, 8))
    [Box(start=(0, 0), shape=(2, 8)), Box(start=(4, 0), shape=(2, 8))]
    """
    per_dim = []
    for dim in range(len(shape)):
        axes = sorted((stride, view.box.shape[a]) for a, (place, stride) in enumerate(view.places) if place == dim and stride)
        length, starts = 1, [view.origin[dim]]
        for stride, extent in axes:
            if stride == length and len(starts) == 1:
                length *= extent
            else:
                starts = [start + index * stride for start in starts for index in range(extent)]
        per_dim.append([(start, length) for start in starts])
    boxes = [Box(tuple(s for s, _ in spans), tuple(n for _, n in spans)) for spans in itertools.product(*per_dim)]
    return boxes if math.prod(view.box.shape) else []


def cut_evenly(axis: str, size: int, world: int, rank: int) -> Share:
    """Return a rank's share of an axis that must divide.

    >>> cut_evenly("ffn", 96, 2, 1)
    Share(start=48, stop=96, size=96)
    """
    if size % world:
        raise BadRequest(
            f"cannot cut axis {axis!r} into {world} equal shards",
            {"axis": f"{axis} = {size}", "world": f"tp = {world}"},
            remedy=f"use a tensor-parallel size that divides {size}",
        )
    step = size // world
    return Share(rank * step, (rank + 1) * step, size)


def round_up(size: int, multiple: int) -> int:
    """Return the next multiple of a number.

    >>> round_up(97, 2), round_up(98, 2)
    (98, 98)
    """
    return -(-size // multiple) * multiple


def cut_padded(size: int, world: int, rank: int) -> Share:
    """Return a rank's share of an axis that is padded up to a multiple of the world.

    >>> cut_padded(97, 2, 1)
    Share(start=49, stop=98, size=97)
    """
    step = round_up(size, world) // world
    return Share(rank * step, (rank + 1) * step, size)


def cut_unevenly(size: int, world: int, rank: int, *, spares_last: bool = False) -> Share:
    """Return a rank's share where the first ranks get one more if the axis does not divide, as ``torch.tensor_split`` does.

    Or those before the last, ``spares_last``.

    >>> [cut_unevenly(5, 2, rank) for rank in (0, 1)]
    [Share(start=0, stop=3, size=5), Share(start=3, stop=5, size=5)]
    >>> [cut_unevenly(5, 4, rank, spares_last=True).start for rank in range(4)]
    [0, 1, 2, 4]
    """
    base, more = divmod(size, world)
    first = world - 1 - more if spares_last else 0  # of those that get one more
    start = rank * base + min(max(rank - first, 0), more)
    return Share(start, start + base + (first <= rank < first + more), size)


def cut_or_repeat(axis: str, size: int, finer: str, finer_size: int, world: int, rank: int) -> dict[str, Share]:
    """Return a rank's shares of an axis that is cut while it lasts, then repeated, its finer axis being cut instead.

    KV heads on more ranks than there are: two ranks hold the same KV head, and each of them half of its query heads.

    >>> cut_or_repeat("kv", 2, "rep", 4, 4, 1)
    {'kv': Share(start=0, stop=1, size=2), 'rep': Share(start=2, stop=4, size=4)}
    """
    if size % world == 0:
        return {axis: cut_evenly(axis, size, world, rank), finer: Share(0, finer_size, finer_size)}
    copies = world // size
    if world % size or finer_size % copies:
        raise BadRequest(
            f"cannot cut axis {axis!r} into {world} equal shards",
            {"axis": f"{axis} = {size}", "heads": f"{finer} = {finer_size} for each {axis}", "world": f"tp = {world}"},
            remedy=f"use a tensor-parallel size that divides {size}, or is a multiple of it that divides {size * finer_size}",
        )
    return {axis: Share(rank // copies, rank // copies + 1, size), finer: cut_evenly(finer, finer_size, copies, rank % copies)}
