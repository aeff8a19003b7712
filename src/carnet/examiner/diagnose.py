"""Say in words what happened to tensors that differ, where it is one of the usual damages.

A target that is wrong everywhere must not take longer than twice: every tensor of the source is read once more and remembered by its
digest, and only the first few damages are looked at as a whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from carnet.algebra.box import Box, volume
from carnet.dtypes import BY_NAME
from carnet.examiner.compare import Finding, Side, Suspect, read, whole_of
from carnet.examiner.tensor_files import blocks
from carnet.examiner.unfold import Array

FEW = 16  # damages that are looked at as a whole


@dataclass(slots=True)
class Clues:
    """What was found out on the way to a name."""

    whole: int  # bytes of a tensor that may be looked at as a whole
    left: int = FEW  # damages that may still be looked at so
    prints: dict[tuple[Box, tuple[int, ...], str], dict[str, str]] = field(default_factory=dict)  # digest -> canonical tensor


def name_damages(source: Side, target: Side, found: Iterable[Finding | Suspect], whole: int) -> list[Finding]:
    """Return findings, with the damage's name where it has one; ``whole`` is how many bytes of a tensor may be held."""
    clues = Clues(whole)
    return [_named(source, target, one, clues) if isinstance(one, Suspect) else one for one in found]


def _named(source: Side, target: Side, suspect: Suspect, clues: Clues) -> Finding:
    part, name = suspect.part, suspect.name
    if part.stored.dtype != source.parts[name][0].stored.dtype:
        return suspect.finding
    limit = target.tensor_files.block // BY_NAME[part.stored.dtype].nbytes
    digest, anything = _print(read(target, part, box) for box in blocks(part.box, limit))
    if not anything:
        return replace(suspect.finding, what="all zero")
    key = part.box, source.shapes[name], part.stored.dtype
    if key not in clues.prints:
        clues.prints[key] = _prints(source, *key, limit)
    other = clues.prints[key].get(digest)
    if other == name and source.is_adapted(name):
        return replace(suspect.finding, what="holds the weight without its adapter")
    if other not in (None, name):  # its own: a norm that is stored less one
        return replace(suspect.finding, what=f"holds {other}")
    if clues.left and not source.is_adapted(name) and volume(part.box) * BY_NAME[part.stored.dtype].nbytes <= clues.whole:
        clues.left -= 1
        moved = _moved(source, target, suspect)
        return suspect.finding if moved is None else replace(suspect.finding, what=moved)
    return suspect.finding


def _print(parts: Iterable[Array]) -> tuple[str, bool]:
    """Return the digest of what blocks hold one after another, and whether any of it is not zero."""
    hasher, anything = xxhash.xxh3_128(), False
    for part in parts:
        hasher.update(np.ascontiguousarray(part).data)
        anything = anything or bool(part.any())
    return hasher.hexdigest(), anything


def _prints(source: Side, box: Box, shape: tuple[int, ...], dtype: str, limit: int) -> dict[str, str]:
    """Return what every tensor of a shape has in a box, by digest."""
    found: dict[str, str] = {}
    for name, parts in source.parts.items():
        if source.shapes.get(name) == shape and parts[0].stored.dtype == dtype:
            found.setdefault(_print(whole_of(source, name, each) for each in blocks(box, limit))[0], name)
    return found


def _moved(source: Side, target: Side, suspect: Suspect) -> str | None:
    """Name what was exchanged, or a flipped bit."""
    part = suspect.part
    found, expected = read(target, part, part.box), whole_of(source, suspect.name, part.box)
    axes = part.entry.reading.parts[part.part]
    for place, axis in enumerate(axes):
        moved = rearranged(np.moveaxis(expected, place, 0), np.moveaxis(found, place, 0))
        if moved is not None:
            return f"{moved} along {axis}"
    for place in range(len(axes) - 1):  # query heads are numbered over kv and rep together
        folded = (*expected.shape[:place], -1, *expected.shape[place + 2 :])
        moved = rearranged(*(np.moveaxis(side.reshape(folded), place, 0) for side in (expected, found)))
        if moved is not None:
            return f"{moved} along {axes[place]} {axes[place + 1]}"
    if int((found != expected).sum()) == 1:
        flipped = int(found[found != expected][0]) ^ int(expected[found != expected][0])
        return f"{flipped.bit_count()} bit{'s' * (flipped.bit_count() > 1)} of one element flipped"
    return None


def _equals(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def rearranged(expected: Array, found: Array) -> str | None:
    """Say how slices along the first axis were exchanged, if that is all that happened."""
    length = len(expected)
    differing = [i for i in range(length) if not _equals(expected[i], found[i])] if length <= 1 << 14 else []
    if len(differing) == 2 and _equals(expected[differing], found[differing[::-1]]):
        return f"{differing[0]} and {differing[1]} exchanged"
    if length % 2 == 0 and _equals(np.roll(expected, length // 2, 0), found):
        return "halves exchanged"
    rows = {expected[i].tobytes(): i for i in differing}
    if differing and sorted(rows.get(found[i].tobytes(), -1) for i in differing) == differing:
        return f"{len(differing)} indices rearranged"
    return None
