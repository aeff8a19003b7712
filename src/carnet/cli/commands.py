"""The commands: what each is called with, and what it prints.

Exit codes: 0 done, 1 refused, 2 usage, 3 verified and different. What was asked for goes to stdout, talk goes to stderr.
Nothing heavy is imported before a command runs.
"""

import gc
import shutil
import sys
from typing import TYPE_CHECKING, Any, Unpack

import click

from carnet import __version__
from carnet.cli.cluster import cross_on
from carnet.cli.drawing import Sheet, html_option, report_option
from carnet.cli.edge import REMEMBERS, code_of, heed, heeded, stop_at_once, unwind
from carnet.cli.options import (
    Grouped,
    Place,
    checkpoint,
    choice,
    crossing_options,
    existing_file,
    existing_folder,
    json_option,
    on_option,
    options,
    part,
    threads_option,
)
from carnet.cli.progress import progress_bar
from carnet.cli.talk import TALK, talk
from carnet.cli.telling import print_lines, tell, width

if TYPE_CHECKING:
    from carnet.errors import CarnetError
    from carnet.plans.typed import Budget, Looking, Options


UNPROVEN = "written, not examined: `carnet verify CKPT {}` proves it"
UNSEEN = (
    "an upload that was killed shows in no listing: a rule of the bucket aborts those that stay incomplete (docs/stores.md)"
)
RESUMED = ("cross", "finish", "merge", "run")  # what an interrupted command of these wrote is used by the next


class Verb(click.Command):
    """A command whose examples keep their lines in --help, and whose refusals are one clear error."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, and those that every command has."""
        return [*super().get_params(ctx), *TALK]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups, first those that most people need."""
        groups: dict[str, list[tuple[str, str]]] = {"": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(param.group if isinstance(param, Grouped) else "", []).append(record)
        for group, records in groups.items():
            with formatter.section(group or "Options"):
                formatter.write_dl(records)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they stand."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            for line in self.epilog.splitlines():
                formatter.write(f"  {line}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words of a command; a path that is a URL, or a model's name on a hub, is refused here."""
        from carnet.errors import BadOption, CarnetError

        as_json = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except BadOption as error:
            raise click.UsageError(str(error), ctx) from error
        except CarnetError as error:
            refused(error, as_json=as_json)
            ctx.exit(1)

    def make_context(self, *args: Any, **given: Any) -> click.Context:  # noqa: ANN401  as click's own
        """Read the words of a command; an option that was not said is not handed on, so that a request has its default."""
        ctx = super().make_context(*args, **given)
        unsaid = [
            param.name for param in self.params if isinstance(param, Grouped) and ctx.params.get(param.name or "") in (None, ())
        ]
        ctx.params = {name: value for name, value in ctx.params.items() if name not in unsaid}
        return ctx

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; turn a refusal into a message and an exit code."""
        from carnet.errors import BadOption, CarnetError

        if heeded():
            from carnet import api  # noqa: F401  what takes longest to import: until it is there Ctrl-C ends the process at once

            heed(unwind)
        try:
            return super().invoke(ctx)
        except BadOption as error:
            raise click.UsageError(str(error), ctx) from error
        except CarnetError as error:
            refused(error, as_json=bool(ctx.params.get("as_json")))
            ctx.exit(1)
        except KeyboardInterrupt as interrupt:
            heed(stop_at_once)
            click.echo(REMEMBERS if self.name in RESUMED else "carnet: interrupted; nothing was written", err=True)
            ctx.exit(code_of(interrupt))


class Crossing(Verb):
    """A command that can quantize: its help lists the schemes. The table is imported only here, when that help is shown."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then what --quantize may be asked for."""
        super().format_options(ctx, formatter)
        from carnet.quantize.recipes import by_style

        with formatter.section("Schemes of --quantize, by --style"):
            formatter.write_dl([(style, ", ".join(schemes)) for style, schemes in by_style().items()])


def refused(error: "CarnetError", *, as_json: bool) -> None:
    """Say why carnet stopped."""
    from carnet.errors import lines

    if as_json:
        from carnet.report.data import dump, error_data

        click.echo(dump(error_data(error)))
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    click.echo("carnet: " + "\n".join(lines(error, width)), err=True)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit codes: 0 done, 1 refused, 2 usage, 3 verified and different, 130 interrupted (143 by SIGTERM).",
)
@click.version_option(__version__, prog_name="carnet")
def main() -> None:
    """Take a trained model across the border: from Megatron to vLLM, SGLang, TensorRT-LLM and transformers, and back, provably whole.

    A CKPT is a Megatron root or one of its iter_* folders, a Hugging Face folder, one of PEFT's, or a folder of ranks of
    TensorRT-LLM, vLLM or SGLang.
    """
    gc.set_threshold(200_000, 20, 100)  # a plan is a million records and no cycle: looking for cycles takes a third of the time


