"""From a Megatron model to what TensorRT-LLM builds an engine with: the weights of every rank, and the config of each."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm.engine_builder.trtllm_engine_builder import build_and_save_engine
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import (
    DEFAULT_CONVERSION_DICT,
    NEMOTRON_NAS_CONVERSION_DICT,
)
from carnet.megatron.export.trtllm.records import PretrainedConfig
from carnet.megatron.export.trtllm.scales import kv_cache_scales, load_scaling_factors
from carnet.megatron.export.trtllm.trt_model_config import CLASSES, HAVE_TRTLLM, TRT_MODEL_CONFIG
from carnet.megatron.export.trtllm.trt_model_type import TRT_MODEL_TYPE_STRING
from carnet.megatron.export.trtllm.trtllm_weights_converter.distributed_trtllm_model_weights_converter import (
    DistributedTRTLLMModelWeightsConverter,
)
from carnet.megatron.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
    SingleDeviceTRTLLMModelWeightsConverter,
)
from carnet.megatron.export.trtllm.trtllm_weights_converter.utils import is_gated_activation, non_gated_version
from carnet.megatron.refusals import Refused, Untold

__all__ = ["HAVE_TRTLLM", "TRTLLMHelper"]

ON_DEVICE = (ModelType.gpt, ModelType.gptnext, ModelType.llama, ModelType.nemotron_nas)
POSITIONS = {"learned_absolute": "learned_absolute", "rope": "rope_gpt_neox"}  # Megatron's word -> TensorRT-LLM's

# TensorRT-LLM's word -> Megatron's, in the config of the model and among the helper's arguments; what both say of every model
OF_THE_MODEL = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "head_size": "kv_channels",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "norm_epsilon": "layernorm_epsilon",
    "bias": "add_bias_linear",
    "moe_top_k": "moe_router_topk",
}
ASKED = {
    "max_position_embeddings": "max_position_embeddings",
    "share_embedding_table": "share_embeddings_and_output_weights",
    "rotary_pct": "rotary_percentage",
    "rotary_base": "rotary_base",
    "moe_tp_mode": "moe_tp_mode",
}
SETTLED = {"embedding_sharding_dim": 0, "apply_query_key_layer_scaling": False, "logits_dtype": "float32"}

NO_NAMES: Mapping[str, object] = MappingProxyType({})

Weights = dict[str, torch.Tensor]
Factors = Mapping[str, Mapping[str, torch.Tensor]]


class TRTLLMHelper:
    """Convert a model for TensorRT-LLM and build its engine."""

    def __init__(
        self,
        *,
        transformer_config: TransformerConfig,
        model_type: ModelType,
        trtllm_conversion_dict: Mapping[str, object] = NO_NAMES,
        position_embedding_type: str = "learned_absolute",
        max_position_embeddings: int | None = None,
        rotary_percentage: float = 1.0,
        rotary_base: float = 10000,
        rope_scaling_factor: float = 8.0,
        moe_tp_mode: int = 2,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        seq_len_interpolation_factor: float | None = None,
        moe_renorm_mode: int | None = None,
        share_embeddings_and_output_weights: bool = False,
    ) -> None:
        if position_embedding_type not in POSITIONS:
            facts = {"expected": " or ".join(POSITIONS), "found": position_embedding_type}
            raise Refused("Position embedding type should be one of learned_absolute, rope", facts)
        self.transformer_config = transformer_config
        self.model_type = model_type
        self.trtllm_conversion_dict: dict[str, object] = dict(DEFAULT_CONVERSION_DICT)
        if self.model_type == ModelType.nemotron_nas:
            self.trtllm_conversion_dict |= NEMOTRON_NAS_CONVERSION_DICT
        self.trtllm_conversion_dict |= trtllm_conversion_dict
        self.position_embedding_type = position_embedding_type
        self.max_position_embeddings = max_position_embeddings
        self.rotary_percentage = rotary_percentage
        self.rotary_base = rotary_base
        self.rope_scaling_factor = rope_scaling_factor
        self.moe_tp_mode = moe_tp_mode
        self.multi_query_mode = multi_query_mode
        self.activation = activation
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.moe_renorm_mode = moe_renorm_mode
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.weights_converter: SingleDeviceTRTLLMModelWeightsConverter | DistributedTRTLLMModelWeightsConverter | None = None

    def get_trtllm_pretrained_config_and_model_weights(
        self,
        model_state_dict: Mapping[str, Any] | None,
        dtype: DataType,
        export_config: ExportConfig | None = None,
        on_device_distributed_conversion: bool = False,
        vocab_size: int | None = None,
        gpus_per_node: int | None = None,
        state_dict_split_by_layer_numbers: bool = True,
        fp8_quantized: bool = False,
        fp8_kvcache: bool = False,
    ) -> tuple[list[Weights], list[PretrainedConfig]]:
        """Return the weights and the configs of the ranks of inference: of all of them, or of this one if each converts its own.

        On one device ``export_config`` says the cut and the state dict is the whole model, its layers numbered or, with
        ``state_dict_split_by_layer_numbers=False``, the first dimension of each tensor. With ``on_device_distributed_conversion`` every
        rank of the training calls this with its own state dict, the tokenizer's ``vocab_size`` and ``gpus_per_node``. FP8 weights have
        the scales of the ``_extra_state`` beside them; a cache of keys and values in FP8 has the scale one.

        Raises AssertionError where an argument is missing or too many, ValueError for an unmapped name, CarnetError for tensors that
        are not those of the config.
        """
        if model_state_dict is None:
            raise Refused("Model state dict is not set")
        scales = self._load_scaling_factors(model_state_dict) if fp8_quantized else {}
        state = {name: value for name, value in model_state_dict.items() if "extra_state" not in name}
        numbers = (dtype, self.multi_query_mode, self.activation, scales)
        said = {"dtype": dtype, "fp8_quantized": fp8_quantized, "fp8_kvcache": fp8_kvcache}
        if on_device_distributed_conversion:
            if vocab_size is None:
                raise Refused("Need to pass in vocab_size for on device")
            if self.model_type not in ON_DEVICE:
                found = {"expected": ", ".join(each.name for each in ON_DEVICE), "found": self.model_type.name}
                raise Refused("On device conversion only supported for some model types", found)
            if export_config is not None:
                facts = {"export_config": export_config}
                raise Refused("Export config is inferred based on the parallel state", facts, remedy="export_config=None")
            if gpus_per_node is None:
                raise Refused("Need to pass in gpus_per_node for on device conversion")
            held = self.weights_converter = DistributedTRTLLMModelWeightsConverter(self.transformer_config, *numbers)
            held.convert(state, self.trtllm_conversion_dict, vocab_size)
            _add_factors(held.trtllm_model_weights, scales, fp8_kvcache=fp8_kvcache)
            cut = ExportConfig(held.inference_tp_size, held.inference_pp_size, use_parallel_embedding=True)
            rank = held.pp_rank * held.inference_tp_size + held.tp_rank
            return [held.trtllm_model_weights], [self._config_of(rank, cut, gpus_per_node, vocab_size, **said)]
        if vocab_size is not None:
            raise Refused("Vocab size is inferred from the input layer for cpu conversion", remedy="vocab_size=None")
        if export_config is None:
            raise Untold("Need to pass in export_config for conversion on one device")
        whole = SingleDeviceTRTLLMModelWeightsConverter(export_config, self.transformer_config, *numbers)
        self.weights_converter = whole
        whole.convert(state, self.trtllm_conversion_dict, state_dict_split_by_layer_numbers)
        _add_factors(whole.trtllm_model_weights, scales, fp8_kvcache=fp8_kvcache)
        tp, rows = export_config.inference_tp_size, whole.get_padded_vocab_size()
        ranks = range(tp * export_config.inference_pp_size)
        configs = [self._config_of(rank, export_config, gpus_per_node or tp, rows, **said) for rank in ranks]
        return [whole.get_local_model_weights_per_gpu(config.mapping, config) for config in configs], configs

    build_and_save_engine = build_and_save_engine

    def _load_scaling_factors(self, model_state_dict: Mapping[str, Any]) -> Factors:
        return load_scaling_factors(model_state_dict, self.trtllm_conversion_dict, gated=is_gated_activation(self))

    def _config_of(self, rank: int, cut: ExportConfig, node: int, rows: int, **said: Any) -> PretrainedConfig:  # noqa: ANN401
        """Return the config of a rank, with its place."""
        tp, pp = cut.inference_tp_size, cut.inference_pp_size
        config = self._get_trtllm_config(cut, tp * pp, node, rows, **said)
        config.mapping = CLASSES["Mapping"](world_size=tp * pp, rank=rank, tp_size=tp, pp_size=pp)
        return config

    def _get_trtllm_config(
        self,
        export_config: ExportConfig,
        world_size: int,
        gpus_per_node: int,
        vocab_size_padded: int,
        dtype: DataType,
        fp8_quantized: bool = False,
        fp8_kvcache: bool = False,
    ) -> PretrainedConfig:
        """Return the config of the model, of TensorRT-LLM's class for it or carnet's record."""
        said = self.transformer_config
        # experts name the activation with its gate, an MLP what is done to the gate
        act = self.activation.split("-")[-1] if said.num_moe_experts else non_gated_version(self.activation)
        config = {
            **SETTLED,
            **{name: getattr(said, place) for name, place in OF_THE_MODEL.items()},
            **{name: getattr(self, place) for name, place in ASKED.items()},
            "architecture": TRT_MODEL_TYPE_STRING[self.model_type],
            "dtype": dtype.name,
            "num_key_value_heads": said.num_query_groups or said.num_attention_heads,
            "vocab_size": vocab_size_padded,
            "position_embedding_type": POSITIONS[self.position_embedding_type],
            "hidden_act": act,
            "use_parallel_embedding": export_config.use_parallel_embedding,
            "quantization": {
                "quant_algo": "FP8" if fp8_quantized else None,
                "kv_cache_quant_algo": "FP8" if fp8_kvcache else None,
            },
            "moe_num_experts": (said.num_moe_experts or 1) if said.moe_router_topk else 0,
            "moe_normalization_mode": self.moe_renorm_mode or CLASSES["MoeConfig"].ExpertScaleNormalizationMode.RENORMALIZE,
            "world_size": world_size,
            "tp_size": export_config.inference_tp_size,
            "pp_size": export_config.inference_pp_size,
            "gpus_per_node": gpus_per_node,
        }
        made: PretrainedConfig = TRT_MODEL_CONFIG[self.model_type](**config, **self._more())
        return made

    def _more(self) -> dict[str, Any]:
        """Return what the configs of some models say beside."""
        more: dict[str, Any] = {}
        if self.model_type == ModelType.falcon:  # the 7B, of 32 layers, is the older decoder
            more |= {"new_decoder_architecture": self.transformer_config.num_layers != 32, "parallel_attention": True}
        if self.seq_len_interpolation_factor is not None:
            more["rotary_scaling"] = {"type": "linear", "factor": float(self.seq_len_interpolation_factor)}
        if self.model_type == ModelType.nemotron_nas:
            text = json.loads(self.transformer_config.heterogeneous_layers_config_encoded_json)
            more["block_configs"] = text["block_configs"]
            more["rotary_scaling"] = {"type": "llama3", "factor": self.rope_scaling_factor}
        return more


def _add_factors(weights: Weights, scales: Factors, *, fp8_kvcache: bool) -> None:
    """Add the scaling factors that stand beside the weights, float32 [1]."""
    weights |= {name: scale["trt_llm_scale"] for name, scale in scales.items()}
    weights |= kv_cache_scales(weights) if fp8_kvcache else {}
