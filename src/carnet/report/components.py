"""The *components* of a model, as a person thinks of it: which of them a canonical tensor belongs to, by its name alone."""

import re

from carnet.model.tensors import ADAPTER, BY_PART, NORM
from carnet.model.tower import NAMED

OPTIMIZER, TOWER, ADAPTERS, NORMS, OTHER = "optimizer", "tower", "adapters", "norms", "other"
LEFT = "left behind"
WITHIN = (  # what a name begins with within its layer -> its component, in the order in which a model computes
    ("embed", "embedding"),
    ("position", "embedding"),
    ("mtp.", "further tokens"),
    ("attention.", "attention"),
    ("mla.", "attention"),
    ("indexer.", "attention"),
    ("mamba.", "state space"),
    ("s6.", "state space"),
    ("gdn.", "linear attention"),
    ("linear_mixer", "attention"),
    ("mlp.", "MLP"),
    ("linear_mlp", "MLP"),
    ("moe.", "experts"),
    ("shared.", "shared experts"),
    ("head", "head"),
)
COMPONENTS = (*dict.fromkeys(word for _, word in WITHIN), NORMS, TOWER, ADAPTERS, OPTIMIZER, OTHER)
NAME = re.compile(r"(?:(?P<plane>\w+):)?(?:layers\.(?P<layer>\d{1,9}|\*)\.)?(?P<part>.*)", re.DOTALL)


def split(name: str) -> tuple[int | None, str]:
    """Return the layer of a canonical tensor, None for none or for several, and its name within.

    >>> split("layers.3.attention.q"), split("embed"), split("layers.*.mlp.up")
    ((3, 'attention.q'), (None, 'embed'), (None, 'mlp.up'))
    """
    found = NAME.fullmatch(name)
    assert found is not None, "every text matches"
    layer = found["layer"]
    return (int(layer) if layer is not None and layer.isdecimal() else None), found["part"]


def component_of(name: str) -> str:
    """Return the component of a canonical tensor.

    >>> [component_of(name) for name in ("layers.3.attention.q", "final_norm", "exp_avg:embed", "carried:visual.patch", "embed")]
    ['attention', 'norms', 'optimizer', 'tower', 'embedding']
    """
    if name.startswith(NAMED):
        return TOWER
    found = NAME.fullmatch(name)
    if found is not None and found["plane"]:
        return OPTIMIZER
    part = split(name)[1]
    known = BY_PART.get(part)
    if known is not None and known.role == NORM:
        return NORMS
    if known is not None and known.role == ADAPTER:
        return ADAPTERS
    if part.endswith("norm_bias"):
        return NORMS
    return next((word for start, word in WITHIN if part.startswith(start)), OTHER)
