"""Small drawings of one form, a row of them for each kind of weight: signal to noise over the layers, and how scales are spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from carnet.report.loss import Kind
from carnet.report.scales import Scale, path, ticks

WIDE, HIGH, EDGE = 220.0, 56.0, 4.0  # pixels


@dataclass(frozen=True, slots=True)
class Dot:
    """One layer."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of the axis."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Signal to noise of a kind over the layers."""

    dots: tuple[Dot, ...]
    line: str
    ticks: tuple[Tick, ...]  # dB, the same for all kinds


@dataclass(frozen=True, slots=True)
class Column:
    """The scales of an octave."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Spread:
    """How the scales of a kind are spread over powers of two."""

    columns: tuple[Column, ...]
    ticks: tuple[Tick, ...]


def strips(kinds: Sequence[Kind]) -> list[Strip]:
    """Return a strip for each kind, all on one scale of dB and one of layers."""
    ratios = [found.snr for kind in kinds for found in kind.layers.values() if isfinite(found.snr)]
    low, high = (min(ratios), max(ratios)) if ratios else (0.0, 1.0)
    room = max((high - low) * 0.15, 0.5)
    down = Scale((low - room, high + room), (HIGH - EDGE, EDGE))
    last = max((layer for kind in kinds for layer in kind.layers if layer is not None), default=0)
    along = Scale((0, max(last, 1)), (34, WIDE - 8))
    marks = tuple(Tick(down(each), f"{each:g}") for each in ticks(low - room, high + room, 3))
    found = []
    for kind in kinds:
        places = sorted((layer if layer is not None else last / 2, layer, each) for layer, each in kind.layers.items())
        dots = []
        for place, layer, each in places:
            where = "outside of layers" if layer is None else f"layer {layer}"
            said = f"{each.snr:.1f} dB" if isfinite(each.snr) else "exact"
            y = down(each.snr) if isfinite(each.snr) else EDGE
            dots.append(Dot(along(place), y, f"{where}: {said}, {each.saturated:,} cut off"))
        found.append(Strip(tuple(dots), path([(dot.x, dot.y) for dot in dots]) if len(dots) > 1 else "", marks))
    return found


def spreads(kinds: Sequence[Kind]) -> list[Spread]:
    """Return a spread for each kind, all on one scale of powers of two; the highest column of each is as high as there is room."""
    every = [octave for kind in kinds for octave in kind.all.octaves]
    low, high = (min(every), max(every) + 1) if every else (0, 1)
    low, high = (low - 2, high + 2) if high - low < 6 else (low, high)
    along = Scale((low, high), (6, WIDE - 6))
    wide = along(low + 1) - along(low)
    marks = tuple(Tick(along(each), f"{each:.0f}") for each in ticks(low + 1, high - 1, 4) if float(each).is_integer())
    found = []
    for kind in kinds:
        octaves = kind.all.octaves
        most = max(octaves.values(), default=1)
        up = Scale((0, most), (0, HIGH - 20))
        columns = []
        for octave, count in sorted(octaves.items()):
            height = max(up(count), 1.5)
            title = f"{count:,} scales from 2^{octave} to 2^{octave + 1}"
            columns.append(Column(along(octave) + 0.5, HIGH - 16 - height, max(wide - 1, 1), height, title))
        found.append(Spread(tuple(columns), marks))
    return found
