"""Patterns against stored tensors that numpy built by hand: reshape, concatenate, transpose."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.algebra.box import Box
from carnet.algebra.layout import (
    BadPattern,
    Share,
    View,
    clip,
    cut_evenly,
    cut_or_repeat,
    cut_padded,
    cut_unevenly,
    fold,
    parse,
    stored_boxes,
    view,
)
from carnet.errors import BadRequest

PADDING = -1  # what the oracle writes where no canonical tensor has an element


@dataclass(frozen=True)
class Case:
    remark: str
    text: str
    parts: Mapping[str, str]  # as for parse()
    axes: Mapping[str, str]  # canonical axes of each part
    build: Callable  # (what is held of each canonical tensor, length of each axis) -> stored array
    padded: str = ""  # the axis whose share may reach past its size
    alone: str = ""  # the axis of which one index is held, because only the stored name shows it


def joined(*arrays):
    return np.concatenate(arrays, axis=0)


def flat(array, rows):
    return array.reshape(rows, -1)


def grouped_by_kv_head(t, n):
    """Each group its query rows, then its key rows, then its value rows: megatron/core/transformer/attention.py."""
    groups = [
        joined(flat(t["q"][g], n["rep"] * n["dim"]), t["k"][g].reshape(n["dim"], -1), t["v"][g].reshape(n["dim"], -1))
        for g in range(n["kv"])
    ]
    return np.stack(groups).reshape(n["kv"] * (n["rep"] + 2) * n["dim"], n["hidden"])


def one_after_the_other(t, n):
    return joined(*(t[name].reshape(-1, n["hidden"]) for name in ("q", "k", "v")))


QKV_AXES = {"q": "kv rep dim hidden", "k": "kv dim hidden", "v": "kv dim hidden"}
GATE_UP_AXES = {"gate": "ffn hidden", "up": "ffn hidden"}
GROUPED = {"q": "rep dim", "k": "dim", "v": "dim"}
IN_A_ROW = {"q": "kv rep dim", "k": "kv dim", "v": "kv dim"}
CASES = (
    Case("Megatron groups by KV head", "(kv *) hidden", GROUPED, QKV_AXES, grouped_by_kv_head),
    Case(
        "the join may stand outside an axis", "(kv * dim) hidden", {"q": "rep", "k": "", "v": ""}, QKV_AXES, grouped_by_kv_head
    ),
    Case("TensorRT-LLM joins whole projections", "* hidden", IN_A_ROW, QKV_AXES, one_after_the_other),
    Case(
        "a head's gate follows its queries, and all keys follow",
        "* hidden",
        {"q": "kv rep * dim", "gate": "kv rep * dim", "k": "kv dim"},
        {"q": "kv rep dim hidden", "gate": "kv rep dim hidden", "k": "kv dim hidden"},
        lambda t, n: joined(np.stack([t["q"], t["gate"]], axis=2).reshape(-1, n["hidden"]), t["k"].reshape(-1, n["hidden"])),
    ),
    Case("Conv1D stores the transpose", "hidden *", IN_A_ROW, QKV_AXES, lambda t, n: one_after_the_other(t, n).T),
    Case(
        "parts of size 1 interleave",
        "(ffn *) hidden",
        {"gate": "", "up": ""},
        GATE_UP_AXES,
        lambda t, n: np.stack([t["gate"], t["up"]], axis=1).reshape(2 * n["ffn"], n["hidden"]),
    ),
    Case(
        "the gate's rows come first",
        "* hidden",
        {"gate": "ffn", "up": "ffn"},
        GATE_UP_AXES,
        lambda t, n: joined(t["gate"], t["up"]),
    ),
    Case(
        "one matrix an expert, gate before up",
        "expert * hidden",
        {"gate": "ffn", "up": "ffn"},
        {"gate": "expert ffn hidden", "up": "expert ffn hidden"},
        lambda t, n: np.concatenate([t["gate"], t["up"]], axis=1),
    ),
    Case(
        "experts side by side along the columns",
        "hidden (expert *)",
        {"gate": "ffn", "up": "ffn"},
        {"gate": "expert ffn hidden", "up": "expert ffn hidden"},
        lambda t, n: np.concatenate([t["gate"], t["up"]], axis=1).reshape(-1, n["hidden"]).T,
    ),
    Case(
        "a dimension of length 1 belongs to no axis",
        "out 1 in",
        {"conv": ""},
        {"conv": "out in"},
        lambda t, n: t["conv"][:, None, :],
    ),
    Case(
        "heads fold into the columns of an output projection",
        "hidden (kv rep dim)",
        {"o": ""},
        {"o": "hidden kv rep dim"},
        lambda t, n: t["o"].reshape(n["hidden"], -1),
    ),
    Case(
        "the halves of a head change places with its pairs",
        "(kv pair half)",
        {"bias": ""},
        {"bias": "kv half pair"},
        lambda t, n: t["bias"].transpose(0, 2, 1).reshape(-1),
    ),
    Case(
        "a padded vocabulary",
        "vocab hidden",
        {"embed": ""},
        {"embed": "vocab hidden"},
        lambda t, n: np.pad(t["embed"], ((0, n["vocab"] - len(t["embed"])), (0, 0)), constant_values=PADDING),
        padded="vocab",
    ),
    Case(
        "a padded vocabulary in the columns",
        "hidden vocab",
        {"embed": ""},
        {"embed": "vocab hidden"},
        lambda t, n: np.pad(t["embed"].T, ((0, 0), (0, n["vocab"] - len(t["embed"]))), constant_values=PADDING),
        padded="vocab",
    ),
    Case(
        "only the name shows which expert it is",
        "ffn hidden",
        {"up": ""},
        {"up": "expert ffn hidden"},
        lambda t, n: t["up"][0],
        alone="expert",
    ),
)


@dataclass(frozen=True)
class Laid:
    """One case with random sizes and shares, folded by carnet and built by the oracle."""

    stored: np.ndarray
    canonical: Mapping[str, np.ndarray]  # whole tensors; every element of all of them has a number of its own
    shape: tuple[int, ...]
    views: tuple[View, ...]
    padding: tuple[Box, ...]


@st.composite
def a_share(draw, axis, case):
    size = draw(st.integers(1, 4))
    if axis == case.padded:
        start = draw(st.integers(0, size + 1))
        return Share(start, draw(st.integers(start + 1, size + 3)), size)
    start = draw(st.integers(0, size - 1))
    return Share(start, start + 1 if axis == case.alone else draw(st.integers(start + 1, size)), size)


def numbered(case, sizes):
    canonical, first = {}, 0
    for name, axes in case.axes.items():
        shape = [sizes[axis] for axis in axes.split()]
        canonical[name] = np.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    return canonical


@st.composite
def laid(draw):
    case = draw(st.sampled_from(CASES))
    shares = {axis: draw(a_share(axis, case)) for axes in case.axes.values() for axis in axes.split()}
    canonical = numbered(case, {axis: share.size for axis, share in shares.items()})
    held = {
        name: array[tuple(slice(shares[a].start, shares[a].stop) for a in case.axes[name].split())]
        for name, array in canonical.items()
    }
    stored = case.build(held, {axis: share.stop - share.start for axis, share in shares.items()})
    folded = fold(parse(case.text, case.parts), shares)
    views = tuple(view(slot, slot.tensor, case.axes[slot.tensor].split(), shares, {}) for slot in folded.slots)
    return Laid(stored, canonical, folded.shape, views, folded.padding)


@st.composite
def laid_in_layers(draw):
    """Megatron's stacked weight: the layer is a stored dimension and no axis of any canonical tensor."""
    sizes = {axis: draw(st.integers(1, 3)) for axis in ("kv", "rep", "dim", "hidden")}
    first, count = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    shares = {axis: Share(0, size, size) for axis, size in sizes.items()} | {
        "layer": Share(first, first + count, first + count)
    }
    one = numbered(CASES[0], sizes)
    many = sum(array.size for array in one.values())
    layers = [{name: array + many * layer for name, array in one.items()} for layer in range(count)]
    stored = np.stack([grouped_by_kv_head(layer, sizes) for layer in layers])
    folded = fold(parse("layer (kv *) hidden", GROUPED), shares)
    views = tuple(
        view(slot, f"{at}.{slot.tensor}", QKV_AXES[slot.tensor].split(), shares, {"layer": at})
        for at in range(count)
        for slot in folded.slots
    )
    canonical = {f"{at}.{name}": array for at, layer in enumerate(layers) for name, array in layer.items()}
    return Laid(stored, canonical, folded.shape, views, folded.padding)


