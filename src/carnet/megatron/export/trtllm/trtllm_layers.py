"""The layers that TensorRT-LLM has, and how the names of a state dict lead to them.

``decoder.layers.2.mlp.linear_fc2.weight`` is, without its number, a key of a conversion dictionary; the layer found there names the
tensor in TensorRT-LLM, the number back in its place: ``transformer.layers.2.mlp.proj.weight``.
"""

import re
from collections.abc import Mapping
from typing import Any

from carnet.errors import NotSupported
from carnet.megatron.export.words import Word
from carnet.megatron.refusals import Refused, Unmapped

PREFIX = "transformer.layers."
NUMBER = re.compile(r"(?<=layers\.)(\d+)\.")
STATE, ADAPTER = "_extra_state", "adapter_layer"  # what is beside the weights of a layer


class TRTLLMLayers(Word):
    """The layers, by the names that TensorRT-LLM gives them; without a number where every layer of the stack has one."""

    position_embedding = "transformer.position_embedding.weight"
    vocab_embedding = "transformer.vocab_embedding.weight"
    lm_head = "lm_head.weight"
    final_layernorm_weight = "transformer.ln_f.weight"
    final_layernorm_bias = "transformer.ln_f.bias"
    input_layernorm_weight = "transformer.layers.input_layernorm.weight"
    input_layernorm_bias = "transformer.layers.input_layernorm.bias"
    attention_qkv_weight = "transformer.layers.attention.qkv.weight"
    attention_qkv_bias = "transformer.layers.attention.qkv.bias"
    attention_dense_weight = "transformer.layers.attention.dense.weight"
    attention_dense_bias = "transformer.layers.attention.dense.bias"
    attention_linear_weight = "transformer.layers.attention.weight"  # Nemotron-NAS: in place of the attention
    mlp_fc_weight = "transformer.layers.mlp.fc.weight"
    mlp_fc_bias = "transformer.layers.mlp.fc.bias"
    post_layernorm_weight = "transformer.layers.post_layernorm.weight"
    post_layernorm_bias = "transformer.layers.post_layernorm.bias"
    mlp_projection_weight = "transformer.layers.mlp.proj.weight"
    mlp_projection_bias = "transformer.layers.mlp.proj.bias"
    ffn_fc_weight = "transformer.layers.ffn.fc.weight"  # Nemotron-NAS calls its MLPs so
    ffn_projection_weight = "transformer.layers.ffn.proj.weight"
    ffn_linear_weight = "transformer.layers.ffn.weight"  # Nemotron-NAS: in place of an MLP
    mlp_router_weight = "transformer.layers.mlp.router.weight"
    mlp_fc_weight_mixture_of_experts = "transformer.layers.mlp.fc.weight.expert"
    mlp_projection_weight_mixture_of_experts = "transformer.layers.mlp.proj.weight.expert"

    @staticmethod
    def return_layer_name_and_number(layer_name: str) -> tuple[str, int | None]:
        """Return a name without the number of its layer, and the number, None where there is none.

        Only the layer's number goes. The original takes away every ``.2.`` of layer 2, an expert's number with it.

        >>> TRTLLMLayers.return_layer_name_and_number("decoder.layers.2.self_attention.linear_qkv.weight")
        ('decoder.layers.self_attention.linear_qkv.weight', 2)
        """
        found = NUMBER.search(layer_name)
        if found is None:
            return layer_name, None
        return layer_name[: found.start()] + layer_name[found.end() :], int(found[1])

    @staticmethod
    def rename_input_layer_names_to_trtllm_layer_names(
        model_state_dict: dict[str, Any],
        trtllm_conversion_dict: Mapping[str, object],
        state_dict_split_by_layer_numbers: bool = True,
    ) -> dict[str, Any]:
        """Rename the keys of a state dict, in place, to the names that TensorRT-LLM has; extra states are left out.

        Raises NotSupported for an adapter, which the original leaves out in silence; ValueError for a name that the dictionary lacks
        and for two names of one tensor; AssertionError for a value that is not a layer and for a layer without a number where
        ``state_dict_split_by_layer_numbers`` says that all have one.
        """
        renamed: dict[str, Any] = {}
        for name, value in model_state_dict.items():
            if ADAPTER in name:
                facts = {"tensor": name}
                raise NotSupported(
                    "an adapter is not a layer of the engine", facts, remedy="merge the adapters into their layers"
                )
            if STATE in name:
                continue
            known, number = TRTLLMLayers.return_layer_name_and_number(name)
            if "layers" in known and state_dict_split_by_layer_numbers and number is None:
                raise Refused(
                    f"Layer number is None for {name}",
                    {"state_dict_split_by_layer_numbers": True},
                    remedy="state_dict_split_by_layer_numbers=False, if its first dimension is the layer",
                )
            if known not in trtllm_conversion_dict:
                raise Unmapped(f"Unable to rename key {known}", remedy="give its layer in trtllm_conversion_dict")
            target = numbered(layer_of(trtllm_conversion_dict[known]).value, number)
            if target in renamed:  # the original keeps the last of them in silence
                raise Unmapped(f"two tensors of the state dict are {target}", {"tensor": name, "layer": known})
            renamed[target] = value
        model_state_dict.clear()
        model_state_dict.update(renamed)
        return model_state_dict


def layer_of(value: object) -> TRTLLMLayers:
    """Return the layer that a value of a conversion dictionary is, be it a member of this enum or of Megatron's."""
    for layer in TRTLLMLayers:
        if layer == value:
            return layer
    raise Refused(f"{value} is not supported for conversion", {"expected": "a member of TRTLLMLayers"})


def numbered(name: str, number: int | None) -> str:
    """Return the name of a layer's tensor with the layer's number.

    >>> numbered("transformer.layers.attention.qkv.weight", 2)
    'transformer.layers.2.attention.qkv.weight'
    """
    return name if number is None else name.replace("layers.", f"layers.{number}.", 1)


def get_layer_name_without_prefix(layer: TRTLLMLayers) -> str:
    """Return a layer's name without what all names of the stack begin with.

    >>> get_layer_name_without_prefix(TRTLLMLayers.attention_qkv_weight)
    'attention.qkv.weight'
    """
    return layer.value.replace(PREFIX, "")


# outside the stack: these have no number
NON_TRANSFORMER_LAYERS_NAMES = [
    TRTLLMLayers.vocab_embedding.value,
    TRTLLMLayers.position_embedding.value,
    TRTLLMLayers.lm_head.value,
    TRTLLMLayers.final_layernorm_weight.value,
    TRTLLMLayers.final_layernorm_bias.value,
]
