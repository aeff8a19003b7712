"""How far a command is: a bar on a terminal, nothing in a pipe."""

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from carnet.cli.talk import quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType

    from carnet.progress import Callback, Progress

WIDTH = len("examining")  # the longest name of a phase: the bar stays where it is


@contextmanager
def progress_bar(*, bytes_: bool = True, below: "Callable[[], Iterable[str]]" = tuple) -> "Iterator[Callback | None]":
    """Show how much is done, of bytes the rate too, and the time left on a terminal, and lines ``below``; nothing in a pipe.

    Yields what takes how far a verb is. What was done before the first amount counts for no rate.
    """
    if quiet() or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Shown(Bar):
        def get_renderables(self) -> "Iterator[RenderableType]":
            yield from super().get_renderables()
            yield from map(Text, below())

    amount = (DownloadColumn(), TransferSpeedColumn()) if bytes_ else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Shown(*columns, console=Console(stderr=True), transient=True) as bar:

        def show(at: "Progress") -> None:
            name = f"{at.phase:<{WIDTH}}"
            if not bar.tasks:
                bar.add_task(name)
            begins = bar.tasks[0].description != name
            bar.update(bar.task_ids[0], description=name, completed=at.done, total=at.total or None, refresh=begins)

        yield show
