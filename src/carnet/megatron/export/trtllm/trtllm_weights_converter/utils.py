"""Activations with a gate, by the names that Megatron gives them."""

from typing import Protocol

from megatron.core.transformer.transformer_config import TransformerConfig

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
