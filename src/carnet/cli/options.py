"""The options of commands, made from the table of a request, whose names, words and defaults they have."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from carnet.dialects.kinds import OWN
from carnet.errors import BadOption
from carnet.plans.options import local, nbytes, near
from carnet.plans.request import DEFAULTS, KNOWN, MACHINE, MEMORY, OPTIONS, flag_of

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


class Grouped(click.Option):
    """An option that help lists in a group."""

    def __init__(self, *names: Any, group: str = "", **given: Any) -> None:  # noqa: ANN401  as click's own
        """Take what click takes, and the group."""
        super().__init__(*names, **given)
        self.group = group


def choice(
    *names: str,
    known: Iterable[str] | Callable[[], Iterable[str]],
    help: str,  # noqa: A002  as click's own
    **given: Any,  # noqa: ANN401  as click's own
) -> Decorator:
    """Return an option that is one of some words, which may be asked for only when they are needed; a wrong one is answered with those
    that are near.
    """

    def convert(value: str) -> str:
        words = [*(known() if callable(known) else known)]
        for said in (value, value.lower()):
            if said in words:
                return said
        raise click.BadParameter(f"{value!r} is not one of {', '.join(words)}{near(value, words)}")

    shown = {} if callable(known) else {"metavar": f"[{'|'.join(known)}]"}
    return click.option(*names, type=convert, help=help, cls=Grouped, shell_complete=begun(known), **{**shown, **given})


def begun(known: Iterable[str] | Callable[[], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what a shell asks for the words that go on from what was typed."""
    return lambda ctx, param, typed: [word for word in (known() if callable(known) else known) if word.startswith(typed)]


def size(value: str | int) -> int:
    """Read a number of bytes as a person writes it."""
    try:
        return nbytes("a size", value)
    except BadOption:
        raise click.BadParameter(f"{value!r} is not a size; write 512M (decimal), 512MiB or a number of bytes") from None


def part(value: str | tuple[int, int]) -> tuple[int, int]:
    """Read which of how many parts, as a person writes it."""
    try:
        number, of = map(int, value.split("/") if isinstance(value, str) else value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a part; write 3/64 for the third of 64") from None
    return number, of


class Place(click.Path):
    """A path on this machine, or a URL of a store, which nobody looks for yet. A URL of another kind is refused before it becomes a
    folder's name; what is not there is answered with what is near.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401  as click's own
        """Take a URL as it is, and of a path do as click does and a little more."""
        name = "a path" if param is None else param.human_readable_name
        value = local(name, value, out=self.exists is False)
        if "://" in value:
            return value
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as wrong:
            folder, last = os.path.split(os.fspath(value).rstrip(os.sep))
            there = [] if os.path.lexists(value) or not os.path.isdir(folder or os.curdir) else os.listdir(folder or os.curdir)
            meant = (
                f"; name its folder: {folder or os.curdir}"
                if not self.file_okay and os.path.isfile(value)
                else near(last, there)
            )
            raise click.BadParameter(wrong.message.removesuffix(".") + meant, ctx, param) from wrong


class Adapter(Place):
    """A folder of adapters, or the word for those in the checkpoint itself."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401  as click's own
        """Take the word as it is, though a folder may be called so: ./own names it."""
        return value if value == OWN else super().convert(value, param, ctx)


def once(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | None:
    """Return the only value of an option; of folders of adapters none is left out without a word."""
    if len(value) > 1:
        raise click.BadParameter("one folder at a time: cross what comes out with --dtype f32 again, with the next", ctx, param)
    return value[0] if value else None


existing_file, existing_folder = Place(exists=True, dir_okay=False), Place(exists=True, file_okay=False)
TYPES: Mapping[str, Mapping[str, Any]] = {
    "whole": {"type": click.IntRange(1)},
    "size": {"type": size, "metavar": "SIZE"},
    "number": {"type": float},
    "text": {"type": str},
    "path": {"type": existing_file},
    "folder": {"type": existing_folder},
    "patterns": {"multiple": True},
    "program": {},
    "adapter": {"type": Adapter(exists=True, file_okay=False), "multiple": True, "callback": once},
    "factor": {"type": float},
}


def option(name: str, text: str | None = None) -> Decorator:
    """Return one option of a request, ``text`` in place of its help; what is not said is None, or no pattern."""
    made, default = KNOWN[name], {**DEFAULTS, "memory": MEMORY}.get(name)
    said = made.help if text is None else text
    if default:
        said += f"  [default: {_rounded(default) if made.value == 'size' else default}]"
    given: dict[str, Any] = {"group": made.group, **({"metavar": made.metavar} if made.metavar else {})}
    if made.value == "word":
        return choice(flag_of(name), name, known=made.words if made.metavar else [*made.words()], help=said, **given)
    if made.value == "program":
        given["shell_complete"] = begun(made.words)
    return click.option(flag_of(name), name, help=said, cls=Grouped, **{**TYPES[made.value], **given})


def _rounded(nbytes_: int) -> str:
    """Return a round number of bytes as a person writes it.

    >>> _rounded(5_000_000_000), _rounded(512_000_000)
    ('5G', '512M')
    """
    return f"{nbytes_ // 10**6}M" if nbytes_ % 10**9 else f"{nbytes_ // 10**9}G"


def said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a person said, without those that are None or off."""
    return {name: value for name, value in options.items() if value not in (None, False, ())}


def options(*names: str, **texts: str) -> Decorator:
    """Return several options of a request in one decorator, some with a help of their own."""
    return together(*(option(name, texts.get(name)) for name in names))


def together(*options: Decorator) -> Decorator:
    """Return one decorator that adds options in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


checkpoint = click.argument("ckpt", type=existing_folder)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
on_option = click.option(
    "--on",
    metavar="CLUSTER",
    cls=Grouped,
    group=MACHINE,
    help="Use all machines of a Ray cluster that see the same files: ray://HOST:10001, or ray for the one of RAY_ADDRESS.",
)
against_option = click.option(
    "--against", type=existing_folder, help="CKPT is a base and OUT a delta: compare what they make with this version."
)
crossing_options = options("to", "tokenizer", "request", *(name for name in OPTIONS if name != "to"), "memory")
threads_option = options("threads")
comparison_options = options(
    "tokenizer",
    "request",
    *(name for name, option in OPTIONS.items() if option.compared),
    "memory",
    "threads",
    dtype="What the weights were cast to.",
    tokenizer="Folder whose tokenizer went along.",
    amax="What `carnet calibrate` had found.",
    kv_scale="The scale of the FP8 cache, where one was named.",
)
