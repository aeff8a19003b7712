"""The element types that a target may have: the source's own, the one that was asked for, or the one that all weights of its kind have.

Every other cast is a finding.
"""

from collections import defaultdict
from collections.abc import Iterator

from carnet.dtypes import BY_NAME, FLOATS
from carnet.examiner.compare import Finding, Part, Side
from carnet.inventory.planes import type_of_weights
from carnet.model.model import value
from carnet.model.tensors import BY_PART, Canonical


def check_types(source: Side, target: Side, asked: str | None) -> Iterator[Finding]:
    """Yield the casts that nobody asked for, each kind once, and what was not cast as asked; codes have rules of their own."""
    odd: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)  # what, from, to -> stored tensors
    computed = type_of_weights(source.inventory.checkpoint.tensors, source.inventory.config) if asked is None else None
    for name, parts in target.parts.items():
        for part in parts if name.origins[0] in source.parts else ():
            allowed = _allowed(source, target, name, part, asked)
            allowed |= {computed} if computed and not name.plane and allowed <= {*FLOATS} else set()
            if part.coded is None and part.stored.dtype not in allowed:
                given = _own(source, source.parts[name.origins[0]][0])
                odd[_what(given, part.stored.dtype, asked), given, part.stored.dtype][part.label] = None
    for (what, given, found), labels in odd.items():
        first, remedy = (
            next(iter(labels)),
            f"if that was wanted: --dtype {found}" if asked is None else f"--dtype {asked} was asked for",
        )
        yield Finding(what, "dtype", first, f"{given} -> {found} in {len(labels)} stored tensors; {remedy}")


def _allowed(source: Side, target: Side, name: Canonical, part: Part, asked: str | None) -> set[str]:
    """Return the types that a stored tensor may have. Rows with a type of their own keep it; so does f32, which holds a sum exactly."""
    own = {_own(source, origin) for each in name.origins for origin in source.parts[each]} if asked is None else {asked}
    if target.inventory.dialect.kind.one_type and asked is None and name.tensor.part in BY_PART:
        own = {str(value(target.inventory.config, "dtype")) if each in FLOATS else each for each in own}
    summed = name.tensor.part in source.inventory.less_one ^ target.inventory.less_one
    return own | ({part.entry.dtype} if part.entry.dtype else set()) | ({"f32"} if summed else set())


def _own(source: Side, origin: Part) -> str:
    """Return the type that a source has its numbers in; of codes, what its config calls the type of the model."""
    return origin.stored.dtype if origin.coded is None else str(source.inventory.config["dtype"])


def _what(given: str, found: str, asked: str | None) -> str:
    if asked is not None:
        return "not cast as asked"
    return (
        "stored wider than in the source" if BY_NAME[found].nbytes > BY_NAME[given].nbytes else "a cast that nobody asked for"
    )
