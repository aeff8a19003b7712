"""Keep what the documentation shows of carnet's output equal to what carnet prints.

A fenced block of the kind ``console`` is a command and its output. The commands of a page run one after the other in one folder, where
the folders in ``checkpoints`` are bundled ones that Megatron wrote, ``s3://models`` is an empty bucket, and ``demo`` and ``tools`` are
those of the repository::

    ```console
    $ carnet plan --help
    Usage: carnet plan ...
    ```

A block of the kind ``python refit.py``, or ``toml llama.toml``, is that file, which later commands of the page find there.

Without options the outputs are compared; with ``--write`` they are replaced. Of all pages, or of those that are named.
"""

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, os.curdir)  # this is run as a file, and the server of stores is the tests'

from tests.conftest import unpack
from tests.stores.server import environment, serving

PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
BLOCK = re.compile(
    r"^(?P<fence>```+)(?:console\n\$ (?P<command>.+)|[a-z]+ (?P<file>[\w.]+))\n(?P<shown>(?s:.*?))^(?P=fence)$", re.MULTILINE
)
CHECKPOINTS = {
    "llama": "megatron/llama_te_pp2_vpp",
    "gpt": "megatron/gpt_te_tp2",
    "trained": "megatron/llama_dist",
    "lora": "adapters/v0192_loraonly_llama_te_tp2",
    "tuned": "adapters/v0192_lora_llama_te_tp2",
    "qat": "modelopt/qat",
    "eagle": "modelopt/eagle",
    "pruned": "modelopt/pruned",
}
PROGRAMS = ("carnet", "python")  # what a page may run
SETTING = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore", "TERM": "dumb"}  # the same output on every machine


def main() -> int:
    """Compare or rewrite every block of every page."""
    write, named = "--write" in sys.argv, [Path(word) for word in sys.argv[1:] if word != "--write"]
    stale = 0
    unpack()
    pages = named or sorted(path for pattern in PAGES for path in Path().glob(pattern))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a page waits for the processes of its commands
        for path, fresh in zip(pages, pool.map(today, pages), strict=True):
            page = path.read_text()
            if fresh == page:
                continue
            if write:
                path.write_text(fresh)
                print(f"{path}: rewritten")
                continue
            stale += 1
            lines = page.splitlines(), fresh.splitlines()
            print("\n".join(difflib.unified_diff(*lines, f"{path} (as it is)", f"{path} (now)", lineterm="")))
    if stale:
        print("the documentation shows something else than carnet prints: run make format")
    return 1 if stale else 0


def today(path: Path) -> str:
    """Return a page with the outputs that its commands have today, run one after the other."""
    page = path.read_text()
    with tempfile.TemporaryDirectory() as folder, stored(Path(folder), page) as store:
        return BLOCK.sub(partial(current, desk=desk(Path(folder)), store=store), page)


@contextmanager
def stored(folder: Path, page: str) -> Iterator[dict[str, str]]:
    """Serve ``s3://models`` to a page that shows a command on it, and give what names the server in the environment."""
    if not any("s3://" in (block["command"] or "") for block in BLOCK.finditer(page)):
        yield {}
        return
    (folder / "stores/models").mkdir(parents=True)
    with serving(folder / "stores") as relay:
        yield environment(relay.port)


def desk(folder: Path) -> Path:
    """Lay out the folder that a page's commands run in."""
    (folder / "checkpoints").mkdir()
    for name, golden in CHECKPOINTS.items():
        (folder / "checkpoints" / name).symlink_to(Path("tests/goldens", golden).absolute())
    for name in ("demo", "tools"):
        (folder / name).symlink_to(Path(name).absolute())
    return folder


def current(block: re.Match[str], desk: Path, store: Mapping[str, str]) -> str:
    """Return a block with the output that its command has today; put a file's block into its file."""
    if block["file"]:
        (desk / block["file"]).write_text(block["shown"])
        return block[0]
    words = shlex.split(block["command"])
    if words[0] not in PROGRAMS:
        sys.exit(f"a page may run {' and '.join(PROGRAMS)}, not {words[0]!r}")
    # a refusal is worth showing too, so the exit code is not looked at
    done = subprocess.run(
        words,
        cwd=desk,
        env={**os.environ, **SETTING, **store},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # a checkpoint's own path is absolute, and not the same on any two machines
    printed = done.stdout.replace(f"{desk.resolve()}/", "").replace(f"{desk}/", "").strip("\n")
    output = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    return f"{block['fence']}console\n$ {block['command']}\n{output}{block['fence']}"


if __name__ == "__main__":
    sys.exit(main())
