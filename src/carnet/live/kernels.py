"""Coding and copying on a GPU, many boxes in a launch; the same bits as carnet.quantize.arithmetic.

Imported where weights lie on a GPU, not before: Triton comes with the torch that knows one. Largest magnitudes are found among bits,
which sort as the magnitudes do and keep NaN and infinity above all; divisions round to nearest as on a processor (Triton's own sign
for a division does not). Launches beside a transfer have few programs, each of which goes through many tiles: NCCL needs whole
multiprocessors, and its share of the memory. What an address is a multiple of is said of the pointer itself: only then are loads wide.
"""

import torch
import triton
import triton.language as tl

from carnet.live.batches import TALL, WIDE, WORDS, Batch
from carnet.quantize.recipes import PACKED, Recipe

FIELDS = tl.constexpr(10)


@triton.jit
def _tile(jobs, tiles, number, tall: tl.constexpr, wide: tl.constexpr, even: tl.constexpr):
    """Return a job, the first row and column of a tile of it, the rows and columns that it has; columns are a multiple of ``even``."""
    job = jobs + tl.load(tiles + 2 * number).to(tl.int64) * FIELDS
    tile, width = tl.load(tiles + 2 * number + 1), tl.multiple_of(tl.load(job + 5).to(tl.int32), even)
    across = tl.cdiv(width, wide)
    return job, tile // across * tall, tile % across * wide, tl.load(job + 3).to(tl.int32), width


@triton.jit
def _rows(job, row, read: tl.constexpr, written: tl.constexpr):
    """Return where rows begin in source and target; ``read`` and ``written`` are what strides there are multiples of."""
    inner = tl.load(job + 4).to(tl.int32)
    first, second = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    source = first * tl.multiple_of(tl.load(job + 6), read) + second * tl.multiple_of(tl.load(job + 7), read)
    target = first * tl.multiple_of(tl.load(job + 8), written) + second * tl.multiple_of(tl.load(job + 9), written)
    return source, target


@triton.jit
def _copy(jobs, tiles, count, tall: tl.constexpr, wide: tl.constexpr, step: tl.constexpr):
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        job, top, left, rows, width = _tile(jobs, tiles, number, tall, wide, 2)
        column = left + tl.arange(0, wide)
        read = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.int64)), 16)
        written = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(tl.int64)), 16)
        for low in range(top, tl.minimum(top + tall, rows), step):
            row = low + tl.arange(0, step)
            source, target = _rows(job, row, 2, 2)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            words = tl.load(read + (source[:, None] + column[None, :]), mask=inside)
            tl.store(written + (target[:, None] + column[None, :]), words, mask=inside)


@triton.jit
def _sizes(pairs):
    """Return the larger magnitude of each two weights, as the bits of f32."""
    return tl.maximum(pairs << 16 & 0x7FFF0000, pairs & 0x7FFF0000)


@triton.jit
def _amax(jobs, tiles, count, most, tall: tl.constexpr, wide: tl.constexpr, step: tl.constexpr):
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        job, top, left, rows, width = _tile(jobs, tiles, number, tall, wide, 4)
        column = left + tl.arange(0, wide)
        read = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.int32)), 16)
        best = tl.zeros([step, wide], tl.int32)
        for low in range(top, tl.minimum(top + tall, rows), step):
            row = low + tl.arange(0, step)
            source, _ = _rows(job, row, 4, 1)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            best = tl.maximum(best, _sizes(tl.load(read + (source[:, None] + column[None, :]), mask=inside, other=0)))
        tl.atomic_max(most + tl.load(job + 2), tl.max(tl.max(best, 1), 0), sem="relaxed")


@triton.jit
def _divided(values, divisors):
    """Return quotients, rounded to nearest, but those that are coded as zero or as the largest whatever they are.

    Two steps of Newton's after a product with the inverse, which is rounded to nearest itself (Markstein, Computation of elementary
    functions on the IBM RISC System/6000 processor, 1990). Not for divisors near the ends of what f32 holds.
    """
    inverses = tl.div_rn(tl.full(divisors.shape, 1.0, tl.float32), divisors)
    first = values * inverses
    found = tl.fma(tl.fma(-first, divisors, values), inverses, first)
    found = tl.fma(tl.fma(-found, divisors, values), inverses, found)
    sizes = tl.abs(first)  # zero keeps its sign, and infinity is not made none of
    return tl.where((sizes > 1e-6) & (sizes < 1e6), found, first)


