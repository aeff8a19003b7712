"""Where a target's tensors lie on this rank: made here, an engine's own, or those of a running module.

What does not travel is written here too: zeros where the target pads, scales, numbers that are known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from carnet.errors import BadRequest
from carnet.live import coding
from carnet.live.binding import CARNET, TORCH, Located
from carnet.live.moves import Spot, TargetIndex, Transfer, matrix_name
from carnet.steps import Fill, Make, Measure, Move, Place, Put, Same, Step, TargetTensor

Parts = Iterable[tuple[tuple[slice, ...], torch.Tensor]]  # where in a box, and where in memory


class Module:
    """The tensors of a running module, found as a source's are: by what they mean."""

    def __init__(self, located: Located) -> None:
        self._located = located
        self.held: dict[str, torch.Tensor] = {}  # none by name

    def find(self, move: Transfer) -> Parts:
        """Yield where the parts of a box go."""
        return self._located.find(move.tensor, move.box)

    def settle(self, _: Iterable[Step], __: Mapping[str, coding.Scale]) -> None:
        """Write zeros where the module pads its vocabulary."""
        for padding in self._located.padding:
            padding.zero_()


class Tensors:
    """Tensors by name, made when they are first asked for, unless they are given."""

    def __init__(
        self, wanted: Mapping[str, TargetTensor], index: TargetIndex, files: Sequence[str], device: torch.device
    ) -> None:
        self._wanted, self._index, self._files, self._device = wanted, index, frozenset(files), device
        self.held: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Name the tensors of this rank."""
        return list(self._wanted)

    def accept(self, given: Mapping[str, torch.Tensor], rank: int) -> None:
        """Take tensors to write into; raise BadRequest where one is not there, or not what the target needs."""
        for name, tensor in self._wanted.items():
            found = given.get(name)
            if (
                found is None
                or (found.dtype, tuple(found.shape)) != (TORCH[tensor.dtype], tensor.shape)
                or not found.is_contiguous()
            ):
                said = "nothing" if found is None else f"{CARNET.get(found.dtype, found.dtype)} {list(found.shape)}"
                facts = {"on": f"rank {rank}", "expected": f"{tensor.dtype} {list(tensor.shape)}, contiguous", "found": said}
                raise BadRequest(f"the tensor {name!r} to write into is not the target's", facts)
            self.held[name] = found.detach()

    def make(self) -> None:
        """Make all tensors of this rank that are not there yet."""
        self.held = {name: self._tensor(name) for name in self._wanted}

    def take(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors, and forget them: who takes them has them alone."""
        for name in names:
            yield name, self._tensor(name)
            del self.held[name]

    def find(self, move: Transfer) -> Parts:
        """Yield where a box goes."""
        yield (), _view(self._tensor(move.spot.name), move.spot, move.box.shape)

    def beside(self, steps: Iterable[Step]) -> dict[str, list[Step]]:
        """Return the steps that write what does not travel, by the name of the tensor, as far as this rank holds it."""
        found: dict[str, list[Step]] = {}
        for step in steps:
            place = step.encoding.scales if isinstance(step, Make) else step.target if isinstance(step, Fill | Put) else None
            if place is not None and place.file in self._files:
                found.setdefault(self._index.at(place).name, []).append(step)
        return found

    def settle(self, steps: Iterable[Step], scales: Mapping[str, coding.Scale]) -> None:
        """Write what does not travel."""
        known: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in steps:
            match step:
                case Fill():
                    for view in self._at(step.target, step.shape):
                        view.zero_()
                case Put():
                    known += [(v, coding.numbers(step, v.dtype)) for v in self._at(step.target, step.shape)]
                case Make():
                    stored = scales[matrix_name(step)].stored
                    known += [(v, torch.full((1, 1), stored, dtype=v.dtype)) for v in self._at(step.encoding.scales, (1, 1))]
                case Move() | Same() | Measure():
                    pass
        for dtype in {view.dtype for view, _ in known}:  # all of a type go to the device at once
            pairs = [(view, value.view(-1)) for view, value in known if view.dtype == dtype]
            sent, start = torch.cat([value for _, value in pairs]).to(self._device), 0
            for view, value in pairs:
                view.copy_(sent[start : (start := start + len(value))].view(view.shape))

    def _at(self, place: Place, shape: Sequence[int]) -> Iterator[torch.Tensor]:
        if place.file in self._files:
            spot = self._index.at(place)
            yield _view(self._tensor(spot.name), spot, shape)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.held:
            wanted = self._wanted[name]
            self.held[name] = torch.empty(wanted.shape, dtype=TORCH[wanted.dtype], device=self._device)
        return self.held[name]


def _view(tensor: torch.Tensor, spot: Spot, shape: Sequence[int]) -> torch.Tensor:
    return tensor.as_strided(shape, spot.strides, tensor.storage_offset() + spot.offset)
