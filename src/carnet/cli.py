"""The command line: options, progress, exit codes; no logic.

Exit codes: 0 done, 1 refused, 2 usage, 3 verified and different. What was asked for goes to stdout, talk goes to stderr.
Nothing heavy is imported before a command runs.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from carnet import __version__

if TYPE_CHECKING:
    from rich.console import Console

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
Command = Callable[..., None]


def nbytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Return the number of bytes that a size says: 512M, 2G, 1048576."""
    text = value.upper().removesuffix("B").removesuffix("I")
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        return int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{value!r} is no size; write 512M or 2G", ctx, param) from None


class Verb(click.Command):
    """A command whose examples keep their lines in --help, and whose refusals are one clear error."""

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they stand."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            for line in self.epilog.splitlines():
                formatter.write(f"  {line}\n")

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; turn a refusal into a message and an exit code."""
        from carnet.errors import CarnetError

        try:
            return super().invoke(ctx)
        except CarnetError as error:
            refused(error, as_json=bool(ctx.params.get("as_json")))
            ctx.exit(1)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("carnet: interrupted; the same command goes on where it stopped", err=True)
            ctx.exit(130)


class Crossing(Verb):
    """A command that can quantize: its help lists the schemes. The table is imported only here, when that help is shown."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then what --quantize may be asked for."""
        super().format_options(ctx, formatter)
        from carnet.quantize.recipes import by_style

        with formatter.section("Schemes of --quantize, by --style"):
            formatter.write_dl([(style, ", ".join(schemes)) for style, schemes in by_style().items()])


def refused(error: Exception, *, as_json: bool) -> None:
    """Say why carnet stopped."""
    from carnet.errors import CarnetError

    if as_json and isinstance(error, CarnetError):
        from carnet.report import dump, error_data

        click.echo(dump(error_data(error)))
    click.echo(f"carnet: {error}", err=True)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit codes: 0 done, 1 refused, 2 usage, 3 verified and different.",
)
@click.version_option(__version__, prog_name="carnet")
def main() -> None:
    """Take a trained model across the border: Megatron checkpoints to TensorRT-LLM ranks or Hugging Face folders, provably whole.

    A CKPT is a Megatron root or one of its iter_* folders, a Hugging Face folder, or a TensorRT-LLM checkpoint folder.
    """
    gc.set_threshold(200_000, 20, 100)  # a plan is a million records and no cycle: looking for cycles takes a third of the time


checkpoint = click.argument("ckpt", type=click.Path(exists=True, file_okay=False))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
drop_option = click.option(
    "--drop", multiple=True, metavar="PATTERN", help="Leave behind the stored tensors with names like this. May be repeated."
)
vocab_option = click.option(
    "--vocab-size", type=click.IntRange(1), help="True size of the vocabulary, where the checkpoint does not say it."
)


device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to quantize; cuda needs carnet[cuda].",
)
config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    help="config.json or YAML in place of the checkpoint's own arguments.",
)


def quantize_options(command: Command) -> Command:
    """Add the options that say what is quantized on the way."""
    existing = click.Path(exists=True, dir_okay=False)
    for option in reversed(
        (
            click.option(
                "--quantize", metavar="SCHEME", help="Write the linear layers' weights as codes and scales; see below."
            ),
            click.option(
                "--style",
                help="Whose names and arithmetic; see below.  [default: modelopt for hf; trtllm has its own]",
            ),
            click.option("--kv-cache", type=click.Choice(["fp8"]), help="Store scales for a cache of keys and values in FP8."),
            click.option("--kv-scale", type=float, help="That scale, the same for all layers, where --amax does not say it."),
            click.option(
                "--activations",
                type=click.Choice(["static", "dynamic"]),
                help="Store a scale for activations, or leave it to the engine.  [default: as the scheme has it]",
            ),
            click.option("--amax", type=existing, help="What `carnet calibrate` found: activations, keys and values."),
            click.option(
                "--exclude", multiple=True, metavar="PATTERN", help="Modules to leave as they are, by name. May be repeated."
            ),
        )
    ):
        command = option(command)
    return command


