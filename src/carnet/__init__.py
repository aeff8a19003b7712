"""carnet takes a trained language model across the border: Megatron to TensorRT-LLM, vLLM and transformers, provably whole.

The verbs, what they return, and what they raise::

    import carnet

    verdict = carnet.cross("checkpoints/llama", "out/llama-hf", to="hf")
    if not verdict:
        print(verdict.findings)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from carnet.version import __version__ as __version__

__all__ = [
    "BadCheckpoint",
    "BadOption",
    "BadRequest",
    "CarnetError",
    "Comparison",
    "Expected",
    "Inspection",
    "MachineFailed",
    "NotSupported",
    "Options",
    "Plan",
    "Progress",
    "Verdict",
    "against",
    "clean",
    "cross",
    "expect",
    "finish",
    "inspect",
    "merge",
    "plan",
    "run",
    "verify",
]

if TYPE_CHECKING:
    from carnet.api import Inspection, clean, cross, finish, inspect, plan, run, verify
    from carnet.engines.comparing import Comparison
    from carnet.engines.expected import Expected
    from carnet.errors import BadCheckpoint, BadOption, BadRequest, CarnetError, MachineFailed, NotSupported
    from carnet.examiner.verdict import Verdict
    from carnet.expecting import against, expect
    from carnet.merging import merge
    from carnet.plans.columns import Plan
    from carnet.plans.typed import Options
    from carnet.progress import Progress

_HOMES = {
    "carnet.api": ("Inspection", "Verdict", "clean", "cross", "finish", "inspect", "plan", "run", "verify"),
    "carnet.engines.comparing": ("Comparison",),
    "carnet.engines.expected": ("Expected",),
    "carnet.expecting": ("against", "expect"),
    "carnet.merging": ("merge",),
    "carnet.errors": ("BadCheckpoint", "BadOption", "BadRequest", "CarnetError", "MachineFailed", "NotSupported"),
    "carnet.plans.typed": ("Options",),
    "carnet.plans.columns": ("Plan",),
    "carnet.progress": ("Progress",),
}


if not TYPE_CHECKING:  # a type checker that saw it would take any name

    def __getattr__(name: str) -> object:
        # the verbs need numpy; `carnet --help` does not
        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module 'carnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
