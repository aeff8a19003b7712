"""Reports of what a command found: where one is written is looked at before anything is done, and it is drawn when all is."""

from typing import TYPE_CHECKING, Any

import click

from carnet.cli.options import Place
from carnet.cli.talk import talk

if TYPE_CHECKING:
    from pathlib import Path

    from carnet.api import Inspection
    from carnet.examiner.verdict import Verdict
    from carnet.progress import Callback
    from carnet.report.page import Page
    from carnet.report.running import Run

report_option = click.option(
    "--report", type=Place(dir_okay=False), metavar="FILE", help="Draw it, with how the run went, as one file of HTML."
)
html_option = click.option("--html", type=Place(dir_okay=False), metavar="FILE", help="Draw it as one file of HTML.")


class Sheet:
    """The file that a report goes to; where none was asked for everything is as it was."""

    def __init__(self, option: str, file: str | None, out: str | None = None) -> None:
        """Refuse a place that cannot be written to, and a machine that cannot draw."""
        self.path: Path | None = None
        self.run: Run | None = None
        if file is None:
            return
        from carnet.plans.options import here
        from carnet.report import html

        self.path = here(option, file, out=True)
        html.check(self.path, out)

    def watched(self, listener: "Callback | None") -> "Callback | None":
        """Return who is told how far a run is: the one who shows it, and where it is drawn who keeps its course."""
        if self.path is None:
            return listener
        from carnet.report.running import Run

        self.run = Run(listener)
        return self.run

    def crossed(self, ckpt: str, out: str, verdict: "Verdict", options: Any) -> None:  # noqa: ANN401  those of a crossing
        """Draw a crossing."""
        if self.path is not None:
            from carnet.report.gathering import of_target

            self.write(of_target(out, ckpt, verdict=verdict, run=self.run, **options))

    def inspected(self, found: "Inspection") -> None:
        """Draw a checkpoint."""
        if self.path is not None:
            from carnet.report.gathering import of_checkpoint

            self.write(of_checkpoint(found))

    def write(self, page: "Page") -> None:
        """Write a report, and say so."""
        from carnet.report import html

        if self.path is not None:
            html.write(page, self.path)
            talk(f"report written to {self.path}")
