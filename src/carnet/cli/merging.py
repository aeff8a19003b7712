"""The command `carnet merge`, and the options that `carnet verify` shares with it."""

from typing import TYPE_CHECKING, Unpack

import click

from carnet.cli.commands import Verb, main
from carnet.cli.options import Grouped, Place, choice, crossing_options, existing_folder, json_option, threads_option, together
from carnet.cli.progress import progress_bar
from carnet.cli.telling import tell

if TYPE_CHECKING:
    from carnet.plans.typed import Options

SUM = "Sum"


def numbers(value: str | tuple[float, ...]) -> tuple[float, ...]:
    """Read several numbers as a person writes them."""
    try:
        return tuple(map(float, value.split(","))) if isinstance(value, str) else value
    except ValueError:
        raise click.BadParameter(f"{value!r} are no weights; write 0.5,0.3,0.2") from None


sum_options = together(
    click.option(
        "--weights",
        type=numbers,
        metavar="X,Y,...",
        cls=Grouped,
        group=SUM,
        help="One for each CKPT, in their order, taken as they are; for task_arithmetic one for each but the base.",
    ),
    choice(
        "--method",
        known=("linear", "task_arithmetic"),
        group=SUM,
        help="A weighted sum, or the first CKPT as a base and what the others differ from it.  [default: linear]",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="PATTERN",
        cls=Grouped,
        group=SUM,
        help="Take the tensors with names like this, carnet's own or stored ones, from the first CKPT alone. May be repeated.",
    ),
)


@main.command(
    cls=Verb,
    epilog="carnet merge runs/a runs/b runs/c out/soup --weights 0.5,0.3,0.2\n"
    "carnet merge base tuned out/stronger --method task_arithmetic --weights 1.4 --to megatron --tp 2\n"
    "carnet merge runs/a runs/b out/average --weights 0.5,0.5 --keep '*norm*' --dtype bf16",
)
@click.argument("ckpts", metavar="CKPT CKPT...", nargs=-1, required=True, type=existing_folder)
@click.argument("out", type=Place())
@sum_options
@crossing_options
@threads_option
@json_option
@click.pass_context
def merge(
    ctx: click.Context,
    /,
    ckpts: tuple[str, ...],
    out: str,
    as_json: bool,
    weights: tuple[float, ...] | None = None,
    method: str = "linear",
    keep: tuple[str, ...] = (),
    **options: "Unpack[Options]",
) -> None:
    """Write the sum of several checkpoints of one model, in any layouts, and prove it. OUT appears only then.

    Sums are in f32, in the order of the checkpoints, and rounded once, to the type of the first or to --dtype. All that is no weight
    comes from the first. --to is hf where nothing else is said.
    """
    from carnet import merging

    if weights is None:
        raise click.UsageError("how much of each? --weights 0.5,0.5", ctx)
    with progress_bar() as progress:
        verdict = merging.merge(ckpts, out, weights, method=method, keep=keep, progress=progress, **options)
    tell(ctx, verdict, as_json=as_json)
