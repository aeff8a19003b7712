"""All rows of all dialects: a pattern has every axis of its tensors, and what ranks cut they can cut."""

import re
from dataclasses import replace

import pytest

from carnet.algebra.layout import JOIN
from carnet.architectures.known import FAMILIES, dialect_of
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import fuse, row
from carnet.dialects.units import Unit
from carnet.model.tensors import AXES, BY_PART, LINEAR, PLAIN, READERS, TENSORS

DIALECTS = {"megatron": MEGATRON} | {
    f"{family.name}, {name}": dialect_of(family, name)
    for family in FAMILIES
    for name in ("hf", "trtllm")
    if name == "hf" or family.trtllm is not None
}
ROWS = [(f"{where}: {row.name}", row) for where, dialect in DIALECTS.items() for row in dialect.rows]


def test_every_row_has_the_axes_of_its_tensors():
    wrong = []
    for where, each in ROWS:
        named = {"expert"} if "{expert}" in each.name else set()
        for pattern in filter(None, (each.pattern, each.stored)):
            dims = [axis for axes in pattern.dims for axis in axes if axis != JOIN]
            for part, inner in pattern.parts:
                axes = [*dims, *inner, *named]
                if sorted(axes) != sorted(BY_PART[part].axes):
                    wrong.append(f"{where} has {axes} of {part}, {BY_PART[part].axes}")
    assert wrong == []


def test_what_a_row_cuts_is_an_axis_that_ranks_share():
    cuts = {each.cut for _, each in ROWS} - {"", "embedding"}
    assert all(AXES[cut].cut and hasattr(Unit("", (), 0, first=True, last=True), AXES[cut].among) for cut in cuts)
    wrong = [
        where
        for where, each in ROWS
        if each.cut in AXES
        for part, _ in each.pattern.parts
        if each.cut not in BY_PART[part].axes
    ]
    assert wrong == []


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


def test_rows_of_one_name_may_mean_different_layers():
    gated = fuse("mlp.weight", "* hidden", {"mlp.gate": "ffn", "mlp.up": "ffn"})
    replace(MEGATRON, rows=(gated, row("mlp.weight", "ffn hidden", "mlp.up", when={"gated": False})))
