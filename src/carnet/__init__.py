"""carnet takes a trained model across the border: Megatron to TensorRT-LLM, vLLM, SGLang and transformers, provably whole.

Five verbs, nothing else::

    import carnet

    carnet.cross("checkpoints/llama", "out/llama-hf", to="hf")
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["cross", "inspect", "plan", "run", "verify"]

if TYPE_CHECKING:
    from carnet.api import cross, inspect, plan, run, verify


def __getattr__(name: str) -> object:
    # the verbs need numpy; `carnet --help` does not
    if name in __all__:
        from carnet import api

        return getattr(api, name)
    raise AttributeError(f"module 'carnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
