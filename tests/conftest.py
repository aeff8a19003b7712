"""Goldens that are kept packed are unpacked once, beside their archive."""

import shutil
import tarfile
import tempfile
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"


def pytest_configure():
    for archive in GOLDENS.rglob("*.tar.xz"):
        folder = archive.with_name(archive.name.removesuffix(".tar.xz"))
        if folder.exists():
            continue
        with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")
            try:
                Path(scratch, folder.name).rename(folder)
            except OSError:  # another worker was faster
                shutil.rmtree(Path(scratch, folder.name), ignore_errors=True)
