"""Styles: under which names, with which shapes a program keeps codes and scales, and what its config says about them.

A quantized weight ``X.weight`` becomes several stored tensors. Names and shapes: modelopt 0.47 export_hf_checkpoint, compressed-tensors
0.19, DeepSeek's published inference code (``weight_scale_inv``), TensorRT-LLM's per-rank format up to 1.2, GPT-OSS as it is published
(transformers 5.23 integrations/mxfp4.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from carnet.quantize.recipes import WHOLE, Recipe, codes_dtype, codes_shape, grid


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
    # scheme -> which weights that read the same activations share the scale of a whole tensor, by the word of carnet.model.tensors
    joint: Mapping[str, tuple[str, ...]]
    cache: tuple[str, str, str]  # where the scale of cached keys stands, and of values: seen from the projection; and its type
    lists: frozenset[str]  # roles of weights beside linear ones that its config names as plain
    weight: str = "weight"  # what the names stand in place of; "" where they are added to the name of a parameter
    one_module: bool = False  # a name is one module, no pattern, and nothing below it
    by_patterns: bool = False  # the names are patterns: one for a part of the model in which nothing is coded
    reaches: bool = False  # a pattern names what lies below a module that it matches, too
    alone: frozenset[str] = frozenset()  # weights that read what others read and share no scale with them
    only_where: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # weight -> models whose config names it
    # names of a head without a tensor that are excluded: of a tied model the first so many, None for all names of any model
    heads_named: int | None = 0
    heads_asked: tuple[int | None, ...] = (None,)  # the names of the head of which an engine must be told one: a slice of all
    codes_conv1d: bool = False  # transformers' Conv1D is coded too, and stored as a linear layer
    whole_experts: bool = False  # the experts of a layer are one module: coded whole or not at all
    dynamic: frozenset[str] = frozenset()  # schemes that may do without a stored scale of activations
    shapes: Mapping[str, str] = field(default_factory=dict)  # scheme -> shape of its scales, where it is not "rows columns"
    stacks_experts: bool = False  # codes of experts in one tensor have its name, and their scales longer ones: X_weight_scale
    turns_experts: bool = False  # codes of experts in one tensor are stored as a linear layer's are: [expert, out, in]
    blocks_apart: bool = False  # the codes of each block have an axis of their own
    hf_modules: bool = True  # modules have the names that transformers gives them
    packed: str = ""  # what codes are called where several share an item; "" where that is no other name
    one_cache: bool = False  # keys and values have one scale, which is never below one

    def codes_of(self, recipe: Recipe) -> str:
        """Return what the codes of a recipe are called."""
        return self.packed if self.packed and recipe.packing else self.codes


LEFT = frozenset(("plain", "gate", "head"))  # roles of linear layers that no program codes, and every one must be told so
FUSED = ("attention", "latent", "mlp", "experts", "shared")  # what engines fuse

STYLES = {
    "modelopt": Style(
        "modelopt",
        codes="weight",
        scales="weight_scale",
        outer="weight_scale_2",
        inputs={"fp8": "input_scale", "nvfp4": "input_scale"},
        scalar="[]",
        input_dtype="f32",
        joint={"fp8": ("experts",), "nvfp4": FUSED},
        cache=("k_scale", "v_scale", "f32"),
        lists=LEFT | {"table", "convolution"},
        by_patterns=True,
        only_where={"embed": {"embed_root": False}},  # Gemma's is of another class: it multiplies what it looks up
        heads_named=1,
        shapes={"fp8-channel": "rows", "fp8-block": "rows 1 columns 1"},
        stacks_experts=True,
        codes_conv1d=True,
    ),
    "compressed-tensors": Style(
        "compressed-tensors",
        codes="weight",
        scales="weight_scale",
        outer="weight_global_scale",
        inputs={"fp8": "input_scale", "nvfp4": "input_global_scale"},
        scalar="[1]",
        input_dtype="own",
        joint={"nvfp4": FUSED},
        alone=frozenset(("mla.q",)),  # vLLM's fused_qkv_a_proj joins compressed queries
        cache=("../k_scale", "../v_scale", "own"),
        lists=LEFT,
        one_module=True,
        heads_named=None,
        dynamic=frozenset(("fp8", "nvfp4")),
        packed="weight_packed",
        heads_asked=(-1, None),  # that of transformers, the last
    ),
    "deepseek": Style(
        "deepseek",
        codes="weight",
        scales="weight_scale_inv",
        outer="",
        inputs={"fp8": "activation_scale"},  # transformers 5.23 integrations/finegrained_fp8.py FP8Linear, without blocks
        scalar="[]",
        input_dtype="f32",
        joint={},
        cache=("", "", ""),
        lists=LEFT - {"head"},  # DeepSeek's code leaves the head alone without being told
        dynamic=frozenset(("fp8",)),
        reaches=True,  # transformers: quantizers_utils.py should_convert_module
        heads_asked=(0,),
    ),
    "trtllm": Style(
        "trtllm",
        codes="weight",
        scales="weights_scaling_factor",
        outer="weights_scaling_factor_2",
        inputs={"fp8": "activation_scaling_factor"},
        scalar="[1]",
        input_dtype="f32",
        # what is stored as one tensor has one scale anyhow; gate and up are two, which TensorRT-LLM may fuse for an engine
        joint={"fp8": ("mlp",)},
        # one for both: modelopt adds k_ and v_cache_scaling_factor, which 0.17 does not know and 1.x drops again after taking the
        # larger (tensorrt_llm/models/modeling_utils.py preprocess_weights)
        cache=("../kv_cache_scaling_factor", "../kv_cache_scaling_factor", "f32"),
        lists=LEFT,  # takes the place of TensorRT-LLM's own list: quantization/quantize.py quantize_layers
        heads_asked=(1,),
        whole_experts=True,
        hf_modules=False,
        one_cache=True,
    ),
    "openai": Style(
        "openai",
        codes="_blocks",
        scales="_scales",
        outer="",
        inputs={},
        scalar="[1]",
        input_dtype="f32",
        joint={},
        cache=("", "", ""),
        lists=LEFT,
        weight="",
        reaches=True,
        turns_experts=True,
        blocks_apart=True,
    ),
}
# what an engine calls otherwise before it packs it: vllm 0.32 layers/quantization/mxfp4.py
LOADED = {
    "openai": replace(
        STYLES["openai"], codes="weight", scales="weight_scale", weight="weight", turns_experts=False, blocks_apart=False
    )
}
SCALAR: Mapping[str, tuple[int, ...]] = {"[]": (), "[1]": (1,)}


def as_loaded(style: Style) -> Style:
    """Return a style with the names that an engine has before it packs codes."""
    return LOADED.get(style.name, style)


def ends_in(name: str, last: str) -> bool:
    """Say whether a name is that of a module's or a parameter's own.

    >>> ends_in("mlp.up.weight_scale", "weight_scale"), ends_in("mlp.up_scales", "_scales"), ends_in("mlp.up_scales", "scales")
    (True, True, False)
    """
    return name.endswith(last if last.startswith("_") else f".{last}")


def beside(weight: str, place: str) -> str:
    """Return the name of what stands beside a weight, or beside the module that holds it.

    >>> beside("h.0.attn.k_proj.weight", "../k_scale"), beside("h.0.attn.k_proj.weight", "k_scale")
    ('h.0.attn.k_scale', 'h.0.attn.k_proj.k_scale')
    """
    module = weight.rsplit(".", 1)[0]
    return f"{module.rsplit('.', 1)[0]}.{place[3:]}" if place.startswith("../") else f"{module}.{place}"


def is_stacked(style: Style, shape: tuple[int, ...]) -> bool:
    """Say whether the experts of a weight are a parameter with one scale over them all, whose names are longer than its own."""
    return style.stacks_experts and len(shape) > 2


def around(recipe: Recipe, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape with rows and columns as they are stored."""
    return (*shape[:-2], shape[-1], shape[-2]) if recipe.turned and shape else shape


