"""Build the sdist, and the wheel from it, into dist: twice, the same bytes each time, with nothing in them but what belongs there.

Times in them are those of the last commit, so that a commit has one wheel. The sdist leaves the tests out: they need this repository,
with 10 MB of checkpoints and programs of gigabytes, and who has the repository has them.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

DIST = Path("dist")
PAGES = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}  # beside src in the sdist
MADE = {".gitignore", "PKG-INFO", "pyproject.toml"}  # hatchling adds them
INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}  # what a wheel says of itself


def main() -> int:
    """Build both, compare them, and put them in place of what was there."""
    with tempfile.TemporaryDirectory(dir=".") as first, tempfile.TemporaryDirectory(dir=".") as second:
        built, again = build(Path(first)), build(Path(second))
        wrong = [f"{one.name}: built twice, and different" for one, two in zip(built, again, strict=True) if not same(one, two)]
        wrong += [f"{path.name}: {what}" for path in built for what in misplaced(path)]
        if not wrong:
            shutil.rmtree(DIST, ignore_errors=True)
            DIST.mkdir()
            for path in built:
                path.rename(DIST / path.name)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


def git(*words: str) -> str:
    """Return what git says; nothing where this is no clone."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def build(folder: Path) -> list[Path]:
    """Build the sdist, and the wheel from what the sdist holds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct") or "1577836800"  # else that of 2020
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), "."]
    done = subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": epoch}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return sorted(folder.iterdir())


def same(one: Path, two: Path) -> bool:
    """Compare the names and the bytes."""
    return one.name == two.name and filecmp.cmp(one, two, shallow=False)


def misplaced(path: Path) -> list[str]:
    """Name what lacks and what is too much, next to the files that git knows."""
    known = set(git("ls-files", "src", *PAGES).splitlines())
    if not known:  # no clone
        known = PAGES | {each.as_posix() for each in Path("src").rglob("*") if each.suffix in (".py", ".typed")}
    release = "-".join(path.name.split("-")[:2]).removesuffix(".tar.gz")
    if path.suffix == ".whl":
        expected = {name.removeprefix("src/") for name in known if name.startswith("src/")}
        expected |= {f"{release}.dist-info/{name}" for name in INFO}
        found = set(zipfile.ZipFile(path).namelist())
    else:
        expected = {f"{release}/{name}" for name in known | MADE}
        with tarfile.open(path) as archive:
            found = set(archive.getnames())
    lacking = [f"lacks {name}" for name in sorted(expected - found)]
    return lacking + [f"has {name}, too: git add it, or take it away" for name in sorted(found - expected)]


if __name__ == "__main__":
    sys.exit(main())
