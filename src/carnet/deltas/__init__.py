"""Deltas: what changed in a model from one version to the next, as a folder that trainers publish and engines pull.

::

    A  ──┐                                         BASE  ──┐
         ├ xor, a zstd frame for each tensor ─> OUT        ├ xor ─> the next version, bit for bit
    B  ──┘                                        DELTA  ──┘

The folder is that of slime, miles and ModelExpress (``artifact``). Beside its index stands what they do not have: a digest of
every tensor before and after, so that a step that is missing, or in another's place, is found (``chain``).
``pip install 'carnet[delta]'`` brings zstd.
"""

from carnet.deltas.applying import Applied, apply
from carnet.deltas.comparing import verify
from carnet.deltas.making import Made, delta
from carnet.deltas.sides import Differing

__all__ = ["Applied", "Differing", "Made", "apply", "delta", "verify"]