LAID = st.one_of(laid(), laid(), laid_in_layers())


def stored_indices(seen):
    """Return, for every element of a view's box, its stored index: one array a stored dimension."""
    steps = np.indices(seen.box.shape)
    found = [np.full(seen.box.shape, origin) for origin in seen.origin]
    for axis, (dim, stride) in enumerate(seen.places):
        found[dim] = found[dim] + steps[axis] * stride
    return tuple(found)


def marks(boxes, shape):
    count = np.zeros(shape, np.int64)
    for box in boxes:
        assert all(s >= 0 and s + n <= limit for s, n, limit in zip(box.start, box.shape, shape, strict=True))
        count[region(box)] += 1
    return count


def region(box):
    return tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))


@settings(deadline=None, max_examples=200)
@given(LAID)
def test_every_canonical_element_lies_where_numpy_put_it(case):
    assert case.shape == case.stored.shape
    for seen in case.views:
        assert (case.stored[stored_indices(seen)] == case.canonical[seen.tensor][region(seen.box)]).all()


@settings(deadline=None, max_examples=200)
@given(LAID)
def test_views_and_padding_hold_every_stored_element_once(case):
    count = marks(case.padding, case.shape)
    for seen in case.views:
        np.add.at(count, stored_indices(seen), 1)
    assert (count == 1).all()
    assert np.array_equal(marks(case.padding, case.shape), case.stored == PADDING)


