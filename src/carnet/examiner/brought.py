"""Whose scales stand beside a module of the source, told a second time: by what its row says, not by the views that a plan goes by."""

from collections.abc import Iterator

from carnet.dialects.entry import Entry
from carnet.inventory.source_scales import Which


def by_rows(entry: Entry, at: tuple[int, ...]) -> Iterator[Which]:
    """Yield the canonical tensors, or single experts of them, that a scale at a place of a stored weight is about.

    ``at`` has an index for the layer and one for the expert, where the weights of several share a name.
    """
    row = entry.reading
    place = dict(zip((dim[0] for dim in row.pattern.dims if dim in (("layer",), ("expert",))), at, strict=False))
    experts = row.shares.get("expert")
    for name in row.tensors[place.get("layer", 0)]:
        yield name, "input"
        if not name.tensor.each_expert or experts is None:
            yield name, "weight"
            continue
        first, last = experts.start, min(experts.stop, experts.size)
        if "expert" in place:
            first, last = first + place["expert"], first + place["expert"] + 1
        for expert in range(first, last):
            yield f"{name}[{expert}]", "weight"