def kept(
    recipe: Recipe, name: str, shape: tuple[int, ...], own: str, *, static: bool, parts: tuple[int, ...] = ()
) -> Iterator[Kept]:
    """Yield the stored tensors of a quantized weight, the codes first.

    ``shape`` is that of the weight, rows and columns, with the experts before them where it holds several; ``own`` its element type;
    ``static`` says that the scale of activations is stored too. ``parts`` are the rows of each part that an engine joins in it, before
    it packs them: vLLM's parameters are f32, and have a number of each part where a folder has one
    (vllm 0.32 layers/quantization/fp8.py, modelopt.py, compressed_tensors/).

    >>> from carnet.quantize.recipes import BY_NAME
    >>> [(k.name, k.dtype, k.shape) for k in kept(BY_NAME["modelopt/nvfp4"], "a.weight", (128, 256), "bf16", static=False)]
    [('a.weight', 'u8', (128, 128)), ('a.weight_scale', 'f8_e4m3', (128, 16)), ('a.weight_scale_2', 'f32', ())]
    """
    style = as_loaded(STYLES[recipe.style]) if parts else STYLES[recipe.style]
    base, codes = name.removesuffix(style.weight), style.codes_of(recipe)
    experts, matrix = shape[:-2], (shape[-2], shape[-1])
    scalar = SCALAR[style.scalar]
    scales = _scales_shape(recipe, experts, matrix, scalar)
    if parts:
        yield from _loaded(recipe, style, base, (experts, matrix), scales, parts, static=static)
        return
    if is_stacked(style, shape):
        base, codes = f"{name}_", ""
        scales = scalar if recipe.block == WHOLE else scales
    yield Kept(
        "codes", base + codes if codes else name, codes_dtype(recipe), around(recipe, experts + codes_shape(recipe, matrix))
    )
    dtype = own if recipe.scale.stored == "own" else recipe.scale.stored
    yield Kept("scales", base + style.scales, dtype, around(recipe, scales))
    if recipe.scale.outer:
        yield Kept("outer", base + style.outer, "f32", scalar)
    if static and recipe.scheme in style.inputs:
        dtype = own if style.input_dtype == "own" and not recipe.scale.outer else "f32"
        yield Kept("input", base + style.inputs[recipe.scheme], dtype, scalar)
    if recipe.packing == "words":
        yield Kept("shape", base + "weight_shape", "i64", (2,))


