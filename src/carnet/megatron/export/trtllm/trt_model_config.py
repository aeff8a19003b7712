"""TensorRT-LLM's classes, where it is installed: they then say what a model is.

Where it is not, carnet's records stand in its place. Releases from 1.3 on have no engines any more, nor these classes; that counts as
not installed.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from carnet.megatron.export.model_type import ModelType
from carnet.megatron.export.trtllm import records

PLACES = {  # class -> its module in tensorrt_llm
    "GPTConfig": "models.gpt.config",
    "LLaMAConfig": "models.llama.config",
    "GemmaConfig": "models.gemma.config",
    "FalconConfig": "models.falcon.config",
    "DeciConfig": "models.nemotron_nas.config",
    "Mapping": "mapping",
    "MoeConfig": "layers",
}
CONFIGS = {
    ModelType.gpt: "GPTConfig",
    ModelType.gptnext: "GPTConfig",
    ModelType.starcoder: "GPTConfig",
    ModelType.mixtral: "LLaMAConfig",
    ModelType.llama: "LLaMAConfig",
    ModelType.gemma: "GemmaConfig",
    ModelType.falcon: "FalconConfig",
    ModelType.nemotron_nas: "DeciConfig",
}


def _classes() -> tuple[Mapping[str, Any], bool]:
    """Return the classes by name, and whether they are TensorRT-LLM's."""
    try:
        return {name: getattr(import_module(f"tensorrt_llm.{place}"), name) for name, place in PLACES.items()}, True
    except (ImportError, AttributeError):
        return {name: getattr(records, name) for name in PLACES}, False


CLASSES, HAVE_TRTLLM = _classes()
TRT_MODEL_CONFIG = {model: CLASSES[name] for model, name in CONFIGS.items()}
