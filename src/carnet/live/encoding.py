"""What becomes of a weight on its way: its codes or the scales of its blocks, the bits of carnet.quantize.arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from carnet.dtypes import BY_NAME as DTYPES
from carnet.dtypes import array_type
from carnet.live.binding import CARNET, TORCH
from carnet.live.moves import Coded, Transfer
from carnet.quantize import arithmetic
from carnet.quantize.codes import E4M3
from carnet.quantize.recipes import WHOLE
from carnet.steps import Put


@dataclass(slots=True)
class Coder:
    """What codes weights, under the scales of this run."""

    matrices: Mapping[str, tuple[int, str]]  # the number of each, and the element type of its weights
    # [matrices], f32, where weights are: what they are divided by, or the scale over those of blocks
    numbers: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    stored: Mapping[str, float] = field(default_factory=dict)  # the same as the target keeps it

    def dress(self, move: Transfer, view: torch.Tensor) -> torch.Tensor:
        """Return what a move makes of what it reads."""
        if move.coded is None:
            if move.function:
                return -torch.exp(view.double()).float()  # minus_exp is the only one: carnet.executor.functions
            return view.float() + move.add if move.add else view
        at, own = self.matrices[move.coded.matrix]
        if move.coded.recipe.block == WHOLE:
            return _whole(view.to(TORCH[own]), move.coded, self.numbers[at])
        return _blocks(view.to(TORCH[own]), own, move, move.coded, self.numbers[at])


def _whole(view: torch.Tensor, coded: Coded, divisor: torch.Tensor) -> torch.Tensor:
    """Return codes under one scale. It is a tensor: a quotient by a plain number is a product with its inverse on GPUs."""
    quotients = view.float() / divisor.to(view.device)
    if coded.recipe.quotient == "own":
        quotients = quotients.to(view.dtype).float()
    return quotients.clamp_(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)


def _blocks(view: torch.Tensor, own: str, move: Transfer, coded: Coded, over: torch.Tensor) -> torch.Tensor:
    """Return codes, or scales, of blocks of rows, made on the processor."""
    recipe = coded.recipe
    rows = view.flatten(len(move.spot.shape) - 1).flatten(0, -2).cpu().contiguous()
    bits = rows.view(torch.uint8).numpy().view(f"u{DTYPES[own].nbytes}")
    outer = float(over) if recipe.scale.outer else None
    stored, divisors = arithmetic.scales(recipe, arithmetic.block_amax(bits, own, recipe.block), own, outer)
    if coded.part == "codes":
        stored = arithmetic.pack(recipe, arithmetic.encode(recipe, bits, own, divisors))
    made = torch.from_numpy(np.ascontiguousarray(stored).view(np.uint8))
    return made.view(TORCH[move.dtype]).view(move.spot.shape).to(view.device)


def numbers(step: Put, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of a step, rounded as a file has them."""
    values = step.values * prod(step.shape) if len(step.values) == 1 else step.values
    made = np.array(values, np.float64).astype(array_type(CARNET[dtype])).astype(np.float64)
    return torch.from_numpy(made).view(step.shape).to(dtype)
