"""Quantize on one GPU beside a device-to-device copy: GB/s of bf16 read, after the bits were held against the processor's.

Weights lie in the GPU's memory already: this is the speed of the kernels that `carnet.live` uses. The largest magnitude of a whole
tensor is part of the time where a scheme needs it.
"""

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bench.measure import record, table
from carnet.live import kernels
from carnet.quantize import arithmetic
from carnet.quantize.recipes import BY_NAME, WHOLE, Recipe

SCHEMES = (
    "modelopt/fp8",
    "trtllm/fp8",
    "compressed-tensors/fp8",
    "modelopt/fp8-channel",
    "compressed-tensors/fp8-channel",
    "modelopt/fp8-block",
    "compressed-tensors/fp8-block",
    "deepseek/fp8-block",
    "modelopt/nvfp4",
)
SIDE = 16384  # of the matrix that is timed
COPY = "device-to-device copy"
Coder = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def main() -> None:
    """Compare the bits, then measure."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    for name in SCHEMES:
        for rows, columns in ((1024, 2048), (300, 8192), (640, 1536), (256, 28672)):
            for spread in (0, 100):
                weights = torch.randn((rows, columns), device="cuda", generator=generator) * 0.02
                weights *= torch.exp2(torch.randint(-spread, spread + 1, weights.shape, device="cuda", generator=generator))
                weights[:, :256], weights[0], weights[1, ::2] = 0, 0, -0.0
                check(BY_NAME[name], weights.bfloat16())
        print(f"the processor's bits: {name}", flush=True)
    weights = (torch.randn((SIDE, SIDE), device="cuda", generator=generator) * 0.02).bfloat16()
    copy = torch.empty_like(weights)
    contenders: dict[str, Callable[[], object]] = {COPY: lambda: copy.copy_(weights)}
    for name in SCHEMES:
        contenders[name] = partial(coder(BY_NAME[name]), weights.view(torch.int16))
    found = {name: weights.nbytes / 1e9 / seconds(contender) for name, contender in contenders.items()}
    rows_of = [(name, f"{speed:,.0f}", f"{speed / found[COPY]:.2f}") for name, speed in found.items()]
    print("\n" + table([("", "GB/s of bf16 read", "x copy"), *rows_of]))
    record("device", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "gb_per_s": found})


def coder(recipe: Recipe) -> Coder:
    """Return what codes a matrix, given as bits, from nothing: measuring first where the scheme needs it."""

    def amax(bits: torch.Tensor, largest: float) -> torch.Tensor:
        return (kernels.largest(bits).view(torch.bfloat16).float() / largest).reshape(1)

    if recipe.block == WHOLE:
        return lambda bits: (kernels.whole(recipe, bits, amax(bits, 448)),)
    if recipe.scale.outer:
        return lambda bits: kernels.nvfp4(bits, amax(bits, 448 * 6))
    return lambda bits: kernels.blocks(recipe, bits)


def check(recipe: Recipe, weights: torch.Tensor) -> None:
    """Stop where a bit differs from the processor's."""
    bits = weights.cpu().view(torch.int16).numpy().view(np.uint16)
    sent = weights.view(torch.int16)
    amax = arithmetic.block_amax(bits, "bf16", recipe.block)
    if float(kernels.largest(sent).view(torch.bfloat16)) != float(amax.max()):
        raise SystemExit(f"{recipe.name}: another largest magnitude")
    outer = float(arithmetic.outer_scale(recipe, float(amax.max()), "bf16")) if recipe.scale.outer else None
    stored, divisors = arithmetic.scales(recipe, amax, "bf16", outer)
    expected = arithmetic.pack(recipe, arithmetic.encode(recipe, bits, "bf16", divisors))
    if recipe.block == WHOLE:
        made = kernels.whole(recipe, sent, torch.tensor(divisors[0], device=sent.device))
    else:
        given = None if outer is None else torch.tensor([outer], device=sent.device)
        made, scales, _ = kernels.blocks(recipe, sent) if given is None else kernels.nvfp4(sent, given)
        found = scales.cpu().numpy()
        if (found if given is not None else found.astype(stored.dtype)).tobytes() != stored.tobytes():
            raise SystemExit(f"{recipe.name}: other scales")
    codes = made.cpu().numpy()
    if (codes != expected).any():
        raise SystemExit(f"{recipe.name}: {int((codes != expected).sum())} other codes of {codes.size}")


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of some work on the GPU."""
    found: list[float] = []
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    for count in range(25):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if count >= 5:  # the first compile and warm up
            found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


if __name__ == "__main__":
    main()