def target_options(command: Command) -> Command:
    """Add the options that say what the target is."""
    for option in reversed(
        (
            click.option(
                "--to", required=True, type=click.Choice(["hf", "trtllm", "megatron"]), help="What the target is for."
            ),
            click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="ranks that share each layer."),
            click.option("--pp", default=1, show_default=True, type=click.IntRange(1), help="pipeline stages."),
            click.option("--ep", default=1, show_default=True, type=click.IntRange(1), help="ranks that share experts."),
            click.option("--dtype", help="Cast the weights: bf16, f16 or f32.  [default: as they are]"),
            click.option("--memory", default="512M", show_default=True, callback=nbytes, help="Peak of private memory."),
            click.option(
                "--parallel-embedding",
                type=click.Choice(["none", "rows", "columns"]),
                help="trtllm: share the embedding among the ranks.  [default: as NVIDIA's converter does]",
            ),
            click.option(
                "--spelling", default="te", show_default=True, type=click.Choice(["te", "local"]), help="megatron: whose names."
            ),
            drop_option,
            vocab_option,
            config_option,
            click.option(
                "--shard-size", default="5000000000", callback=nbytes, help="hf: bytes of a file at most.  [default: 5 GB]"
            ),
            click.option(
                "--tokenizer", type=click.Path(exists=True, file_okay=False), help="Folder whose tokenizer goes along."
            ),
        )
    ):
        command = option(command)
    return command


@main.command(
    cls=Verb, epilog="carnet inspect checkpoints/llama\ncarnet inspect checkpoints/llama/iter_0001000 --tensors --json"
)
@checkpoint
@click.option("--tensors", is_flag=True, help="List every stored tensor with its layout.")
@config_option
@json_option
@click.pass_context
def inspect(ctx: click.Context, /, ckpt: str, tensors: bool, config: str | None, as_json: bool) -> None:
    """Show what a checkpoint is. Only headers are read."""
    from carnet import api, report

    found = api.inspect(ckpt, config=config)
    if as_json:
        data = report.inspection_data(found)
        click.echo(
            report.dump(data if tensors else {key: value for key, value in data.items() if key not in ("tensors", "objects")})
        )
    else:
        report.show_inspection(found, _console(), every=tensors)
    if found.refusal is not None:
        refused(found.refusal, as_json=False)  # the JSON has said it
        ctx.exit(1)


@main.command(
    cls=Crossing,
    epilog="carnet plan checkpoints/llama --to trtllm --tp 2 --pp 2 -o llama.plan\n"
    "carnet plan checkpoints/llama --to hf --dtype bf16 --memory 256M --json\n"
    "carnet plan checkpoints/llama --to hf --quantize fp8 --kv-cache fp8 --amax amax.safetensors",
)
@checkpoint
@target_options
@quantize_options
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan to this file.")
@json_option
def plan(ckpt: str, output: str | None, as_json: bool, **wish: object) -> None:
    """Plan a crossing and prove that it loses nothing. Only headers are read."""
    from pathlib import Path

    from carnet import api, report
    from carnet.planner import saved

    made = api.plan(ckpt, **wish)  # type: ignore[arg-type]  # click has checked the types
    if output is not None:
        saved.save(made, Path(output))
        click.echo(f"carnet: plan saved to {output}", err=True)
    if as_json:
        click.echo(report.dump(report.plan_data(made)))
    else:
        report.show_plan(made, _console())


@main.command(cls=Verb, epilog="carnet run llama.plan out/llama")
@click.argument("plan_file", metavar="PLAN", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path())
@device_option
def run(plan_file: str, out: str, device: str) -> None:
    """Carry out a saved plan, exactly. After an interruption the same command goes on where it stopped."""
    from carnet import api

    with _progress("writing") as progress:
        api.run(plan_file, out, device=device, progress=progress)
    click.echo(f"carnet: {out} is written; `carnet verify` proves it", err=True)


@main.command(cls=Verb, epilog="carnet verify checkpoints/llama out/llama\ncarnet verify out/llama")
@checkpoint
@click.argument("out", required=False, type=click.Path(exists=True, file_okay=False))
@drop_option
@vocab_option
@config_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    ckpt: str,
    out: str | None,
    drop: tuple[str, ...],
    vocab_size: int | None,
    config: str | None,
    as_json: bool,
) -> None:
    """Compare a target with its source, every element; or, given the target alone, with its own carnet.json."""
    from carnet import api, report

    with _progress("verifying") as progress:
        verdict = api.verify(ckpt, out, drop=drop, vocab_size=vocab_size, config=config, progress=progress)
    if as_json:
        click.echo(report.dump(report.verdict_data(verdict)))
    else:
        report.show_verdict(verdict, _console())
    ctx.exit(0 if verdict.equal else 3)


