"""All rows of all dialects: a pattern has every axis of its tensors, and what ranks cut they can cut."""

import re
from dataclasses import replace

import pytest

from carnet.algebra.layout import BadPattern
from carnet.architectures.known import FAMILIES, dialect_of
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import MODULE, fuse, row
from carnet.dialects.units import Unit
from carnet.model.tensors import AXES, BY_PART, LINEAR, PLAIN, READERS, TENSORS

DIALECTS = {"megatron": MEGATRON} | {
    f"{family.name}, {name}": dialect_of(family, name)
    for family in FAMILIES
    for name in ("hf", "trtllm")
    if name == "hf" or family.trtllm is not None
}
ROWS = [(f"{where}: {row.name}", row) for where, dialect in DIALECTS.items() for row in dialect.rows]


STRAY = [
    ("an axis too few", ("mlp.up.weight", "ffn", {"mlp.up": ""}), "mlp.up has the axes ffn hidden, not ffn"),
    (
        "an axis too many",
        ("mlp.up.weight", "kv ffn hidden", {"mlp.up": ""}),
        "mlp.up has the axes ffn hidden, not kv ffn hidden",
    ),
    ("another's", ("mlp.up.weight", "kv hidden", {"mlp.up": ""}), "mlp.up has the axes ffn hidden, not kv hidden"),
    (
        "a name of experts",
        ("e.{expert}.up", "ffn hidden", {"mlp.up": ""}),
        "mlp.up has the axes ffn hidden, not ffn hidden expert",
    ),
    ("a part", ("q", "(kv *) hidden", {"attention.q": "dim"}), "attention.q has the axes kv rep dim hidden, not kv hidden dim"),
    ("no tensor", ("mlp.up.weight", "ffn hidden", {"mlp.upp": ""}), "there is no tensor 'mlp.upp'"),
]


@pytest.mark.parametrize(("text", "said"), [row[1:] for row in STRAY], ids=[row[0] for row in STRAY])
def test_a_row_has_the_axes_of_its_tensors(text, said):
    with pytest.raises(BadPattern) as refused:
        fuse(*text)
    assert str(refused.value).splitlines()[:2] == [f"{text[0]}: {said}", f"  {text[1]}"]


def test_the_shape_in_the_file_has_the_axes_of_its_tensors_too():
    with pytest.raises(BadPattern, match=r"mlp\.up has the axes ffn hidden, not ffn"):
        row("mlp.up.weight", "ffn hidden", "mlp.up", stored="ffn")


def test_what_a_row_cuts_is_an_axis_that_ranks_share():
    cuts = {each.cut for _, each in ROWS} - {"", "embedding"}
    assert all(AXES[cut].cut and hasattr(Unit("", (), 0, first=True, last=True), AXES[cut].among) for cut in cuts)
    with pytest.raises(BadPattern, match=r"ranks cannot cut 'kv', which mlp\.up does not have"):
        row("mlp.up.weight", "ffn hidden", "mlp.up", cut="kv")


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: tensor.part)
def test_a_tensor_is_made_of_axes_that_there_are(tensor):
    assert set(tensor.axes) <= set(AXES)
    assert len(set(tensor.axes)) == len(tensor.axes)
    matrix = tensor.role in (LINEAR, PLAIN)
    assert 0 < tensor.outputs < len(tensor.axes) if matrix else not tensor.reads
    assert not matrix or tensor.each_expert == (tensor.axes[0] == "expert")


def test_what_reads_the_same_has_the_same_inputs():
    for parts in READERS.values():
        assert len({BY_PART[part].axes[BY_PART[part].outputs :] for part in parts}) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (row("mlp.weight", "ffn hidden", "mlp.up"), row("mlp.weight", "(ffn) hidden", "mlp.up")),
        (fuse("mlp.weight", "* hidden", {"mlp.gate": "ffn", "mlp.up": "ffn"}), row("mlp.weight", "ffn hidden", "mlp.up")),
        (row("a.weight", "hidden", "attention_norm"), row("a.weight", "hidden", "mlp_norm")),
        (row("a.weight", "hidden", "final_norm"), row("a.weight", "hidden", "final_norm")),
    ],
    ids=["two shapes", "with the gate and without", "two norms", "the same twice"],
)
def test_two_rows_of_one_name_that_both_apply_are_an_error_of_the_table(first, second):
    with pytest.raises(ValueError, match=rf"two rows of megatron  apply to one layer: {re.escape(first.name)}"):
        replace(MEGATRON, rows=(first, second))


@pytest.mark.parametrize(
    "second",
    [
        row("mlp.other", "hidden ffn", "mlp.down"),
        fuse("mlp.both", "hidden *", {"mlp.down": "ffn", "attention.o": "kv rep dim"}),
    ],
    ids=["alone", "among others"],
)
def test_two_rows_that_write_one_tensor_are_an_error_of_the_table(second):
    first = row("mlp.weight", "hidden ffn", "mlp.down")
    with pytest.raises(ValueError, match=rf"two rows of megatron  write one tensor: mlp\.down \(mlp\.weight, {second.name}\)"):
        replace(MEGATRON, rows=(first, second))
    replace(MEGATRON, rows=(first, replace(second, written=MODULE)))  # it may be read


def test_rows_of_one_name_may_mean_different_layers():
    gated = fuse("mlp.weight", "* hidden", {"mlp.gate": "ffn", "mlp.up": "ffn"})
    replace(MEGATRON, rows=(gated, row("mlp.weight", "ffn hidden", "mlp.up", when={"gated": False})))
