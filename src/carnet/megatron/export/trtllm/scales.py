"""The scales of a model trained in FP8: Transformer Engine's states beside the weights, as the engine's scaling factors.

A module's state has two numbers that matter here: what its input and what its weight are multiplied by to become e4m3. The engine gets
the inverse of each. Nothing in a state is executed.
"""

import io
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from carnet.errors import BadCheckpoint, NotSupported
from carnet.formats.extra_state import NAME, scales_in
from carnet.megatron.export.trtllm.binding import names_of
from carnet.megatron.export.trtllm.trtllm_layers import NON_TRANSFORMER_LAYERS_NAMES, TRTLLMLayers, numbered
from carnet.megatron.export.trtllm.trtllm_weights_converter.utils import NORMS, WEIGHT, WEIGHT_SCALE
from carnet.megatron.refusals import NoScales, NoState

INPUT_SCALE = ".activation_scaling_factor"
KV_SCALE = ".kv_cache_scaling_factor"
QKV = ".attention.qkv"
MEMORY = "the state dict"  # for messages


def load_scaling_factors(
    model_state_dict: Mapping[str, Any], trtllm_conversion_dict: Mapping[str, object], *, gated: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Return what the states of a state dict say: for each scaling factor ``trt_llm_scale`` and its inverse, ``weight_multiplier``.

    Raises ValueError where a module with scales is unmapped, and CarnetError where a state is none or belongs to experts.
    """
    states = {}
    for key, value in model_state_dict.items():
        match = NAME.fullmatch(key)
        if match is None or value is None or match["module"].endswith("core_attention"):
            continue
        at = [int(each) for each in (match["at"] or "").split(".") if each]  # of a stacked model: its layer
        name = numbered(match["module"], at[0]) if at else match["module"]
        if scales := _read(value, key):
            states[name + WEIGHT] = scales
    if not states:
        raise NoScales("the model has no scales for FP8", remedy="fp8_quantized=False, or a state dict with _extra_state")
    found: dict[str, dict[str, torch.Tensor]] = {}
    renamed = TRTLLMLayers.rename_input_layer_names_to_trtllm_layer_names(dict(states), trtllm_conversion_dict, False)
    for name, scales in renamed.items():
        known, number = TRTLLMLayers.return_layer_name_and_number(name)
        if known in NON_TRANSFORMER_LAYERS_NAMES or TRTLLMLayers(known) in NORMS:
            continue  # the engine has these in the model's type
        if known.endswith(".expert"):
            raise NotSupported("experts in FP8 have a scale each", {"tensor": name}, remedy="fp8_quantized=False")
        # both halves of what Megatron joins have its scales; the original knows this of mlp.fc and not of ffn.fc
        for each in names_of(TRTLLMLayers(known), number, gated=gated):
            module = each.removesuffix(WEIGHT)
            found |= {module + INPUT_SCALE: _factor(scales[0]), module + WEIGHT_SCALE: _factor(scales[1])}
    return found


def kv_cache_scales(names: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Return the scale of the keys and values of each layer that attends: one, as of a cache that nobody calibrated."""
    layers = {name.split(QKV)[0] for name in names if QKV + WEIGHT in name}
    return {layer + ".attention" + KV_SCALE: torch.ones(1) for layer in layers}


def _factor(multiplier: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a scale and its inverse, float32 [1].

    The inverse that some versions of Transformer Engine store beside it may be an older one: that of a weight is only brought up to
    date when the weight is cast again. The weights here are multiplied by the scale, so that its own inverse goes with them.
    """
    return {"trt_llm_scale": 1 / multiplier, "weight_multiplier": multiplier}


def _read(state: object, key: str) -> tuple[torch.Tensor, ...]:
    """Return what a module's input and its weight are multiplied by, float32 [1] each, 1 where nothing was seen; nothing if it says so.

    Raises BadCheckpoint for anything else than a state, NotSupported for that of experts.
    """
    data = _bytes(state, key)
    scales = _pair(data)
    if scales is None:
        try:
            said = scales_in(data, key, MEMORY) if data else None
        except BadCheckpoint as error:
            raise NoState(error.what, error.facts, remedy=error.remedy) from error
        if said is None:
            return ()
        if len(said.weight) != 1:
            raise NotSupported("experts in FP8 have a scale each", {"tensor": key}, remedy="fp8_quantized=False")
        scales = torch.tensor([1.0 if each is None else each for each in (said.input[0], said.weight[0])])
    if not (scales.isfinite() & (scales > 0)).all():
        raise NoState(f"{key} holds a scale that is not a positive number", {"found": scales.tolist()})
    return scales[:1], scales[1:]


def _pair(data: bytes) -> torch.Tensor | None:
    """Return the two numbers of a table that has no others: what scripts make by hand, as Megatron's export reads no more."""
    if data[:2] == b"PK":
        with suppress(Exception):  # whatever torch cannot read, the reader of all other states judges
            scales = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["scale_fwd"]
            return scales.float() if scales.shape == (2,) else None
    return None


def _bytes(state: object, key: str) -> bytes:
    if isinstance(state, io.BytesIO):
        return state.getvalue()
    if isinstance(state, torch.Tensor) and state.dtype == torch.uint8:
        return state.cpu().numpy().tobytes()
    raise NoState(f"{key} is not a state of a module", {"expected": "a file in memory or bytes", "found": type(state).__name__})
