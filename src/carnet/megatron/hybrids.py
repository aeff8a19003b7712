"""megatron-core's classes of a hybrid, under the names of today, on a machine without Triton, too.

megatron-core imports Triton for kernels that need a GPU: its hybrids do, and since 0.19 all of it. Where Triton is not installed a
module stands in for it while these are imported, and no longer: the layers can be built then, and say what they hold; they cannot run.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch

__all__ = [
    "DSAIndexer",
    "DSAIndexerSubmodules",
    "DSAttention",
    "DSAttentionSubmodules",
    "GatedDeltaNet",
    "GatedDeltaNetSubmodules",
    "HybridModel",
    "MambaLayer",
    "MambaLayerSubmodules",
    "MambaMixer",
    "MambaMixerSubmodules",
    "Stack",
    "StackSubmodules",
    "mamba_context_parallel",
    "mamba_mixer",
]


class _NoTriton(ModuleType):
    """Whatever is asked of it is itself, or the function that it should have compiled."""

    __version__ = "0"

    def __getattr__(self, name: str) -> "_NoTriton":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *given: object, **settings: object) -> object:
        """Decorate nothing."""
        return given[0] if len(given) == 1 and callable(given[0]) and not settings else self


@contextmanager
def _triton() -> Iterator[None]:
    """Have something to import as Triton."""
    names = () if find_spec("triton") else ("triton", "triton.language")
    if names:
        torch.compile(len)  # asks for Triton itself, once: it must not find this
    sys.modules.update({name: _NoTriton(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


with _triton():
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.transformer.experimental_attention_variant.dsa import (
        DSAIndexer,
        DSAIndexerSubmodules,
        DSAttention,
        DSAttentionSubmodules,
    )

    try:  # since 0.18
        from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
        from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as StackSubmodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba import MambaModel as HybridModel
        from megatron.core.ssm.mamba_block import MambaStack as Stack
        from megatron.core.ssm.mamba_block import MambaStackSubmodules as StackSubmodules
