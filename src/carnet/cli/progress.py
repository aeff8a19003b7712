"""How far a command is: a bar on a terminal, nothing in a pipe."""

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType

    from carnet.pool import Phase, Progress

WIDTH = len("examining")  # the longest name of a phase: the bar stays where it is


@contextmanager
def progress_bar(
    what: str, *, bytes_: bool = True, below: "Callable[[], Iterable[str]]" = tuple
) -> "Iterator[tuple[Progress | None, Phase]]":
    """Show how much is done, of bytes the rate too, and the time left on a terminal, and lines ``below``; nothing in a pipe.

    Yields what takes the amount done and that in all, and what takes the name of a phase. What was done before the first call
    counts for no rate.
    """
    if not sys.stderr.isatty():
        yield None, lambda name: None
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
        task = bar.add_task(f"{what:<{WIDTH}}", total=None)
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda name: bar.update(task, description=f"{name:<{WIDTH}}", refresh=True),
        )
