"""Live crossings: the ranks of a running training hand their weights to the ranks of inference, without a file between."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError("carnet.live moves tensors with PyTorch: pip install 'carnet[torch]'", name="torch")

from carnet.live.crossing import Crossing
from carnet.live.grid import Grid
from carnet.live.planning import plan
from carnet.live.publishing import delta

__all__ = ["Crossing", "Grid", "delta", "plan"]
