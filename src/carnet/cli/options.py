"""The options that commands have in common. Names, words and defaults are those of a request; here is how a person writes them."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import click

from carnet.errors import BadOption
from carnet.plans.options import DTYPES, local, nbytes, near
from carnet.plans.request import ACTIVATIONS, CACHES, EMBEDDINGS, MEMORY, SPELLINGS, TARGETS, Request

DEFAULT = Request(to="hf")
Command = Callable[..., None]
Decorator = Callable[[Command], Command]


def choice(
    name: str,
    known: Iterable[str] | Callable[[], Iterable[str]],
    *,
    help: str,  # noqa: A002  as click's own
    metavar: str | None = None,
    default: str | None = None,
    required: bool = False,
    param: str | None = None,
) -> Decorator:
    """Return an option that is one of some words, which may be asked for only when they are needed; a wrong one is answered with those
    that are near.
    """

    def convert(value: str) -> str:
        words = [*(known() if callable(known) else known)]
        for said in (value, value.lower()):
            if said in words:
                return said
        raise click.BadParameter(f"{value!r} is none of {', '.join(words)}{near(value, words)}")

    shown = metavar if callable(known) or metavar is not None else f"[{'|'.join(known)}]"
    given: dict[str, Any] = {} if default is None else {"default": default, "show_default": True}
    names = [name] if param is None else [name, param]
    return click.option(*names, type=convert, metavar=shown, required=required, help=help, **given)


def size(value: str | int) -> int:
    """Read a number of bytes as a person writes it."""
    try:
        return nbytes("a size", value)
    except BadOption:
        raise click.BadParameter(f"{value!r} is no size; write 512M (decimal), 512MiB or a number of bytes") from None


class Here(click.Path):
    """A path on this machine. A URL is refused with what to do instead, before it is looked for or becomes a folder's name; what is not
    there is answered with what is near.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401  as click's own
        """Refuse a URL, then do as click does and a little more."""
        name = "a path" if param is None else param.human_readable_name
        local(name, value, out=self.exists is False)
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as wrong:
            folder, last = os.path.split(os.fspath(value).rstrip(os.sep))
            there = [] if os.path.lexists(value) or not os.path.isdir(folder or os.curdir) else os.listdir(folder or os.curdir)
            raise click.BadParameter(wrong.message.removesuffix(".") + near(last, there), ctx, param) from wrong


def _styles() -> list[str]:
    from carnet.quantize.recipes import by_style

    return [*by_style()]


def _schemes() -> list[str]:
    from carnet.quantize.recipes import schemes

    return schemes()


def _families() -> list[str]:
    from carnet.architectures.known import FAMILIES

    return [family.name for family in FAMILIES]


def together(*options: Decorator) -> Decorator:
    """Return one decorator that adds options in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


existing_file = Here(exists=True, dir_okay=False)
checkpoint = click.argument("ckpt", type=Here(exists=True, file_okay=False))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
drop_option = click.option(
    "--drop", multiple=True, metavar="PATTERN", help="Leave behind the stored tensors with names like this. May be repeated."
)
vocab_option = click.option(
    "--vocab-size", type=click.IntRange(1), help="True size of the vocabulary, where the checkpoint does not say it."
)
config_option = click.option(
    "--config", type=existing_file, help="config.json or YAML in place of the checkpoint's own arguments."
)
memory_option = click.option(
    "--memory", default=MEMORY, type=size, metavar="SIZE", help="Peak of private memory: 512M, 2GiB.  [default: 512M]"
)
family_option = choice(
    "--as",
    _families,
    param="family",
    metavar="FAMILY",
    help="Whose model it is, where Megatron's arguments fit several families; `carnet inspect` says which.",
)
written_option = click.option(
    "--written-by",
    metavar="PROGRAM",
    help="What trained a Megatron checkpoint, where it does not show: megatron-lm==0.17, megatron-bridge, nemo.",
)
read_option = click.option(
    "--read-by", metavar="PROGRAM", help="megatron: what will load the target.  [default: megatron-lm, any since 0.16]"
)
accept_option = click.option(
    "--accept", multiple=True, metavar="ARGUMENT", help="Do without what this argument of Megatron's does. May be repeated."
)
device_option = choice(
    "--device",
    ("cpu", "cuda"),
    default="cpu",
    help="Where to quantize; cuda needs carnet[cuda].",
)
quantize_options = together(
    choice(
        "--quantize",
        _schemes,
        metavar="SCHEME",
        help="Write the linear layers' weights as codes and scales; see below.",
    ),
    choice(
        "--style",
        _styles,
        metavar="STYLE",
        help="Whose names and arithmetic; see below.  [default: modelopt for hf; trtllm has its own]",
    ),
    choice("--kv-cache", CACHES, help="Store scales for a cache of keys and values in FP8."),
    click.option("--kv-scale", type=float, help="That scale, the same for all layers, where --amax does not say it."),
    choice(
        "--activations",
        ACTIVATIONS,
        help="Store a scale for activations, or leave it to the engine.  [default: as the scheme has it]",
    ),
    click.option("--amax", type=existing_file, help="What `carnet calibrate` found: activations, keys and values."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Modules to leave as they are, by name. May be repeated."),
)
target_options = together(
    choice("--to", TARGETS, required=True, help="What the target is for."),
    click.option("--tp", default=DEFAULT.tp, show_default=True, type=click.IntRange(1), help="ranks that share each layer."),
    click.option("--pp", default=DEFAULT.pp, show_default=True, type=click.IntRange(1), help="pipeline stages."),
    click.option("--ep", default=DEFAULT.ep, show_default=True, type=click.IntRange(1), help="ranks that share experts."),
    choice("--dtype", DTYPES, metavar="[bf16|fp16|fp32]", help="Cast the weights.  [default: as they are]"),
    memory_option,
    choice(
        "--parallel-embedding",
        EMBEDDINGS,
        help="trtllm: share the embedding among the ranks.  [default: as NVIDIA's converter does]",
    ),
    choice("--spelling", SPELLINGS, default=DEFAULT.spelling, help="megatron: whose names."),
    drop_option,
    vocab_option,
    config_option,
    family_option,
    written_option,
    read_option,
    accept_option,
    click.option(
        "--shard-size", default=DEFAULT.shard, type=size, metavar="SIZE", help="hf: bytes of a file at most.  [default: 5G]"
    ),
    click.option("--tokenizer", type=Here(exists=True, file_okay=False), help="Folder whose tokenizer goes along."),
)
