"""Weights of the source that are stored as codes: where their matrices lie, and how they are read.

A place in such a matrix counts in weights, and its strides are those of the matrix unpacked: so its pieces are met and cut as all
others are.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from carnet.algebra.box import Box, intersect
from carnet.dialects.entry import Entry
from carnet.dtypes import BY_NAME as DTYPES
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.stored import Chunk, Coded, Stored, dense_strides, label_of
from carnet.inventory.survey import Inventory
from carnet.planner.pieces import Piece, cut, pieces
from carnet.planner.touches import Extent, Named
from carnet.plans.columns import Gathered
from carnet.quantize.recipes import BY_NAME, PER_BYTE, WHOLE, grid, strides
from carnet.steps import Encoding, Place, Same, Space

TO_BF16 = "--dtype bf16"
Spot = tuple[int, int, int, int, int, int, int]
"""Numbers of the files of a chunk, its scales and the scale over them; offsets: where it begins, of its first code, of those."""


def coded_pieces(
    source: Inventory, dtype: str | None, gathered: Gathered, extents: list[Named]
) -> Iterator[tuple[str, Piece, Spot]]:
    """Yield the canonical tensors in the coded matrices of a source, and add what must be used up of them to ``extents``.

    Refuse them where nobody says what they are to become.
    """
    if source.coded and dtype is None:
        (key, one), others = next(iter(source.coded.items())), len(source.coded) - 1
        facts = {"tensor": label_of(key), "others": others, "quantized": one.recipe}
        remedy = f"name the type that weights are to be dequantized to: {TO_BF16}"
        raise BadRequest("the weights of the source are quantized", facts, remedy=remedy)
    seen = set[tuple[Space, str, int]]()
    known, forms = dict[tuple[object, ...], list[tuple[int, Piece]]](), dict[Extent, Extent]()
    for key, one in source.coded.items():
        entry = source.entries[key]
        for box, file, encoding in _matrices(one, str(source.checkpoint.root)):
            scales, outer, space = encoding.scales, encoding.outer, _space(encoding)
            like = (
                id(entry.like),
                box.start,
                box.shape,
                one.recipe,
                one.shape,
                scales.strides,
                scales.dtype,
                outer and outer.dtype,
            )
            if like not in known:
                open_ = Encoding(encoding.recipe, encoding.shape, 0, begun(scales), None if outer is None else begun(outer))
                chunk = Chunk(box, "", 0, dense_strides(one.shape))
                views = enumerate(entry.like.views)
                found = [(at, piece) for at, view in views for piece in pieces(view, chunk, "u8", one.shape, space)]
                known[like] = [(at, replace(piece, encoding=open_)) for at, piece in found]
            over = (-1, 0) if outer is None else (gathered.name(outer.file), outer.offset)
            ids = gathered.name(file), gathered.name(scales.file), over[0]
            for at, piece in known[like]:
                yield entry.names[at], piece, (*ids, encoding.first, encoding.first, scales.offset, over[1])
            for extent in _extents(one, entry, box, file, encoding):
                if (where := (extent.space, extent.file, extent.offset)) not in seen:  # a scale may stand over all experts
                    seen.add(where)
                    form = replace(extent, name="", file="", offset=0)
                    extents.append((extent.name, forms.setdefault(form, form), extent.file, extent.offset))


def begun(place: Place) -> Place:
    """Return the form of a place."""
    return Place("", 0, place.strides, place.dtype, place.space)


def _space(encoding: Encoding) -> Space:
    return "packed" if BY_NAME[encoding.recipe].packing else "file"


def _matrices(one: Coded, where: str) -> Iterator[tuple[Box, str, Encoding]]:
    """Yield the matrices of a coded weight: itself, or one for each expert in it, or for each part that has a scale of its own."""
    recipe, (*experts, rows, columns) = BY_NAME[one.recipe], one.shape
    assert one.scales is not None, "codes stand under scales"
    parts = one.parts_of or (rows,)
    count, blocks = prod(experts), [grid(recipe, (tall, columns)) for tall in parts]
    codes, scales = only_chunk(one.codes, where), only_chunk(one.scales, where)
    outer = None if one.outer is None else only_chunk(one.outer, where)
    alone = 1 if recipe.turned and recipe.block == WHOLE else count  # one may stand over all experts
    each = prod(one.scales.shape) // alone
    if each * alone != prod(one.scales.shape) or each != sum(map(prod, blocks)) or len(experts) > 1:
        facts = {
            "where": where,
            "tensor": one.scales.name,
            "expected": list(map(list, blocks)),
            "found": list(one.scales.shape),
        }
        raise BadCheckpoint("there is not one scale for each block of codes", facts)
    for number in range(count):
        row, done = 0, number % alone * each  # scales before these
        for part, (tall, held) in enumerate(zip(parts, blocks, strict=True)):
            first = codes.offset * PER_BYTE[recipe.packing] + (number * rows + row) * columns
            at = Place(scales.file, scales.offset + done * _size(one.scales), strides(recipe, held), one.scales.dtype)
            over = None
            if outer is not None and one.outer is not None:
                every = prod(one.outer.shape) == count * len(parts)  # else one stands over all experts
                own = (number * len(parts) + part) * _size(one.outer) if every else 0
                over = Place(outer.file, outer.offset + own, (1, 1), one.outer.dtype)
            encoding = Encoding(recipe.name, (tall, columns), first, at, over)
            box = Box((number, row, 0), (1, tall, columns)) if experts else Box((row, 0), (tall, columns))
            yield box, codes.file, encoding
            row, done = row + tall, done + prod(held)


def _size(stored: Stored) -> int:
    return DTYPES[stored.dtype].nbytes


def only_chunk(stored: Stored, where: str) -> Chunk:
    """Return the place of a tensor that is stored in one piece; refuse one in several."""
    chunk = stored.chunks[0]
    if len(stored.chunks) > 1 or chunk.strides != dense_strides(stored.shape):
        raise NotSupported("codes that are stored in several pieces cannot be read", {"where": where, "tensor": stored.name})
    return chunk


def _extents(one: Coded, entry: Entry, box: Box, file: str, encoding: Encoding) -> Iterator[Extent]:
    """Yield what must be used up of a matrix: its codes, the scales of its blocks, and the scale over them."""
    gone = [shared for padding in entry.padding if (shared := intersect(padding, box)) is not None]
    padding = tuple(Box(shared.start[-2:], shared.shape[-2:]) for shared in gone)
    blocks = grid(BY_NAME[encoding.recipe], encoding.shape)
    strides = encoding.shape[1], 1
    yield Extent(one.codes.name, file, encoding.first, encoding.shape, strides, "u8", padding, _space(encoding))
    for stored, place, shape in ((one.scales, encoding.scales, blocks), (one.outer, encoding.outer, (1, 1))):
        if stored is not None and place is not None:
            yield Extent(stored.name, place.file, place.offset, shape, place.strides, place.dtype, ())


def alike(tensor: str, box: Box, one: Piece, other: Piece) -> Iterator[Same]:
    """Yield the comparisons of a box that is there twice: its codes are the same and so is the scale of the whole."""
    first, second = one.encoding, other.encoding
    recipe = None if first is None else BY_NAME[first.recipe]
    whole_scale = recipe is not None and not recipe.packing and recipe.block == WHOLE
    if first is None or second is None or first.recipe != second.recipe or not whole_scale:
        known = first or second
        facts = {"tensor": tensor, "where": one.place.file, "other": other.place.file, "quantized": known and known.recipe}
        raise NotSupported(f"{tensor!r} is stored twice, and its codes cannot be compared", facts)
    yield Same(tensor, box.start, box.shape, cut(one, box), cut(other, box))
    yield Same(tensor, (0, 0), (1, 1), first.scales, second.scales)


def aside(source: Inventory) -> dict[str, tuple[str, ...]]:
    """Return what stands beside codes and is no part of a weight, by what it is: it is left behind."""
    shapes = tuple(label_of(key) for key in source.scales if key[1].endswith(".weight_shape"))
    scales = tuple(label_of(key) for key in source.scales if not key[1].endswith(".weight_shape"))
    found = {"shapes of packed weights": shapes, "scales of activations and of the cache": scales}
    return {reason: tuple(sorted(names)) for reason, names in found.items() if names}
