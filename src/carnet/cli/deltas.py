"""The commands of deltas: `carnet delta` and `carnet apply`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Unpack

import click

from carnet.cli.commands import Verb, main
from carnet.cli.options import Place, choice, existing_folder, json_option, options
from carnet.cli.progress import progress_bar
from carnet.cli.telling import print_lines, width

if TYPE_CHECKING:
    from carnet.deltas import Differing
    from carnet.plans.typed import Budget


@main.command(
    cls=Verb,
    epilog="carnet delta out/step-100 out/step-101 published/weight_v000001\n"
    "carnet delta checkpoints/llama/iter_0000100 checkpoints/llama/iter_0000101 published/weight_v000002 \\\n"
    "    --after published/weight_v000001 --dtype bf16",
)
@click.argument("a", type=existing_folder)
@click.argument("b", type=existing_folder)
@click.argument("out", type=Place())
@click.option("--version", metavar="TEXT", help="The version that B is.  [default: the next after the base version]")
@click.option(
    "--base-version", metavar="TEXT", help="The version that A is.  [default: as --after or A itself says, or 000000]"
)
@click.option("--after", type=existing_folder, help="The delta that leads to A; that it does is compared.")
@choice(
    "--checksum",
    known=("adler32", "xxh3-128"),
    help="Of each new tensor; ModelExpress takes adler32 alone, slime's own default is xxh3-128.  [default: adler32]",
)
@choice("--scope", known=("compressed_delta",), help="Have checksums be those of frames instead, which no engine above reads.")
@options(
    "dtype",
    "tokenizer",
    "config",
    "family",
    "vocab_size",
    "drop",
    "written_by",
    "tower",
    "accept",
    "memory",
    "threads",
    dtype="Cast the weights of both.  [default: as they are]",
    tokenizer="Folder whose tokenizer says the vocabulary.",
)
@json_option
def delta(a: str, b: str, out: str, as_json: bool, **options: "Unpack[Differing]") -> None:
    """Write what changed from version A of a model to B, as the folder that slime, miles and ModelExpress pull.

    A and B are checkpoints or targets in any layout that carnet reads. A Hugging Face folder counts as it is; what another layout holds
    is compared as `carnet cross --to hf` would write it. It needs `pip install 'carnet[delta]'`.
    """
    from carnet import deltas
    from carnet.report.data import dump
    from carnet.report.terminal import delta_lines

    with progress_bar() as progress:
        made = deltas.delta(a, b, out, progress=progress, **options)
    if as_json:
        click.echo(dump(asdict(made)))
    else:
        print_lines(delta_lines(made, width()))


@main.command(
    cls=Verb,
    epilog="carnet apply out/step-100 published/weight_v000001 out/step-101\n"
    "carnet apply base published/weight_v000001 published/weight_v000002 published/weight_v000003 out/step-103",
)
@click.argument("base", type=existing_folder)
@click.argument("deltas", metavar="DELTA...", nargs=-1, required=True, type=existing_folder)
@click.argument("out", type=Place())
@options("memory", "threads")
@json_option
def apply(base: str, deltas: tuple[str, ...], out: str, as_json: bool, **options: "Unpack[Budget]") -> None:
    """Write into OUT what the Hugging Face folder BASE becomes by one delta, or several in their order, bit for bit.

    A base or a step that is not the right one is refused by name; OUT appears only when every checksum and digest is right.
    """
    from carnet import deltas as verbs
    from carnet.report.data import dump
    from carnet.report.terminal import applied_lines

    with progress_bar() as progress:
        done = verbs.apply(base, deltas, out, progress=progress, **options)
    if as_json:
        click.echo(dump(asdict(done)))
    else:
        print_lines(applied_lines(done, width()))
