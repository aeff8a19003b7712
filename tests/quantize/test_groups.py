"""Groups that are coded by looking up have the scales and codes that are computed: of every recipe, whatever the weights."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from carnet.quantize import arithmetic, groups
from carnet.quantize.recipes import PACKED, RECIPES

SIZE = 1 << 14
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 448, 464, 2.0**-10, 3 * 2.0**-10)  # and ends, of e2m1 and e4m3
GROUPED = [recipe for recipe in RECIPES if groups.takes(recipe, "bf16", 1.0 if recipe.scale.outer else None)]
WEIGHTS = {
    "usual": lambda weights, rng: weights / 50,
    "large": lambda weights, rng: weights * 1e4,
    "small": lambda weights, rng: weights * 1e-17,
    "far from each other": lambda weights, rng: weights * np.exp2(rng.integers(-30, 15, SIZE)),
    "as far as bf16 goes": lambda weights, rng: weights * np.exp2(rng.integers(-140, 120, SIZE)),
    "each group of its own size": lambda weights, rng: weights * np.repeat(np.exp2(rng.integers(-50, 12, SIZE // 32)), 32),
    "zeros of both signs": lambda weights, rng: np.where(rng.random(SIZE) < 0.5, np.copysign(0, weights), weights),
    "groups of zeros": lambda weights, rng: weights * np.repeat(rng.integers(0, 2, SIZE // 32), 32),
    "in the middle of two codes": lambda weights, rng: np.array(TIES)[rng.integers(0, len(TIES), SIZE)] * np.sign(weights),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("recipe", GROUPED, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("seen", [1, 0.02, 30], ids=["as measured", "cut off", "larger in a fellow"])
def test_groups_that_are_looked_up_are_as_they_are_computed(recipe, kind, seen):
    rng = np.random.default_rng(1)
    with np.errstate(over="ignore"):
        weights = WEIGHTS[kind](rng.standard_normal(SIZE), rng).astype(np.float32).astype(ml_dtypes.bfloat16)
    bits = np.where(np.isfinite(weights.astype(np.float32)), weights.view(np.uint16), 0).astype(np.uint16)
    matrix = bits.reshape(-1, recipe.block[1])
    amax = arithmetic.block_amax(matrix, "bf16", recipe.block)
    outer = float(arithmetic.outer_scale(recipe, float(amax.max()) * seen, "bf16")) if recipe.scale.outer else None
    if not groups.takes(recipe, "bf16", outer):
        pytest.skip("such scales are computed")
    stored, divisors = arithmetic.scales(recipe, amax, "bf16", outer)
    with np.errstate(over="ignore"):
        expected = arithmetic.pack(recipe, arithmetic.encode(recipe, matrix, "bf16", divisors)).reshape(-1)
    codes = np.empty(SIZE // PACKED[recipe.packing], np.uint8)
    scales = groups.code(groups.tables(recipe.name, outer), bits, codes)
    assert (scales == stored.view(np.uint8).reshape(-1)).all()
    assert (codes == expected).all()


@pytest.mark.parametrize("recipe", GROUPED, ids=lambda recipe: recipe.name)
def test_usual_weights_are_looked_up(recipe):
    outer = {"": None, "multiplies": 1e-5, "divides": 1e5}[recipe.scale.outer]
    tables = groups.tables(recipe.name, outer)
    bits = (np.random.default_rng(1).standard_normal(SIZE) / 50).astype(ml_dtypes.bfloat16).view(np.uint16)
    codes = np.empty(SIZE // PACKED[recipe.packing], np.uint8)
    groups.code(replace(tables, codes=np.zeros_like(tables.codes)), bits, codes)
    assert not (codes & (0x7F if recipe.code.bits == 8 else 0x77)).any()  # of a table of zeros
