"""The order in which Megatron's modules have their parameters, which is that of an optimizer's buckets, backwards.

``named_parameters`` follows the order in which modules are made: transformer_layer.py, attention.py, multi_latent_attention.py, mlp.py,
moe/moe_layer.py, moe/router.py and moe/shared_experts.py in megatron/core/transformer. Names are those of a store.
"""

import re
from collections.abc import Iterator
from itertools import product

LAYERS = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")
FURTHER = re.compile(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?(.*)")  # a layer for further tokens, and what is around one
NORM = ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias")
ATTENTION = (
    "self_attention.core_attention.softmax_offset",
    "self_attention.linear_proj.weight",
    "self_attention.linear_proj.bias",
)
PROJECTIONS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_q_proj.weight",
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.kv_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight",  # of a mixture too, where the norm is a module before it
    "mlp.linear_fc1.layer_norm_bias",
    "mlp.router.weight",
    "mlp.router.bias",
)
EXPERTS = ("mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight")
MLP = (
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_experts.gate_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
)
INPUT = ("input_layernorm.weight", "input_layernorm.bias")
BEFORE = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
AFTER = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias")
AROUND = (
    ("enorm.weight", "enorm.bias", "hnorm.weight", "hnorm.bias", "eh_proj.weight"),
    ("final_layernorm.weight", "final_layernorm.bias"),
)
HEAD = ("output_layer.weight",)

Place = tuple[int, ...]


class Order:
    """One order: with norms as modules of their own, or in the linear layers; experts one after another, or each layer of theirs."""

    def __init__(self, *, local: bool, grouped: bool) -> None:
        ahead, behind = ((*INPUT, *NORM), ()) if local else (INPUT, NORM)
        inside = (*ahead, *ATTENTION, *behind, *PROJECTIONS, *EXPERTS, *MLP)
        self._inside = {name: at for at, name in enumerate(inside)}
        self._grouped = grouped

    def place(self, name: str, layer: int, expert: int) -> Place | None:
        """Return where a parameter stands, to be sorted by; None where that is not known."""
        for section, names in ((0, BEFORE), (2, AFTER), (4, HEAD)):
            if name in names:
                return section, names.index(name)
        if (found := FURTHER.fullmatch(name)) is not None:
            at = (
                self._within(found[3], expert)
                if found[2]
                else next(((2 * side, names.index(found[3])) for side, names in enumerate(AROUND) if found[3] in names), None)
            )
            return None if at is None else (3, int(found[1]), *((1,) if found[2] else ()), *at)
        found = LAYERS.fullmatch(name)
        at = None if found is None else self._within(found[2], expert)
        return None if found is None or at is None else (1, layer if found[1] is None else int(found[1]), *at)

    def _within(self, name: str, expert: int) -> Place | None:
        """Return where a parameter stands in its layer."""
        at = self._inside.get(name)
        if at is None or name not in EXPERTS:
            return None if at is None else (at,)
        first = self._inside[EXPERTS[0]]
        return (first, at, expert) if self._grouped else (first, expert, at)


def orders() -> Iterator[Order]:
    """Yield the orders that there are."""
    for local, grouped in product((False, True), (True, False)):
        yield Order(local=local, grouped=grouped)
