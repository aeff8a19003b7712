"""A *family* is an architecture: what it fixes about a model, and how the dialects that are its own spell it."""

from dataclasses import dataclass, field

from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import Dialect
from carnet.dialects.vllm import Spelling
from carnet.model.fields import Condition, Config

LLAMA_TRAITS: Config = {"norm": "rms", "gated": True, "position": "rope"}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. Its Megatron dialect is the one that all share, but for heads that lie beside them."""

    name: str
    traits: Config  # the fields that it fixes
    hf: Dialect
    trtllm: Dialect | None  # None where there is none
    without: str = "NVIDIA's TensorRT-LLM has no class for it"  # why, then
    vllm: Spelling | None = None  # what vLLM's class stores otherwise than the folder; None where carnet does not know
    megatron: Dialect = MEGATRON
    needs: Condition = field(default_factory=dict)  # what all of its models have, whatever the value: experts
