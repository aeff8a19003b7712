"""What adapters change: which weights of a checkpoint, by which of its tensors, and how much."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from carnet.model.tensors import Canonical


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a weight, ``scale * (b @ a)``, and how long its rows are made afterwards."""

    a: Canonical  # experts, rank | inputs
    b: Canonical  # experts, outputs | rank
    scale: float  # f32
    magnitude: Canonical | None = None  # experts, outputs |, of DoRA


@dataclass(frozen=True, slots=True)
class Changes:
    """What adapters add to the weights of a checkpoint, whose tensors they are beside."""

    of: Mapping[Canonical, Change] = field(default_factory=dict)  # by the weight
    factors: Mapping[Canonical, tuple[int, ...]] = field(default_factory=dict)  # the tensors of adapters, each with its shape

    @property
    def most(self) -> int:
        """Return the elements of the largest A and B of one weight, or of one expert of it."""
        shapes = (
            [self.factors[part][name.tensor.each_expert :] for part in (each.a, each.b)] for name, each in self.of.items()
        )
        return max((sum(map(prod, pair)) for pair in shapes), default=0)

    def said(self, whose: str) -> str:
        """Return in a line what is added."""
        scales = sorted({each.scale for each in self.of.values()})
        rows = ", rows made as long as their magnitudes" if any(each.magnitude for each in self.of.values()) else ""
        return f"{whose}, added to {len(self.of)} weights: B A times {' or '.join(f'{each:g}' for each in scales[:4])}{rows}"


NOTHING = Changes()
