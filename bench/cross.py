"""Compare crossings with `cp -r` of the same checkpoint, in turn and prepared alike. Ratios mean something, seconds do not.

Before each measurement the last output is deleted, the source is read through once, and the disk is synced; each
measurement ends when the bytes are on disk. The rounds go A B C, A B C, ... so that a slow minute of the machine hits all. A
first round is not counted: it is the one that takes fresh memory from the machine for the page cache.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Measured, nbytes, read_through, record, run, summary, table, work_folder

TARGETS = {
    "carnet run, to hf": ("--to", "hf"),
    "carnet run, to trtllm tp 2": ("--to", "trtllm", "--tp", "2", "--pp", "1"),
}
COPY = "cp -r"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to bring the checkpoint's bytes into the output folder."""

    name: str
    command: tuple[str, ...]


def main() -> None:
    """Measure all contenders and show them side by side."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="measurements of each contender (5)")
    rounds: int = options.parse_args().rounds
    work = work_folder()
    print(f"checkpoint: about 2 GB below {work}, written once", flush=True)
    subprocess.run([sys.executable, "-m", "bench.checkpoint", str(work)], check=True)
    (source,) = work.glob("llama-*")
    output = work / "output"
    copy = Contender(COPY, ("cp", "-r", str(source), str(output)))
    whole = Contender("carnet cross, to hf", ("carnet", "cross", str(source), str(output), "--to", "hf"))
    contenders = [copy, *plans(source, work, output), whole]
    report("cross", *take_turns(contenders, rounds, source, output), nbytes(source))


def plans(source: Path, work: Path, output: Path) -> list[Contender]:
    """Plan each crossing once; running the plan is what is measured."""
    found = []
    for name, words in TARGETS.items():
        plan = work / f"{words[1]}.plan"
        plan.unlink(missing_ok=True)
        one = run(["carnet", "plan", str(source), *words, "-o", str(plan)])
        print(f"planned {name.removeprefix('carnet run, ')} in {one.seconds:.2f} s")
        found.append(Contender(name, ("carnet", "run", str(plan), str(output))))
    return found


def take_turns(
    contenders: Sequence[Contender],
    rounds: int,
    source: Path,
    output: Path,
    *,
    also: Sequence[Path] = (),
    once: Collection[str] = (),
    before: Callable[[], object] = lambda: None,
) -> tuple[dict[str, list[Measured]], dict[str, int]]:
    """Let contenders take turns, and return what each took in every round but the first, and how many bytes it wrote.

    ``also`` is read beside the source, ``once`` names those that the first round leaves out, ``before`` is called before each.
    """
    measured: dict[str, list[Measured]] = {contender.name: [] for contender in contenders}
    written: dict[str, int] = {}
    wide = max(len(contender.name) for contender in contenders) + 2
    for count in range(rounds + 1):
        for contender in contenders:
            if not count and contender.name in once:
                continue
            for folder in also:
                read_through(folder)
            prepare(source, output)
            before()
            one = run(contender.command)
            written[contender.name] = nbytes(output) if output.exists() else 0
            if count:
                measured[contender.name].append(one)
            print(f"{f'round {count}' if count else 'not counted'}: {contender.name:<{wide}}{one.seconds:6.2f} s", flush=True)
    prepare(source, output)
    return measured, written


def prepare(source: Path, output: Path) -> None:
    """Bring the machine into the state that every measurement starts from."""
    shutil.rmtree(output, ignore_errors=True)
    read_through(source)
    os.sync()


def report(name: str, measured: dict[str, list[Measured]], written: dict[str, int], source: int) -> None:
    """Print the table and write the numbers under a name."""
    copies = [one.seconds for one in measured[COPY]]
    rows: list[tuple[str, ...]] = [
        ("", "median s", "min", "max", "x cp", "processor s", "private MB", "resident MB", "written MB")
    ]
    facts: dict[str, object] = {}
    for contender, runs in measured.items():
        seconds = summary([one.seconds for one in runs])
        # each round's own ratio: both sides saw the same minute of the machine
        ratio = statistics.median(one.seconds / copy for one, copy in zip(runs, copies, strict=True))
        processor = statistics.median(one.processor for one in runs)
        private, resident = max(one.private for one in runs), max(one.resident for one in runs)
        times = (f"{seconds[key]:.2f}" for key in ("median", "min", "max"))
        sizes = (f"{size / 1e6:,.0f}" for size in (private, resident, written[contender]))
        rows.append((contender, *times, f"{ratio:.2f}", f"{processor:.2f}", *sizes))
        facts[contender] = {
            "seconds": seconds,
            "all_seconds": [round(one.seconds, 3) for one in runs],
            "ratio_to_cp": ratio,
            "processor_seconds": processor,
            "peak_private_bytes": private,
            "peak_resident_bytes": resident,
            "written_bytes": written[contender],
        }
    print("\n" + table(rows))
    record(name, {"source_bytes": source, "contenders": facts})


if __name__ == "__main__":
    main()
