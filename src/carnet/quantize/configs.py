"""What a config says about quantized weights, as each program writes it.

modelopt 0.47 writes ``quantization_config`` into config.json and hf_quant_config.json beside it; compressed-tensors 0.19 the first
alone; DeepSeek's published models likewise; TensorRT-LLM's per-rank config has a ``quantization`` record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from carnet.quantize.recipes import Recipe

Json = dict[str, object]

ALGORITHMS = {  # of modelopt, by scheme
    "fp8": "FP8",
    "fp8-channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-block": "fp8_pb_wo",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
    "mxfp4": "mxfp4",
}
WEIGHTS_ALONE = {"W4A16_NVFP4": "nvfp4"}  # words for a scheme whose activations are left as they are: read, never written
GROUPS = {"nvfp4": 16, "mxfp8": 32}  # of mxfp4 modelopt says none
BITS = {"fp8": 8, "nvfp4": 4}  # schemes whose groups of layers modelopt spells out
PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # engines recognise the style by the name

# of compressed-tensors: format, and what differs from ARGUMENTS for weights and for activations
ARGUMENTS: Json = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": None,
    "observer_kwargs": {},
    "scale_dtype": None,
    "strategy": "tensor",
    "symmetric": True,
    "type": "float",
    "zp_dtype": None,
}
TOKEN: Json = {"dynamic": True, "strategy": "token"}
E4M3, U8 = "torch.float8_e4m3fn", "torch.uint8"
MX8: Json = {"strategy": "group", "group_size": 32, "scale_dtype": U8, "zp_dtype": U8}
MX4: Json = {**MX8, "num_bits": 4}
FP4: Json = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3, "zp_dtype": E4M3}
INT4: Json = {"num_bits": 4, "strategy": "group", "type": "int"}
PRESSED: Mapping[str, tuple[str, Json, Json | None]] = {
    "fp8": ("float-quantized", {}, {"observer": "static_minmax"}),
    "fp8-channel": ("float-quantized", {"strategy": "channel"}, TOKEN),
    "fp8-block": (
        "float-quantized",
        {"strategy": "block", "block_structure": [128, 128]},
        {"dynamic": True, "strategy": "group", "group_size": 128},
    ),
    "nvfp4": ("nvfp4-pack-quantized", FP4, {**FP4, "dynamic": "local", "observer": "static_minmax"}),
    "mxfp8": ("mxfp8-quantized", MX8, {**MX8, "dynamic": True}),
    "mxfp4": ("mxfp4-pack-quantized", MX4, {**MX4, "dynamic": True}),
    "int8-channel": ("int-quantized", {"strategy": "channel", "type": "int"}, {**TOKEN, "type": "int"}),
    "int4-group": ("pack-quantized", {**INT4, "group_size": 128}, None),
    "int4-group32": ("pack-quantized", {**INT4, "group_size": 32}, None),
}
# scheme -> what is said of activations that have no stored scale, where they could have one
DYNAMIC: Mapping[str, Json | None] = {"fp8": TOKEN, "nvfp4": None}
CACHE: Json = {"dynamic": False, "num_bits": 8, "type": "float"}


@dataclass(frozen=True, slots=True)
class Codes:
    """What a config is to say of codes."""

    recipe: Recipe
    ignored: Sequence[str]  # the linear modules that stay as they are
    cache: bool  # scales of an FP8 cache of keys and values are stored
    static: bool  # activations have a scale that is stored


def with_codes(said: Mapping[str, object], key: str, codes: Codes) -> dict[str, Json]:
    """Return the texts of a target that say what is coded: name -> text; ``said`` is config.json without, ``key`` where it says it."""
    record = said.get(key)
    own = WRITERS[codes.recipe.style](codes)
    texts = {CONFIG: {**said, key: {**(record if isinstance(record, dict) else {}), **own}}}
    return texts | ({BESIDE: _beside(codes)} if codes.recipe.style in WITH_BESIDE else {})


def _blocks(codes: Codes) -> Json:
    blocks: Json = {
        "activation_scheme": "static" if codes.static else "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [*codes.recipe.block] if any(codes.recipe.block) else None,
    }
    return {**blocks, **({"modules_to_not_convert": [*codes.ignored]} if codes.ignored else {})}


def _modelopt(codes: Codes) -> Json:
    said: Json = {}
    if codes.recipe.scheme in BITS:
        numbers: Json = {"dynamic": False, "num_bits": BITS[codes.recipe.scheme], "type": "float"}
        numbers |= {"group_size": GROUPS[codes.recipe.scheme]} if codes.recipe.scheme in GROUPS else {}
        said["config_groups"] = {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}}
    said |= {"ignore": [*codes.ignored], "quant_algo": ALGORITHMS[codes.recipe.scheme]}
    said |= {"kv_cache_scheme": CACHE} if codes.cache else {}
    return {**said, "producer": PRODUCER, "quant_method": "modelopt"}


def _pressed(codes: Codes) -> Json:
    format_, weights, inputs = PRESSED[codes.recipe.scheme]
    if not codes.static:
        inputs = DYNAMIC.get(codes.recipe.scheme, inputs)
    group: Json = {
        "format": format_,
        "input_activations": None if inputs is None else {**ARGUMENTS, **inputs},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {**ARGUMENTS, "observer": "memoryless_minmax", **weights},
    }
    return {
        "config_groups": {"group_0": group},
        "format": format_,
        "global_compression_ratio": None,
        "ignore": [*codes.ignored],
        "kv_cache_scheme": {**ARGUMENTS, "observer": "static_minmax"} if codes.cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def _beside(codes: Codes) -> Json:
    groups: Json = {"group_size": GROUPS[codes.recipe.scheme]} if codes.recipe.scheme in GROUPS else {}
    said: Json = {
        "quant_algo": ALGORITHMS[codes.recipe.scheme],
        "kv_cache_quant_algo": "FP8" if codes.cache else None,
        **groups,
    }
    return {"producer": PRODUCER, "quantization": {**said, "exclude_modules": [*codes.ignored]}}


def _published(codes: Codes) -> Json:
    return {"modules_to_not_convert": [*codes.ignored], "quant_method": "mxfp4"}


def _of_ranks(codes: Codes) -> Json:
    algorithms: Json = {"quant_algo": ALGORITHMS[codes.recipe.scheme], "kv_cache_quant_algo": "FP8" if codes.cache else None}
    return {**algorithms, "exclude_modules": [*codes.ignored]}


WRITERS: Mapping[str, Callable[[Codes], Json]] = {
    "modelopt": _modelopt,
    "compressed-tensors": _pressed,
    "deepseek": _blocks,
    "trtllm": _of_ranks,
    "openai": _published,
}
CONFIG = "config.json"
BESIDE, WITH_BESIDE = "hf_quant_config.json", ("modelopt",)  # a second file with the same in other words, and who writes it
