"""Where a target's tensors lie on this rank: made here, an engine's own, or those of a running module.

What does not travel is written here too: zeros where the target pads, scales, numbers that are known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from carnet.errors import BadRequest
from carnet.live.binding import CARNET, TORCH, Located
from carnet.live.encoding import Coder, numbers
from carnet.live.moves import Spot, TargetIndex, Transfer, matrix_name
from carnet.quantize.recipes import BY_NAME, WHOLE
from carnet.steps import Fill, Make, Measure, Move, Place, Product, Put, Same, Step, TargetTensor

Parts = Iterable[tuple[tuple[slice, ...], torch.Tensor]]  # where in a box, and where in memory


class Module:
    """The tensors of a running module, found as a source's are: by what they mean."""

    def __init__(self, located: Located) -> None:
        self._located = located
        self.held: dict[str, torch.Tensor] = {}  # none by name

    def find(self, move: Transfer) -> Parts:
        """Yield where the parts of a box go."""
        return self._located.find(move.tensor, move.box)

    def settle(self, _: Iterable[Step], __: Coder) -> None:
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
        yield (), _view(self._tensor(move.spot.name), move.spot)

    def beside(self, steps: Iterable[Step]) -> dict[str, list[Step]]:
        """Return the steps that write what does not travel, by the name of the tensor, as far as this rank holds it."""
        found: dict[str, list[Step]] = {}
        for step in steps:
            place = _alone(step) if isinstance(step, Make) else step.target if isinstance(step, Fill | Put) else None
            if place is not None and place.file in self._files:
                found.setdefault(self._index.at(place, ()).name, []).append(step)
        return found

    def settle(self, steps: Iterable[Step], coder: Coder) -> None:
        """Write what does not travel."""
        known: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in steps:
            match step:
                case Fill():
                    for view in self._at(step.target, step.shape):
                        view.zero_()
                case Put():
                    known += [(v, numbers(step, v.dtype)) for v in self._at(step.target, step.shape)]
                case Make() if (place := _alone(step)) is not None:
                    stored = coder.stored[matrix_name(step)]
                    known += [(v, torch.full((1, 1), stored, dtype=v.dtype)) for v in self._at(place, (1, 1))]
                case Make() | Move() | Product() | Same() | Measure():
                    pass
        for dtype in {view.dtype for view, _ in known}:  # all of a type go to the device at once
            pairs = [(view, value.view(-1)) for view, value in known if view.dtype == dtype]
            sent = torch.split_with_sizes(torch.cat([value for _, value in pairs]).to(self._device), [len(v) for _, v in pairs])
            shaped = [each.view(view.shape) for each, (view, _) in zip(sent, pairs, strict=True)]
            torch._foreach_copy_([view for view, _ in pairs], shaped)  # one launch for all of them

    def _at(self, place: Place, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        if place.file in self._files:
            spot = self._index.at(place, shape)
            yield _view(self._tensor(spot.name), spot)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.held:
            wanted = self._wanted[name]
            self.held[name] = torch.empty(wanted.shape, dtype=TORCH[wanted.dtype], device=self._device)
        return self.held[name]


def _alone(step: Make) -> Place | None:
    """Return where the scale of a whole matrix goes, which is written on its own; None where only blocks have some."""
    return step.encoding.scales if BY_NAME[step.encoding.recipe].block == WHOLE else step.encoding.outer


def _view(tensor: torch.Tensor, spot: Spot) -> torch.Tensor:
    return tensor.as_strided(spot.shape, spot.strides, tensor.storage_offset() + spot.offset)
