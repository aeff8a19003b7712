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
from carnet.megatron.export.trtllm.engine_builder.trtllm_engine_builder import TRTLLMEngineBuilder
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import (
    DEFAULT_CONVERSION_DICT,
    NEMOTRON_NAS_CONVERSION_DICT,
)
from carnet.megatron.export.trtllm.records import EngineConfig, Place
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
        if self._is(ModelType.nemotron_nas):
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
    ) -> tuple[list[Weights], list[EngineConfig]]:
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
        quantized = {"fp8_quantized": fp8_quantized, "fp8_kvcache": fp8_kvcache}
        if on_device_distributed_conversion:
            if vocab_size is None:
                raise Refused("Need to pass in vocab_size for on device")
            if not any(self._is(each) for each in ON_DEVICE):
                found = {"expected": ", ".join(each.name for each in ON_DEVICE), "found": self.model_type.name}
                raise Refused("On device conversion only supported for some model types", found)
            if export_config is not None:
                facts = {"export_config": export_config}
                raise Refused("Export config is inferred based on the parallel state", facts, remedy="export_config=None")
            if gpus_per_node is None:
                raise Refused("Need to pass in gpus_per_node for on device conversion")
            return self._on_device(state, dtype, vocab_size, gpus_per_node, scales, quantized)
        if vocab_size is not None:
            raise Refused("Vocab size is inferred from the input layer for cpu conversion", remedy="vocab_size=None")
        if export_config is None:
            raise Untold("Need to pass in export_config for conversion on one device")
        return self._on_one_device(
            state, dtype, export_config, gpus_per_node, state_dict_split_by_layer_numbers, scales, quantized
        )

    def build_and_save_engine(
        self,
        engine_dir: str,
        trtllm_model_weights: Weights,
        trtllm_model_config: EngineConfig,
        max_input_len: int = 1024,
        max_output_len: int = 1024,
        max_batch_size: int = 4,
        lora_ckpt_list: list[str] | None = None,
        use_lora_plugin: str | None = None,
        max_lora_rank: int = 64,
        lora_target_modules: list[str] | None = None,
        max_prompt_embedding_table_size: int = 0,
        paged_kv_cache: bool = True,
        remove_input_padding: bool = True,
        paged_context_fmha: bool = False,
        use_refit: bool = False,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        opt_num_tokens: int | None = None,
        max_beam_width: int = 1,
        tokens_per_block: int = 128,
        multiple_profiles: bool = False,
        gpt_attention_plugin: str = "auto",
        gemm_plugin: str = "auto",
    ) -> object:
        """Build the engine of a rank with TensorRT-LLM, save it in a folder and return it: see ``TRTLLMEngineBuilder``.

        Raises ImportError where TensorRT-LLM is not installed.
        """
        return TRTLLMEngineBuilder.build_and_save_engine(
            engine_dir,
            trtllm_model_weights,
            trtllm_model_config,
            max_input_len,
            max_output_len,
            max_batch_size,
            lora_ckpt_list,
            use_lora_plugin,
            max_lora_rank,
            lora_target_modules,
            max_prompt_embedding_table_size,
            paged_kv_cache,
            remove_input_padding,
            paged_context_fmha,
            use_refit,
            max_num_tokens,
            max_seq_len,
            opt_num_tokens,
            max_beam_width,
            tokens_per_block,
            multiple_profiles,
            gpt_attention_plugin,
            gemm_plugin,
        )

    def _is(self, model: ModelType) -> bool:
        """Say whether this is a model of a kind, whoever's enum says it."""
        return self.model_type.name == model.name

    def _load_scaling_factors(self, model_state_dict: Mapping[str, Any]) -> Factors:
        return load_scaling_factors(model_state_dict, self.trtllm_conversion_dict, gated=is_gated_activation(self))

    def _on_one_device(
        self,
        state: Mapping[str, Any],
        dtype: DataType,
        export_config: ExportConfig,
        gpus_per_node: int | None,
        split_by_layer_numbers: bool,
        scales: Factors,
        quantized: Mapping[str, bool],
    ) -> tuple[list[Weights], list[EngineConfig]]:
        """Return the weights and configs of all ranks."""
        converter = SingleDeviceTRTLLMModelWeightsConverter(
            export_config, self.transformer_config, dtype, self.multi_query_mode, self.activation, scales
        )
        self.weights_converter = converter
        converter.convert(state, self.trtllm_conversion_dict, split_by_layer_numbers)
        converter.trtllm_model_weights |= _factors(converter.trtllm_model_weights, scales, quantized)
        weights, configs = [], []
        world = export_config.inference_tp_size * export_config.inference_pp_size
        rows = converter.get_padded_vocab_size()
        for rank in range(world):
            node = gpus_per_node or export_config.inference_tp_size
            config = self._get_trtllm_config(export_config, world, node, rows, dtype, **quantized)
            config.mapping = _mapping(export_config, rank)
            weights.append(converter.get_local_model_weights_per_gpu(config.mapping, config))
            configs.append(config)
        return weights, configs

    def _on_device(
        self,
        state: Mapping[str, Any],
        dtype: DataType,
        vocab_size: int,
        gpus_per_node: int,
        scales: Factors,
        quantized: Mapping[str, bool],
    ) -> tuple[list[Weights], list[EngineConfig]]:
        """Return the weights and the config of this rank, in lists."""
        converter = DistributedTRTLLMModelWeightsConverter(
            self.transformer_config, dtype, self.multi_query_mode, self.activation, scales
        )
        self.weights_converter = converter
        converter.convert(state, self.trtllm_conversion_dict, vocab_size)
        converter.trtllm_model_weights |= _factors(converter.trtllm_model_weights, scales, quantized)
        cut = ExportConfig(converter.inference_tp_size, converter.inference_pp_size, use_parallel_embedding=True)
        world = cut.inference_tp_size * cut.inference_pp_size
        config = self._get_trtllm_config(cut, world, gpus_per_node, vocab_size, dtype, **quantized)
        config.mapping = _mapping(cut, converter.pp_rank * converter.inference_tp_size + converter.tp_rank)
        return [converter.trtllm_model_weights], [config]

    def _get_trtllm_config(
        self,
        export_config: ExportConfig,
        world_size: int,
        gpus_per_node: int,
        vocab_size_padded: int,
        dtype: DataType,
        fp8_quantized: bool = False,
        fp8_kvcache: bool = False,
    ) -> EngineConfig:
        """Return the config of the model, of TensorRT-LLM's class for it or carnet's record."""
        said = self.transformer_config
        # experts name the activation with its gate, an MLP what is done to the gate
        act = self.activation.split("-")[-1] if said.num_moe_experts else non_gated_version(self.activation)
        config = {
            "architecture": TRT_MODEL_TYPE_STRING[ModelType[self.model_type.name]],
            "dtype": dtype.name,
            "num_hidden_layers": said.num_layers,
            "num_attention_heads": said.num_attention_heads,
            "num_key_value_heads": said.num_query_groups or said.num_attention_heads,
            "head_size": said.kv_channels,
            "hidden_size": said.hidden_size,
            "intermediate_size": said.ffn_hidden_size,
            "norm_epsilon": said.layernorm_epsilon,
            "vocab_size": vocab_size_padded,
            "position_embedding_type": POSITIONS[self.position_embedding_type],
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": act,
            "use_parallel_embedding": export_config.use_parallel_embedding,
            "embedding_sharding_dim": 0,
            "share_embedding_table": self.share_embeddings_and_output_weights,
            "quantization": {
                "quant_algo": "FP8" if fp8_quantized else None,
                "kv_cache_quant_algo": "FP8" if fp8_kvcache else None,
            },
            "bias": said.add_bias_linear,
            "apply_query_key_layer_scaling": False,
            "rotary_pct": self.rotary_percentage,
            "rotary_base": self.rotary_base,
            "moe_num_experts": (said.num_moe_experts or 1) if said.moe_router_topk else 0,
            "moe_top_k": said.moe_router_topk,
            "moe_normalization_mode": self.moe_renorm_mode or CLASSES["MoeConfig"].ExpertScaleNormalizationMode.RENORMALIZE,
            "moe_tp_mode": self.moe_tp_mode,
            "logits_dtype": "float32",
            "world_size": world_size,
            "tp_size": export_config.inference_tp_size,
            "pp_size": export_config.inference_pp_size,
            "gpus_per_node": gpus_per_node,
        }
        made: EngineConfig = TRT_MODEL_CONFIG[ModelType[self.model_type.name]](**config, **self._more())
        return made

    def _more(self) -> dict[str, Any]:
        """Return what the configs of some models say beside."""
        more: dict[str, Any] = {}
        if self._is(ModelType.falcon):  # the 7B, of 32 layers, is the older decoder
            more |= {"new_decoder_architecture": self.transformer_config.num_layers != 32, "parallel_attention": True}
        if self.seq_len_interpolation_factor is not None:
            more["rotary_scaling"] = {"type": "linear", "factor": float(self.seq_len_interpolation_factor)}
        if self._is(ModelType.nemotron_nas):
            text = json.loads(self.transformer_config.heterogeneous_layers_config_encoded_json)
            more["block_configs"] = text["block_configs"]
            more["rotary_scaling"] = {"type": "llama3", "factor": self.rope_scaling_factor}
        return more


def _factors(weights: Weights, scales: Factors, quantized: Mapping[str, bool]) -> Weights:
    """Return the scaling factors that stand beside the weights, float32 [1]."""
    found = {name: scale["trt_llm_scale"] for name, scale in scales.items()}
    return found | (kv_cache_scales(weights) if quantized["fp8_kvcache"] else {})


def _mapping(cut: ExportConfig, rank: int) -> Place:
    """Return a rank's place."""
    tp, pp = cut.inference_tp_size, cut.inference_pp_size
    place: Place = CLASSES["Mapping"](world_size=tp * pp, rank=rank, tp_size=tp, pp_size=pp)
    return place
