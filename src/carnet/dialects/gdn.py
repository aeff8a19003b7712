"""Gated DeltaNet as transformers' module has it: rows of its projections by key head, or each part apart.

Qwen3NextGatedDeltaNet in modeling_qwen3_next.py, Qwen3_5GatedDeltaNet in modeling_qwen3_5.py; some who train with Megatron
put the same modules into its layers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from carnet.dialects.rows import Row, fuse, row

QKVZ = {"gdn.q": "key_dim", "gdn.k": "key_dim", "gdn.v": "value value_dim", "gdn.z": "value value_dim"}
QKV = {"gdn.q": "key key_dim", "gdn.k": "key key_dim", "gdn.v": "key value value_dim"}
CONV = {"gdn.conv_q": "key key_dim", "gdn.conv_k": "key key_dim", "gdn.conv_v": "key value value_dim"}
BY_KEY_HEAD = (
    fuse("in_proj_qkvz.weight", "(key *) hidden", QKVZ),
    fuse("in_proj_ba.weight", "(key *) hidden", {"gdn.b": "value", "gdn.a": "value"}),
)
APART = (
    fuse("in_proj_qkv.weight", "* hidden", QKV),
    row("in_proj_z.weight", "(key value value_dim) hidden", "gdn.z"),
    row("in_proj_b.weight", "(key value) hidden", "gdn.b"),
    row("in_proj_a.weight", "(key value) hidden", "gdn.a"),
)
ROWS = (
    fuse("conv1d.weight", "* 1 gdn_conv", CONV),
    row("dt_bias", "(key value)", "gdn.dt_bias"),
    row("A_log", "(key value)", "gdn.a_log"),
    row("norm.weight", "value_dim", "gdn.out_norm", whole=True),
    row("out_proj.weight", "hidden (key value value_dim)", "gdn.o"),
)


def within(module: str, rows: Iterable[Row], written: Mapping[str, object] | None = None) -> tuple[Row, ...]:
    """Return rows under the name of a module."""
    return tuple(replace(row, name=module + row.name, written=written or {}) for row in rows)
