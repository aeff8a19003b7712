"""A *family* is an architecture: what it fixes about a model, and how the dialects that are its own spell it."""

from dataclasses import dataclass

from carnet.families.rows import Dialect
from carnet.families.words import Config


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. Its Megatron dialect is the one that all families share."""

    name: str
    traits: Config  # the fields that it fixes
    hf: Dialect
    trtllm: Dialect | None  # None where there is none
    without: str = "NVIDIA's TensorRT-LLM has no class for it"  # why, then
