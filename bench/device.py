"""Code on one GPU beside a device-to-device copy: GB/s of bf16 read, after the bits were held against the processor's.

    python -m bench.device

Weights lie in the GPU's memory already, in many matrices, as `carnet.live` finds them: this is the speed of its kernels. What is
measured first, and the scales of blocks beside the codes, are part of the time.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from bench.measure import record, table
from carnet.live import kernels
from carnet.live.batches import WORDS, Batch, Job, batch
from carnet.quantize import arithmetic
from carnet.quantize.recipes import BY_NAME, PACKED, WHOLE, Recipe, grid

SCHEMES = (
    "modelopt/fp8",
    "trtllm/fp8",
    "compressed-tensors/fp8",
    "modelopt/mxfp8",
    "compressed-tensors/mxfp8",
    "modelopt/nvfp4",
    "compressed-tensors/nvfp4",
)
SHAPES = (1024, 2048), (300, 8192), (640, 1536), (256, 28672), (48, 128)
SIDE, MANY = 4096, 16  # of the matrices that are timed
COPY, COPIES = "device-to-device copy", "carnet's copies"


def main() -> None:
    """Compare the bits, then measure."""
    device = torch.device("cuda")
    for name in SCHEMES:
        check(BY_NAME[name], samples(device))
        print(f"the processor's bits: {name}", flush=True)
    generator = torch.Generator(device=device).manual_seed(1)
    weights = [(torch.randn((SIDE, SIDE), device=device, generator=generator) * 0.02).bfloat16() for _ in range(MANY)]
    copy = torch.empty((MANY, SIDE, SIDE), dtype=torch.bfloat16, device=device)
    contenders: dict[str, Callable[[], object]] = {COPY: lambda: torch.stack(weights, out=copy), COPIES: copies(weights, copy)}
    for name in SCHEMES:
        contenders[name] = Coded(BY_NAME[name], weights).run
    nbytes = sum(each.nbytes for each in weights)
    found = {name: nbytes / 1e9 / seconds(contender) for name, contender in contenders.items()}
    rows_of = [(name, f"{speed:,.0f}", f"{speed / found[COPY]:.2f}") for name, speed in found.items()]
    print("\n" + table([("", "GB/s of bf16 read", "x copy"), *rows_of]))
    record("device", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "gb_per_s": found})


def samples(device: torch.device) -> list[torch.Tensor]:
    """Return matrices of many sizes with zeros and numbers of all magnitudes; some are parts of wider ones."""
    made, generator = list[torch.Tensor](), torch.Generator().manual_seed(1)
    for rows, columns in SHAPES:
        for spread in (0, 5, 100):
            weights = torch.randn((rows, columns), generator=generator) * 0.02
            weights *= torch.exp2(torch.randint(-spread, spread + 1, weights.shape, generator=generator))
            weights[:, :48], weights[0], weights[1, ::2] = 0, 0, -0.0
            whole = weights.bfloat16().to(device)
            made += [whole, whole[1:, columns // 2 :], whole.view(-1, 4, columns)[:, 1:3, : columns // 2]]
    return made


class Coded:
    """Codes and scales of some matrices, all in a few launches."""

    def __init__(self, recipe: Recipe, weights: Sequence[torch.Tensor]) -> None:
        self.recipe, self.weights, device = recipe, weights, weights[0].device
        self.numbers = torch.ones(len(weights), device=device)
        by = {"codes": PACKED[recipe.packing]} | ({} if recipe.block == WHOLE else {"scales": recipe.block[1]})
        self.made = {part: [_empty(each, many) for each in weights] for part, many in by.items()}
        seen = [each.view(torch.int32) for each in weights]
        self._batches = {
            part: _batch(
                [Job(view, _pairs(out, recipe, part), at) for at, (view, out) in enumerate(zip(seen, outs, strict=True))]
            )
            for part, outs in self.made.items()
        }
        self._measured = _batch([Job(view, view, at) for at, view in enumerate(seen)])

    def measure(self) -> torch.Tensor:
        """Return the largest magnitude of each."""
        return kernels.largest(self._measured, len(self.weights))

    def code(self) -> None:
        """Write codes, and scales of blocks."""
        for part, one in self._batches.items():
            kernels.code(one, self.recipe, part, self.numbers)

    def run(self) -> None:
        """Do both."""
        if self.recipe.block == WHOLE or self.recipe.scale.outer:
            self.measure()
        self.code()


def _empty(like: torch.Tensor, by: int) -> torch.Tensor:
    return torch.empty((*like.shape[:-1], like.shape[-1] // by), dtype=torch.uint8, device=like.device)


def _pairs(out: torch.Tensor, recipe: Recipe, part: str) -> torch.Tensor:
    return out.view(torch.int16) if part == "codes" and not recipe.packing else out


def _batch(jobs: Sequence[Job], wide: int | None = None) -> Batch:
    made, left = batch(jobs) if wide is None else batch(jobs, wide)
    if made is None or left:
        raise SystemExit(f"{len(left)} of {len(jobs)} matrices have no kernel")
    return made


def copies(weights: Sequence[torch.Tensor], copy: torch.Tensor) -> Callable[[], object]:
    """Return what copies matrices as live crossings do."""
    jobs = [Job(each.view(torch.int64), out.view(torch.int64)) for each, out in zip(weights, copy, strict=True)]
    return partial(kernels.copy, _batch(jobs, WORDS))


def check(recipe: Recipe, weights: Sequence[torch.Tensor]) -> None:
    """Stop where a bit differs from the processor's."""
    coded = Coded(recipe, weights)
    found = coded.measure().tolist()
    expected = []
    for at, each in enumerate(weights):
        bits = each.cpu().contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1, each.shape[-1])
        amax = arithmetic.block_amax(bits, "bf16", recipe.block)
        if found[at] != float(amax.max()):
            raise SystemExit(f"{recipe.name}: another largest magnitude")
        outer = float(arithmetic.outer_scale(recipe, float(amax.max()), "bf16")) if recipe.scale.outer else None
        stored, divisors = arithmetic.scales(recipe, amax, "bf16", outer)
        if recipe.block == WHOLE and at % 2:
            divisors = divisors / np.float32(2)  # a scale that weights have outgrown
        coded.numbers[at] = float(divisors[0, 0]) if outer is None else outer
        assert stored.shape == grid(recipe, bits.shape)
        expected.append({"scales": stored, "codes": arithmetic.pack(recipe, arithmetic.encode(recipe, bits, "bf16", divisors))})
    coded.code()
    for part, made in coded.made.items():
        for one, there in zip(expected, made, strict=True):
            ours, theirs = there.cpu().numpy().reshape(-1), one[part].reshape(-1).view(np.uint8)
            if (ours != theirs).any():
                raise SystemExit(f"{recipe.name}: {int((ours != theirs).sum())} other {part} of {ours.size}")


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
