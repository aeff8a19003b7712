"""Recipes: what each program makes of a weight, as a table. Sizes are known without data.

A weight of n rows and k columns becomes codes and scales. A *block* is the part of it that shares a scale: rows x columns, 0 for
all of them. Every program states the same idea, ``scale = amax / largest``, and no two compute it alike: which type the division
rounds to, what an empty block gets, in which order two scales are multiplied. These facts are in the rows. Each was read in the
program's own source (modelopt 0.47 torch/export/quant_utils.py and torch/quantization/qtensor, compressed-tensors 0.19
quantization/lifecycle/forward_helpers.py and quantization/utils) and is held against the program's own output, bit for bit.
"""

from dataclasses import dataclass, replace

from carnet.quantize.codes import E2M1, E4M3, INT4, INT8, Code


@dataclass(frozen=True, slots=True)
class Scale:
    """How the scale of a block follows from the largest magnitude in it."""

    kind: str  # "linear"; "power" (of two, kept as its exponent + 127); "two" (an e4m3 scale under one of the whole tensor)
    stored: str  # carnet's element type, or "own": that of the weights
    divisor: float  # the magnitude that the largest code stands for; 0 where how scales follow is not known
    division: str  # what amax / divisor rounds to: "f32" or "own"
    empty: str  # scale of a block of zeros: "one", "largest" (as if amax were the divisor), "eps" (of the stored type), "least"
    round: str = ""  # of a power: "up" (nothing is cut off) or "near" (the largest may be)
    outer: str = ""  # of two: "multiplies" (w = code x scale x outer) or "divides"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One scheme as one program has it."""

    style: str
    scheme: str
    code: Code
    block: tuple[int, int]
    scale: Scale
    quotient: str  # what weight / scale rounds to before it becomes a code: "f32" or "own"
    packing: str = ""  # how codes of four bits lie: "bytes" (two a byte, the even column low), "words" (eight an i32, plus 8)
    turned: bool = False  # what is stored of a row, codes and scales, stands in a column: of experts that are kept [in, out]

    @property
    def name(self) -> str:
        """Name the recipe: ``modelopt/fp8``."""
        return f"{self.style}/{self.scheme}{', turned' if self.turned else ''}"

    @property
    def is_made(self) -> bool:
        """Say whether it is known how codes and scales follow from weights; else codes are right where they mean the same."""
        return self.scale.divisor > 0


WHOLE, ROW, SQUARE = (0, 0), (1, 0), (128, 128)
OUTER = 6.0 * 448.0  # of nvfp4: the largest code times the largest scale

_MODELOPT = Scale("linear", "f32", 448.0, "f32", "largest")
_TENSORS = Scale("linear", "own", 448.0, "own", "eps")
_GROUP = Scale("linear", "own", 7.5, "own", "eps")
_FP4 = Code("e2m1", 4, 6.0, minus_zero="from below")
_MX4 = Code("e2m1", 4, 6.0, minus_zero="any", ties="zero")