@main.command(
    cls=Crossing,
    epilog="carnet cross checkpoints/llama out/llama-hf --to hf --tokenizer tokenizers/llama\n"
    "carnet cross checkpoints/llama out/llama-trt --to trtllm --tp 4\n"
    "carnet cross checkpoints/llama out/llama-fp8 --to hf --quantize fp8-channel --style compressed-tensors",
)
@checkpoint
@click.argument("out", type=click.Path())
@target_options
@quantize_options
@device_option
@json_option
@click.pass_context
def cross(ctx: click.Context, /, ckpt: str, out: str, as_json: bool, **wish: object) -> None:
    """Plan, run and verify. OUT appears only when it is proven, with its document carnet.json."""
    from carnet import api, report

    with _progress("crossing") as progress:
        verdict = api.cross(ckpt, out, progress=progress, **wish)  # type: ignore[arg-type]  # click has checked the types
    if as_json:
        click.echo(report.dump(report.verdict_data(verdict)))
    else:
        report.show_verdict(verdict, _console())
    ctx.exit(0 if verdict.equal else 3)


@main.command(
    cls=Verb,
    epilog="carnet calibrate models/llama --data texts.jsonl -o amax.safetensors\n"
    "carnet cross checkpoints/llama out/llama-fp8 --to hf --quantize fp8 --amax amax.safetensors",
)
@click.argument("hf_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False), help='Texts, one {"text": "..."} a line.')
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="The file for --amax.")
@click.option("--samples", default=512, show_default=True, type=click.IntRange(1), help="Texts to read, at most.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(1), help="Tokens of a text, at most.")
@click.option("--device", help="Where the model runs: cpu, cuda, cuda:1.  [default: cuda where there is one]")
def calibrate(hf_dir: str, data: str, output: str, samples: int, length: int, device: str | None) -> None:
    """Run texts through a Hugging Face model and note how large activations, keys and values become.

    NVIDIA's ModelOpt does it; it comes with `pip install 'carnet[modelopt]'`. The whole model is loaded.
    """
    from carnet.calibrate import calibrate as observe

    with _progress("calibrating", bytes_=False) as progress:
        found = observe(hf_dir, data, output, samples=samples, length=length, device=device, progress=progress)
    click.echo(f"carnet: {found.amaxes:,} magnitudes of {found.tokens:,} tokens in {found.texts:,} texts: {output}", err=True)


@main.command(
    cls=Verb,
    epilog="carnet fits checkpoints/llama --spec modelopt\ncarnet fits checkpoints/llama --spec te --tp 8 --pp 2 --json",
)
@checkpoint
@click.option("--spec", required=True, type=click.Choice(["modelopt", "te", "local"]), help="What the model is built of.")
@click.option("--tp", type=click.IntRange(1), help="ranks that share each layer of the model.  [default: 1]")
@click.option("--pp", type=click.IntRange(1), help="its pipeline stages.  [default: 1]")
@click.option("--ep", type=click.IntRange(1), help="ranks that share its experts.  [default: 1]")
@click.option("--parts", is_flag=True, help="List every part of a parameter with the box that fills it.")
@config_option
@json_option
@click.pass_context
def fits(ctx: click.Context, /, ckpt: str, parts: bool, as_json: bool, **wish: object) -> None:
    """Prove that a Megatron checkpoint fills the model of a spec, and is used up by it. Only headers are read, no GPU is needed.

    megatron-core is asked itself; it comes with `pip install 'carnet[megatron]'`. Where ranks have a file each they are the model's.
    """
    import warnings

    from carnet import report
    from carnet.errors import MachineFailed

    with warnings.catch_warnings(action="ignore"):  # of accelerators that are not here, and need not be
        try:
            from carnet.megatron import fits as asked
        except ModuleNotFoundError as missing:
            remedy = "pip install 'carnet[megatron]'"
            raise MachineFailed("`carnet fits` asks megatron-core", {"missing": missing.name}, remedy=remedy) from missing
        found = asked.fits(ckpt, **wish)  # type: ignore[arg-type]  # click has checked the types
    if as_json:
        click.echo(report.dump(asked.data(found)))
    else:
        report.show_fit(_console(), asked.facts(found), asked.misfits(found), *asked.lines(found, every=parts))
    ctx.exit(0 if found.good else 3)


def _console() -> "Console":
    from rich.console import Console

    # a pipe has no width: one line a row there
    return Console() if sys.stdout.isatty() else Console(width=250)


@contextmanager
def _progress(what: str, *, bytes_: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Show how much is done, of bytes the rate too, and the time left on a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if bytes_ else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
