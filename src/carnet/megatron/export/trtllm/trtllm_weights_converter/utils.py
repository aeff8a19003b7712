"""What both converters know: activations with a gate, by the names that Megatron gives them; heads, element types, scales.

FP8: a weight is multiplied by its scale and becomes e4m3; the inverse goes with it, for the engine to multiply with. What would lie
past the largest e4m3 becomes the largest, as when Transformer Engine casts in training; older releases of torch make NaN of it.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.trtllm.binding import recut
from carnet.megatron.export.trtllm.trtllm_layers import TRTLLMLayers
from carnet.megatron.refusals import NoTensor

Scales = Mapping[str, Mapping[str, torch.Tensor]]  # name -> trt_llm_scale and weight_multiplier
WEIGHT, WEIGHT_SCALE = ".weight", ".weights_scaling_factor"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
NORMS = (TRTLLMLayers.input_layernorm_weight, TRTLLMLayers.post_layernorm_weight, TRTLLMLayers.final_layernorm_weight)
GATED_ACTIVATION = ["swiglu", "geglu", "fast-swiglu", "fast-geglu"]


class Activated(Protocol):
    """What knows its activation: a helper or a converter."""

    activation: str
    transformer_config: TransformerConfig


def is_gated_activation(helper: Activated) -> bool:
    """Say whether the MLPs of a model have a gate."""
    return helper.activation in GATED_ACTIVATION or bool(helper.transformer_config.gated_linear_unit)


def non_gated_version(activation: str) -> str:
    """Return the function that a gated activation applies to the gate; others are their own.

    TensorRT-LLM's config names it and the layers imply the gate: ``non_gated_version`` in tensorrt_llm/functional.py.

    >>> non_gated_version("swiglu"), non_gated_version("fast-geglu"), non_gated_version("relu")
    ('silu', 'gelu', 'relu')
    """
    gate = activation.removeprefix("fast-")
    return {"swiglu": "silu", "geglu": "gelu"}.get(gate, activation)


def str_dtype_to_torch(dtype: Enum) -> torch.dtype:
    """Return torch's type for an element type.

    >>> str_dtype_to_torch(DataType.bfloat16)
    torch.bfloat16
    """
    return getattr(torch, dtype.name)  # type: ignore[no-any-return]


def layer_of_tensor(name: str, value: object) -> tuple[TRTLLMLayers, int | None, torch.Tensor]:
    """Return the layer of a name of TensorRT-LLM, its number, and the value if it is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise NoTensor(f"Expected a tensor for {name} but got {type(value)}")
    known, number = TRTLLMLayers.return_layer_name_and_number(name)
    return TRTLLMLayers(known), number, value.detach()


class Converter:
    """A model's numbers, and what becomes of its tensors."""

    def __init__(
        self, config: TransformerConfig, dtype: DataType, multi_query_mode: bool, activation: str, scales: Scales | None
    ) -> None:
        self.transformer_config = config
        self.trtllm_model_weights: dict[str, torch.Tensor] = {}
        self.storage_type = str_dtype_to_torch(dtype)
        self.activation = activation
        self.scales = {} if scales is None else scales
        # a config without query groups has one for all queries or one for each
        self.num_kv_heads = int(config.num_query_groups or (1 if multi_query_mode else config.num_attention_heads))

    def _heads(self, layer: int | None, world: int = 1) -> dict[str, int]:
        """Return KV heads, query heads for each, and a head's width, on one of ``world`` ranks.

        ``layer`` counts from 0 in the whole model: the layers of a heterogeneous one have KV heads of their own, which the original
        gives the model's (megatron/core/transformer/heterogeneous/heterogeneous_config.py).
        """
        config, kv = self.transformer_config, self.num_kv_heads
        blocks = getattr(config, "per_block_parameters", None)
        if blocks is not None and layer is not None and layer < len(blocks):
            kv = blocks[layer].attention.num_query_groups or kv
        heads = config.num_attention_heads
        return {"kv": kv // world or kv, "rep": heads // kv, "dim": config.kv_channels or config.hidden_size // heads}

    def _recut(
        self, value: torch.Tensor, layer: TRTLLMLayers, number: int | None, heads: Mapping[str, int], *, world: int, gated: bool
    ) -> Iterator[tuple[str, int | None, torch.Tensor]]:
        """Yield what ranks hold of a tensor: its name, the rank or None for all of them, and the part.

        Norms that the config says are stored less one get it back, LayerNorms alone, as in the original.
        """
        config, scales = self.transformer_config, {} if number is None else self.scales
        less_one = layer in NORMS and config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm"

        def treat(name: str, part: torch.Tensor) -> torch.Tensor:
            scale = scales.get(name.removesuffix(WEIGHT) + WEIGHT_SCALE) if name.endswith(WEIGHT) else None
            if scale is not None:
                return (part * scale["weight_multiplier"].to(part.device)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            return (part + 1.0 if less_one else part).to(self.storage_type)

        return recut(value, layer, number, gated=gated, heads=heads, world=world, treat=treat)
