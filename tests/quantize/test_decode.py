"""Codes become the numbers that the programs themselves make of them, bit for bit; and what packs codes unpacks them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carnet.quantize.arithmetic import decode, factors, is_large, pack, unpack
from carnet.quantize.recipes import BY_NAME, RECIPES, codes_dtype, codes_shape, grid

pytestmark = pytest.mark.filterwarnings("ignore")  # of the programs, at import

SHAPE = (256, 384)
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NAMES = [recipe.name for recipe in RECIPES]


def drawn(name, own="bf16", shape=SHAPE):
    """Return codes of every value but NaN, and scales of every size, as a program would store them."""
    recipe, chance = BY_NAME[name], np.random.default_rng(7)
    codes = chance.integers(0, 1 << recipe.code.bits, shape, np.uint8)
    if recipe.code.name == "e4m3":
        codes[codes & 0x7F == 0x7F] = 0x80
    blocks = grid(recipe, shape)
    if recipe.scale.kind == "power":
        scales, outer = chance.integers(0, 240, blocks, np.uint8), None
    else:
        sizes = np.exp2(chance.uniform(-20, -3, blocks)).astype(np.float32)
        outer = None
        if recipe.scale.outer:
            sizes = chance.uniform(0.01, 448, blocks).astype(np.float32)
            outer = 3.1e-5 if recipe.scale.outer == "multiplies" else 31234.5
        stored = own if recipe.scale.stored == "own" else recipe.scale.stored
        kind = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f8_e4m3": ml_dtypes.float8_e4m3fn}[stored]
        scales = sizes.astype(kind)
    return recipe, codes, scales, outer


def decoded(recipe, codes, scales, outer, to):
    wide = factors(recipe, scales, outer)
    for axis, block in enumerate(recipe.block):
        if block > 1:
            wide = np.repeat(wide, block, axis=axis)[(slice(None),) * axis + (slice(0, codes.shape[axis]),)]
    own = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(scales.dtype.name, scales.dtype.name)
    return decode(recipe, pack(recipe, codes).view(np.uint8), wide, own, to)


def tensor(values):
    """Return an array as torch's, of the same bits."""
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(values)


def same(ours, theirs):
    ours, theirs = tensor(ours).contiguous(), theirs.contiguous()
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    bits = torch.int16 if ours.dtype.itemsize == 2 else torch.int32
    unequal = ours.view(bits) != theirs.view(bits)
    assert not unequal.any(), (ours[unequal][:5], theirs[unequal][:5])


PRESETS = {
    "fp8": ("FP8", "float-quantized"),
    "fp8-channel": ("FP8_DYNAMIC", "float-quantized"),
    "fp8-block": ("FP8_BLOCK", "float-quantized"),
    "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
    "mxfp8": ("MXFP8A16", "mxfp8-quantized"),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
    "int8-channel": ("W8A8", "int-quantized"),
    "int4-group": ("W4A16", "pack-quantized"),
    "int4-group32": ("W4A16", "pack-quantized"),
}


def of_library(preset, scheme):
    """Return compressed-tensors' own record of a scheme; it has no name for groups of 32."""
    from compressed_tensors.quantization import preset_name_to_scheme

    found = preset_name_to_scheme(preset, ["Linear"])
    smaller = {"group_size": 32} if scheme == "int4-group32" else {}
    return found.model_copy(update={"weights": found.weights.model_copy(update=smaller)})


@pytest.mark.referee
@pytest.mark.parametrize("own", ["bf16", "f16"])
@pytest.mark.parametrize("scheme", PRESETS)
def test_compressed_tensors_makes_the_same_numbers(scheme, own):
    from compressed_tensors.compressors import BaseCompressor

    recipe, codes, scales, outer = drawn(f"compressed-tensors/{scheme}", own)
    preset, form = PRESETS[scheme]
    packed = torch.from_numpy(pack(recipe, codes))
    if not recipe.packing:
        packed = packed.view(torch.int8 if recipe.code.name == "int8" else torch.float8_e4m3fn)
    state = {"weight_packed" if recipe.packing else "weight": packed, "weight_scale": tensor(scales)}
    if recipe.block == (0, 0):
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if outer is not None:
        state["weight_global_scale"] = torch.tensor([outer])
    if recipe.packing == "words":
        state["weight_shape"] = torch.tensor(SHAPE)
    compressor = BaseCompressor.get_value_from_registry(form)
    theirs = compressor.decompress(state, of_library(preset, scheme))["weight"]
    made = {torch.bfloat16: "bf16", torch.float16: "f16"}[theirs.dtype]  # microscaled ones become bf16 whatever the model is
    same(decoded(recipe, codes, scales, outer, made), theirs)


