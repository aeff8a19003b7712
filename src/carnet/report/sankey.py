"""The drawing of a flow: bars in two or three columns, and the streams between them, as high as they have bytes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.report.components import LEFT
from carnet.report.flow import Flow, Stream
from carnet.report.scales import short
from carnet.report.terminal import size

BAR = 10.0  # pixels
GAP = 22.0  # between bars, so that the names of two have room
LEAST = 1.5  # of what has few bytes
LINE = 14.0  # from one line of text to the next


@dataclass(frozen=True, slots=True)
class Bar:
    """One node."""

    x: float
    y: float
    height: float
    label: str
    nbytes: int
    anchor: str  # of the label: "start" or "end"
    at: float  # where the label stands
    level: float  # and how high
    said: str  # the label as far as there is room


@dataclass(frozen=True, slots=True)
class Band:
    """One stream."""

    d: str
    fate: str
    title: str


@dataclass(frozen=True, slots=True)
class Sankey:
    """A drawing."""

    width: float
    height: float
    bars: tuple[Bar, ...]
    bands: tuple[Band, ...]


def sankey(flow: Flow, width: float, room: float, *, inside: bool = False) -> Sankey:
    """Return the drawing of a flow, with so much room for bytes; names stand beside the outer bars, where it is narrow ``inside``."""
    sides = [flow.sources, {name: max(both) for name, both in flow.components.items()}, flow.targets]
    columns = [side for side in sides if side]
    if not columns:  # of no tensor, or of none that has an element
        return Sankey(width, 24, (), ())
    most = max(sum(side.values()) for side in columns) or 1
    scale = room / most
    margin = 0.0 if inside else 222.0
    left, right = margin, width - (margin if flow.targets or not inside else 110.0)
    xs = [left + (right - BAR - left) * at / max(len(columns) - 1, 1) for at in range(len(columns))]
    heights = [sum(_high(nbytes, scale) for nbytes in side.values()) + GAP * (len(side) - 1) for side in columns]
    height, middle = max(heights), 1 if flow.sources else 0
    bars, tops = list[Bar](), list[dict[str, float]]()
    for at, side in enumerate(columns):
        y = 12 + (height - heights[at]) / 2
        tops.append({})
        for name, nbytes in side.items():
            tops[at][name] = y
            said = _said(nbytes, flow.components.get(name) if at == middle else None)
            bars.append(_bar(name, nbytes, said, (xs[at], y, _high(nbytes, scale)), (at, len(columns)), inside=inside))
            y += _high(nbytes, scale) + GAP
    bars = _apart(bars) if inside else bars
    bands = _bands(flow.arriving, tops[0], tops[1], (xs[0] + BAR, xs[1]), scale) if flow.sources else []
    bands += _bands(flow.leaving, tops[-2], tops[-1], (xs[-2] + BAR, xs[-1]), scale) if flow.targets else []
    return Sankey(width, height + 24, tuple(bars), tuple(bands))


def _high(nbytes: int, scale: float) -> float:
    return max(nbytes * scale, LEAST)


def _said(nbytes: int, both: tuple[int, int] | None) -> str:
    """Return the bytes of a bar; of a component those that came in and those that went out, where they are not the same."""
    ins, outs = both or (0, 0)
    return f"{size(ins)} → {size(outs)}" if ins and outs and size(ins) != size(outs) else size(nbytes)


def _bar(name: str, nbytes: int, words: str, box: tuple[float, float, float], place: tuple[int, int], *, inside: bool) -> Bar:
    (x, y, height), (at, columns) = box, place
    outer = at == 0 and columns > 1
    last = at == columns - 1 and at > 1
    before = (outer and not inside) or (last and inside)
    letters = 15 if inside else 22
    name = name.removeprefix(f"{LEFT}: ")
    short_name = name if len(name) <= letters else f"{name[: letters - 8]}…{name[-7:]}"
    said = short_name if inside else f"{short_name} · {words}"
    return Bar(x, y, height, name, nbytes, "end" if before else "start", x - 6 if before else x + BAR + 6, y + height / 2, said)


def _apart(bars: Sequence[Bar]) -> list[Bar]:
    """Return bars of which no label before its bar is as high as another: they share the room between two columns."""
    levels = [bar.level for bar in bars if bar.anchor == "start"]
    found = list[Bar]()
    for bar in bars:
        level = bar.level
        while bar.anchor == "end" and any(abs(level - other) < LINE for other in levels):
            level += 2
        if bar.anchor == "end":
            levels.append(level)
        found.append(replace(bar, level=level))
    return found


def _bands(
    streams: Sequence[Stream], starts: Mapping[str, float], ends: Mapping[str, float], xs: tuple[float, float], scale: float
) -> list[Band]:
    """Return the bands of streams, in the order of the bars on both sides, so that they cross as little as can be."""
    order = {name: at for names in (starts, ends) for at, name in enumerate(names)}
    used: dict[tuple[str, str], float] = defaultdict(float)
    low: dict[tuple[int, str, str, str], float] = {}
    for side in (0, 1):
        for each in sorted(streams, key=lambda each: (order[_end(each, side)], order[_end(each, 1 - side)], each.fate)):
            key = ("start", "end")[side], _end(each, side)
            low[side, each.start, each.end, each.fate] = (starts, ends)[side][key[1]] + used[key]
            used[key] += each.nbytes * scale
    (x0, x1), found = xs, list[Band]()
    for each in streams:
        thick = max(each.nbytes * scale, 0.75)
        a, b = (low[side, each.start, each.end, each.fate] for side in (0, 1))
        middle = (x0 + x1) / 2
        x0s, x1s, ms = short(x0), short(x1), short(middle)
        d = f"M{x0s} {short(a)}C{ms} {short(a)} {ms} {short(b)} {x1s} {short(b)}V{short(b + thick)}"
        d += f"C{ms} {short(b + thick)} {ms} {short(a + thick)} {x0s} {short(a + thick)}Z"
        end = each.end.removeprefix(f"{LEFT}: ")
        found.append(Band(d, each.fate, f"{each.start} to {end}: {size(each.nbytes)}, {each.fate}"))
    return found


def _end(stream: Stream, side: int) -> str:
    return stream.end if side else stream.start
