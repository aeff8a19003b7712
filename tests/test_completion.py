"""Real shells complete carnet's commands, options, what these may be, and paths, when somebody presses TAB."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.terminal import COLOUR

SHELLS = {  # -> how it begins without anybody's own settings, and what it is told first
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        'PS1="> "; bind "set page-completions off"; eval "$(carnet completion bash)"',
    ),
    "zsh": (["zsh", "-f", "-i"], 'PS1="> "; LISTMAX=0; autoload -U compinit; compinit -u -D; eval "$(carnet completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "function fish_prompt; echo -n '> '; end; carnet completion fish | source"),
}
SECONDS = 30  # that a shell on a busy machine may take to answer


@pytest.fixture(params=SHELLS)
def shell(request):
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed: apt-get install {request.param}")
    return request.param


@pytest.fixture
def place(tmp_path):
    """A folder with the command carnet, a checkpoint's folder and a file."""
    command = tmp_path / "bin/carnet"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m carnet "$@"\n')
    command.chmod(0o755)
    home = tmp_path / "home"
    (home / "checkpoints_of_mine").mkdir(parents=True)
    (home / "request_of_mine.toml").write_text("")
    return home


def environment(place):
    path = os.pathsep.join([str(place.with_name("bin")), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HOME": str(place), "TERM": "dumb", "COLUMNS": "200", "LINES": "50"}


class Typed:
    """A shell, and somebody who types and looks on."""

    def __init__(self, shell, place):
        command, first = SHELLS[shell]
        master, slave = pty.openpty()
        self.master, self.seen = master, ""
        self.child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment(place), cwd=place)
        os.close(slave)
        self.press(f"{first}; echo rea''dy\n", "ready")

    def press(self, keys, *wanted):
        """Type keys, and wait until all that is wanted shows; return what shows then."""
        os.write(self.master, keys.encode())
        shown, end = "", time.monotonic() + SECONDS
        while not all(word in shown for word in wanted):
            assert time.monotonic() < end, (wanted, shown)
            if select.select([self.master], [], [], 0.1)[0]:
                shown += COLOUR.sub("", os.read(self.master, 65536).decode(errors="replace"))
        return shown

    def end(self):
        self.child.kill()
        self.child.wait()
        os.close(self.master)


@contextmanager
def typing(shell, place):
    typed = Typed(shell, place)
    try:
        yield typed
    finally:
        typed.end()


LINES = {  # what is typed -> what a shell must offer, and what it must not
    "carnet ": (["cross", "verify", "lineage"], ["--help"]),
    "carnet cross --s": (["--style", "--shard-size", "--spelling"], ["--tp"]),
    "carnet run --l": (["--log"], ["--to"]),
    "carnet cross --to ": (["hf", "megatron", "trtllm", "vllm"], ["llama"]),
    "carnet cross --as mix": (["mixtral"], ["llama"]),
    "carnet plan --quantize fp8-": (["fp8-block", "fp8-channel"], ["nvfp4"]),
    "carnet verify ": (["checkpoints_of_mine/"], ["request_of_mine.toml"]),
    "carnet cross --request requ": (["request_of_mine.toml"], ["checkpoints_of_mine/"]),
}


@pytest.mark.parametrize("line", LINES)
def test_a_shell_offers_what_comes_next(shell, place, line):
    offered, others = LINES[line]
    if shell == "fish":  # asked in its own words: on a terminal it draws a pager
        script = f"carnet completion fish | source; complete -C '{line}'"
        found = subprocess.run(
            ["fish", "--no-config", "-c", script], env=environment(place), cwd=place, capture_output=True, check=True
        )
        shown = found.stdout.decode()
        assert all(word in shown for word in offered)
    else:
        with typing(shell, place) as typed:
            shown = typed.press(line + "\t\t", *offered)
    assert not {*others} & {*shown.split()}
