"""The command line: options, progress, exit codes; no logic. Nothing heavy is imported before a command runs."""

from carnet.cli.commands import main

__all__ = ["main"]
