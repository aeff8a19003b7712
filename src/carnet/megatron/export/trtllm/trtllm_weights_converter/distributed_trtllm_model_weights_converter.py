"""Every rank converts what it holds: the inference has the cut of the training, and the tensors are born where they are needed.

Nothing but the vocabulary moves between the ranks: see ``vocabulary``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.trtllm.binding import EXPERT, query_groups
from carnet.megatron.export.trtllm.trtllm_layers import NON_TRANSFORMER_LAYERS_NAMES, TRTLLMLayers
from carnet.megatron.export.trtllm.trtllm_weights_converter.utils import (
    Converter,
    Scales,
    is_gated_activation,
    layer_of_tensor,
    str_dtype_to_torch,
)
from carnet.megatron.export.trtllm.vocabulary import part, reshare
from carnet.megatron.refusals import Refused, Uneven, Unmapped

__all__ = ["DistributedTRTLLMModelWeightsConverter", "str_dtype_to_torch"]

VOCABULARY = (TRTLLMLayers.vocab_embedding, TRTLLMLayers.lm_head)


class DistributedTRTLLMModelWeightsConverter(Converter):
    """Convert the state dict of a rank, as Megatron's ``parallel_state`` places it, for the same place among the ranks of inference."""

    def __init__(
        self,
        transformer_config: TransformerConfig,
        dtype: DataType,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        scales: Scales | None = None,
    ) -> None:
        super().__init__(transformer_config, dtype, multi_query_mode, activation, scales)
        self.inference_pp_size = parallel_state.get_pipeline_model_parallel_world_size()
        self.inference_tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        if (transformer_config.virtual_pipeline_model_parallel_size or 1) != 1:
            raise Refused(
                "Virtual parallelism is not supported in GPU Converter",
                {"virtual_pipeline_model_parallel_size": transformer_config.virtual_pipeline_model_parallel_size},
                remedy="gather the chunks of every stage first",
            )

    @torch.no_grad()
    def convert(
        self, model_state_dict: Mapping[str, Any], trtllm_conversion_dict: Mapping[str, object], tokenizer_vocab_size: int
    ) -> None:
        """Convert this rank's state dict; the ranks of its tensor-parallel group have to do so together.

        Layers keep the numbers that they have on this stage. Called again, it fills the tensors that it made the first time. Raises
        ValueError for an unmapped name and for a mixture of experts, AssertionError where a layer's number is missing, and CarnetError
        where the tensors are not those of the config.
        """
        renamed = TRTLLMLayers.rename_input_layer_names_to_trtllm_layer_names(dict(model_state_dict), trtllm_conversion_dict)
        if self.num_kv_heads % self.inference_tp_size:
            raise Uneven(query_groups(self.num_kv_heads))
        # the vocabulary first, in one order on all ranks: its rows change hands, and nobody waits for a rank that refused a layer
        for name in sorted(renamed, key=lambda name: (name not in NON_TRANSFORMER_LAYERS_NAMES, name)):
            self._convert(*layer_of_tensor(name, renamed[name]), tokenizer_vocab_size)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to pinned memory are there when this returns

    def _convert(self, layer: TRTLLMLayers, number: int | None, value: torch.Tensor, vocabulary: int) -> None:
        if layer.value.endswith(EXPERT):
            raise Unmapped(f"{layer.value} cannot be handled by GPU converter", remedy="convert the whole model on one device")
        if layer in VOCABULARY:
            value = reshare(value, vocabulary, world=self.inference_tp_size, rank=self.tp_rank, group=self.tp_group)
        if layer is TRTLLMLayers.position_embedding:  # TensorRT-LLM shares all embeddings among its ranks
            value = part(value, self.inference_tp_size, self.tp_rank)
        heads, gated = self._heads(self._in_model(number), self.inference_tp_size), is_gated_activation(self)
        # what this rank holds is the whole of what it will hold
        for name, _, made in self._recut(value, layer, number, heads, world=1, gated=gated):
            there = self.trtllm_model_weights.get(name)  # on the CPU, pinned where there is CUDA
            if there is None or there.shape != made.shape or there.dtype != made.dtype:
                there = torch.empty_like(made, device="cpu", pin_memory=made.is_cuda)
                self.trtllm_model_weights[name] = there
            there.copy_(made, non_blocking=True)

    def _in_model(self, number: int | None) -> int | None:
        """Return the number of a layer in the whole model."""
        if number is None or self.inference_pp_size == 1:
            return number
        return number + int(get_transformer_layer_offset(self.transformer_config))
