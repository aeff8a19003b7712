"""What carnet says when it stops: one base error, a few children by who must act.

An error names the thing that is wrong, lists the facts aligned, and ends with one way out::

    cannot cut axis 'kv' into 3 equal shards
      axis      kv = 8
      world     tp = 3
      try: use a tensor-parallel size that divides 8, or is a multiple of it
"""

import textwrap
from collections.abc import Iterable, Mapping

NO_MORE_FILES = "the machine opens no more files", "raise the limit of open files (ulimit -n)"  # what is wrong, and a way out
MADE_AGAIN = "copy it again, or have what made it write it again"  # a way out for who has a damaged file
MOST = 12  # obstacles that are told one by one, besides the first


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
        return "\n".join(lines(self))


def lines(error: CarnetError, width: int | None = None) -> list[str]:
    """Return what an error says, line by line; where a width is given, longer lines go on below where they began."""
    column = max([9, *(len(label) + 1 for label in error.facts)])
    facts = [f"  {label:<{column}} {value}" for label, value in error.facts.items()]
    heads = [
        (error.what, 2),
        *((fact, column + 3) for fact in facts),
        *([(f"  try: {error.remedy}", 7)] if error.remedy else []),
    ]
    return [printable(line) for text, indent in heads for line in folded(text, width, indent)]


def folded(text: str, width: int | None, indent: int) -> list[str]:
    """Return a line in pieces of at most a width, the later ones indented; what has no space is never cut.

    >>> folded("found     one and another and a third", 30, 10)
    ['found     one and another and', '          a third']
    """
    if width is None or len(text) <= width:
        return text.splitlines() or [""]
    first, rest = text[:indent], text[indent:]
    pieces = textwrap.wrap(rest, max(20, width - indent), break_long_words=False, break_on_hyphens=False) or [""]
    return [(first if at == 0 else " " * indent) + piece for at, piece in enumerate(pieces)]


class Obstacles:
    """What stands in a person's way, gathered so that nobody meets one after the other: the first counts, the others stand in it.

    >>> found = Obstacles()
    >>> with found:
    ...     raise CarnetError("the file is too short", {"where": "a.bin"})
    >>> with found:
    ...     raise CarnetError("the config sets 'a', which carnet does not know", {"found": 3}, remedy="--accept a")
    >>> found.stop()
    Traceback (most recent call last):
    carnet.errors.CarnetError: the file is too short
      where     a.bin
      also      the config sets 'a', which carnet does not know: 3; try: --accept a
    """

    def __init__(self, errors: Iterable[CarnetError] = ()) -> None:
        self.errors = list(errors)

    def __enter__(self) -> None:
        """Go on after what is refused within."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, CarnetError):
            self.errors.append(error)
        return isinstance(error, CarnetError)

    def stop(self) -> None:
        """Raise the first of them, if there is any, with a line for each of the others."""
        if not self.errors:
            return
        first, *others = self.errors
        said = [line for line in dict.fromkeys(map(_in_a_line, others)) if line != _in_a_line(first)]
        first.facts |= {f"also {at}" if at > 1 else "also": line for at, line in enumerate(said[:MOST], 1)}
        first.facts |= {"and": f"{len(said) - MOST} more"} if len(said) > MOST else {}
        raise first


def _in_a_line(error: CarnetError) -> str:
    found = f": {error.facts['found']}" if "found" in error.facts else ""
    further = [str(line) for label, line in error.facts.items() if label.split()[0] == "also"]
    return "; also ".join([f"{error.what}{found}" + (f"; try: {error.remedy}" if error.remedy else ""), *further])


def printable(text: str) -> str:
    """Return a text as it may go to a terminal: what would steer it, or begin a line, is escaped.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    return text if text.isprintable() else ascii(text)[1:-1]


def shown(text: str) -> str:
    """Return a text from a file as it may go to a terminal: one line, printable, not endless.

    >>> shown("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    clean = printable(text)
    return clean if len(clean) <= 200 else clean[:197] + "..."


class BadCheckpoint(CarnetError):
    """The bytes of a checkpoint are damaged, incomplete or hostile: its producer must act."""


class BadRequest(CarnetError):
    """What was asked for cannot be: the person at the terminal must act."""


class BadOption(BadRequest):
    """An option has a name or a value that it can never have, whatever the checkpoint: a usage error."""


class NotSupported(CarnetError):
    """The request makes sense and carnet cannot do it: carnet's authors must act."""


class MachineFailed(CarnetError):
    """The machine refused: a full disk, a vanished file, a missing permission."""
