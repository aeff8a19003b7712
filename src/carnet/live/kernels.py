"""Coding on a GPU: the same bits as carnet.quantize.arithmetic, in kernels that read every weight once.

Imported where weights lie on a GPU, not before: Triton comes with the torch that knows one. Largest magnitudes are found among bits,
which sort as the magnitudes do and keep NaN and infinity above all; divisions round to nearest as on a processor (Triton's own sign
for a division does not).
"""

import ml_dtypes
import torch
import triton
import triton.language as tl

from carnet.quantize.arithmetic import finfo
from carnet.quantize.recipes import Recipe

BLOCK = 4096  # weights that one program codes
TURNS = 8  # times as many are measured by one


@triton.jit
def _amax(weights, most, size, block: tl.constexpr, turns: tl.constexpr):
    best = tl.zeros([block], tl.int16)
    first = tl.program_id(0).to(tl.int64) * block * turns
    for turn in range(turns):
        at = first + turn * block + tl.arange(0, block)
        best = tl.maximum(best, tl.load(weights + at, mask=at < size, other=0) & 0x7FFF)
    tl.store(most + tl.program_id(0), tl.max(best, 0))


@triton.jit
def _numbers(bits):
    return bits.to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _e4m3(values, divisors, narrow: tl.constexpr):
    quotients = tl.div_rn(values, tl.broadcast_to(divisors, values.shape))
    if narrow:
        quotients = quotients.to(tl.bfloat16).to(tl.float32)
    quotients = tl.minimum(tl.maximum(quotients, -448.0), 448.0)
    return quotients.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _whole(weights, divisor, codes, size, narrow: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    values = _numbers(tl.load(weights + at, mask=at < size, other=0))
    divisors = tl.full([block], 0, tl.float32) + tl.load(divisor)
    tl.store(codes + at, _e4m3(values, divisors, narrow), mask=at < size)


@triton.jit
def _blocks(
    weights,
    codes,
    scales,
    most,
    rows,
    columns,
    tall: tl.constexpr,
    wide: tl.constexpr,
    rounded: tl.constexpr,
    empty: tl.constexpr,
    narrow: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    column = tl.program_id(1).to(tl.int64) * wide + tl.arange(0, wide)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    bits = tl.load(weights + at, mask=inside, other=0)
    largest = tl.zeros([1], tl.int16) + tl.max(tl.max(bits & 0x7FFF, 1), 0).to(tl.int16)
    scale = tl.div_rn(_numbers(largest), tl.full([1], 448.0, tl.float32))
    if rounded:
        scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = tl.where(scale == 0, empty, scale)
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, 1)
    tl.store(most + block, largest)
    tl.store(scales + block, scale)
    tl.store(codes + at, _e4m3(_numbers(bits), tl.reshape(scale, [1, 1]), narrow), mask=inside)


@triton.jit
def _nvfp4(weights, outer, codes, scales, most, size, block: tl.constexpr):
    groups: tl.constexpr = block // 16
    first = tl.program_id(0).to(tl.int64) * block
    group = tl.arange(0, groups)
    at = first + group[:, None] * 16 + tl.arange(0, 16)[None, :]
    bits = tl.load(weights + at, mask=at < size, other=0)
    largest = tl.max(bits & 0x7FFF, 1).to(tl.int16)
    tl.store(most + tl.program_id(0), tl.max(largest, 0))
    over = tl.load(outer)
    scale = tl.div_rn(_numbers(largest), tl.full([groups], 0, tl.float32) + 6.0 * over)
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.minimum(tl.maximum(scale, 0.001953125), 448.0).to(tl.float8e4nv)
    where = first // 16 + group
    tl.store(scales + where, scale.to(tl.uint8, bitcast=True), mask=where < size // 16)
    divisors = tl.broadcast_to((scale.to(tl.float32) * over)[:, None], [groups, 16])
    quotients = tl.div_rn(_numbers(bits), divisors)
    sizes = tl.abs(quotients)  # a value in the middle of two goes to the even one
    code = (sizes > 0.25).to(tl.uint8) + (sizes >= 0.75).to(tl.uint8) + (sizes > 1.25).to(tl.uint8)
    code += (sizes >= 1.75).to(tl.uint8) + (sizes > 2.5).to(tl.uint8) + (sizes >= 3.5).to(tl.uint8) + (sizes > 5.0).to(tl.uint8)
    code += (quotients < 0).to(tl.uint8) * 8
    low, high = tl.split(tl.reshape(code, [groups, 8, 2]))
    place = first // 2 + group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes + place, low | (high << 4), mask=place < size // 2)


def largest(weights: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude among weights on the GPU; here as below, weights and magnitudes are the bits of bf16."""
    programs = triton.cdiv(weights.numel(), BLOCK * TURNS)
    most = torch.empty(programs, dtype=torch.int16, device=weights.device)
    _amax[(programs,)](weights, most, weights.numel(), BLOCK, TURNS)
    return most.max()


def whole(recipe: Recipe, weights: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Return the codes of weights under one scale."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    grid = (triton.cdiv(weights.numel(), BLOCK),)
    _whole[grid](weights, divisor, codes, weights.numel(), recipe.quotient == "own", BLOCK)
    return codes


def blocks(recipe: Recipe, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes of weights, the scale of each block, and the largest magnitude in each."""
    rows, columns = weights.shape
    down, along = recipe.block[0], recipe.block[1] or columns
    grid = triton.cdiv(rows, down), triton.cdiv(columns, along)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    scales = torch.empty(grid, dtype=torch.float32, device=weights.device)
    most = torch.empty(grid, dtype=torch.int16, device=weights.device)
    rounded, narrow = recipe.scale.division == "own", recipe.quotient == "own"
    empty = float(finfo(ml_dtypes.bfloat16).eps) if recipe.scale.empty == "eps" else 1.0
    shape = down, triton.next_power_of_2(along)
    _blocks[grid](weights, codes, scales, most, rows, columns, *shape, rounded, empty, narrow, num_warps=8)
    return codes, scales, most


def nvfp4(weights: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes of weights, two a byte, the scales of blocks as they are stored, and largest magnitudes of parts."""
    rows, columns = weights.shape
    programs = triton.cdiv(weights.numel(), BLOCK)
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=weights.device)
    scales = torch.empty((rows, columns // 16), dtype=torch.uint8, device=weights.device)
    most = torch.empty(programs, dtype=torch.int16, device=weights.device)
    _nvfp4[(programs,)](weights, outer, codes, scales, most, weights.numel(), BLOCK)
    return codes, scales, most
