"""The rows of adapters follow from those of the weights, for every family."""

import pytest

from carnet.architectures.known import FAMILIES
from carnet.dialects.adapters import adapted, of_peft
from carnet.dialects.megatron.rows import MEGATRON
from carnet.model.tensors import BY_PART


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_weight_of_a_linear_layer_that_peft_can_name_has_an_adapter_there(family):
    made = adapted(of_peft(family.hf), family.hf)  # which refuses names of two meanings
    parts = {part for row in made.rows for part, _ in row.pattern.parts}
    for row in family.hf.rows:
        tensors = [BY_PART[part] for part, _ in row.pattern.parts]
        alike = {tensor.axes[tensor.outputs :] for tensor in tensors}
        if row.name.endswith(".weight") and {tensor.role for tensor in tensors} <= {"linear", "plain"} and len(alike) == 1:
            first = tensors[0].part
            assert first.startswith("mtp.") or {f"{first}.a", *(f"{tensor.part}.b" for tensor in tensors)} <= parts


def test_megatrons_rows_of_adapters_are_the_weights_own_in_axes_and_cuts():
    rows = {(row.name, tuple(part for part, _ in row.pattern.parts)): row for row in adapted(MEGATRON, MEGATRON).rows}
    top = "decoder.layers.{layer}."
    qkv = rows[f"{top}self_attention.linear_qkv.adapter.linear_out.weight", ("attention.q.b", "attention.k.b", "attention.v.b")]
    assert (qkv.pattern.text, qkv.cut) == ("(kv *) rank", "kv")
    a = rows[f"{top}self_attention.linear_proj.adapter.linear_in.weight", ("attention.o.a",)]
    assert (a.pattern.text, a.cut) == ("rank (kv rep dim)", "kv")
    experts = rows[f"{top}mlp.experts.experts.linear_fc2.adapter.linear_in.weight", ("moe.down.a",)]
    assert (experts.pattern.text, experts.cut) == ("expert rank moe_ffn", "expert")
    mamba = rows[f"{top}mixer.in_proj.adapter.linear_out.weight.dt", ("mamba.dt.b",)]
    assert (mamba.pattern.text, mamba.cut) == ("(group head) rank", "group")
