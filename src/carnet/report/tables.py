"""Rows of cells as lines of text: columns where they fit into the width, and else a paragraph a row.

No name is ever cut or broken, so that it can be copied, searched for and piped.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.cells import cell_len

from carnet.errors import folded, printable

GAP = "   "  # between columns
INDENT = "    "  # of what follows the first cell in a paragraph
LABEL = 18  # columns of the label of a fact
TIED = "\N{NO-BREAK SPACE}"  # between words that stay on one line


def table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int | None, right: Sequence[str] = ()) -> list[str]:
    """Return a head, a rule and a row a line; in a paragraph each where the width (None: endless) is too small for columns.

    Cells of the columns named in ``right`` end below each other. A cell that is empty takes no place in a paragraph.

    >>> rows = [["embed.weight", "256 x 64", "32.8 kB"], ["norm.weight", "64", "128 B"]]
    >>> print(*table(["name", "shape", "bytes"], rows, None, ["bytes"]), sep="\\n")
    name           shape        bytes
    ─────────────────────────────────
    embed.weight   256 x 64   32.8 kB
    norm.weight    64           128 B
    >>> print(*table(["name", "shape", "bytes"], rows, 32), sep="\\n")
    name
        shape  bytes
    ────────────────────────────────
    embed.weight
        256 x 64  32.8 kB
    norm.weight
        64  128 B
    """
    shown = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    across = sum(widths) + len(GAP) * (len(widths) - 1)
    if width is None or across <= width:
        ends = [title in right for title in head]
        first, *others = ([GAP.join(map(_padded, row, widths, ends)).rstrip()] for row in shown)
    else:
        across = width
        first, *others = ([*_paragraph(row, width)] for row in shown)
    return [*first, "─" * across, *(line for lines in others for line in lines)]


def _padded(cell: str, width: int, at_end: bool) -> str:
    filling = " " * (width - cell_len(cell))
    return filling + cell if at_end else cell + filling


def _paragraph(row: Sequence[str], width: int) -> Iterator[str]:
    """Yield the first cell, then the others in lines below it; only a cell that is longer than a line goes on in the next."""
    yield row[0]
    longest = width - len(INDENT)
    cells = "  ".join(cell.replace(" ", TIED) if len(cell) <= longest else cell for cell in row[1:] if cell)
    for line in folded(INDENT + cells, width, len(INDENT)) if cells else ():
        yield line.replace(TIED, " ")


def facts_in_lines(facts: Mapping[str, object], width: int | None) -> Iterator[str]:
    """Yield a line a fact; on a terminal one that is too long goes on below its value."""
    for label, value in facts.items():
        for line in folded(f"{label:<{LABEL}} {value}", width, LABEL + 1):
            yield printable(line.replace(TIED, " "))