@main.command(
    cls=Verb,
    epilog="carnet inspect checkpoints/llama\ncarnet inspect checkpoints/llama/iter_0001000 --tensors --json\n"
    "carnet inspect checkpoints/llama --html llama.html",
)
@checkpoint
@click.option("--tensors", is_flag=True, help="List every stored tensor with its layout.")
@html_option
@options(
    *("config", "family", "vocab_size", "tokenizer", "drop", "written_by", "accept", "adapter_alpha"),
    tokenizer="Folder whose tokenizer says the vocabulary.",
)
@json_option
@click.pass_context
def inspect(
    ctx: click.Context, /, ckpt: str, tensors: bool, as_json: bool, html: str | None = None, **options: "Unpack[Looking]"
) -> None:
    """Show what a checkpoint is. Only headers are read."""
    from carnet import api
    from carnet.report.data import dump, inspection_data
    from carnet.report.terminal import inspection_lines

    sheet = Sheet("html", html)
    found = api.inspect(ckpt, **options)
    sheet.inspected(found)
    if as_json:
        data = inspection_data(found)
        click.echo(dump(data if tensors else {key: value for key, value in data.items() if key not in ("tensors", "objects")}))
    else:
        print_lines(inspection_lines(found, width(), every=tensors))
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
@crossing_options
@click.option("-o", "--output", type=Place(dir_okay=False), help="Save the plan to this file.")
@json_option
def plan(ckpt: str, output: str | None, as_json: bool, **options: "Unpack[Options]") -> None:
    """Plan a crossing and prove that it loses nothing. Only headers are read."""
    from carnet import api
    from carnet.plans import saved
    from carnet.plans.options import here
    from carnet.report.data import dump, plan_data
    from carnet.report.terminal import plan_lines

    path = None if output is None else here("output", output, out=True)
    made = api.plan(ckpt, **options)
    if path is not None:
        saved.save(made, path)
        talk(f"plan saved to {output}")
    if as_json:
        click.echo(dump(plan_data(made)))
    else:
        print_lines(plan_lines(made, width()))


@main.command(cls=Verb, epilog="carnet run llama.plan out/llama\ncarnet run llama.plan out/llama --part 3/64")
@click.argument("plan_file", metavar="PLAN", type=existing_file)
@click.argument("out", type=Place())
@click.option(
    "--part",
    type=part,
    metavar="N/M",
    help="Do the Nth of M parts, beside others that do the rest on any machines that see the same disk; then `carnet finish`.",
)
@threads_option
def run(plan_file: str, out: str, part: tuple[int, int] | None, threads: int | None = None) -> None:
    """Carry out a saved plan, exactly. After an interruption the same command goes on where it stopped."""
    from carnet import api

    with progress_bar() as progress:
        api.run(plan_file, out, part=part, threads=threads, progress=progress)
    if part is not None:
        talk(f"part {part[0]}/{part[1]} is written; when all are: `carnet finish {plan_file} {out}`")
        return
    talk(f"{out} is {UNPROVEN.format(out)}")


@main.command(cls=Verb, epilog="carnet finish llama.plan out/llama\ncarnet finish llama.plan out/llama --verify")
@click.argument("plan_file", metavar="PLAN", type=existing_file)
@click.argument("out", type=Place())
@click.option("--verify", is_flag=True, help="Compare it with its source first; OUT appears only when it is proven.")
@options("memory", "threads")
@json_option
@click.pass_context
def finish(ctx: click.Context, /, plan_file: str, out: str, verify: bool, as_json: bool, **options: "Unpack[Budget]") -> None:
    """Put a target in place whose every part was written by `carnet run --part`."""
    from carnet import api

    with progress_bar() as progress:
        verdict = api.finish(plan_file, out, verify=verify, progress=progress, **options)
    if verdict is not None:
        tell(ctx, verdict, as_json=as_json)
    talk(f"{out} is {UNPROVEN.format(out)}")


@main.command(cls=Verb, epilog="carnet clean out/llama\ncarnet clean s3://models/llama")
@click.argument("out", type=Place())
@json_option
def clean(out: str, as_json: bool) -> None:
    """Remove what a crossing into OUT left that was killed and shall not go on; nothing that carnet did not write."""
    from carnet import api
    from carnet.report.data import dump
    from carnet.storage.schemes import folder_at

    removed = api.clean(out)
    click.echo(dump({"removed": removed}) if as_json else "\n".join(f"removed {name}" for name in removed))
    if folder_at(out).far:
        talk(UNSEEN)


