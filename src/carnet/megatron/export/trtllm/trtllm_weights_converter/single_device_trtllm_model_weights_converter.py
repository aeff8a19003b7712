"""The whole model on one device: every layer becomes the tensors of all inference ranks, which are then dealt out.

``trtllm_model_weights`` holds both halves of the way: whole tensors under their names, those that are cut under the name, the rank and
``.bin``: ``transformer.layers.2.mlp.proj.weight.1.bin``.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from carnet.errors import BadCheckpoint
from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.trtllm.records import Mapping as Place
from carnet.megatron.export.trtllm.trtllm_layers import PREFIX, TRTLLMLayers
from carnet.megatron.export.trtllm.trtllm_weights_converter.utils import (
    Converter,
    Scales,
    is_gated_activation,
    layer_of_tensor,
    str_dtype_to_torch,
)
from carnet.megatron.export.trtllm.vocabulary import pad_vocab_size, padded, part
from carnet.megatron.refusals import Misshapen, Missing

__all__ = ["SingleDeviceTRTLLMModelWeightsConverter", "pad_vocab_size", "str_dtype_to_torch"]

CUT = re.compile(r"(.+)\.(\d+)\.bin")
IN_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
EMBED = TRTLLMLayers.vocab_embedding.value
POSITION = TRTLLMLayers.position_embedding.value
HEAD = TRTLLMLayers.lm_head.value
NORM = TRTLLMLayers.final_layernorm_weight.value
BIAS = TRTLLMLayers.final_layernorm_bias.value


class SingleDeviceTRTLLMModelWeightsConverter(Converter):
    """Convert a whole state dict for any number of inference ranks, wherever its tensors are."""

    def __init__(
        self,
        export_config: ExportConfig,
        transformer_config: TransformerConfig,
        dtype: DataType,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        scales: Scales | None = None,
    ) -> None:
        super().__init__(transformer_config, dtype, multi_query_mode, activation, scales)
        self.export_config = export_config

    @torch.no_grad()
    def convert(
        self,
        model_state_dict: Mapping[str, Any],
        trtllm_conversion_dict: Mapping[str, object],
        state_dict_split_by_layer_numbers: bool = True,
    ) -> None:
        """Convert a state dict; the names tell which tensors are one layer's and which hold all layers, one index each.

        Raises ValueError for an unmapped name, AssertionError where a layer's number is missing, and CarnetError, which BadRequest and
        BadCheckpoint are, where the tensors cannot be cut so or are not those of the config.
        """
        renamed = TRTLLMLayers.rename_input_layer_names_to_trtllm_layer_names(
            dict(model_state_dict), trtllm_conversion_dict, state_dict_split_by_layer_numbers
        )
        for name, value in renamed.items():
            layer, number, held = layer_of_tensor(name, value)
            for at, each in self._each_layer(layer, number, held):
                self._convert(layer, at, each)

    def _each_layer(
        self, layer: TRTLLMLayers, number: int | None, value: torch.Tensor
    ) -> Iterator[tuple[int | None, torch.Tensor]]:
        """Yield the layers that a tensor holds."""
        count = self.transformer_config.num_layers
        if not layer.value.startswith(PREFIX):
            yield None, value
        elif number is not None:
            if number >= count:  # the original gives it to no rank
                raise BadCheckpoint(f"the state dict has a layer {number}, the config has {count}", {"tensor": layer.value})
            yield number, value
        elif not value.ndim or len(value) != count:  # the original takes the first so many
            facts = {"tensor": layer.value, "expected": f"{count} layers", "found": list(value.shape)}
            raise Misshapen("a tensor of all layers has another number of them", facts)
        else:
            yield from enumerate(value)

    def _convert(self, layer: TRTLLMLayers, number: int | None, value: torch.Tensor) -> None:
        """Add what all ranks hold of a tensor; what lies outside the layers stays whole until it is dealt out."""
        tp, gated, heads = self.export_config.inference_tp_size, self._is_gated(layer, value), self._heads(number)
        if layer is TRTLLMLayers.vocab_embedding and self.export_config.use_parallel_embedding and value.ndim:
            value = padded(value, pad_vocab_size(len(value), tp))
        for name, rank, made in self._recut(value, layer, number, heads, world=1 if number is None else tp, gated=gated):
            self.trtllm_model_weights[name if rank is None or number is None else f"{name}.{rank}.bin"] = made

    def _is_gated(self, layer: TRTLLMLayers, value: torch.Tensor) -> bool:
        """Say whether a layer has a gate: its activation says it, or, of experts, the rows that they have."""
        gated = is_gated_activation(self)
        if not gated and layer is TRTLLMLayers.mlp_fc_weight_mixture_of_experts and value.ndim == 3:
            config = self.transformer_config
            return bool(value.shape[1] == 2 * (config.moe_ffn_hidden_size or config.ffn_hidden_size))
        return gated

    def get_padded_vocab_size(self) -> int:
        """Return the rows that the vocabulary has for the engine: whole shares for all ranks where there is a head."""
        rows = len(self._needed(EMBED))
        return pad_vocab_size(rows, self.export_config.inference_tp_size) if HEAD in self.trtllm_model_weights else rows

    def _needed(self, name: str) -> torch.Tensor:
        if name not in self.trtllm_model_weights:
            raise Missing(f"the state dict has no {name}")
        return self.trtllm_model_weights[name]

    def get_local_model_weights_per_gpu(self, mapping: Place, trtllm_model_config: object) -> dict[str, torch.Tensor]:
        """Return what one rank of the inference holds, its layers counted from 0.

        ``mapping`` says the rank's place: ``tp_size``, ``tp_rank``, ``pp_layers(count)``, ``is_first_pp_rank()`` and
        ``is_last_pp_rank()``. A vocabulary or positions that the ranks cannot share evenly are padded with zeros, to the sizes that the
        engine's layers have: the original leaves the last rank short, or without any, and no engine takes that.
        """
        layers = {number: at for at, number in enumerate(mapping.pp_layers(self.transformer_config.num_layers))}
        newer = getattr(trtllm_model_config, "new_decoder_architecture", False)
        held = {}
        for name, value in self.trtllm_model_weights.items():
            if cut := CUT.fullmatch(name):  # the whole number: "1.bin" also ends the name of rank 11
                if int(cut[2]) != mapping.tp_rank:
                    continue
                name = cut[1]
            if (inside := IN_LAYER.fullmatch(name)) and int(inside[1]) in layers:
                own = inside[2].replace("post_layernorm", "mlp_layernorm") if newer else inside[2]  # Falcon's newer decoder
                held[f"{PREFIX}{layers[int(inside[1])]}.{own}"] = value
        return held | self._outside(mapping)

    def _outside(self, mapping: Place) -> dict[str, torch.Tensor]:
        """Return what a rank holds of what is in no layer."""
        known, held = self.trtllm_model_weights, {}
        shared, place = self.export_config.use_parallel_embedding, (mapping.tp_size, mapping.tp_rank)
        if mapping.is_first_pp_rank():
            embed = padded(self._needed(EMBED), self.get_padded_vocab_size())
            held[EMBED] = part(embed, *place) if shared else embed
            if POSITION in known:
                held[POSITION] = part(known[POSITION], *place) if shared else known[POSITION]
        if mapping.is_last_pp_rank():
            if HEAD in known:
                held[HEAD] = part(known[HEAD], *place)
            held |= {NORM: self._needed(NORM)} | ({BIAS: known[BIAS]} if BIAS in known else {})
        return held
