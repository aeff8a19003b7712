"""What adapters change: which weights of a checkpoint, by which of its tensors, and how much."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from carnet.model.tensors import Canonical


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a weight: ``scale * (b @ a)``."""

    a: Canonical  # experts, rank | inputs
    b: Canonical  # experts, outputs | rank
    scale: float  # f32


@dataclass(frozen=True, slots=True)
class Changes:
    """What adapters add to the weights of a checkpoint, whose tensors they are beside."""

    of: Mapping[Canonical, Change] = field(default_factory=dict)  # by the weight
    factors: Mapping[Canonical, tuple[int, ...]] = field(default_factory=dict)  # the tensors of adapters, each with its shape
    said: Mapping[str, object] = field(default_factory=dict)  # what a document says of it


NOTHING = Changes()
