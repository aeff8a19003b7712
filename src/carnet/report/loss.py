"""What codes *lose* of the numbers that they stand for, by kind and by layer: signal to noise, what was cut off, scales."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from carnet.examiner.examine import Quality
from carnet.examiner.judge import Judgement, ratio
from carnet.report.components import split
from carnet.report.held import Held


@dataclass(slots=True)
class Sum:
    """Some weights of a kind together."""

    weights: int = 0
    elements: int = 0
    saturated: int = 0
    signal: float = 0.0
    noise: float = 0.0
    octaves: Counter[int] = field(default_factory=Counter)

    def add(self, one: Judgement) -> None:
        """Add a weight."""
        self.weights += 1
        self.elements += one.elements
        self.saturated += one.saturated
        self.signal += one.signal
        self.noise += one.noise
        self.octaves += one.octaves

    @property
    def snr(self) -> float:
        """Return the ratio of signal to noise in dB."""
        return ratio(self.signal, self.noise)


@dataclass(frozen=True, slots=True)
class Kind:
    """Weights of one kind and recipe, in all layers."""

    name: str  # the parts that they hold: "attention.q, attention.k"
    recipe: str
    all: Sum
    layers: Mapping[int | None, Sum]  # None outside of layers


def kinds(quality: Quality, rows: Sequence[Held]) -> list[Kind]:
    """Return what was found in all weights, by kind."""
    parts = {row.label: [split(name) for name in row.elements] for row in rows}
    layers: dict[tuple[str, str], dict[int | None, Sum]] = defaultdict(lambda: defaultdict(Sum))
    every: dict[tuple[str, str], Sum] = defaultdict(Sum)
    for one in quality.each:
        held = parts.get(one.label) or [(None, one.label)]
        key = ", ".join(dict.fromkeys(part for _, part in held)), one.recipe
        every[key].add(one)
        layers[key][held[0][0]].add(one)
    return [Kind(*key, found, dict(layers[key])) for key, found in every.items()]
