"""What a person hears beside the output: lines on stderr, which --quiet leaves out, and a log of JSON lines."""

import click

from carnet.cli.options import Grouped, Place

QUIET = "carnet.quiet"  # in what click's contexts share
GROUP = "Talk"


def quiet() -> bool:
    """Say whether a person wants to hear of errors alone."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and QUIET in ctx.meta


def talk(text: str) -> None:
    """Say something that is neither output nor an error."""
    if not quiet():
        click.echo(f"carnet: {text}", err=True)


def _hush(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[QUIET] = True


def _log(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None and not ctx.resilient_parsing:  # a shell that completes starts nothing
        from carnet.cli.logfile import logged

        ctx.with_resource(logged(value))


# of every command; none is handed on to it
TALK = (
    Grouped(
        ["--log"],
        group=GROUP,
        type=Place(dir_okay=False),
        metavar="FILE",
        callback=_log,
        is_eager=True,
        expose_value=False,
        help="Append what happens to this file: start, phases and end, a line of JSON each.",
    ),
    Grouped(
        ["-q", "--quiet"],
        group=GROUP,
        is_flag=True,
        callback=_hush,
        is_eager=True,
        expose_value=False,
        help="Say nothing on stderr but errors.",
    ),
)
