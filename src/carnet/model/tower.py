"""The *tower*: what a model that also sees or hears has beside its text; each tensor goes along as it is, under its own name.

Such a tensor is a canonical one with the shape that is stored and axes without a meaning: it is planned, proven and compared as all
others are, and never cast or quantized. Where a program stores it in another order, its dimensions are split into factors.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from carnet.model.fields import Config
from carnet.model.tensors import CARRIED, Canonical, Tensor

NAMED = "carried:"  # what the canonical names begin with: no part of a text model does
Dims = tuple[tuple[int, ...], ...]  # per dimension of the stored tensor its factors, outermost first


class Carried(NamedTuple):
    """One tensor of a tower, as a Hugging Face folder has it."""

    name: str
    dtype: str
    dims: Dims

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the canonical shape: all factors."""
        return tuple(chain(*self.dims))

    @property
    def tensor(self) -> Canonical:
        """Return its canonical name."""
        axes = tuple(f"factor{at}" for at in range(len(self.shape)))
        return Canonical(Tensor(NAMED + self.name, axes, len(axes), CARRIED, "first", {}), None)


def told(tensors: Iterable[Carried]) -> str:
    """Return the field that says the tensors of a tower, "" for none."""
    listed = sorted(tensors)
    return json.dumps(listed) if listed else ""


def tower(config: Config) -> tuple[Carried, ...]:
    """Return the tensors of a model's tower, in the order of their names."""
    said = config.get("tower")
    return _tower(said) if isinstance(said, str) and said else ()


@lru_cache(maxsize=8)
def _tower(said: str) -> tuple[Carried, ...]:
    return tuple(Carried(name, dtype, tuple(map(tuple, dims))) for name, dtype, dims in json.loads(said))
