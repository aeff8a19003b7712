"""Styles: under which names, with which shapes a program keeps codes and scales, and what its config says about them.

A quantized weight ``X.weight`` becomes several stored tensors. Names and shapes: modelopt 0.47 export_hf_checkpoint, compressed-tensors
0.19, DeepSeek's published inference code (``weight_scale_inv``), TensorRT-LLM's per-rank format up to 1.2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from carnet.quantize.recipes import Recipe, codes_dtype, codes_shape, grid


@dataclass(frozen=True, slots=True)
class Kept:
    """One stored tensor of a quantized weight."""

    role: (
        str  # "codes", "scales" (a number a block), "outer" (one over them), "input" (of activations), "shape" (of the weight)
    )
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Style:
    """The names of one program, in place of ``weight`` at the end of a name."""

    name: str
    codes: str
    scales: str
    outer: str
    inputs: Mapping[str, str]  # scheme -> name of the scale of activations, where it is static
    scalar: str  # shape of a single number: "[]" or "[1]"
    input_dtype: str  # "f32" or "own"
    joint: Mapping[
        str, tuple[tuple[str, ...], ...]
    ]  # scheme -> canonical weights of a layer that share the scale of a whole tensor
    cache: tuple[str, str, str]  # where the scale of cached keys stands, and of values: seen from the projection; and its type

    def codes_of(self, recipe: Recipe) -> str:
        """Return what the codes of a recipe are called."""
        return "weight_packed" if self.name == "compressed-tensors" and recipe.packing else self.codes


QKV = ("attention.q", "attention.k", "attention.v")
GATE_UP = (("mlp.gate", "mlp.up"), ("moe.gate", "moe.up"), ("shared.gate", "shared.up"))
# of latent attention: modelopt joins what reads the same input, compressed-tensors what vLLM fuses (fused_qkv_a_proj)
LATENT = ("mla.q", "mla.q_a", "mla.kv_a", "mla.k_rope")

STYLES = {
    "modelopt": Style(
        "modelopt",
        codes="weight",
        scales="weight_scale",
        outer="weight_scale_2",
        inputs={"fp8": "input_scale", "nvfp4": "input_scale"},
        scalar="[]",
        input_dtype="f32",
        joint={"fp8": GATE_UP[1:2], "nvfp4": (QKV, LATENT, *GATE_UP)},
        cache=("k_scale", "v_scale", "f32"),
    ),
    "compressed-tensors": Style(
        "compressed-tensors",
        codes="weight",
        scales="weight_scale",
        outer="weight_global_scale",
        inputs={"fp8": "input_scale", "nvfp4": "input_global_scale"},
        scalar="[1]",
        input_dtype="own",
        joint={"nvfp4": (QKV, LATENT[1:], *GATE_UP)},
        cache=("../k_scale", "../v_scale", "own"),
    ),
    "deepseek": Style("deepseek", "weight", "weight_scale_inv", "", {}, "[1]", "f32", {}, ("", "", "")),
    "trtllm": Style(
        "trtllm",
        codes="weight",
        scales="weights_scaling_factor",
        outer="weights_scaling_factor_2",
        inputs={"fp8": "activation_scaling_factor"},
        scalar="[1]",
        input_dtype="f32",
        # what is stored as one tensor has one scale anyhow; gate and up are two, which TensorRT-LLM may fuse for an engine
        joint={"fp8": GATE_UP[:1]},
        # one for both: modelopt adds k_ and v_cache_scaling_factor, which 0.17 does not know and 1.x drops again after taking the
        # larger (tensorrt_llm/models/modeling_utils.py preprocess_weights)
        cache=("../kv_cache_scaling_factor", "../kv_cache_scaling_factor", "f32"),
    ),
}
SCALAR: Mapping[str, tuple[int, ...]] = {"[]": (), "[1]": (1,)}
# what reads the same activations: they are calibrated together, and an engine that fuses them has one scale for all
SAME_INPUT = (QKV, LATENT, *GATE_UP)


def beside(weight: str, place: str) -> str:
    """Return the name of what stands beside a weight, or beside the module that holds it.

    >>> beside("h.0.attn.k_proj.weight", "../k_scale"), beside("h.0.attn.k_proj.weight", "k_scale")
    ('h.0.attn.k_scale', 'h.0.attn.k_proj.k_scale')
    """
    module = weight.rsplit(".", 1)[0]
    return f"{module.rsplit('.', 1)[0]}.{place[3:]}" if place.startswith("../") else f"{module}.{place}"


def kept(recipe: Recipe, name: str, shape: tuple[int, ...], own: str, *, static: bool) -> Iterator[Kept]:
    """Yield the stored tensors of a quantized weight, the codes first.

    ``shape`` is that of the weight, rows and columns, with the experts before them where it holds several; ``own`` its element type;
    ``static`` says that the scale of activations is stored too.

    >>> from carnet.quantize.recipes import BY_NAME
    >>> [(k.name, k.dtype, k.shape) for k in kept(BY_NAME["modelopt/nvfp4"], "a.weight", (128, 256), "bf16", static=False)]
    [('a.weight', 'u8', (128, 128)), ('a.weight_scale', 'f8_e4m3', (128, 16)), ('a.weight_scale_2', 'f32', ())]
    """
    style, base = STYLES[recipe.style], name.removesuffix("weight")
    experts, matrix = shape[:-2], (shape[-2], shape[-1])
    scalar = SCALAR[style.scalar]
    yield Kept("codes", base + style.codes_of(recipe), codes_dtype(recipe), experts + codes_shape(recipe, matrix))
    scales = own if recipe.scale.stored == "own" else recipe.scale.stored
    yield Kept("scales", base + style.scales, scales, _scales_shape(recipe, experts, matrix, scalar))
    if recipe.scale.outer:
        yield Kept("outer", base + style.outer, "f32", scalar)
    if static and recipe.scheme in style.inputs:
        dtype = own if style.input_dtype == "own" and not recipe.scale.outer else "f32"
        yield Kept("input", base + style.inputs[recipe.scheme], dtype, scalar)
    if recipe.packing == "words":
        yield Kept("shape", base + "weight_shape", "i64", (2,))


def _scales_shape(
    recipe: Recipe, experts: tuple[int, ...], matrix: tuple[int, int], scalar: tuple[int, ...]
) -> tuple[int, ...]:
    rows, columns = grid(recipe, matrix)
    if recipe.block == (0, 0):
        return (*experts, 1) if experts else scalar
    if recipe.style == "modelopt" and recipe.scheme == "fp8-channel":
        return (rows,)
    if recipe.style == "modelopt" and recipe.scheme == "fp8-block":
        return (rows, 1, columns, 1)
    return (*experts, rows, columns)
