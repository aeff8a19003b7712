"""Scales that a checkpoint brings along: of training in FP8 (Transformer Engine), or of quantizing after training (ModelOpt).

Both stand beside the modules of Megatron. What a fused module says holds for each of its parts; where several ranks, or several
modules, speak of one tensor, the largest counts: nothing is then cut off. Which canonical tensors a module holds is told by who asks:
planner and examiner each tie for themselves, so that a wrong tie cannot pass both.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from carnet.dialects.entry import Entry
from carnet.dialects.kinds import KINDS
from carnet.dtypes import FLOATS
from carnet.errors import BadCheckpoint
from carnet.formats.extra_state import NAME, Numbers, Scales, read_numbers, read_states
from carnet.formats.stored import Key, label_of
from carnet.inventory.survey import Inventory

# (canonical tensor, or one expert of it: "layers.0.moe.up[3]", "weight"), or (canonical tensor, "input", "k" or "v")
Which = tuple[str, str]
States = Mapping[
    Key, Mapping[tuple[int, ...], Scales]
]  # (unit, module) -> layer and expert, where these share a name -> scales
Find = Callable[[str, str], Numbers | None]
# of a stored weight, and a place where its name is shared (layer, expert): whose scales stand there
Tie = Callable[[Entry, tuple[int, ...]], Iterable[Which]]

# the weight of a module; of experts in one module it has a number, of the parts of one weight a name
WEIGHT = re.compile(r"(?P<module>.+)\.weight(?P<number>\d*)(?:_[wv]|\.\w+)?")
# modelopt/torch/quantization/plugins/megatron.py; a weight of one of many experts has its number between
WEIGHTS, INPUTS, CACHE = (
    "{module}.weight_quantizer{number}._amax",
    "{module}.input_quantizer._amax",
    "{what}_bmm_quantizer._amax",
)
MANY = 1 << 20  # more elements are scales of blocks, which are found again


@dataclass(frozen=True, slots=True)
class SourceScales:
    """What a checkpoint says of its own scales."""

    scales: Mapping[Which, float]  # of training, f32: a code times this is the number
    amaxes: Mapping[Which, float]  # of quantizing after training: the largest magnitude
    off: frozenset[str] = frozenset()  # the weights whose quantizers are off, named as in ``scales``


NOTHING = SourceScales({}, {})


def read_source_scales(source: Inventory, tie: Tie) -> SourceScales:
    """Return the scales that a checkpoint of Megatron brings along; raise BadCheckpoint where one is none.

    States that a person wants dropped are not looked at, nor are those of modules without a weight.
    """
    checkpoint = source.checkpoint
    if not KINDS[checkpoint.dialect].arguments:
        return NOTHING
    dropped = {name for reason, names in source.dropped.items() if reason.startswith("--drop") for name in names}
    modules = {(unit, match["module"]) for unit, name in source.entries if (match := WEIGHT.fullmatch(name))}

    def wants(unit: str, name: str) -> bool:
        return label_of((unit, name)) not in dropped and (unit, NAME.sub(r"\g<module>", name)) in modules

    states = read_states(checkpoint, wants)

    def numbers(unit: str, name: str) -> Numbers | None:
        stored = checkpoint.tensors.get((unit, name))
        if stored is None or label_of((unit, name)) in dropped:
            return None
        small = stored.dtype in FLOATS and 0 < prod(stored.shape) <= MANY
        return read_numbers(checkpoint.root, stored) if small else None

    return tie_source_scales(source.entries, states, numbers, str(checkpoint.root), tie)


def tie_source_scales(entries: Mapping[Key, Entry], states: States, numbers: Find, where: str, tie: Tie) -> SourceScales:
    """Return what stands beside entries: states of Transformer Engine, and what quantizers of ModelOpt saw.

    ``numbers`` finds a small tensor by unit and name, None where there is none.
    """
    scales: dict[Which, float] = {}
    amaxes: dict[Which, float] = {}
    off = set[str]()
    for (unit, name), entry in entries.items():
        match = WEIGHT.fullmatch(name)
        if match is None:
            continue
        module, number = match["module"], match["number"]
        for at, said in states.get((unit, module), {}).items():
            if said.off:
                off |= {tensor for tensor, what in tie(entry, at) if what == "weight"}
            for which in tie(entry, at) if not said.off else ():
                _note(scales, which, _factor(where, module, said, which[1], int(number or 0)))
        for which, amax in _quantizers(numbers, where, entry, module, f".{number}" if number else "", tie):
            _note(amaxes, which, amax)
    return SourceScales(scales, amaxes, frozenset(off))


def largest_of(every: Collection[SourceScales]) -> SourceScales:
    """Return what several say together: the largest of each scale."""
    scales: dict[Which, float] = {}
    amaxes: dict[Which, float] = {}
    for one in every:
        for found, said in ((scales, one.scales), (amaxes, one.amaxes)):
            for which, value in said.items():
                _note(found, which, value)
    return SourceScales(scales, amaxes, frozenset[str]().union(*(one.off for one in every)))


def _note(found: dict[Which, float], which: Which, value: float | None) -> None:
    if value is not None:
        found[which] = max(value, found.get(which, 0.0))


def _factor(where: str, module: str, said: Scales, what: str, gemm: int) -> float | None:
    """Return what a code is multiplied by, from what Transformer Engine multiplies a number by: both are f32."""
    known = said.input if what == "input" else said.weight
    if gemm >= len(known):
        facts = {"where": where, "expected": f"more than {gemm}", "found": len(known)}
        raise BadCheckpoint(f"the state of {module!r} has scales for fewer products than the module", facts)
    scale = known[gemm]
    factor = None if scale is None else float(np.float32(1) / np.float32(scale))
    if factor is not None and not (factor > 0 and isfinite(factor)):
        raise BadCheckpoint(f"a scale of {module!r} has no inverse", {"where": where, "found": scale})
    return factor


def _quantizers(numbers: Find, where: str, entry: Entry, module: str, number: str, tie: Tie) -> Iterator[tuple[Which, float]]:
    """Yield the largest magnitudes that ModelOpt's quantizers of a module saw."""
    for what, name in (("weight", WEIGHTS), ("input", INPUTS)):
        for which, amax in _amaxes(numbers, where, entry, name.format(module=module, number=number), tie):
            if which[1] == what:
                yield which, amax
    cached: dict[str, str] = {name: what for name in entry.names if (what := name.tensor.cached)}
    for what in sorted({*cached.values()}):
        name = f"{module.rpartition('.')[0]}.core_attention.{CACHE.format(what=what)}"
        for (tensor, _), amax in _amaxes(numbers, where, entry, name, tie):
            if cached.get(tensor) == what:
                yield (tensor, what), amax


def _amaxes(numbers: Find, where: str, entry: Entry, name: str, tie: Tie) -> Iterator[tuple[Which, float]]:
    """Yield the numbers of one stored tensor: one for each layer and expert of a weight, or one for all; no others are needed."""
    found = numbers(entry.unit, name)
    if found is None:
        return
    leading = sum(dim in (("layer",), ("expert",)) for dim in entry.reading.pattern.dims)
    within = found.shape[:leading] == entry.shape[:leading] and prod(found.shape[leading:]) == 1
    if not within and found.size != 1:
        return
    found = found.astype(np.float32)
    for at in np.ndindex(found.shape[:leading]) if within else [()]:
        amax = float(found[at].reshape(-1)[0])
        if not (isfinite(amax) and amax >= 0):
            raise BadCheckpoint(
                "a quantizer's largest magnitude is not a magnitude", {"where": where, "tensor": name, "found": amax}
            )
        for which in tie(entry, at) if amax else ():
            yield which, amax
