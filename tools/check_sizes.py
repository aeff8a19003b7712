"""Fail where a source file is longer than a sitting: 400 lines is the sign that it holds a second idea."""

import sys
from pathlib import Path

LIMIT = 400  # lines


def main() -> int:
    """Name every file under src that is too long."""
    sizes = {path: len(path.read_text().splitlines()) for path in sorted(Path("src").rglob("*.py"))}
    long = {path: size for path, size in sizes.items() if size > LIMIT}
    for path, size in long.items():
        print(f"{path}: {size} lines, more than {LIMIT}: which second idea wants a file of its own?")
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())
