"""The drawings of a run: bytes a second, and private memory, over its time."""

from collections.abc import Sequence
from dataclasses import dataclass

from carnet.report.running import Run, Sample
from carnet.report.scales import Scale, path, short, ticks
from carnet.report.terminal import size

WIDE, HIGH = 460.0, 180.0  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64.0, 10.0, 22.0, 24.0
BINS = 90  # of time
LETTER = 6.2  # pixels, about


@dataclass(frozen=True, slots=True)
class Mark:
    """A line of an axis, or the begin of a phase."""

    place: float
    label: str
    before: bool = False  # the label stands before it


@dataclass(frozen=True, slots=True)
class Series:
    """One drawing."""

    title: str
    said: str
    area: str
    line: str
    downs: tuple[Mark, ...]
    alongs: tuple[Mark, ...]
    phases: tuple[Mark, ...]


def series(run: Run) -> list[Series]:
    """Return the drawings of a run, none of one that is too short to have a course."""
    samples = run.samples
    if len(samples) < 3 or samples[-1].seconds <= 0:
        return []
    speed = rates(samples)
    found = [_drawn("Speed", f"{size(mean(samples))}/s on average, of bytes read, written and compared", speed, run, "/s")]
    memory = [(each.seconds, float(each.memory)) for each in samples if each.memory is not None]
    if len(memory) > 1:
        peak = max(nbytes for _, nbytes in memory)
        found.append(_drawn("Private memory", f"{size(peak)} at the most, of all its processes", memory, run, ""))
    return found


def mean(samples: Sequence[Sample]) -> float:
    """Return the bytes a second over all of a run; what an earlier one had done counts not."""
    first, last = samples[0], samples[-1]
    return (last.done - first.done) / max(last.seconds - first.seconds, 1e-9)


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return the bytes a second in equal parts of the time: the middle of each and its rate.

    >>> rates([Sample(0, 0, 8, None), Sample(1, 4, 8, None), Sample(2, 8, 8, None)])[0]
    (0.5, 4.0)
    """
    end, count = samples[-1].seconds, min(BINS, len(samples) - 1)
    step = (end - samples[0].seconds) / count
    edges = [samples[0].seconds + step * at for at in range(count + 1)]
    held, at = list[float](), 0
    for edge in edges:
        while at + 1 < len(samples) - 1 and samples[at + 1].seconds <= edge:
            at += 1
        a, b = samples[at], samples[at + 1]
        share = min(max((edge - a.seconds) / max(b.seconds - a.seconds, 1e-9), 0), 1)
        held.append(a.done + (b.done - a.done) * share)
    return [
        ((a + b) / 2, max(after - before, 0) / step)
        for a, b, before, after in zip(edges, edges[1:], held, held[1:], strict=False)
    ]


def _drawn(title: str, said: str, points: Sequence[tuple[float, float]], run: Run, per: str) -> Series:
    end = run.samples[-1].seconds
    most = max(number for _, number in points) or 1
    along, down = Scale((0, end), (LEFT, WIDE - RIGHT)), Scale((0, most * 1.08), (HIGH - BOTTOM, TOP))
    drawn = [(along(second), down(number)) for second, number in points]
    line = path(drawn)
    area = f"{line}L{short(drawn[-1][0])} {short(HIGH - BOTTOM)}L{short(drawn[0][0])} {short(HIGH - BOTTOM)}Z"
    downs = tuple(Mark(down(each), f"{size(each)}{per}" if each else "0") for each in ticks(0, most * 1.08, 4))
    alongs = tuple(Mark(along(each), f"{each:g} s") for each in ticks(0, end, 5))
    return Series(title, said, area, line, downs, alongs, tuple(_phases(run, along)))


def _phases(run: Run, along: Scale) -> list[Mark]:
    """Return where phases begin; a name stands behind its line, at the right edge before it; of two, the longer phase has the room."""
    end = along.numbers[1]
    begins = [(along(min(second, end)), name) for second, name in run.phases]
    ends = [place for place, _ in begins[1:]] + [along(end)]
    taken, found = list[tuple[float, float]](), dict[int, Mark]()
    for at in sorted(range(len(begins)), key=lambda at: begins[at][0] - ends[at]):
        (place, name), wide = begins[at], LETTER * len(begins[at][1]) + 8
        before = place + wide > WIDE
        low = place - wide if before else place
        free = all(low + wide <= other or low >= other + length for other, length in taken)
        taken += [(low, wide)] if free else []
        found[at] = Mark(place, name if free else "", before=before)
    return [found[at] for at in sorted(found)]
