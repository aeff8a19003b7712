"""What happens to the numbers on the way, and which sizes the config alone knows.

FP8: a weight is multiplied by its scale and becomes e4m3; the inverse goes with it, for the engine to multiply with. What would lie
past the largest e4m3 becomes the largest, as when Transformer Engine casts in training; older releases of torch make NaN of it.
"""

from collections.abc import Callable, Mapping
from enum import Enum

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from carnet.megatron.export.trtllm.layouts import NORMS
from carnet.megatron.export.trtllm.trtllm_layers import TRTLLMLayers

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LARGEST = torch.finfo(torch.float8_e4m3fn).max
WEIGHT, WEIGHT_SCALE = ".weight", ".weights_scaling_factor"

Scales = Mapping[str, Mapping[str, torch.Tensor]]  # name -> trt_llm_scale and weight_multiplier
Change = Callable[[torch.Tensor], torch.Tensor]


def str_dtype_to_torch(dtype: Enum) -> torch.dtype:
    """Return torch's type for an element type.

    >>> from carnet.megatron.export.data_type import DataType
    >>> str_dtype_to_torch(DataType.bfloat16)
    torch.bfloat16
    """
    return TORCH[dtype.name]


def kv_heads(config: TransformerConfig, multi_query_mode: bool) -> int:
    """Return the KV heads of a model; a config without query groups has one for all queries or one for each."""
    return int(config.num_query_groups or (1 if multi_query_mode else config.num_attention_heads))


def head_sizes(config: TransformerConfig, kv: int, layer: int | None, world: int = 1) -> dict[str, int]:
    """Return KV heads, query heads for each, and a head's width, on one of ``world`` ranks.

    ``layer`` counts from 0 in the whole model: the layers of a heterogeneous one have KV heads of their own, which the original gives
    the model's (megatron/core/transformer/heterogeneous/heterogeneous_config.py).
    """
    blocks = getattr(config, "per_block_parameters", None)
    if blocks is not None and layer is not None and layer < len(blocks):
        kv = blocks[layer].attention.num_query_groups or kv
    heads = config.num_attention_heads
    return {"kv": kv // world or kv, "rep": heads // kv, "dim": config.kv_channels or config.hidden_size // heads}


def treatment(
    config: TransformerConfig, layer: TRTLLMLayers, name: str, dtype: torch.dtype, scales: Scales
) -> tuple[torch.dtype, Change]:
    """Return the element type that a tensor of TensorRT-LLM has, and what is done to its elements before.

    Norms that the config says are stored less one get it back, LayerNorms alone, as in the original.
    """
    scale = scales.get(name.removesuffix(WEIGHT) + WEIGHT_SCALE) if name.endswith(WEIGHT) else None
    if scale is not None:
        multiplier = scale["weight_multiplier"]
        return torch.float8_e4m3fn, lambda part: (part * multiplier.to(part.device)).clamp(-LARGEST, LARGEST)
    if layer in NORMS and config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm":
        return dtype, lambda part: part + 1.0
    return dtype, lambda part: part