@triton.jit
def _quotients(values, divisors, given, kind: tl.constexpr):
    if kind == "power":  # a product with the inverse, which is a power of two as well
        found = values * divisors
    elif (given > 1e-15) & (given < 1e15):
        found = _divided(values, divisors)
    else:
        found = tl.div_rn(values, tl.broadcast_to(divisors, values.shape))
    return found


@triton.jit
def _two_e4m3(even, odd):
    """Return the FP8 of two numbers in one word, the first one's in its low byte, as one instruction of the GPU makes them.

    Triton's own conversion (3.6, H200), of numbers that have been bf16, left bits of its neighbours in every eighth code.
    """
    two: tl.constexpr = "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;"  # PTX ISA, Data Movement and Conversion Instructions: cvt
    return tl.inline_asm_elementwise(two, "=h,f,f", [even, odd], dtype=tl.int16, is_pure=True, pack=1)


@triton.jit
def _own(quotients, narrow: tl.constexpr):
    """Return quotients, rounded to the weights' type where torch rounds them."""
    return quotients.to(tl.bfloat16).to(tl.float32) if narrow else quotients


@triton.jit
def _e2m1(quotients):
    """Return codes of four bits: what lies in the middle of two goes to the even one, and zero has no sign of its own."""
    sizes = tl.minimum(tl.abs(quotients), 6.0)
    bits = sizes.to(tl.int32, bitcast=True)
    large = (bits + 0x1FFFFF + ((bits >> 22) & 1) >> 22) - 252  # exponent and one place, from 1 on
    small = (sizes + 4194304.0).to(tl.int32, bitcast=True) & 7  # halves: beside 2^22 f32 has no more places
    code = tl.where(bits >= 0x3F800000, large, small)
    return tl.where(quotients < 0, code + 8, code)


@triton.jit
def _exponents(amax, largest: tl.constexpr, up: tl.constexpr):
    """Return the powers of two of blocks, from -127 to 127."""
    if up:
        bits = tl.div_rn(amax, tl.full(amax.shape, largest, tl.float32)).to(tl.int32, bitcast=True)
        exponent, rest = bits >> 23, bits & 0x7FFFFF
        found = tl.where(exponent == 0, (rest > 0x400000).to(tl.int32), exponent + (rest != 0).to(tl.int32)) - 127
    else:
        found = (amax.to(tl.int32, bitcast=True) + (1 << 21) >> 23) - 127 - largest
    return tl.minimum(tl.maximum(tl.where(amax == 0, -127, found), -127), 127)


@triton.jit
def _inner(amax, outer, multiplies: tl.constexpr):
    """Return the scales of blocks under one of all, in FP8, and what weights are divided by."""
    six = tl.full(amax.shape, 6.0, tl.float32)
    if multiplies:
        found = tl.div_rn(amax, six * outer)
        found = tl.where(found == 0, 1.0, found)
        scale = tl.minimum(tl.maximum(found, 0.001953125), 448.0).to(tl.float8e4nv)
        return scale.to(tl.uint8, bitcast=True), scale.to(tl.float32) * outer
    found = tl.minimum(tl.div_rn(amax, six).to(tl.bfloat16).to(tl.float32) * outer, 448.0).to(tl.float8e4nv)
    stored = found.to(tl.uint8, bitcast=True)
    stored = tl.where(stored == 0, 0x20, stored).to(tl.uint8)  # an eighth
    return stored, tl.div_rn(stored.to(tl.float8e4nv, bitcast=True).to(tl.float32), tl.full(amax.shape, 0, tl.float32) + outer)


