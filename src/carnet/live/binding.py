"""The tensors that a rank really holds, tied to what its place in the grid says that it holds.

Here the names of the running module count, whichever spelling it has: fused norms or not, experts one by one or grouped. What the
module lacks, has too much, or has in another shape or type stops the crossing on all ranks.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from carnet.algebra.box import Box, intersect, uncovered
from carnet.algebra.layout import View
from carnet.dialects.entries import entries
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.units import Unit
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.live.virtual import MODULES
from carnet.model.fields import Config

if TYPE_CHECKING:
    from carnet.dialects.entry import Entry

TORCH = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8_e4m3": torch.float8_e4m3fn,
    "u8": torch.uint8,
    "i64": torch.int64,
}
CARNET = {dtype: name for name, dtype in TORCH.items()}

WRAPPERS = ("module.", "model.")
State = Mapping[str, Any] | torch.nn.Module
Held = tuple[Box, torch.Tensor]  # a box of a canonical tensor, and a view of memory with its axes


def tensors_of(state: State) -> dict[str, Any]:
    """Return the tensors and states of a module or a state dict, under the names that a bare model has."""
    found: object = state.state_dict(keep_vars=True) if isinstance(state, torch.nn.Module) else state
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise BadRequest("a state is a module or a state dict", {"found": type(state).__name__})
    return _bare(found)


def _bare(found: Mapping[str, Any]) -> dict[str, Any]:
    """Take away what wrappers put before every name, however many there are."""
    prefix = next((word for word in WRAPPERS if found and all(name.startswith(word) for name in found)), None)
    return dict(found) if prefix is None else _bare({name.removeprefix(prefix): value for name, value in found.items()})


def chunks_of(states: object) -> list[State]:
    """Return the states of a rank: one, or one for each virtual chunk."""
    if states is None:
        return []
    return list(states) if isinstance(states, list | tuple | torch.nn.ModuleList) else [states]  # type: ignore[list-item]


class Watch:
    """Whether the memory of a rank's tensors is still where it was: looked at before every run, so it must be quick.

    What was looked at is kept alive by whoever holds views of it: another tensor cannot have come to the same place.
    """

    def __init__(self, states: object) -> None:
        self._chunks = [(chunk, _tables_of(chunk)) for chunk in chunks_of(states)]
        self._places = [_places(tables) for _, tables in self._chunks]
        self._slots = [
            (table, name, value, value.data_ptr())
            for _, tables in self._chunks
            for table in tables
            for name, value in table.items()
            if isinstance(value, torch.Tensor) and value.layout == torch.strided
        ]

    def same(self, states: object) -> bool:
        """Say whether these are the same tensors at the same places, whatever table they stand in."""
        chunks = chunks_of(states)
        if len(chunks) != len(self._chunks):
            return False
        if all(now is chunk for now, (chunk, _) in zip(chunks, self._chunks, strict=True)):
            # shapes and strides stay with a tensor: the place alone may have changed
            return all(value.data_ptr() == at and table.get(name) is value for table, name, value, at in self._slots)
        return [_places(_tables_of(chunk)) for chunk in chunks] == self._places


def _places(tables: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (name, value.data_ptr(), value.dtype, value.shape, value.stride())
        for table in tables
        for name, value in table.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided
    ]


def _tables_of(chunk: State) -> list[Mapping[str, Any]]:
    return list(_tables(chunk)) if isinstance(chunk, torch.nn.Module) else [chunk]


def _tables(module: torch.nn.Module) -> Iterator[Mapping[str, Any]]:
    """Yield the tables in which modules keep their tensors: torch has no other that is as quick to look into."""
    for each in module.modules():
        yield each._parameters  # noqa: SLF001
        yield each._buffers  # noqa: SLF001


class Located:
    """Where boxes of canonical tensors lie in the memory of a rank."""

    def __init__(self) -> None:
        self._held: dict[str, list[Held]] = defaultdict(list)
        self.padding: list[torch.Tensor] = []  # views of what holds no weight
        self.entries: dict[tuple[str, str], Entry] = {}  # what the running module calls its tensors

    def add(self, tensor: str, box: Box, view: torch.Tensor) -> None:
        """Note that a box lies somewhere."""
        self._held[tensor].append((box, view))

    def lacks(self, tensor: str, box: Box) -> Box | None:
        """Return a part of a box that lies nowhere."""
        return uncovered(
            box, [shared for held, _ in self._held.get(tensor, ()) if (shared := intersect(held, box)) is not None]
        )

    def find(self, tensor: str, box: Box) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """Yield the parts of a box, each with its view of memory; together they are the box, of which a rank may hold copies."""
        for held, view in self._held[tensor]:
            shared = intersect(held, box)
            if shared is not None:
                yield _inside(shared, box), view[_inside(shared, held)]


def _inside(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(low - at, low - at + size) for low, at, size in zip(box.start, outer.start, box.shape, strict=True))


def bind(located: Located, unit: Unit, config: Config, dtypes: Mapping[str, str], state: State, rank: int) -> None:
    """Note where everything lies that a unit must hold.

    ``dtypes``: canonical tensor -> element type. Raises CarnetError where the state is not the one that was described.
    """
    held = {name: value for name, value in tensors_of(state).items() if isinstance(value, torch.Tensor) and _is_weight(name)}
    where = {"where": f"rank {rank}", "share": unit.name}
    present = {(unit.name, name) for name in held}
    named = {entry.name: entry for entry in entries(MODULES, config, present, among=[unit])}
    unknown = sorted(held.keys() - named.keys())
    if unknown:
        facts = {**where, "tensor": unknown[0], "in all": len(unknown)}
        raise NotSupported("the running model holds a tensor that carnet does not know", facts)
    located.entries |= {(unit.name, name): entry for name, entry in named.items()}
    for name, entry in named.items():
        tensor = held[name].detach()
        if not _is_plain(tensor) or (tuple(tensor.shape) == entry.stored != entry.shape and not tensor.is_contiguous()):
            kind = f"{type(tensor).__name__} on {tensor.device}, {tensor.layout}, strides {_strides(tensor)}"
            raise NotSupported(f"{name!r} is not a tensor whose memory can be handed on", {**where, "found": kind})
        if tuple(tensor.shape) != entry.stored:
            facts = {**where, "expected": list(entry.stored), "found": list(tensor.shape)}
            raise BadCheckpoint(f"the shape of {name!r} is not the one that the config and the grid say", facts)
        for view in entry.views:
            wanted = dtypes.get(view.tensor)
            if wanted is not None and tensor.dtype != TORCH.get(wanted):
                facts = {**where, "expected": wanted, "found": CARNET.get(tensor.dtype, str(tensor.dtype))}
                remedy = 'say so on every rank: dtypes={"*router.weight": "f32"}'
                raise BadRequest(f"the element type of {name!r} is not the config's", facts, remedy=remedy)
            located.add(view.tensor, view.box, strided(tensor, entry.shape, view))
        for box in entry.padding:
            located.padding.append(
                tensor[tuple(slice(low, low + size) for low, size in zip(box.start, box.shape, strict=True))]
            )
    for entry in entries(MODULES, config, None, "te", [unit]):
        for view in entry.views:
            hole = located.lacks(view.tensor, view.box)
            if hole is not None:
                facts = {
                    **where,
                    "looked for": entry.name,
                    "missing part": f"start {list(hole.start)}, shape {list(hole.shape)}",
                }
                raise BadCheckpoint(f"the running model lacks {view.tensor!r}", facts)


def _is_weight(name: str) -> bool:
    return not any(fnmatchcase(name, pattern) for pattern in MEGATRON.dropped)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is memory and no more: no part of a distributed one, nothing that computes what it shows."""
    computes = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return tensor.layout == torch.strided and not tensor.is_meta and not computes


def _strides(tensor: torch.Tensor) -> list[int]:
    return list(tensor.stride()) if tensor.layout == torch.strided else []


def strided(tensor: torch.Tensor, shape: Sequence[int], view: View) -> torch.Tensor:
    """Return a view of a stored tensor with the axes of a canonical one."""
    seen = tensor if tuple(tensor.shape) == tuple(shape) else tensor.view(*shape)
    steps = seen.stride()
    first = seen.storage_offset() + sum(start * step for start, step in zip(view.origin, steps, strict=True))
    strides = [stride * steps[dim] if stride else 0 for dim, stride in view.places]
    return seen.as_strided(view.box.shape, strides, first)
