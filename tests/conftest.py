"""Goldens that are kept packed are unpacked once, beside their archive, and again when the archive has changed.

Goldens of one archive share weights, which xz finds again however far apart they lie::

    tar --sort=name --mtime=2026-01-01T00:00Z --owner=0 --group=0 --numeric-owner --mode=u+w,go-w --format=ustar -c FOLDERS |
        xz --lzma2=preset=9e,dict=64MiB,lc=2,lp=1,pb=1 > NAME.tar.xz
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch: models here are tiny, and threads would only wait for each other


def pytest_configure():
    unpack()


def unpack() -> None:
    """Unpack what is not yet there."""
    for archive in GOLDENS.rglob("*.tar.xz"):
        stamp, digest = archive.with_suffix(".unpacked"), hashlib.sha256(archive.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == digest:
            continue
        with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
            with tarfile.open(archive) as packed:
                if hasattr(tarfile, "data_filter"):  # as Debian's 3.11.2 has not
                    packed.extraction_filter = tarfile.data_filter
                packed.extractall(scratch)
            for folder in Path(scratch).iterdir():
                shutil.rmtree(archive.with_name(folder.name), ignore_errors=True)
                folder.rename(archive.with_name(folder.name))
        stamp.write_text(digest)
