"""`carnet cross --on`: a crossing on the machines of a cluster, with a line for each of them."""

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import click

from carnet.cli.progress import progress_bar
from carnet.cli.talk import quiet
from carnet.cli.telling import width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from carnet.cli.drawing import Sheet
    from carnet.examiner.verdict import Verdict
    from carnet.plans.typed import Options


def cross_on(on: str, ckpt: str, out: str, options: "Options", sheet: "Sheet") -> "Verdict":
    """Cross on the machines of a cluster, and say on stderr which has done what."""
    from carnet import fleet
    from carnet.report.terminal import node_lines

    seen = list[fleet.Node]()

    def told(nodes: "Sequence[fleet.Node]") -> None:
        seen[:] = nodes

    def lines() -> list[str]:
        return node_lines(seen, width()) if seen else []

    try:
        # Ray prints to stdout when a worker is lost
        with progress_bar(below=lines) as progress, redirect_stdout(sys.stderr):
            return fleet.cross(ckpt, out, on=on, progress=sheet.watched(progress), nodes=told, **options)
    finally:
        for line in lines() if not quiet() else ():
            click.echo(line, err=True)
