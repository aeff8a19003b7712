"""Adapters that are merged: their matrices are assembled in memory, as f32, by moves like any others, and named by what they change."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from carnet.algebra.box import whole
from carnet.dialects.entry import Entry
from carnet.dtypes import FLOATS
from carnet.errors import CarnetError, NotSupported
from carnet.formats.stored import dense_strides
from carnet.inventory.changed import Changes
from carnet.planner.decoding import begun
from carnet.planner.held import Held
from carnet.planner.pieces import Piece, cut
from carnet.plans.columns import Gathered, Steps
from carnet.steps import NO_FACTORS, Make, Move, Place, TargetFile, TargetTensor, Update


def factors_of(changes: Changes, kept: Mapping[str, Held], gathered: Gathered) -> tuple[TargetFile, tuple[Update, ...]]:
    """Return the space of the factors and what they change, and gather the steps that assemble them."""
    tensors, at, file = list[TargetTensor](), 0, gathered.name(NO_FACTORS.name)
    for name, shape in changes.factors.items():
        tensors.append(TargetTensor(name, "f32", shape, at))
        target = Piece("", whole(shape), Place("", 0, dense_strides(shape), "f32", "factors"))
        held = kept[name]
        for piece, (source, *_, source_at, _, _, _) in zip(held.cut.pieces, held.spots, strict=True):
            if piece.encoding is not None or piece.place.dtype not in FLOATS:
                raise NotSupported(f"{name!r} of an adapter is no tensor of numbers", {"found": piece.place.dtype})
            place = cut(target, piece.box)
            form = gathered.form(Move("", (), piece.box.shape, begun(piece.place), begun(place)))
            ids = form, gathered.name(name), gathered.start(piece.box.start), gathered.more(()), source, file, -1, -1
            gathered.row((*ids, source_at + piece.place.offset, at + place.offset, 0, 0, 0))
        at += 4 * prod(shape)
    updates = [
        Update(name, each.a, each.b, each.scale, own, name.tensor.outputs - own, each.magnitude or "")
        for name, each in changes.of.items()
        for own in [name.tensor.each_expert]
    ]
    return TargetFile(NO_FACTORS.name, at, tuple(tensors), {}, "factors"), tuple(updates)


def check_computed(changes: Changes, wanted: Iterable[Entry], to: str) -> None:
    """Refuse a target that computes a tensor of a weight that adapters change."""
    for name in {name for entry in wanted for name in entry.names if name.tensor.function}:
        changed = next((origin for origin in name.origins if origin in changes.of), None)
        if changed is not None:
            facts = {"tensor": name, "computed of": changed}
            remedy = f"--to hf first, then --to {to} from there"
            raise NotSupported(f"{to} holds a tensor that is computed of a weight with an adapter", facts, remedy=remedy)


def prove_updates(factors: TargetFile, updates: Sequence[Update], steps: Steps, *, whole: bool = True) -> None:
    """Raise where a factor is of no weight or does not fit it, a weight is changed twice or, of a ``whole`` plan, not written."""
    shapes = {tensor.name: tensor.shape for tensor in factors.tensors}
    named = [name for each in updates for name in (each.a, each.b, each.magnitude) if name]
    left = next(iter({*shapes} ^ {*named}), None)
    if left is not None or len({each.tensor for each in updates}) != len(updates) or len(shapes) != len(factors.tensors):
        raise CarnetError("the plan does not use every matrix of an adapter for one weight", {"tensor": left or ""})
    known = {name: number for number, name in enumerate(steps.names)}
    reaches = _reaches(steps)
    for each in updates:
        own = int(each.experts)
        a, b, axes = shapes[each.a], shapes[each.b], reaches.get(known.get(each.tensor, -1), ())
        if not (axes or whole):
            continue
        last = own + each.outputs
        wanted = (*axes[:last], *b[-1:]), (*axes[:own], *b[-1:], *axes[last:]), axes[:last]
        found = b, a, shapes[each.magnitude] if each.magnitude else axes[:last]
        if not each.outputs or len(axes) <= last or found != wanted:
            facts = {"tensor": each.tensor, "shape": list(axes), "a": list(a), "b": list(b)}
            raise CarnetError("an adapter of the plan does not fit the weight that it changes", facts)


def _reaches(steps: Steps) -> dict[int, tuple[int, ...]]:
    """Return for each tensor that steps write, by the number of its name, one past its last index along each axis."""
    rows, found = steps.rows, dict[int, tuple[int, ...]]()
    columns = (rows[each].tolist() for each in ("tensor", "form", "start"))
    for tensor, form, start in {*zip(*columns, strict=True)}:
        step = steps.forms[form]
        if isinstance(step, Move) or (isinstance(step, Make) and step.function == "dequantize"):
            ends = tuple(first + length for first, length in zip(steps.starts[start], step.shape, strict=True))
            found[tensor] = tuple(map(max, found.get(tensor, ends), ends))
    return found
