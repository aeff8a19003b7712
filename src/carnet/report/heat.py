"""The drawing of a picture: an image of a pixel a cell, with what stands beside it in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from carnet.examiner.pictures import Grid, Picture
from carnet.report.png import png, url

ACCENT, DAMAGE = (43, 108, 176), (197, 48, 48)
WIDE = 256.0  # pixels of a drawing
SEEN = 0.45  # how opaque the least damage is, so that it is seen


@dataclass(frozen=True, slots=True)
class Heat:
    """A drawing."""

    name: str
    label: str
    shape: tuple[int, int]
    cell: tuple[int, int]  # rows and columns of a pixel, at most
    height: float
    image: str  # URL
    outline: tuple[float, float, float, float] | None  # around what is damaged: x, y, width, height
    said: str


def lost(pictures: Sequence[Picture]) -> tuple[list[Heat], tuple[float, float] | None]:
    """Return the drawings of what codes lose, all on one scale of dB, and its ends: the worst and the best cell."""
    ratios = [_decibels(each.cells) for each in pictures]
    seen = np.concatenate([each[np.isfinite(each)] for each in ratios]) if ratios else np.array([])
    if not seen.size:
        return [], None
    low, high = float(seen.min()), float(seen.max())
    found = []
    for picture, ratio in zip(pictures, ratios, strict=True):
        shares = np.where(np.isfinite(ratio), 0.08 + 0.92 * (high - ratio) / ((high - low) or 1), 0)
        worst = float(ratio[np.isfinite(ratio)].min())
        found.append(_heat(picture, shares, ACCENT, None, f"worst cell {worst:.1f} dB"))
    return found, (low, high)


def damaged(pictures: Sequence[Picture]) -> list[Heat]:
    """Return the drawings of damages."""
    found = []
    for picture in pictures:
        shares = np.where(picture.cells > 0, SEEN + (1 - SEEN) * picture.cells, 0)
        rows, columns = (np.flatnonzero(picture.cells.any(axis=axis)) for axis in (1, 0))
        (tall, wide), height = picture.cells.shape, _height(picture)
        x, y = columns[0] * WIDE / wide, rows[0] * height / tall
        box = (x, y, (columns[-1] + 1) * WIDE / wide - x, (rows[-1] + 1) * height / tall - y)
        spans = [
            f"{what} {_span(places, size, cells)}"
            for what, places, size, cells in zip(
                ("rows", "columns"), (rows, columns), picture.shape, picture.cells.shape, strict=True
            )
        ]
        count = float((picture.cells * Grid(*picture.shape).sizes()).sum())
        share = f"{round(count):,} of {prod(picture.shape):,} elements"
        found.append(_heat(picture, shares, DAMAGE, box, f"{share}, in {' and '.join(spans)}"))
    return found


def _span(places: NDArray[np.int64], size: int, cells: int) -> str:
    first, last = -(-int(places[0]) * size // cells), -(-(int(places[-1]) + 1) * size // cells) - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _decibels(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = -10 * np.log10(cells)
    return found


def _height(picture: Picture) -> float:
    rows, columns = picture.shape
    return WIDE * min(max(rows / columns, 1 / 16), 1.0)


def _heat(
    picture: Picture,
    shares: NDArray[np.float64],
    colour: tuple[int, int, int],
    box: tuple[float, float, float, float] | None,
    said: str,
) -> Heat:
    cell = tuple(-(-size // cells) for size, cells in zip(picture.shape, picture.cells.shape, strict=True))
    image = url(png(shares, colour))
    return Heat(str(picture.name), picture.label, picture.shape, (cell[0], cell[1]), _height(picture), image, box, said)