@triton.jit
def _code(
    jobs,
    tiles,
    count,
    numbers,
    kind: tl.constexpr,  # "whole", "power", "two"
    part: tl.constexpr,
    block: tl.constexpr,  # pairs of weights of a block; of a whole matrix any
    four: tl.constexpr,  # bits of a code, and not eight
    up: tl.constexpr,  # a power of two; of two scales: that the other multiplies
    largest: tl.constexpr,
    narrow: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    step: tl.constexpr,
):
    along: tl.constexpr = wide // block
    group, inner = tl.arange(0, along) * block, tl.arange(0, block)
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        job, top, left, rows, width = _tile(jobs, tiles, number, tall, wide, 4)
        first = left + group
        column = first[None, :, None] + inner[None, None, :]
        read = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.int32)), 16)
        written = tl.load(job + 1)
        given = tl.load(numbers + tl.load(job + 2))
        for low in range(top, tl.minimum(top + tall, rows), step):
            row = low + tl.arange(0, step)
            source, target = _rows(job, row, 4, 4 if part == "codes" else 1)
            inside = (row < rows)[:, None, None] & (column < width)
            pairs = tl.load(read + (source[:, None, None] + column), mask=inside, other=0)
            divisors = tl.full([step, along], 0, tl.float32) + given
            stored = tl.full([step, along], 0, tl.uint8)
            if kind != "whole":
                amax = tl.max(_sizes(pairs), 2).to(tl.float32, bitcast=True)
                if kind == "power":
                    exponent = _exponents(amax, largest, up)
                    stored = (exponent + 127).to(tl.uint8)
                    divisors = tl.where(exponent == 127, 0x400000, 127 - exponent << 23).to(tl.float32, bitcast=True)
                else:
                    stored, divisors = _inner(amax, given, up)
            if part == "scales":
                there = (row < rows)[:, None] & (first < width)[None, :]
                tl.store(
                    written.to(tl.pointer_type(tl.uint8)) + (target[:, None] + (first // block)[None, :]), stored, mask=there
                )
            else:
                even = _quotients((pairs << 16).to(tl.float32, bitcast=True), divisors[:, :, None], given, kind)
                odd = _quotients((pairs & -65536).to(tl.float32, bitcast=True), divisors[:, :, None], given, kind)
                if four:
                    codes = _e2m1(even) | _e2m1(odd) << 4
                    to = tl.multiple_of(written.to(tl.pointer_type(tl.uint8)), 4)
                    tl.store(to + (target[:, None, None] + column), codes.to(tl.uint8), mask=inside)
                else:
                    codes = _two_e4m3(_own(even, narrow), _own(odd, narrow))
                    to = tl.multiple_of(written.to(tl.pointer_type(tl.int16)), 8)
                    tl.store(to + (target[:, None, None] + column), codes, mask=inside)


# of copying, measuring and coding: programs of a launch, warps of each, rows that it reads at a time
COPYING, MEASURING, CODING = (64, 16, 16), (2112, 4, 4), (64, 16, 16)
UNFUSED = {
    "enable_fp_fusion": False
}  # a product and a sum are rounded one by one, as on a processor; what Triton does unasked changes in 3.10


def copy(batch: Batch) -> None:
    """Copy boxes by eight bytes."""
    programs, warps, step = COPYING
    _copy[(min(programs, batch.count),)](batch.jobs, batch.tiles, batch.count, TALL, WORDS, step, num_warps=warps, **UNFUSED)


def largest(batch: Batch, count: int) -> torch.Tensor:
    """Return the largest magnitude among the boxes of each number, f32; of what was not measured, 0."""
    programs, warps, step = MEASURING
    most = torch.zeros(count, dtype=torch.int32, device=batch.jobs.device)
    _amax[(min(programs, batch.count),)](
        batch.jobs, batch.tiles, batch.count, most, TALL, WIDE, step, num_warps=warps, **UNFUSED
    )
    return most.view(torch.float32)


def meant(recipe: Recipe, part: str) -> dict[str, object]:
    """Return what a kernel that codes is built for."""
    near = recipe.scale.kind == "power" and recipe.scale.round == "near"
    return {
        "kind": {"linear": "whole", "power": "power", "two": "two"}[recipe.scale.kind],
        "part": part,
        "block": (recipe.block[1] or 16) // 2,
        "four": PACKED[recipe.packing] == 2,
        "up": recipe.scale.round == "up" or recipe.scale.outer == "multiplies",
        "largest": int(recipe.scale.divisor).bit_length() - 1 if near else recipe.scale.divisor,
        "narrow": recipe.quotient == "own",
        "tall": TALL,
        "wide": WIDE,
        "step": CODING[2],
    }


def code(batch: Batch, recipe: Recipe, part: str, numbers: torch.Tensor) -> None:
    """Write codes or the scales of blocks; ``numbers`` is what weights are divided by, or the scale over those of blocks."""
    programs, warps, _ = CODING
    given = (batch.jobs, batch.tiles, batch.count, numbers)
    _code[(min(programs, batch.count),)](*given, **meant(recipe, part), num_warps=warps, **UNFUSED)
