"""What commands print: lines as wide as the terminal, and a verdict with the exit code that says it."""

import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from carnet.examiner.verdict import Verdict


def tell(ctx: click.Context, verdict: "Verdict", *, as_json: bool) -> NoReturn:
    """Print a verdict, and end with the exit code that says it."""
    from carnet.report.data import dump, verdict_data
    from carnet.report.terminal import verdict_lines

    if as_json:
        click.echo(dump(verdict_data(verdict)))
    else:
        print_lines(verdict_lines(verdict, width()))
    ctx.exit(0 if verdict.equal else 3)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines."""
    click.echo("\n".join(lines))


def width() -> int | None:
    """Return the columns of the terminal; None for a pipe, which has a line a row."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