def _loaded(
    recipe: Recipe,
    style: Style,
    base: str,
    shape: tuple[tuple[int, ...], tuple[int, int]],
    scales: tuple[int, ...],
    parts: tuple[int, ...],
    *,
    static: bool,
) -> Iterator[Kept]:
    """Yield what an engine has of a weight before it packs it; of experts a single part has no axis of its own."""
    experts, matrix = shape
    each = (*experts, len(parts)) if len(parts) > 1 or not experts else experts
    yield Kept("codes", base + style.codes_of(recipe), codes_dtype(recipe), experts + codes_shape(recipe, matrix))
    dtype = "f32" if recipe.scale.kind == "linear" else recipe.scale.stored
    yield Kept("scales", base + style.scales, dtype, each if recipe.block == WHOLE else scales)
    if recipe.scale.outer:
        yield Kept("outer", base + style.outer, "f32", each)
    if static and recipe.scheme in style.inputs:
        one = bool(experts) and recipe.block == WHOLE  # what reads the same has one scale
        yield Kept("input", base + style.inputs[recipe.scheme], "f32", experts if one else each)


def _scales_shape(
    recipe: Recipe, experts: tuple[int, ...], matrix: tuple[int, int], scalar: tuple[int, ...]
) -> tuple[int, ...]:
    rows, columns = grid(recipe, matrix)
    if recipe.block == (0, 0):
        return (*experts, 1) if experts else scalar
    sizes = {"rows": rows, "columns": columns, "1": 1}
    return (*experts, *(sizes[word] for word in STYLES[recipe.style].shapes.get(recipe.scheme, "rows columns").split()))
