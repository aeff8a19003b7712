"""The command line: options, progress, exit codes; no logic. Nothing heavy is imported before a command runs."""

from typing import TYPE_CHECKING

__all__ = ["main"]

if TYPE_CHECKING:
    from carnet.cli.commands import main


def __getattr__(name: str) -> object:
    # so that the edge of the process stands before anything else is imported
    if name == "main":
        from carnet.cli import (  # noqa: F401  they add their commands
            completion,
            deltas,
            engines,
            merging,
            reporting,
            signing,
            verifying,
        )
        from carnet.cli.commands import main as commands

        return commands
    raise AttributeError(f"module 'carnet.cli' has no attribute {name!r}")
