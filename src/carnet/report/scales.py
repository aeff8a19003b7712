"""From numbers to places on a drawing, and the round numbers that stand at an axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10


@dataclass(frozen=True, slots=True)
class Scale:
    """A line of numbers laid on a line of places."""

    numbers: tuple[float, float]
    places: tuple[float, float]

    def __call__(self, number: float) -> float:
        """Return the place of a number.

        >>> Scale((0, 10), (100, 0))(2.5)
        75.0
        """
        (low, high), (begin, end) = self.numbers, self.places
        return begin + (end - begin) * (number - low) / ((high - low) or 1)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most so many round numbers that lie in an interval.

    >>> ticks(0, 10, 5), ticks(17.2, 18.9, 4)
    ([0.0, 2.5, 5.0, 7.5, 10.0], [17.5, 18.0, 18.5])
    """
    if high <= low:
        return [low]
    rough = (high - low) / max(most, 1)
    power = 10.0 ** floor(log10(rough))
    for step in (power * times for times in (1, 2, 2.5, 5, 10, 20)):
        first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
        if last - first < most:
            return [round(at * step, 10) for at in range(first, last + 1)]
    return [low, high]


def path(points: Sequence[tuple[float, float]]) -> str:
    """Return the words of a path through points.

    >>> path([(0, 1), (2.26, 3)])
    'M0 1L2.3 3'
    """
    return "".join(f"{'L' if at else 'M'}{short(x)} {short(y)}" for at, (x, y) in enumerate(points))


def short(number: float) -> str:
    """Return a place in a tenth of a pixel.

    >>> short(3.0), short(3.14)
    ('3', '3.1')
    """
    return f"{number:.1f}".removesuffix(".0")
