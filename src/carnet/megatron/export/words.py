"""The words that scripts say to Megatron's export: element types, kinds of models, the cut of the inference.

They are carnet's own, equal in name to those of ``megatron.core.export``, so that nothing here depends on whether a release of Megatron
still has them. A member of Megatron's own enums is taken wherever one of these is: by its name, a layer by its value.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class Word(Enum):
    """A member that equals the one of Megatron's own enum of the same name: dictionaries of either are the same."""

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Enum) or type(other).__name__ != type(self).__name__:
            return NotImplemented
        return (other.name, other.value) == (self.name, self.value)

    def __hash__(self) -> int:
        return hash(self.name)  # as enums have it


class DataType(Word):
    """The element type of the weights of the inference."""

    bfloat16 = 1
    float16 = 2
    float32 = 3


class ModelType(Word):
    """The kind of a model, which says what TensorRT-LLM calls it."""

    gpt = 1
    gptnext = 2
    llama = 3
    falcon = 4
    starcoder = 5
    mixtral = 6
    gemma = 7
    nemotron_nas = 8


TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GATED_ACTIVATION = ["swiglu", "geglu", "fast-swiglu", "fast-geglu"]


@dataclass
class ExportConfig:
    """How the inference is cut: as ``megatron.core.export.export_config`` has it."""

    inference_tp_size: int = 1  # ranks that share every layer
    inference_pp_size: int = 1  # stages that share the layers
    use_parallel_embedding: bool = False  # each rank holds a part of the embedding's rows
    use_embedding_sharing: bool | None = None  # deprecated

    def __post_init__(self) -> None:
        if self.use_embedding_sharing is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # shown, and no error, whatever the program's filters: as the original does
                message = "use_embedding_sharing of ExportConfig is share_embeddings_and_output_weights of TRTLLMHelper"
                warnings.warn(message, DeprecationWarning, stacklevel=3)


class Place(Protocol):
    """A rank's place in the inference: TensorRT-LLM's ``Mapping``, carnet's, or what a script makes in its stead."""

    tp_size: int
    tp_rank: int

    def pp_layers(self, num_layers: int) -> Sequence[int]:
        """Return the layers of its stage."""

    def is_first_pp_rank(self) -> bool:
        """Say whether the stage holds what comes before the layers."""

    def is_last_pp_rank(self) -> bool:
        """Say whether the stage holds what comes after them."""


class EngineConfig(Protocol):
    """What an engine is built for: a config of TensorRT-LLM's, or a record in its stead."""

    architecture: str
    use_parallel_embedding: bool
    share_embedding_table: bool
    mapping: Place


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
    return TORCH[dtype.name]


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the next multiple of the ranks: rows of the vocabulary that they share evenly.

    >>> pad_vocab_size(97, 2), pad_vocab_size(98, 2)
    (98, 98)
    """
    return -(-vocab_size // tp_size) * tp_size
