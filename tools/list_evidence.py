"""List, for every family, how many cases of the tests name it, file by file: what docs/families.md shows as its proof.

A case names a family, or a golden that is of one; where it does neither, its test's name or its file's may. pytest is asked, and
nothing runs.
"""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import carnet
from carnet.architectures.known import FAMILIES
from carnet.errors import CarnetError

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/referees", "tests/families/test_every_family.py", "tests/families/test_every_refusal.py")
COLLECT = ("-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider")
CASE = re.compile(r"^tests/(?:\w+/)*test_(?P<file>\w+)\.py::test_(?P<test>\w+)(?:\[(?P<case>.*)\])?$", re.MULTILINE)
NAMES = sorted((family.name for family in FAMILIES), key=len, reverse=True)  # qwen2_moe is not a qwen2


def main() -> int:
    """Print a line for each family; fail where nothing but its own say-so proves one."""
    cases = collected()
    found: dict[str, Counter[str]] = defaultdict(Counter)
    goldens = families_of_goldens()
    for case in CASE.finditer(cases):
        for family in named(case, goldens):
            found[family][case["file"]] += 1
    for family in sorted(NAMES):
        print(f"{family:<13} " + ", ".join(f"{file} {count}" for file, count in sorted(found[family].items())))
    return 0 if all(any(not file.startswith("every_") for file in found[family]) for family in NAMES) else 1


def collected() -> str:
    """Return the ids of all cases, a line each."""
    done = subprocess.run((sys.executable, *COLLECT, *TESTS), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pytest cannot list the tests\n{done.stdout}{done.stderr}")
    return done.stdout


def families_of_goldens() -> dict[str, str]:
    """Return the family of every golden that carnet understands, by its folder's name."""
    found = {}
    for folder in sorted((ROOT / "tests/goldens").glob("*/*/")):
        checkpoint = folder / "hf" if (folder / "hf").is_dir() else folder
        try:
            inventory = carnet.inspect(checkpoint).inventory
        except CarnetError:  # what other programs made of a model, without its weights
            continue
        if inventory is not None:
            found[folder.name] = inventory.family.name
    return found


def named(case: re.Match[str], goldens: Mapping[str, str]) -> set[str]:
    """Return the families that a case is about: those that its parameters name, else its test, else its file."""
    for words in (case["case"] or "", case["test"], case["file"]):
        found = {*families_in(words), *(goldens[word] for word in re.split(r"[^\w]+", words) if word in goldens)}
        if found:
            return found
    return set()


def families_in(words: str) -> Iterator[str]:
    """Yield the families whose names stand among other words."""
    for name in NAMES:
        rest = re.sub(rf"(?<![a-z0-9]){name}(?![a-z0-9])", "", words)
        if rest != words:
            yield name
        words = rest


if __name__ == "__main__":
    sys.exit(main())
