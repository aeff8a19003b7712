"""What the examiner says of codes and scales agrees with ml_dtypes' casts, and with the arithmetic that the writer has."""

import ml_dtypes
import numpy as np
import pytest

from carnet.dtypes import array_type
from carnet.examiner import scales as examined
from carnet.quantize import arithmetic
from carnet.quantize.recipes import BY_NAME, RECIPES

WRITTEN = [recipe.name for recipe in RECIPES]  # of a published one nobody says how its codes were found

FORMS = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def numbers():
    """Return every finite bf16, and f32 around every one that a code of eight bits could confuse."""
    finite = FORMS[np.isfinite(FORMS)]
    near = finite[(np.abs(finite) < 600) & (np.abs(finite) > 2**-12)]
    return np.concatenate([finite, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])


def cast(recipe, quotients):
    """Return the nearest codes as ml_dtypes and numpy round."""
    code = recipe.code
    if code.name.startswith("int"):
        found = np.clip(np.rint(quotients), -code.largest - 1, code.largest)
        return (found.astype(np.int32) + 8 if code.bits == 4 else found.astype(np.int32) & 255).astype(np.uint8)
    kind = ml_dtypes.float8_e4m3fn if code.name == "e4m3" else ml_dtypes.float4_e2m1fn
    if code.ties == "zero":
        ties = np.isin(np.abs(quotients), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
        quotients = np.where(
            ties, np.nextafter(quotients, np.float32(0)), quotients
        )  # a tie no more: it goes to the smaller one
    found = np.clip(quotients, -code.largest, code.largest).astype(kind).view(np.uint8)
    if code.minus_zero == "from below":
        found[(quotients == 0) & np.signbit(quotients)] = 0
    elif code.minus_zero == "any":
        found[quotients == 0] = 1 << code.bits - 1
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_one_code_is_right_for_each_number_and_it_is_the_one_that_a_cast_gives(name):
    quotients, nearest = numbers(), examined.nearest(name)
    expected = cast(BY_NAME[name], quotients)
    assert nearest.is_right(expected, expected.astype(np.intp), quotients).all()
    assert (nearest.code(quotients) == expected).all()
    for other in range(len(nearest.value)):
        codes = np.full(len(quotients), other, np.uint8)
        assert not nearest.is_right(codes, codes.astype(np.intp), quotients)[expected != other].any()


@pytest.mark.parametrize("own", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_two_statements_about_scales_agree(name, own):
    recipe, random = BY_NAME[name], np.random.default_rng(7)
    amax = np.abs(random.standard_normal(4096) * np.exp2(random.uniform(-30, 8, 4096))).astype(array_type(own))
    amax = np.concatenate([amax.astype(np.float32), [0, 1, 1.75, 448, 6, 2.0**-24]]).astype(np.float32).reshape(-1, 1)
    for largest in (float(amax.max()), 0.0, 2.0**-10, 6e4):
        outer = arithmetic.outer_scale(recipe, largest, own) if recipe.scale.outer else None
        if outer is not None:
            assert examined.outer_scale(recipe, largest, own) == outer
        blocks = np.minimum(amax, np.float32(largest)) if outer is not None else amax
        stored, divisors = arithmetic.scales(recipe, blocks, own, outer)
        again = examined.scales(recipe, blocks, own, outer)
        assert again.dtype == stored.dtype
        assert again.tobytes() == stored.tobytes()
        finite = np.isfinite(stored.astype(np.float32))
        assert (examined.divisors(recipe, stored, outer)[finite] == divisors[finite]).all()
        seen = float(np.float32(3.7))
        assert examined.input_scale(recipe, seen, own) == arithmetic.input_scale(recipe, seen, own)


@pytest.mark.parametrize("shape", [(300, 512), (128, 384), (1, 128)])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_largest_of_a_block_is_found_by_either(name, shape):
    recipe = BY_NAME[name]
    values = np.random.default_rng(3).standard_normal(shape).astype(ml_dtypes.bfloat16)
    found = examined.block_amax(recipe.block, values.astype(np.float32))
    assert (found == arithmetic.block_amax(values.view(np.uint16), "bf16", recipe.block)).all()
    wide = np.broadcast_to(examined.spread(recipe.block, found, shape), shape)
    assert (wide >= np.abs(values.astype(np.float32))).all()


@pytest.mark.parametrize("name", [name for name, recipe in BY_NAME.items() if recipe.packing])
def test_codes_are_unpacked_as_they_were_packed(name):
    recipe = BY_NAME[name]
    codes = np.random.default_rng(5).integers(0, 16, (6, 32), dtype=np.uint8)
    found = examined.unpacked(recipe, arithmetic.pack(recipe, codes))
    assert (found == (codes + 8) % 16 if recipe.packing == "words" else found == codes).all()
