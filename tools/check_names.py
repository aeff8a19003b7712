"""Fail where code asks for a kind of checkpoint, or a style of codes, by its name: what it needs to know is a column of a table."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from carnet.dialects.kinds import KINDS
from carnet.quantize.styles import STYLES

NAMES = {*KINDS, *STYLES}
# words of others with the same letters: who quantized a model, as its config says; the specs of Megatron's layers
EXCEPT = {Path("src/carnet/quantize/reading.py"), *Path("src/carnet/megatron").glob("*.py")}


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line of every comparison with a name, also with one of several, and of every case of a match."""
    for node in ast.walk(tree):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides += [node.value] if isinstance(node, ast.MatchValue) else []
        for side in sides:
            for each in side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]:
                if isinstance(each, ast.Constant) and each.value in NAMES:
                    yield each.lineno, str(each.value)


def main() -> int:
    """Name every place."""
    paths = sorted({*Path("src").rglob("*.py")} - EXCEPT)
    found = [(path, line, name) for path in paths for line, name in asked(ast.parse(path.read_text()))]
    for path, line, name in found:
        print(
            f"{path}:{line}: compares with the name {name!r}: which column of carnet.dialects.kinds or quantize.styles is meant?"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
