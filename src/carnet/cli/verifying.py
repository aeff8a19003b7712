"""The command `carnet verify`: a target with its source, with its own document, or what a delta makes with a version."""

from typing import TYPE_CHECKING, Unpack

import click

from carnet.cli.commands import Verb, main
from carnet.cli.options import (
    against_option,
    checkpoint,
    comparison_options,
    existing_file,
    existing_folder,
    json_option,
    said,
)
from carnet.cli.progress import progress_bar
from carnet.cli.telling import tell

if TYPE_CHECKING:
    from carnet.plans.request import Verifying


@main.command(
    cls=Verb,
    epilog="carnet verify checkpoints/llama out/llama-bf16 --dtype bf16\n"
    "carnet verify checkpoints/llama out/llama --plan llama.plan\ncarnet verify out/llama\n"
    "carnet verify out/step-100 published/weight_v000101 --against out/step-101",
)
@checkpoint
@click.argument("out", required=False, type=existing_folder)
@click.option("--plan", type=existing_file, help="The plan of the crossing, which says what was asked for.")
@against_option
@comparison_options
@click.option("--seal", is_flag=True, help="Write carnet.json into a target that is equal, whoever wrote it.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context, /, ckpt: str, out: str | None, against: str | None, as_json: bool, **options: "Unpack[Verifying]"
) -> None:
    """Compare a target with its source, as options or a plan say it was asked for; or, alone, with its own carnet.json."""
    from carnet import api, deltas

    with progress_bar("examining") as (progress, _):
        if against is None:
            verdict = api.verify(ckpt, out, progress=progress, **options)
        else:
            verdict = deltas.verify(ckpt, [out] if out else [], against=against, progress=progress, **said(options))
    tell(ctx, verdict, as_json=as_json)
