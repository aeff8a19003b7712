"""The command `carnet completion`: what has a shell complete the others. Click asks the commands themselves what comes next."""

import click

from carnet.cli.commands import Verb, main

SHELLS = ("bash", "zsh", "fish")


@main.command(
    cls=Verb,
    epilog="carnet completion bash > ~/.local/share/bash-completion/completions/carnet\n"
    "carnet completion zsh > ~/.zfunc/_carnet\n"
    "carnet completion fish > ~/.config/fish/completions/carnet.fish",
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what has a shell complete commands, options, what they may be, and paths.

    Without a file, for this shell alone: eval "$(carnet completion bash)".
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    if script is not None:
        click.echo(script(main, {}, "carnet", "_CARNET_COMPLETE").source(), nl=False)
