"""Fail where a file is opened, listed or changed by anything but the one door to the disk, carnet/storage; and where one is mapped.

A mapped file that somebody truncates kills the process with SIGBUS, so nothing maps one.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("src/carnet")
DOOR = "storage"
OTHERS = {  # what touches the disk and no file of a checkpoint, a plan or a target
    "calibrate.py": "looks whether its output may be replaced, and whether transformers finds a tokenizer",
    "cli/edge.py": "holds the descriptors of the terminal's streams",
    "cli/options.py": "lists a folder that a person mistyped",
    "megatron/export/trtllm/records.py": "has the signature of megatron-core's own",
    "report/running.py": "asks the kernel how much memory it has",
    "plans/options.py": "asks whether a name can be a path of this machine",
}
MODULES = {  # module -> what of it does not touch the disk
    "io": {"BytesIO", "StringIO", "TextIOWrapper"},
    "os": {
        *(
            "_exit",
            "cpu_count",
            "fork",
            "fsencode",
            "fspath",
            "getpid",
            "getppid",
            "kill",
            "sched_getaffinity",
            "sysconf",
            "uname",
        ),
        "waitpid",
    },
    "shutil": {"get_terminal_size", "which"},
}
METHODS = {  # of a Path, and of os.path
    *("absolute", "exists", "glob", "is_dir", "is_file", "is_mount", "is_symlink", "iterdir", "lstat", "mkdir", "read_bytes"),
    *("getsize", "isdir", "isfile", "islink", "lexists", "realpath", "samefile"),
    *("read_text", "readlink", "resolve", "rglob", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text"),
}
MAPS = {"mmap", "memmap", "fromfile", "tofile"}


def main() -> int:
    """Name every place."""
    found = [f"{path}:{line}: {what}" for path in sorted(ROOT.rglob("*.py")) for line, what in places(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


def places(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line of every place in a file, and what is wrong there."""
    name = path.relative_to(ROOT).as_posix()
    free = name.startswith(f"{DOOR}/") or name in OTHERS or path.name.startswith("test_")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = {each.name for each in node.names} | {getattr(node, "module", None)}
            if words & MAPS:
                yield node.lineno, "nothing maps a file"
        elif isinstance(node, ast.Call) and (called := _called(node.func)) is not None:
            if called.rsplit(".", 1)[-1] in MAPS:
                yield node.lineno, f"{called}: nothing maps a file"
            elif not free:
                yield node.lineno, f"{called}: files are opened, listed and changed in carnet/{DOOR} alone"


def _called(func: ast.expr) -> str | None:
    """Return what is called, where it touches the disk."""
    if isinstance(func, ast.Name):
        return func.id if func.id in ("open", *MAPS) else None
    if not isinstance(func, ast.Attribute):
        return None
    if isinstance(func.value, ast.Name) and func.value.id in MODULES:
        return None if func.attr in MODULES[func.value.id] else f"{func.value.id}.{func.attr}"
    return func.attr if func.attr in METHODS | MAPS else None


if __name__ == "__main__":
    sys.exit(main())