RECIPES = (
    Recipe("modelopt", "fp8", E4M3, WHOLE, _MODELOPT, "own"),
    Recipe("modelopt", "fp8-channel", E4M3, ROW, _MODELOPT, "f32"),
    Recipe("modelopt", "fp8-block", E4M3, SQUARE, _MODELOPT, "f32"),
    Recipe("modelopt", "nvfp4", _FP4, (1, 16), Scale("two", "f8_e4m3", 6.0, "f32", "one", outer="multiplies"), "f32", "bytes"),
    Recipe("modelopt", "mxfp8", E4M3, (1, 32), Scale("power", "u8", 448.0, "f32", "least", round="up"), "f32"),
    Recipe("modelopt", "mxfp4", _MX4, (1, 32), Scale("power", "u8", 6.0, "f32", "least", round="up"), "f32", "bytes"),
    Recipe("compressed-tensors", "fp8", E4M3, WHOLE, _TENSORS, "own"),
    Recipe("compressed-tensors", "fp8-channel", E4M3, ROW, _TENSORS, "own"),
    Recipe("compressed-tensors", "fp8-block", E4M3, SQUARE, _TENSORS, "own"),
    Recipe(
        "compressed-tensors",
        "nvfp4",
        _FP4,
        (1, 16),
        Scale("two", "f8_e4m3", 6.0, "own", "eps", outer="divides"),
        "f32",
        "bytes",
    ),
    Recipe("compressed-tensors", "mxfp8", E4M3, (1, 32), Scale("power", "u8", 256.0, "own", "least", round="near"), "own"),
    Recipe(
        "compressed-tensors", "mxfp4", _FP4, (1, 32), Scale("power", "u8", 4.0, "own", "least", round="near"), "own", "bytes"
    ),
    Recipe("compressed-tensors", "int8-channel", INT8, ROW, Scale("linear", "own", 127.5, "own", "eps"), "own"),
    Recipe("compressed-tensors", "int4-group", INT4, (1, 128), _GROUP, "own", "words"),
    Recipe("compressed-tensors", "int4-group32", INT4, (1, 32), _GROUP, "own", "words"),  # as Kimi-K2-Thinking is published
    Recipe("deepseek", "fp8-block", E4M3, SQUARE, Scale("linear", "f32", 448.0, "f32", "one"), "f32"),
    # modelopt's too; the scale has an axis here, and torch rounds a quotient to the weights' type only where the divisor has none
    Recipe("trtllm", "fp8", E4M3, WHOLE, _MODELOPT, "f32"),
)
# read as they are published, and never made: nobody says how the scales of GPT-OSS, or of Ministral 3 and Devstral 2, were found
PUBLISHED = (
    Recipe("openai", "mxfp4", E2M1, (1, 32), Scale("power", "u8", 0.0, "", ""), "", "bytes"),
    Recipe("deepseek", "fp8", E4M3, WHOLE, Scale("linear", "f32", 0.0, "", ""), ""),
)
# experts in one tensor, as modelopt 0.47 keeps them [in, out]: one scale over all of them, which has an axis where weights are divided
# by it, so that torch rounds no quotient. Carnet reads none with blocks along the outputs (MXFP4, MXFP8), or with a scale each
STACKED = {
    recipe.name: replace(recipe, quotient="f32", turned=True)
    for recipe in RECIPES
    if recipe.name in ("modelopt/fp8", "modelopt/nvfp4")
}
BY_NAME = {recipe.name: recipe for recipe in (*RECIPES, *PUBLISHED, *STACKED.values())}
PACKED = {"": 1, "bytes": 2, "words": 8}  # codes of one stored item
PER_BYTE = {"": 1, "bytes": 2, "words": 2}  # codes of one byte


def schemes() -> list[str]:
    """Return the schemes of all styles, each once."""
    return [*dict.fromkeys(recipe.scheme for recipe in RECIPES)]


def by_style() -> dict[str, list[str]]:
    """Return the schemes of every style.

    >>> by_style()["deepseek"]
    ['fp8-block']
    """
    found: dict[str, list[str]] = {}
    for recipe in RECIPES:
        found.setdefault(recipe.style, []).append(recipe.scheme)
    return found


def codes_shape(recipe: Recipe, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the stored codes of a weight.

    >>> codes_shape(BY_NAME["modelopt/nvfp4"], (128, 256))
    (128, 128)
    """
    return shape[0], shape[1] // PACKED[recipe.packing]


def codes_dtype(recipe: Recipe) -> str:
    """Return the element type of the stored codes."""
    return {"bytes": "u8", "words": "i32"}.get(recipe.packing) or {"e4m3": "f8_e4m3", "int8": "i8"}[recipe.code.name]


def grid(recipe: Recipe, shape: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a weight has along its rows and its columns; the last ones may be smaller.

    >>> grid(BY_NAME["deepseek/fp8-block"], (576, 7168)), grid(BY_NAME["modelopt/fp8"], (576, 7168))
    ((5, 56), (1, 1))
    """
    rows, columns = (-(-size // block) if block else 1 for size, block in zip(shape, recipe.block, strict=True))
    return rows, columns


def scaled_apart(recipe: Recipe) -> bool:
    """Say whether matrices have a scale of the whole, so that those that are joined in one keep one each."""
    return recipe.block == WHOLE or bool(recipe.scale.outer)


def strides(recipe: Recipe, blocks: tuple[int, int]) -> tuple[int, int]:
    """Return how far the scales of blocks lie apart, down and along, from how many there are."""
    return (1, blocks[0]) if recipe.turned else (blocks[1], 1)


def columns_of_a_block(recipe: Recipe) -> int:
    """Return what the number of columns must be a multiple of: a block of a row, or a packed item, may not be cut."""
    return max(recipe.block[1] if recipe.block[0] == 1 else 1, PACKED[recipe.packing])
