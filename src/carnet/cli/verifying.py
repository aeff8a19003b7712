"""The command `carnet verify`: a target with its source, with its own document, or what a delta makes with a version."""

from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import click

from carnet.cli.commands import Verb, main
from carnet.cli.merging import sum_options
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
from carnet.cli.signing import trust_options, trusted
from carnet.cli.telling import tell

if TYPE_CHECKING:
    from carnet.plans.typed import Verifying


@main.command(
    cls=Verb,
    epilog="carnet verify checkpoints/llama out/llama-bf16 --dtype bf16\n"
    "carnet verify checkpoints/llama out/llama --plan llama.plan\ncarnet verify out/llama\n"
    "carnet verify out/step-100 published/weight_v000101 --against out/step-101\n"
    "carnet verify runs/a runs/b out/average --weights 0.5,0.5",
)
@checkpoint
@click.argument("out", required=False, type=existing_folder)
@click.argument("more", required=False, nargs=-1, type=existing_folder, metavar="")
@click.option("--plan", type=existing_file, help="The plan of the crossing, which says what was asked for.")
@against_option
@comparison_options
@sum_options
@click.option("--seal", is_flag=True, help="Write carnet.json into a target that is equal, whoever wrote it.")
@click.option("--signature", is_flag=True, help="Check model.sig, too: every file is as it was signed, by whom is said.")
@trust_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    ckpt: str,
    out: str | None,
    more: tuple[str, ...],
    against: str | None,
    as_json: bool,
    signature: bool,
    weights: tuple[float, ...] | None = None,
    method: str | None = None,
    keep: tuple[str, ...] = (),
    **options: "Unpack[Verifying]",
) -> None:
    """Compare a target with its source, as options or a plan say it was asked for; or, alone, with its own carnet.json.

    A target of `carnet merge` is compared with all its sources: carnet verify CKPT CKPT... OUT --weights X,Y,...
    """
    from carnet import api, deltas, merging
    from carnet.signing import check

    trust = trusted(options, ctx, asked=signature)
    sums = said({"weights": weights, "method": method, "keep": keep})
    if more and weights is None:
        raise click.UsageError("how much of each checkpoint? --weights 0.5,0.5", ctx)
    if sums and (not more or against is not None or options.get("seal") or options.get("plan")):
        words = ", ".join(f"--{name}" for name in sums)
        raise click.UsageError(f"{words}: of a sum, CKPT CKPT... OUT; it goes with no --against, --plan or --seal", ctx)
    with progress_bar() as progress:
        checked = None if trust is None else check(more[-1] if more else out or ckpt, trust, progress=progress)
        if out is not None and more:
            verdict = merging.verify([ckpt, out, *more[:-1]], more[-1], progress=progress, **sums, **said(options))
        elif against is None:
            verdict = api.verify(ckpt, out, progress=progress, **options)
        else:
            verdict = deltas.verify(ckpt, [out] if out else [], against=against, progress=progress, **said(options))
    if checked is not None:
        notes = {**verdict.notes, "signature": str(checked)}
        verdict = replace(verdict, findings=(*checked.findings, *verdict.findings), notes=notes)
    tell(ctx, verdict, as_json=as_json)
