"""The words that scripts say to Megatron's export: carnet's own, equal to those of ``megatron.core.export``.

So nothing here depends on whether a release of Megatron still has them. A member of Megatron's own enums is taken wherever one of
these is: by its name, a layer by its value.
"""

from enum import Enum


class Word(Enum):
    """A member that equals the one of Megatron's own enum of the same name: dictionaries of either are the same."""

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Enum) or type(other).__name__ != type(self).__name__:
            return NotImplemented
        return (other.name, other.value) == (self.name, self.value)

    def __hash__(self) -> int:
        return hash(self.name)  # as enums have it
