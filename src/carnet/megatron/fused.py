"""Norms that training has in one module with the linear layer behind them, and that other specs have apart.

The modules differ, the weights do not, and ``sharded_state_dict_keys_map`` ties the two: ``input_layernorm.weight`` is saved as, and
loaded from, ``self_attention.linear_qkv.layer_norm_weight``.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Saver = Literal["te", "local"]


@dataclass(frozen=True, slots=True)
class Fused:
    """A norm, and the linear layer under which its weight is saved."""

    norm: str  # the norm's own module
    linear: str  # what its weight and bias are called instead
    te: str  # the layers where Transformer Engine's spec fuses them, a pattern of their kind
    local: str  # the layers where the local spec names them so, without fusing anything


# a kind is what the layer mixes tokens with, and what it does to each: `attention moe`; in a hybrid one of them alone.
# megatron/core/models/gpt/gpt_layer_specs.py, whose local spec maps keys in every layer but those of latent attention;
# megatron/core/models/{mamba/mamba,hybrid/hybrid}_layer_specs.py, which has Transformer Engine's alone
FUSED = (
    Fused("input_layernorm.", "self_attention.linear_qkv.layer_norm_", te="attention*", local="attention*"),
    Fused("input_layernorm.", "self_attention.in_proj.layer_norm_", te="gdn", local=""),
    Fused("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", te="*dense", local="attention *"),
    Fused("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", te="mla*", local=""),
    Fused("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", te="mla*", local=""),
    Fused("norm.", "mixer.in_proj.layer_norm_", te="mamba", local=""),
)


def keys_map(kind: str, saved_by: Saver) -> dict[str, str]:
    """Return which keys of a layer of some kind are saved under another name.

    >>> keys_map("attention moe", "te")
    {'input_layernorm.': 'self_attention.linear_qkv.layer_norm_'}
    >>> keys_map("mamba", "te")
    {'norm.': 'mixer.in_proj.layer_norm_'}
    """
    return {each.norm: each.linear for each in FUSED if fnmatchcase(kind, getattr(each, saved_by))}
