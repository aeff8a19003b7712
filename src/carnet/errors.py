"""What carnet says when it stops: one base error, a few children by who must act.

An error names the thing that is wrong, lists the facts aligned, and ends with one way out::

    cannot cut axis 'kv' into 3 equal shards
      axis      kv = 8
      world     tp = 3
      try: use a tensor-parallel size that divides 8, or is a multiple of it
"""

from collections.abc import Mapping


class CarnetError(Exception):
    """Stop a crossing for a reason that a person can act on.

    >>> print(CarnetError("the file is too short", {"where": "a.bin", "found": "3 bytes"}, remedy="copy it again"))
    the file is too short
      where     a.bin
      found     3 bytes
      try: copy it again
    """

    def __init__(self, what: str, facts: Mapping[str, object] | None = None, *, remedy: str | None = None) -> None:
        self.what = what  # one line, no full stop: what is wrong, with the name of the thing
        self.facts = dict(facts or {})  # label -> value, shown aligned in this order
        self.remedy = remedy  # one way out, or None where there is none
        super().__init__(what)

    def __str__(self) -> str:
        width = max([9, *(len(label) + 1 for label in self.facts)])
        lines = [self.what, *(f"  {label:<{width}} {value}" for label, value in self.facts.items())]
        if self.remedy is not None:
            lines.append(f"  try: {self.remedy}")
        return "\n".join(lines)


class BadCheckpoint(CarnetError):
    """The bytes of a checkpoint are damaged, incomplete or hostile: its producer must act."""


class BadRequest(CarnetError):
    """What was asked for cannot be: the person at the terminal must act."""


class NotSupported(CarnetError):
    """The request makes sense and carnet cannot do it: carnet's authors must act."""


class MachineFailed(CarnetError):
    """The machine refused: a full disk, a vanished file, a missing permission."""
