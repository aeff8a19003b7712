"""Live crossings: the ranks of a running training hand their weights to the ranks of inference, without a file between."""

from carnet.live.crossing import Crossing, plan
from carnet.live.grid import Grid

__all__ = ["Crossing", "Grid", "plan"]
