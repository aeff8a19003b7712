"""Measure how long `carnet --help` takes next to a Python that does nothing: the difference is what carnet imports."""

import sys

from bench.measure import record, run, summary, table

ROUNDS = 20
COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "carnet --version": ("carnet", "--version"),
    "carnet --help": ("carnet", "--help"),
}


def main() -> None:
    """Measure the commands in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        run(command, sync=False)  # compiles what is not compiled yet
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            seconds[name].append(run(command, sync=False).seconds)
    results = {name: summary(values) for name, values in seconds.items()}
    rows: list[tuple[str, ...]] = [("", "median ms", "min", "max")]
    rows += [(name, *(f"{1000 * result[key]:.1f}" for key in ("median", "min", "max"))) for name, result in results.items()]
    print(table(rows))
    record("startup", {"rounds": ROUNDS, "seconds": results})


if __name__ == "__main__":
    main()
