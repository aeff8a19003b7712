"""Run a command and measure it from outside: wall time with its bytes on disk, and peak memory.

Private memory (Pss_Anon) is what the processes allocated for themselves, with a page that several share counted once; mapped files
are page cache that the kernel may take back, so they count in the resident peak (VmHWM) alone. Both are sums over the command and its
children, read every 10 ms.
"""

import argparse
import json
import os
import platform
import resource
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile

from carnet import __version__

TICK = 0.01  # seconds between two looks at the memory
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of a command took."""

    seconds: float  # wall time; with sync until the bytes that it wrote are on disk
    private: int  # bytes: highest sum of Pss_Anon that was seen
    resident: int  # bytes: sum of VmHWM
    processor: float  # seconds of processor time of all its threads, the kernel's on its behalf included


def run(command: Sequence[str], *, sync: bool = True) -> Measured:
    """Run a command, and stop with what it said where it fails. Without ``sync`` the time ends with the process."""
    private, resident = 0, dict[int, int]()
    before = _processor()
    with TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        ended = os.pidfd_open(process.pid)
        while not select.select([ended], [], [], TICK)[0]:
            now = 0
            for pid in _family(process.pid):
                anonymous, highest = _memory(pid)
                now += anonymous
                resident[pid] = max(resident.get(pid, 0), highest)
            private = max(private, now)
        if sync:
            os.sync()
        seconds = time.perf_counter() - began
        os.close(ended)
        if process.wait():
            said.seek(0)
            sys.exit(f"exit code {process.returncode} from {' '.join(command)}\n{said.read().decode(errors='replace')}")
    return Measured(seconds, private, sum(resident.values()), _processor() - before)


def read_through(folder: Path) -> None:
    """Bring every byte of a folder into the page cache."""
    buffer = memoryview(bytearray(8 << 20))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def nbytes(folder: Path) -> int:
    """Return the sum of the sizes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, the first one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def record(name: str, facts: Mapping[str, object]) -> None:
    """Write a result, with the machine it was measured on, to bench/results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": _machine(), **facts}, indent=2) + "\n")
    print(f"\nwritten: {path.relative_to(Path.cwd())}")


def work_folder() -> Path:
    """Return the folder for checkpoints and outputs: CARNET_BENCH_DIR, or .bench in the repository."""
    return Path(os.environ.get("CARNET_BENCH_DIR", ".bench")).absolute()


def _processor() -> float:
    """Return the processor time of every command that has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _family(pid: int) -> list[int]:
    try:
        said = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]  # each thread has its own
    except OSError:
        return [pid]
    return [pid, *(member for child in " ".join(said).split() for member in _family(int(child)))]


def _memory(pid: int) -> tuple[int, int]:
    try:
        said = "".join(Path(f"/proc/{pid}/{file}").read_text() for file in ("smaps_rollup", "status"))
    except OSError:  # it has just ended
        return 0, 0
    lines = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    anonymous, highest = (int(lines.get(field, "0 kB").split()[0]) << 10 for field in ("Pss_Anon", "VmHWM"))
    return anonymous, highest


def _machine() -> dict[str, object]:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages * size / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "carnet": __version__,
    }


def size_and_place(about: str | None, gigabytes: float, what: str) -> argparse.Namespace:
    """Return what a person says of a measurement: ``gb``, a size; ``at``, a folder on the disk; ``rounds``."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, default=gigabytes, help=f"{what} ({gigabytes})")
    options.add_argument("--at", type=Path, default=work_folder(), help="folder on the disk to measure")
    options.add_argument("--rounds", type=int, default=3, help="measurements of each contender (3)")
    return options.parse_args()
