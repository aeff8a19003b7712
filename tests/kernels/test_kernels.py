"""carnet.live's kernels without a GPU: Triton's interpreter runs them, its compiler builds them for an H100. `make test-kernels`.

TRITON_INTERPRET=1 has to be there before anything imports Triton, torch included.
What is a GPU's own (launches beside a transfer, the memory of others) is asked of real ones in tests/live/test_live_gpu.py.
"""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from carnet.live import batches, kernels
from carnet.live.batches import Job, batch
from carnet.live.copying import ON_GPUS
from carnet.quantize import arithmetic
from carnet.quantize.recipes import PACKED, RECIPES, WHOLE

SHAPES = (7, 64), (140, 1024), (20, 2112)  # less than a tile; whole rows of them; the last of a row narrower
NARROW = {"fp8e4nv": ml_dtypes.float8_e4m3fn, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
CODED = [recipe for recipe in RECIPES if recipe.scheme in ON_GPUS and recipe.style != "trtllm"]


@triton.jit
def two_e4m3(even, odd):
    """Do what an instruction of the GPU does, which the interpreter does not have."""
    low, high = even.to(tl.float8e4nv).to(tl.uint8, bitcast=True), odd.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return (low.to(tl.int32) | high.to(tl.int32) << 8).to(tl.int16)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each goes through many tiles; and the interpreter rounds to FP8 as the hardware does.

    Its own `_convert_float` (triton 3.9) makes zero of what lies between half of the smallest number and that, and rounds up what
    lies in the middle.
    """
    own = interpreter._convert_float

    def convert(given, read, written, mode):
        if not (str(read) in NARROW and str(written) in NARROW):
            return own(given, read, written, mode)
        with np.errstate(all="ignore"):
            made = np.frombuffer(given.tobytes(), NARROW[str(read)]).astype(NARROW[str(written)])
        return made.view(f"u{written.primitive_bitwidth // 8}").reshape(given.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(kernels, "_two_e4m3", two_e4m3)
    for name in ("COPYING", "MEASURING", "CODING"):
        monkeypatch.setattr(kernels, name, (3, *getattr(kernels, name)[1:]))


def weights():
    """Return matrices in bf16, of several magnitudes, with a block of zeros, one of tiny numbers and an outlier."""
    made = [
        torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 10.0 ** (at - 1) for at, shape in enumerate(SHAPES)
    ]
    for each in made:
        each[0, :32], each[1, 0], each[2, :16] = 0, 300.0, each[2, :16] * 1e-30
    return [each.to(torch.bfloat16) for each in made]


def bits_of(weight):
    return weight.view(torch.uint16).numpy()


def amax_of(weight):
    return float(weight.abs().max())


def number_of(recipe, amax):
    """Return what a kernel gets of a matrix: the divisor of all, or the scale over those of its blocks."""
    if recipe.block == WHOLE:
        return amax / 448
    return {"": 1.0, "multiplies": amax / (6 * 448), "divides": 6 * 448 / amax}[recipe.scale.outer]


def test_boxes_are_copied_to_their_place_and_nothing_else_is_written():
    drawn = torch.Generator().manual_seed(5)
    boxes = []
    for rows, width, more in [(5, 64, 0), (130, 1024, 64), (300, 40, 8), (257, 4096, 0)]:
        source = torch.randint(-(2**15), 2**15, (rows, width + more), dtype=torch.int16, generator=drawn)
        boxes.append((source[:, :width], torch.zeros(rows + 3, width + 8, dtype=torch.int16)))
    jobs = [Job(view.view(torch.int64), target[3:, 8:].view(torch.int64)) for view, target in boxes]
    made, left = batch(jobs, batches.WORDS)
    assert not left
    kernels.copy(made)
    for view, target in boxes:
        assert torch.equal(target[3:, 8:], view)
        assert not target[:3].any()
        assert not target[:, :8].any()


def test_the_largest_of_each_matrix_is_found():
    matrices = weights()
    made, left = batch([Job(each.view(torch.int32), each.view(torch.int32), at) for at, each in enumerate(matrices)])
    assert not left
    assert kernels.largest(made, len(matrices) + 1).tolist() == [*map(amax_of, matrices), 0.0]


@pytest.mark.parametrize("recipe", CODED, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_codes_and_scales_are_those_of_the_processor(recipe, part):
    if part == "scales" and recipe.block == WHOLE:
        return  # one number, no kernel's
    matrices = weights()
    numbers = torch.tensor([number_of(recipe, amax_of(each)) for each in matrices])
    jobs, outs = [], []
    for at, each in enumerate(matrices):
        rows, columns = each.shape
        width = columns // (recipe.block[1] if part == "scales" else PACKED[recipe.packing])
        outs.append(torch.zeros(rows, width, dtype=torch.uint8))
        eight = part == "codes" and not recipe.packing
        jobs.append(Job(each.view(torch.int32), outs[-1].view(torch.int16) if eight else outs[-1], at))
    made, left = batch(jobs)
    assert not left
    kernels.code(made, recipe, part, numbers)
    for each, number, out in zip(matrices, numbers.tolist(), outs, strict=True):
        bits = bits_of(each)
        if recipe.block == WHOLE:
            expected = arithmetic.encode(recipe, bits, "bf16", np.array([[number]], np.float32))
        else:
            amax = arithmetic.block_amax(bits, "bf16", recipe.block)
            stored, divisors = arithmetic.scales(recipe, amax, "bf16", number if recipe.scale.outer else None)
            expected = (
                stored if part == "scales" else arithmetic.pack(recipe, arithmetic.encode(recipe, bits, "bf16", divisors))
            )
        np.testing.assert_array_equal(out.numpy(), np.ascontiguousarray(expected).view(np.uint8))


def test_kernels_are_built_for_an_h100_and_read_sixteen_bytes_at_once():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-m", "tests.kernels.built"], env=plain, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.splitlines()) == 2 + len(CODED) + sum(recipe.block != WHOLE for recipe in CODED)