@settings(deadline=None, max_examples=200)
@given(LAID)
def test_the_stored_boxes_of_a_view_are_the_elements_that_its_strides_reach(case):
    for seen in case.views:
        reached = np.zeros(case.shape, np.int64)
        np.add.at(reached, stored_indices(seen), 1)
        assert (marks(stored_boxes(seen, case.shape), case.shape) == reached).all()


@settings(deadline=None, max_examples=200)
@given(LAID, st.data())
def test_clipping_gives_the_canonical_elements_inside_a_stored_box_each_once(case, data):
    spans = []
    for length in case.shape:
        start = data.draw(st.integers(0, length - 1))
        spans.append((start, data.draw(st.integers(1, length - start))))
    chunk = Box(tuple(s for s, _ in spans), tuple(n for _, n in spans))
    for seen in case.views:
        inside = [low <= at for at, low in zip(stored_indices(seen), chunk.start, strict=True)]
        inside += [at < s + n for at, s, n in zip(stored_indices(seen), chunk.start, chunk.shape, strict=True)]
        expected = np.zeros(case.canonical[seen.tensor].shape, np.int64)
        expected[region(seen.box)] = np.logical_and.reduce(inside)
        found = [box for box in clip(seen, chunk) if math.prod(box.shape)]
        assert (marks(found, expected.shape) == expected).all()


def test_a_layer_that_is_folded_into_the_rows_lies_that_many_rows_on():
    shares = {"layer": Share(2, 5, 5), "ffn": Share(0, 4, 4), "hidden": Share(0, 3, 3)}
    folded = fold(parse("(layer *) hidden", {"gate": "ffn", "up": "ffn"}), shares)
    assert folded.shape == (24, 3)
    assert [view(slot, slot.tensor, ["ffn", "hidden"], shares, {"layer": 2}).origin for slot in folded.slots] == [
        (16, 0),
        (20, 0),
    ]


def test_rank_0_is_one_element_that_lies_in_a_box_of_rank_0():
    seen = View("scale", Box((), ()), (), ())
    assert clip(seen, Box((), ())) == [Box((), ())]
    assert stored_boxes(seen, ()) == [Box((), ())]


