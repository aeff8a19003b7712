"""What every rank of an engine must hold after a run: the digests of its parameters, told from what the source holds.

The weights travel once more, a tensor at a time, into memory of carnet's own: what an engine did with those that it was given is
no part of the answer.
"""

from collections.abc import Iterable, Mapping

import torch

from carnet.engines.expected import Expected, Parameter, parameters
from carnet.engines.table import ENGINES
from carnet.errors import BadCheckpoint, BadRequest
from carnet.executor.digesting import digests_of
from carnet.live.checking import flat_bytes
from carnet.live.control import Control
from carnet.live.virtual import Destination
from carnet.model.fields import Config
from carnet.plans.columns import Plan
from carnet.plans.request import Request

Digests = dict[str, tuple[str, ...]]  # by rank and name, as the engine says them


def parameters_of(plan: Plan, destination: Destination, config: Config, request: Request) -> list[Parameter]:
    """Return the parameters of an engine's ranks; raise BadRequest where the target is for no engine."""
    if request.to not in ENGINES:
        facts = {"to": request.to, "known": ", ".join(ENGINES)}
        raise BadRequest("only an engine's ranks have expected digests", facts, remedy="plan a target of its kind: to='vllm'")
    return [*parameters(plan.files, destination.dialect, {**config, **destination.said}, request.tp)]


def digests(engine: str, arriving: Iterable[tuple[str, torch.Tensor]], known: Mapping[str, Parameter]) -> Digests:
    """Return the digests of this rank's tensors, each hashed as it arrives; ``known`` are its parameters by name."""
    found: Digests = {}
    for name, tensor in arriving:
        if name in known:
            data = flat_bytes(tensor.detach()).cpu().numpy().data
            found[known[name].key] = digests_of(ENGINES[engine].hashes, data)
    return found


def merged(control: Control, own: Digests, known: Iterable[Parameter], request: Request, source: str) -> Expected:
    """Return on every rank what all of them found; raise BadCheckpoint where copies of one rank's weights differ."""
    every: Digests = {}
    for rank, found in zip(control.ranks, control.gather(own), strict=True):
        for key, digest in found.items():
            if every.setdefault(key, digest) != digest:
                raise BadCheckpoint("ranks of the source hold different weights", {"parameter": key, "on": f"rank {rank}"})
    coded = frozenset(each.key for each in known if each.coded)
    return Expected(request.to, str(request.engine_version), source, request.tp, request.pp, request.ep, every, coded)
