"""What a sum of checkpoints is made of: the first of them knows the others, and how they are added to it."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carnet.inventory.survey import Inventory

LINEAR, DIFFERENCES = METHODS = "linear", "task_arithmetic"  # mergekit's names


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """How a checkpoint is summed with others, in their order."""

    others: tuple["Inventory", ...]
    factors: tuple[float, ...]  # f32, of each, the first among them; of differences the first has none, and a 1 in its place
    method: str  # one of METHODS
    keep: tuple[str, ...] = ()  # patterns of what is the first's alone, by any of its names

    @property
    def differences(self) -> bool:
        """Say whether the others count by what they differ from the first."""
        return self.method == DIFFERENCES

    def kept(self, named: Iterable[tuple[str, str]]) -> frozenset[str]:
        """Return the canonical tensors that are the first's alone, of pairs of such a name and a stored one."""
        names: dict[str, bool] = {}
        found = set[str]()
        for canonical, stored in named:
            for name in (canonical, stored):
                if name not in names:
                    names[name] = any(fnmatchcase(name, pattern) for pattern in self.keep)
                if names[name]:
                    found.add(str(canonical))
        return frozenset(found)


def named(of: "Inventory") -> Iterable[tuple[str, str]]:
    """Yield every canonical tensor of a checkpoint with each stored one that has a part of it."""
    for (_, name), entry in of.entries.items():
        for names in entry.reading.tensors:
            for canonical in names:
                yield canonical, name
