"""What Transformer Engine leaves beside the weights of a module, made as it makes it.

The tables and their packing: transformer_engine/pytorch/module/base.py get_extra_state, v1.0 to v1.13 and v2.0 to v2.9. The recipe:
transformer_engine/common/recipe/__init__.py. What becomes of one that covers several experts: megatron/core/extensions/
transformer_engine.py _split_extra_state. ModelOpt's own, around such a one: modelopt/torch/opt/plugins/megatron.py.
"""

import enum
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

RECIPES = "transformer_engine.common.recipe"
LENGTH = 16  # of the history


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    E4M3 = _FormatHelper(448, 448)
    E5M2 = _FormatHelper(57344, 57344)
    HYBRID = _FormatHelper(448, 57344)


@dataclass()
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = LENGTH
    amax_compute_algo: str = "max"
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass()
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = MMParams(False)


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Let pickles name the recipe as the program does."""
    module = types.ModuleType(RECIPES)
    for kind in (_FormatHelper, Format, DelayedScaling, MMParams, Float8CurrentScaling):
        kind.__module__ = RECIPES
        setattr(module, kind.__name__, kind)
    names = {"transformer_engine": types.ModuleType("x"), "transformer_engine.common": types.ModuleType("y"), RECIPES: module}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def table(scales: torch.Tensor, *, recipe: bool, gemms: int = 1) -> dict[str, Any]:
    """Return the state of delayed scaling; ``scales``: inputs, weights and outputs of all products, in this order."""
    assert scales.shape == (3 * gemms,)
    history = torch.zeros(LENGTH, 3 * gemms)
    history[1] = torch.where(scales == 1, 0, 448 / scales)
    state: dict[str, Any] = {"recipe": DelayedScaling()} if recipe else {}
    state["scale_fwd"] = scales.clone()
    if not recipe:
        state["scale_inv_fwd"] = 1 / scales
    state["amax_history_fwd"] = history
    state["scale_bwd"] = torch.full((2 * gemms,), 3.0)
    if not recipe:
        state["scale_inv_bwd"] = 1 / state["scale_bwd"]
    state["amax_history_bwd"] = torch.zeros(LENGTH, 2 * gemms)
    plain = {
        "fp8_checkpoint": True,
        "fp8_max_fwd": 448,
        "fp8_max_bwd": 57344,
        "num_gemms": gemms,
        "async_amax_reduction": False,
    }
    state["extra_fp8_variables"] = plain
    return state


def first_form(state: object) -> io.BytesIO:
    """Pack as versions 1.x."""
    packed = io.BytesIO()
    with transformer_engine():
        torch.save(state, packed)
    return packed


def second_form(state: object) -> torch.Tensor:
    """Pack as versions from 2.0 on."""
    with transformer_engine():
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def split(state: dict[str, Any], gemms: int) -> list[dict[str, Any]]:
    """Return the state of each expert out of one for all: views of the tensors that all share."""
    return [
        {
            **{key: value for key, value in state.items() if key in ("recipe", "extra_fp8_variables")},
            "scale_fwd": state["scale_fwd"].view(3, -1)[:, gemm],
            "amax_history_fwd": state["amax_history_fwd"].view(LENGTH, 3, -1)[:, :, gemm],
            "scale_bwd": state["scale_bwd"].view(2, -1)[:, gemm],
            "amax_history_bwd": state["amax_history_bwd"].view(LENGTH, 2, -1)[:, :, gemm],
        }
        for gemm in range(gemms)
    ]


def of_modelopt(inner: object = None) -> torch.Tensor:
    """Pack a quantized module's state as ModelOpt does."""
    quantizers = {
        "weight_quantizer": {"_num_bits": (4, 3), "_axis": None, "_pytorch_state_metadata": {"_amax": torch.Size([])}}
    }
    state = {"extra_state": inner} if inner is not None else {}
    packed = io.BytesIO()
    torch.save({**state, "modelopt_quantizer_state": quantizers, "modelopt_real_quantizer_state": None}, packed)
    return torch.frombuffer(bytearray(packed.getvalue()), dtype=torch.uint8)


FORMS: dict[str, Callable[[torch.Tensor], object]] = {
    "1.x": lambda scales: first_form(table(scales, recipe=False, gemms=len(scales) // 3)),
    "2.x": lambda scales: second_form(table(scales, recipe=True, gemms=len(scales) // 3)),
    "in ModelOpt's": lambda scales: of_modelopt(second_form(table(scales, recipe=True, gemms=len(scales) // 3))),
}
