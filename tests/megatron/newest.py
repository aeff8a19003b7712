"""A plugin of pytest that lets tests run with a newer release of megatron-core, which is found first on the path.

Its modules are plain Python of a later version, and ask for a name of ``typing`` that is in ``typing_extensions``, too. They ask for
Triton, and ``carnet.megatron`` has them imported beside what stands in for it.
"""

import typing
from importlib import import_module

import typing_extensions

if not hasattr(typing, "override"):
    typing.override = typing_extensions.override
import_module("carnet.megatron")  # before any module of Megatron's


def pytest_terminal_summary(terminalreporter):
    """Say which release it was."""
    terminalreporter.write_line(f"with megatron-core {import_module('megatron.core').__version__}")
