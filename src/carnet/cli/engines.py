"""The command that tells what an engine must hold, and asks a running one."""

from typing import TYPE_CHECKING

import click

from carnet.cli.commands import Verb, main, refused
from carnet.cli.options import Place, choice, json_option, options
from carnet.cli.progress import progress_bar
from carnet.cli.talk import talk
from carnet.cli.telling import print_lines, width

if TYPE_CHECKING:
    from typing import Unpack

    from carnet.expecting import Expecting


def _header(said: str | tuple[str, str]) -> tuple[str, str]:
    """Read a header as curl takes it."""
    name, colon, value = said.partition(":") if isinstance(said, str) else (said[0], ":", said[1])
    if not (colon and name.strip() and name.isascii() and name.isprintable() and value.isprintable() and value.isascii()):
        raise click.BadParameter("write a header as 'NAME: VALUE'")
    return name.strip(), value.strip()


def _engines() -> list[str]:
    from carnet.engines.table import ENGINES

    return [*ENGINES]


@main.command(
    cls=Verb,
    epilog="carnet expect checkpoints/llama --engine vllm --tp 4 -o expected.json\n"
    "carnet expect checkpoints/llama --tp 4 --against http://localhost:8000\n"
    "carnet expect expected.json --against http://localhost:8000 --json",
)
@click.argument("ckpt", type=Place(exists=True))
@choice("--engine", known=("vllm", "sglang"), help="Whose names and hashes.  [default: vllm]")
@options(
    "tp",
    "pp",
    "ep",
    "dtype",
    tp="Ranks of the engine that share each layer.",
    pp="Its pipeline stages.",
    ep="Ranks that share the experts; they are among the tp.",
    dtype="What the engine casts the weights to.  [default: as they are]",
)
@click.option("-o", "--output", type=Place(dir_okay=False), help="Save the digests, as the engine's own comparison takes them.")
@click.option("--against", metavar="URL", help="Ask the engine that runs at this URL, and compare.")
@click.option("--timeout", type=click.FloatRange(1), default=600, show_default=True, help="Seconds that it may be silent.")
@click.option(
    "--header", type=_header, multiple=True, metavar="'NAME: VALUE'", help="Goes along with the question. May be repeated."
)
@options("config", "family", "vocab_size", "drop", "written_by", "accept", "engine_version", "memory", "threads")
@json_option
@click.pass_context
def expect(
    ctx: click.Context,
    /,
    ckpt: str,
    output: str | None,
    against: str | None,
    timeout: float,
    header: tuple[tuple[str, str], ...],
    as_json: bool,
    **options: "Unpack[Expecting]",
) -> None:
    """Tell the digest of every parameter on every rank of an engine that has loaded CKPT; ask a running one whether it holds that.

    No engine and no GPU is needed for the digests. CKPT is any checkpoint or target that carnet reads, or a file of `-o`.
    """
    from carnet import expecting
    from carnet.engines.expected import as_data, check_place, save
    from carnet.errors import BadRequest
    from carnet.plans.options import here
    from carnet.report.data import dump
    from carnet.report.engines import comparison_data, comparison_lines, expected_lines

    path = None if output is None else here("output", output, out=True)
    if path is not None:
        check_place(path)  # before hours of hashing
    with progress_bar() as progress:
        expected = expecting.expect(ckpt, progress=progress, **options)
    if path is not None:
        save(expected, path)
        talk(f"{len(expected.digests):,} digests saved to {output}")
    if against is None:
        if as_json:
            click.echo(dump(as_data(expected)))
        else:
            print_lines(expected_lines(expected, width()))
        return
    found = expecting.against(expected, against, timeout=timeout, headers=dict(header))
    if as_json:
        click.echo(dump(comparison_data(found)))
    else:
        print_lines(comparison_lines(found, width()))
    if not found.compared:
        remedy = "ask an engine that keeps weights as they are loaded: on a GPU, and not quantized"
        refused(BadRequest("nothing that the engine holds can be compared", {"asked": against}, remedy=remedy), as_json=False)
        ctx.exit(1)
    ctx.exit(0 if found else 3)