@main.command(
    cls=Crossing,
    epilog="carnet cross checkpoints/llama out/llama-hf --to hf --tokenizer tokenizers/llama\n"
    "carnet cross checkpoints/llama out/llama-trt --to trtllm --tp 4\n"
    "carnet cross checkpoints/llama out/llama-fp8 --to hf --quantize fp8-channel --style compressed-tensors\n"
    "carnet cross checkpoints/llama out/llama-hf --to hf --report llama-hf.html\n"
    "carnet cross /shared/llama /shared/llama-hf --to hf --on ray://head:10001",
)
@checkpoint
@click.argument("out", type=Place())
@crossing_options
@threads_option
@on_option
@report_option
@json_option
@click.pass_context
def cross(
    ctx: click.Context,
    /,
    ckpt: str,
    out: str,
    as_json: bool,
    on: str | None = None,
    report: str | None = None,
    **options: "Unpack[Options]",
) -> None:
    """Plan, run and verify. OUT appears only when it is proven, with its document carnet.json."""
    from carnet import api

    sheet = Sheet("report", report, out)
    if on is not None:
        verdict = cross_on(on, ckpt, out, options, sheet)
    else:
        with progress_bar() as progress:
            verdict = api.cross(ckpt, out, progress=sheet.watched(progress), **options)
    sheet.crossed(ckpt, out, verdict, options)
    tell(ctx, verdict, as_json=as_json)


@main.command(
    cls=Verb,
    epilog="carnet calibrate models/llama --data texts.jsonl -o amax.safetensors\n"
    "carnet cross checkpoints/llama out/llama-fp8 --to hf --quantize fp8 --amax amax.safetensors",
)
@click.argument("hf_dir", type=existing_folder)
@click.option("--data", required=True, type=existing_file, help='Texts, one {"text": "..."} a line.')
@click.option("-o", "--output", required=True, type=Place(dir_okay=False), help="The file for --amax.")
@click.option("--samples", default=512, show_default=True, type=click.IntRange(1), help="Texts to read, at most.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(1), help="Tokens of a text, at most.")
@click.option("--device", help="Where the model runs: cpu, cuda, cuda:1.  [default: cuda where there is one]")
def calibrate(hf_dir: str, data: str, output: str, samples: int, length: int, device: str | None) -> None:
    """Run texts through a Hugging Face model and note how large activations, keys and values become.

    NVIDIA's ModelOpt does it; it comes with `pip install 'carnet[modelopt]'`. The whole model is loaded.
    """
    from carnet.calibrate import calibrate as observe

    with progress_bar(bytes_=False) as progress:
        found = observe(hf_dir, data, output, samples=samples, length=length, device=device, progress=progress)
    talk(f"{found.amaxes:,} magnitudes of {found.tokens:,} tokens in {found.texts:,} texts: {output}")


@main.command(
    cls=Verb,
    epilog="carnet fits checkpoints/llama --spec modelopt\ncarnet fits checkpoints/llama --spec te --tp 8 --pp 2 --json",
)
@checkpoint
@choice("--spec", known=("modelopt", "te", "local"), required=True, help="What the model is built of.")
@click.option("--tp", type=click.IntRange(1), help="ranks that share each layer of the model.  [default: 1]")
@click.option("--pp", type=click.IntRange(1), help="its pipeline stages.  [default: 1]")
@click.option("--ep", type=click.IntRange(1), help="ranks that share its experts.  [default: 1]")
@click.option("--parts", is_flag=True, help="List every part of a parameter with the box that fills it.")
@options("config", "written_by")
@json_option
@click.pass_context
def fits(
    ctx: click.Context,
    ckpt: str,
    spec: str,
    tp: int | None,
    pp: int | None,
    ep: int | None,
    parts: bool,
    as_json: bool,
    config: str | None = None,
    written_by: str | None = None,
) -> None:
    """Prove that a Megatron checkpoint fills the model of a spec, and is used up by it. Only headers are read, no GPU is needed.

    megatron-core is asked itself; it comes with `pip install 'carnet[megatron]'`. Where ranks have a file each they are the model's.
    """
    import warnings

    from carnet.errors import MachineFailed
    from carnet.report.data import dump
    from carnet.report.terminal import fit_lines

    with warnings.catch_warnings(action="ignore"):  # of accelerators that are not here, and need not be
        try:
            from carnet.megatron import fits as asked
        except ModuleNotFoundError as missing:
            remedy = "pip install 'carnet[megatron]'"
            raise MachineFailed("`carnet fits` asks megatron-core", {"missing": missing.name}, remedy=remedy) from missing
        found = asked.fits(ckpt, spec, config=config, tp=tp, pp=pp, ep=ep, written_by=written_by)
    if as_json:
        click.echo(dump(asked.data(found)))
    else:
        print_lines(fit_lines(asked.facts(found), asked.misfits(found), *asked.lines(found, every=parts), width()))
    ctx.exit(0 if found.good else 3)