UNREADABLE = [  # pattern, its parts, what is said, and where the caret stands
    ("kv hidden", {"q": "", "k": ""}, "nothing says where the parts are joined", 9),
    ("kv hidden", {"q": "dim"}, "nothing says where the parts are joined", 9),
    ("(kv *) hidden", {"q": ""}, "there is only one part to join", 4),
    ("(kv *) *", {"q": "dim", "k": "dim"}, "'*' stands here for the second time", 7),
    ("(* kv *)", {"q": "dim", "k": "dim"}, "'*' stands here for the second time", 6),
    ("(kv * hidden", {"q": "dim", "k": "dim"}, "nothing closes this bracket", 0),
    ("kv) hidden", {"q": ""}, "nothing opens this bracket", 2),
    ("((kv *) hidden", {"q": "dim", "k": "dim"}, "a bracket stands in a bracket", 1),
    ("(kv *)) hidden", {"q": "dim", "k": "dim"}, "nothing opens this bracket", 6),
    ("() hidden", {"q": ""}, "a bracket holds no axis", 1),
    ("ffn ffn", {"up": ""}, "'ffn' stands here for the second time", 4),
    ("(ffn 1)", {"up": ""}, "a 1 is a dimension of its own", 5),
    ("(ffn 1", {"up": ""}, "a 1 is a dimension of its own", 5),
    ("ffn 12", {"up": ""}, "'12' means nothing here", 4),
    ("ffn 11", {"up": ""}, "'11' means nothing here", 4),
    ("ffn1 hidden", {"up": ""}, "'ffn1' means nothing here", 0),
    ("1ffn", {"up": ""}, "'1ffn' means nothing here", 0),
    ("ffn hiddén", {"up": ""}, "'hiddén' means nothing here", 4),
    ("", {}, "no tensor is in it", 0),
    ("(kv *) hidden", {}, "no tensor is in it", 0),
    ("ffn 2 hidden", {"up": ""}, "'2' means nothing here", 4),
    ("ffn, hidden", {"up": ""}, "',' means nothing here", 3),
    ("ffn -> hidden", {"up": ""}, "'-' means nothing here", 4),
    ("ffn Hidden", {"up": ""}, "'Hidden' means nothing here", 4),
    ("(kv *) hidden", {"q": "rep dim", "k": "kv"}, "'kv' stands here for the second time", 0),
    ("(kv *) hidden", {"q": "dim dim"}, "'dim' stands here for the second time", 4),
    ("(kv *) hidden", {"q": "(rep dim)"}, "'(' means nothing here", 0),
    ("(kv *) hidden", {"q": "1"}, "'1' means nothing here", 0),
    ("(kv *) hidden", {"q": "*"}, "'*' means nothing here", 0),
    ("(kv rep dmi) hidden", {"q": ""}, "there is no axis 'dmi'", 8),
    ("(kv *) hidden", {"q": "rep dmi"}, "there is no axis 'dmi'", 4),
]


@pytest.mark.parametrize(("text", "parts", "what", "at"), UNREADABLE, ids=[f"{row[0]}, {row[2]}" for row in UNREADABLE])
def test_a_pattern_is_refused_where_it_says_nothing(text, parts, what, at):
    with pytest.raises(BadPattern) as caught:
        parse(text, parts, {"kv", "rep", "dim", "ffn", "hidden"})
    said, shown, caret = str(caught.value).split("\n")
    assert said == what
    assert shown[2:] in (text, *parts.values())
    assert caret == " " * (2 + at) + "^"


@pytest.mark.parametrize("stray", ["\n", "\t", "\0", "\x1b", "\u00a0"])
def test_what_cannot_be_seen_is_refused_and_the_caret_stands_below_it(stray):
    with pytest.raises(BadPattern) as caught:
        parse(f"ffn{stray}hidden", {"up": ""})
    assert str(caught.value).split("\n") == [f"{stray!r} means nothing here", "  ffn?hidden", "     ^"]


@given(st.text("ab *1()", max_size=9))
def test_what_is_read_is_all_of_the_text(text):
    try:
        dims = parse(text, {"one": ""} if "*" not in text else {"one": "c", "other": "d"}).dims
    except BadPattern:
        return
    assert [axis for axes in dims for axis in axes or ("1",)] == re.findall("[ab]+|[*1]", text)
    assert len(dims) == len(re.findall(r"\([^)]*\)|[ab]+|[*1]", text))


PARSED = [
    ("one axis a dimension", "hidden ffn", {"down": ""}, (("hidden",), ("ffn",))),
    ("folded axes, outermost first", "hidden (kv rep dim)", {"o": ""}, (("hidden",), ("kv", "rep", "dim"))),
    ("spaces say nothing", "  ( kv   *)hidden ", {"k": "dim", "v": "dim"}, (("kv", "*"), ("hidden",))),
    ("a 1 is a dimension without an axis", "out 1 in", {"conv": ""}, (("out",), (), ("in",))),
    ("rank 0", "", {"scale": ""}, ()),
]


