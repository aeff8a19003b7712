"""Codes are read, scaled and placed wherever a plan says, in any axes, from any column on, through windows of any size."""

import random
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from carnet.executor.run import write
from carnet.executor.staging import owned
from carnet.formats.safetensors import layout_file
from carnet.formats.stored import dense_strides
from carnet.plans.columns import Plan, Steps
from carnet.quantize.arithmetic import decode, factors, pack
from carnet.quantize.recipes import PER_BYTE, RECIPES, Recipe, grid
from carnet.steps import Encoding, Make, Place
from carnet.storage.protocol import Crossing

HEADER = 24  # bytes before the codes


def stored(recipe: Recipe, rows: int, columns: int, seed: int):
    """Return the bytes of a file with codes and scales, where both lie, and the weights by decoding everything at once."""
    chance = np.random.default_rng(seed)
    codes = chance.integers(0, 1 << recipe.code.bits, (rows, columns), np.uint8)
    if recipe.code.name == "e4m3":
        codes[codes & 0x7F == 0x7F] = 0
    blocks, dtype = grid(recipe, (rows, columns)), "f32" if recipe.scale.stored == "own" else recipe.scale.stored
    if recipe.scale.kind == "power":
        scales = chance.integers(100, 140, blocks, np.uint8)
    else:
        scales = chance.uniform(0.1, 2, blocks).astype(np.float32)
    packed = pack(recipe, codes)
    if dtype == "f8_e4m3":
        import ml_dtypes

        scales = scales.astype(ml_dtypes.float8_e4m3fn)
    over = np.float32(0.37)
    at = HEADER + packed.nbytes
    content = bytes(HEADER) + packed.tobytes() + scales.tobytes() + over.tobytes()
    outer = Place("a.bin", at + scales.nbytes, (1, 1), "f32") if recipe.scale.outer else None
    encoding = Encoding(
        recipe.name,
        (rows, columns),
        HEADER * PER_BYTE[recipe.packing],
        Place("a.bin", at, (blocks[1], 1), dtype),
        outer,
    )
    wide = factors(recipe, scales, float(over) if outer else None)
    for axis, block in enumerate(recipe.block):
        wide = np.repeat(wide, block or codes.shape[axis], axis=axis)
    weights = decode(recipe, packed.view(np.uint8), wide[:rows, :columns], "f32", "f32")
    return content, encoding, weights


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32), window=st.sampled_from((64, 200, 4096, 1 << 20)))
def test_any_box_of_codes_in_any_order_of_axes_is_what_decoding_everything_gives(seed, window):
    chance = random.Random(seed)
    recipe = chance.choice(RECIPES)
    outer, inner = chance.randint(1, 5), chance.choice((1, 3, 40, 90))
    columns = chance.choice((1, 3, 5)) * max(8, recipe.block[1] if recipe.block[0] == 1 else 8)
    least = chance.choice([size for size in range(1, columns + 1) if columns % size == 0])
    content, encoding, weights = stored(recipe, outer * inner, columns, seed)
    axes = (outer, inner, columns // least, least)
    strides = (inner * columns, columns, least, 1)
    start = tuple(chance.randrange(n) for n in axes)
    shape = tuple(chance.randint(1, n - s) for n, s in zip(axes, start, strict=True))
    order = chance.sample(range(4), 4)
    file = layout_file("out.safetensors", [("w", "f32", tuple(shape[axis] for axis in order))], {})
    dense = dense_strides(file.tensors[0].shape)
    first = encoding.first + sum(s * stride for s, stride in zip(start, strides, strict=True))
    target = Place(file.name, file.tensors[0].offset, tuple(dense[order.index(axis)] for axis in range(4)), "f32")
    step = Make("dequantize", "w", start, shape, Place("a.bin", first, strides, "u8"), target, encoding)
    inside = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    expected = weights.reshape(axes)[inside].transpose(order)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "a.bin").write_bytes(content)
        plan = Plan(folder, "f", {}, "toy", (file,), (), (), Steps.of([step]), {}, {}, 1 << 20, window)
        with owned(plan, Crossing("p"), source, Path(folder) / "out") as staging:
            write(plan, source, staging)
            found = load(Path(staging.where, file.name).read_bytes())["w"]
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
