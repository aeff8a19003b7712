"""The command `carnet report`: a target, and what an examination finds of it, as one file of HTML."""

from typing import TYPE_CHECKING, Any, Unpack

import click

from carnet.cli.commands import Verb, main
from carnet.cli.options import Place, comparison_options, existing_file, existing_folder, json_option, said
from carnet.cli.progress import progress_bar
from carnet.cli.signing import search_options

if TYPE_CHECKING:
    from carnet.plans.typed import Verifying


@main.command(
    cls=Verb,
    epilog="carnet report out/llama -o llama.html\n"
    "carnet report out/llama-fp8 checkpoints/llama -o llama-fp8.html\n"
    "carnet report out/llama-bf16 checkpoints/llama --dtype bf16 -o llama-bf16.html",
)
@click.argument("out", type=existing_folder)
@click.argument("src", required=False, type=existing_folder)
@click.option("-o", "--output", required=True, type=Place(dir_okay=False), metavar="FILE", help="The file, HTML.")
@click.option("--plan", type=existing_file, help="The plan of the crossing, which says what was asked for.")
@search_options
@comparison_options
@json_option
@click.pass_context
def report(
    ctx: click.Context,
    /,
    out: str,
    src: str | None,
    output: str,
    at: tuple[tuple[str, str], ...],
    beside: tuple[str, ...],
    as_json: bool,
    **options: "Unpack[Verifying]",
) -> None:
    """Draw a target as one file of HTML that opens anywhere: where its bytes came from, what it holds, who wrote it.

    OUT alone is drawn as its carnet.json says. With SRC it is examined as `carnet verify SRC OUT` does, with the same options, and what
    codes lose and where it differs is drawn, too.
    """
    from carnet.cli.drawing import Sheet
    from carnet.errors import BadRequest
    from carnet.report.data import dump
    from carnet.report.gathering import of_target
    from carnet.report.page import DIFFERENT, page_data

    sheet = Sheet("output", output, out)
    given: Any = said(options)
    if src is None and given.keys() - {"memory", "threads"}:
        raise BadRequest("a target alone is drawn as its carnet says: no option changes that", remedy="name the source too")
    with progress_bar() as progress:
        page = of_target(out, src, at=dict(at), beside=beside, progress=progress, **given)
    sheet.write(page)
    if as_json:
        click.echo(dump(page_data(page)))
    ctx.exit(3 if page.state == DIFFERENT else 0)