@pytest.mark.parametrize(("remark", "text", "parts", "dims"), PARSED, ids=[row[0] for row in PARSED])
def test_a_pattern_is_read_as(remark, text, parts, dims):
    assert parse(text, parts).dims == dims


def test_padding_inside_a_folded_dimension_is_refused():
    shares = {"vocab": Share(0, 4, 3), "dim": Share(0, 2, 2)}
    with pytest.raises(ValueError, match=r"pattern '\(vocab dim\)' pads the axis 'vocab' inside a folded dimension"):
        fold(parse("(vocab dim)", {"embed": ""}), shares)


def test_an_axis_without_a_share_is_never_guessed():
    with pytest.raises(KeyError, match="hidden"):
        fold(parse("vocab hidden", {"embed": ""}), {"vocab": Share(0, 4, 4)})


def test_a_share_past_the_end_of_its_axis_holds_nothing_true():
    assert Share(6, 8, 5).held == 0
    assert Share(4, 6, 5).held == 1
    assert Share(0, 2, 5).held == 2


def held(share):
    return list(range(share.start, share.stop))


@given(st.integers(1, 8), st.integers(1, 8))
def test_even_shares_are_numpys_equal_parts(step, world):
    size = step * world
    parts = np.split(np.arange(size), world)
    assert [held(cut_evenly("ffn", size, world, rank)) for rank in range(world)] == [list(part) for part in parts]


@given(st.integers(0, 40), st.integers(1, 9))
def test_uneven_shares_are_numpys_array_split(size, world):
    parts = np.array_split(np.arange(size), world)
    assert [held(cut_unevenly(size, world, rank)) for rank in range(world)] == [list(part) for part in parts]


@given(st.integers(1, 40), st.integers(1, 9))
def test_padded_shares_are_as_long_as_each_other_and_hold_every_true_index_once(size, world):
    shares = [cut_padded(size, world, rank) for rank in range(world)]
    assert len({share.stop - share.start for share in shares}) == 1
    assert list(itertools.chain.from_iterable(map(held, shares))) == list(range(shares[-1].stop))
    assert sum(share.held for share in shares) == size
    assert shares[-1].stop - size < world


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_kv_heads_are_cut_or_repeated_and_each_query_head_is_held_once(few, many, rest, repeat):
    kv, rep, world = (few, many * rest, few * many) if repeat else (few * many, rest, many)
    shares = [cut_or_repeat("kv", kv, "rep", rep, world, rank) for rank in range(world)]
    queries = [(group, head) for share in shares for group in held(share["kv"]) for head in held(share["rep"])]
    assert queries == list(itertools.product(range(kv), range(rep)))
    copies = max(1, world // kv)
    assert sorted(group for share in shares for group in held(share["kv"])) == sorted([*range(kv)] * copies)


REFUSALS = [
    (
        "an axis that does not divide",
        lambda: cut_evenly("ffn", 10, 4, 0),
        (
            "cannot cut axis 'ffn' into 4 equal shards\n  axis      ffn = 10\n  world     tp = 4\n"
            "  try: use a tensor-parallel size that divides 10"
        ),
    ),
    (
        "KV heads that neither divide nor repeat",
        lambda: cut_or_repeat("kv", 8, "rep", 4, 3, 0),
        (
            "cannot cut axis 'kv' into 3 equal shards\n  axis      kv = 8\n  heads     rep = 4 for each kv\n  world     tp = 3\n"
            "  try: use a tensor-parallel size that divides 8, or is a multiple of it that divides 32"
        ),
    ),
    (
        "more ranks than query heads",
        lambda: cut_or_repeat("kv", 2, "rep", 2, 8, 0),
        (
            "cannot cut axis 'kv' into 8 equal shards\n  axis      kv = 2\n  heads     rep = 2 for each kv\n  world     tp = 8\n"
            "  try: use a tensor-parallel size that divides 2, or is a multiple of it that divides 4"
        ),
    ),
]


@pytest.mark.parametrize(("remark", "cut", "text"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_cut_is_refused_line_by_line_for(remark, cut, text):
    with pytest.raises(BadRequest) as caught:
        cut()
    assert str(caught.value) == text
