"""What ``megatron.core.export`` offers, on carnet's tables: a script changes its import and nothing else.

It works without tensorrt_llm, whose configs are then carnet's own records with the same fields; with it, configs are of its classes and
engines are built.
"""

from carnet.megatron.export.builder import TRTLLMEngineBuilder
from carnet.megatron.export.distributed import DistributedTRTLLMModelWeightsConverter
from carnet.megatron.export.engine import HAVE_TRTLLM, TRT_MODEL_CONFIG, TRT_MODEL_TYPE_STRING
from carnet.megatron.export.helper import TRTLLMHelper
from carnet.megatron.export.layers import (
    DEFAULT_CONVERSION_DICT,
    NEMOTRON_NAS_CONVERSION_DICT,
    NON_TRANSFORMER_LAYERS_NAMES,
    TRTLLMLayers,
    get_layer_name_without_prefix,
)
from carnet.megatron.export.records import Mapping, MoeConfig
from carnet.megatron.export.single_device import SingleDeviceTRTLLMModelWeightsConverter
from carnet.megatron.export.words import (
    GATED_ACTIVATION,
    DataType,
    ExportConfig,
    ModelType,
    is_gated_activation,
    non_gated_version,
    pad_vocab_size,
    str_dtype_to_torch,
)

__all__ = [
    "DEFAULT_CONVERSION_DICT",
    "GATED_ACTIVATION",
    "HAVE_TRTLLM",
    "NEMOTRON_NAS_CONVERSION_DICT",
    "NON_TRANSFORMER_LAYERS_NAMES",
    "TRT_MODEL_CONFIG",
    "TRT_MODEL_TYPE_STRING",
    "DataType",
    "DistributedTRTLLMModelWeightsConverter",
    "ExportConfig",
    "Mapping",
    "ModelType",
    "MoeConfig",
    "SingleDeviceTRTLLMModelWeightsConverter",
    "TRTLLMEngineBuilder",
    "TRTLLMHelper",
    "TRTLLMLayers",
    "get_layer_name_without_prefix",
    "is_gated_activation",
    "non_gated_version",
    "pad_vocab_size",
    "str_dtype_to_torch",
]
