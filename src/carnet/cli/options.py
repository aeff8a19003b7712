"""The options that commands have in common. Names and defaults are those of a request; here is how a person writes them."""

from collections.abc import Callable

import click

from carnet.planner.request import EMBEDDINGS, MEMORY, TARGETS, Request

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DEFAULT = Request(to="hf")
Command = Callable[..., None]
Decorator = Callable[[Command], Command]


def nbytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Return the number of bytes that a size says: 512M, 2G, 1048576."""
    text = value.upper().removesuffix("B").removesuffix("I")
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        return int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{value!r} is no size; write 512M or 2G", ctx, param) from None


def together(*options: Decorator) -> Decorator:
    """Return one decorator that adds options in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


existing_file = click.Path(exists=True, dir_okay=False)
checkpoint = click.argument("ckpt", type=click.Path(exists=True, file_okay=False))
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
    "--memory", default=MEMORY, type=str, callback=nbytes, help="Peak of private memory.  [default: 512M]"
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to quantize; cuda needs carnet[cuda].",
)
quantize_options = together(
    click.option("--quantize", metavar="SCHEME", help="Write the linear layers' weights as codes and scales; see below."),
    click.option("--style", help="Whose names and arithmetic; see below.  [default: modelopt for hf; trtllm has its own]"),
    click.option("--kv-cache", type=click.Choice(["fp8"]), help="Store scales for a cache of keys and values in FP8."),
    click.option("--kv-scale", type=float, help="That scale, the same for all layers, where --amax does not say it."),
    click.option(
        "--activations",
        type=click.Choice(["static", "dynamic"]),
        help="Store a scale for activations, or leave it to the engine.  [default: as the scheme has it]",
    ),
    click.option("--amax", type=existing_file, help="What `carnet calibrate` found: activations, keys and values."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Modules to leave as they are, by name. May be repeated."),
)
target_options = together(
    click.option("--to", required=True, type=click.Choice(TARGETS), help="What the target is for."),
    click.option("--tp", default=DEFAULT.tp, show_default=True, type=click.IntRange(1), help="ranks that share each layer."),
    click.option("--pp", default=DEFAULT.pp, show_default=True, type=click.IntRange(1), help="pipeline stages."),
    click.option("--ep", default=DEFAULT.ep, show_default=True, type=click.IntRange(1), help="ranks that share experts."),
    click.option("--dtype", help="Cast the weights: bf16, f16 or f32.  [default: as they are]"),
    memory_option,
    click.option(
        "--parallel-embedding",
        type=click.Choice(EMBEDDINGS),
        help="trtllm: share the embedding among the ranks.  [default: as NVIDIA's converter does]",
    ),
    click.option(
        "--spelling",
        default=DEFAULT.spelling,
        show_default=True,
        type=click.Choice(["te", "local"]),
        help="megatron: whose names.",
    ),
    drop_option,
    vocab_option,
    config_option,
    click.option(
        "--shard-size", default=DEFAULT.shard, type=str, callback=nbytes, help="hf: bytes of a file at most.  [default: 5 GB]"
    ),
    click.option("--tokenizer", type=click.Path(exists=True, file_okay=False), help="Folder whose tokenizer goes along."),
)