@pytest.mark.referee
@pytest.mark.parametrize("to", ["bf16", "f32"])
@pytest.mark.parametrize("scheme", ["fp8", "fp8-channel", "fp8-block", "nvfp4", "mxfp8", "mxfp4"])
def test_modelopt_makes_the_same_numbers(scheme, to):
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor

    recipe, codes, scales, outer = drawn(f"modelopt/{scheme}")
    packed, scale, size = torch.from_numpy(pack(recipe, codes)), tensor(scales), torch.Size(SHAPE)
    if scheme == "nvfp4":
        options = {"scale": scale, "double_scale": torch.tensor(outer), "block_sizes": {-1: 16}}
        theirs = NVFP4QTensor(size, torch.float32, packed).dequantize(torch.float32, **options)
    elif scheme == "mxfp4":
        theirs = MXFP4QTensor(size, torch.float32, packed).dequantize(scale=scale.reshape(-1, 1), block_sizes={-1: 32})
    elif scheme == "mxfp8":
        theirs = MXFP8QTensor(size, torch.float32, packed.view(torch.float8_e4m3fn)).dequantize(scale=scale)
    else:
        blocks = {"fp8-block": {-1: 128, -2: 128}}.get(scheme)
        codes8 = packed.view(torch.float8_e4m3fn)
        theirs = FP8QTensor(size, torch.float32, codes8).dequantize(torch.float32, scale=scale, block_sizes=blocks)
    same(decoded(recipe, codes, scales, outer, to), theirs.to(TORCH[to]))


def test_deepseeks_weight_dequant_makes_the_same_numbers():
    recipe, codes, scales, _ = drawn("deepseek/fp8-block", shape=(576, 320))  # blocks that are cut off on both sides
    assert scales.shape == (5, 3)
    theirs = torch.empty(576, 320, dtype=torch.bfloat16)
    for row in range(576):
        for column in range(3):
            block = torch.from_numpy(codes[row, column * 128 : column * 128 + 128]).view(torch.float8_e4m3fn)
            theirs[row, column * 128 : column * 128 + 128] = block.float() * float(scales[row // 128, column])
    same(decoded(recipe, codes, scales, None, "bf16"), theirs)


@given(name=st.sampled_from(NAMES), rows=st.integers(1, 5), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_unpacked_codes_are_those_that_were_packed(name, rows, columns, seed):
    recipe = BY_NAME[name]
    codes = np.random.default_rng(seed).integers(0, 1 << recipe.code.bits, (rows, 8 * columns), np.uint8)
    stored = pack(recipe, codes)
    assert stored.shape == codes_shape(recipe, codes.shape)
    assert stored.dtype.itemsize == {"i32": 4}.get(codes_dtype(recipe), 1)
    assert np.array_equal(unpack(recipe, stored), codes)


@pytest.mark.parametrize("name", NAMES)
def test_one_scale_for_all_gives_what_many_equal_ones_give(name):
    recipe, codes, scales, outer = drawn(name)
    one = factors(recipe, scales[:1, :1], outer)
    stored = pack(recipe, codes).view(np.uint8)
    few = decode(recipe, stored, one, "bf16", "bf16")
    assert few.tobytes() == decode(recipe, stored, np.broadcast_to(one, SHAPE), "bf16", "bf16").tobytes()


def test_a_nan_among_codes_stays_one():
    recipe = BY_NAME["modelopt/fp8"]
    found = decode(recipe, np.array([[0x7F, 0xFF, 0x38]], np.uint8), np.ones((1, 1), np.float32), "f32", "bf16")
    assert np.isnan(found.astype(np.float32)).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("name", "size", "to"),
    [
        ("modelopt/fp8", 1e37, "bf16"),
        ("modelopt/fp8", 200.0, "f16"),
        ("compressed-tensors/fp8", 1e36, "bf16"),
        ("compressed-tensors/int8-channel", 1e3, "f16"),
    ],
)
def test_what_may_be_too_large_for_its_type_is_told(name, size, to):
    recipe = BY_NAME[name]
    largest = {"e4m3": 0x7E, "int8": 0x80}[recipe.code.name]
    scale = np.full((1, 1), size, np.float32)
    assert is_large(recipe, scale, "f32", to)
    assert np.isinf(decode(recipe, np.full((1, 4), largest, np.uint8), scale, "f32", to).astype(np.float32)).all()
    assert not is_large(recipe, scale / 2**8, "f32", to)
    assert np.isfinite(decode(recipe, np.full((1, 4), largest, np.uint8), scale / 2**8, "f32", to).astype(np.float32)).all()
