"""Deltas of a step of training next to `cp -r` of both versions: a small share of the elements has other low bits in the second one.

The model is that of bench.machine; its next version is written once beside it, and the first one once more as Megatron stores it.
Preparation and ratios are those of bench.cross; nothing but carnet and safetensors is needed, so that any machine can be measured.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np

from bench.cross import COPY, Contender, report, take_turns
from bench.machine import CARNET, write
from bench.measure import nbytes, run, work_folder

PIECE = 16 << 20  # bytes that are changed together


def main() -> None:
    """Measure all contenders and show them side by side."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, default=2, help="size of the model (2)")
    options.add_argument("--at", type=Path, default=work_folder(), help="folder on the disk to measure")
    options.add_argument("--share", type=float, default=0.03, help="of the elements that change (0.03)")
    options.add_argument("--rounds", type=int, default=3, help="measurements of each contender (3)")
    asked = options.parse_args()
    first, output, delta, ranks = write(asked.at, asked.gb), asked.at / "output", asked.at / "delta", asked.at / "megatron"
    second = next_version(first, asked.share)
    for folder in (delta, ranks):
        shutil.rmtree(folder, ignore_errors=True)
    run([*CARNET, "cross", str(first), str(ranks), "--to", "megatron"])
    run([*CARNET, "delta", str(first), str(second), str(delta)])
    a, b, d, out = map(str, (first, second, delta, output))
    contenders = [
        Contender(COPY, ("sh", "-c", f"mkdir {out} && cp -r {a} {b} {out}")),
        Contender("carnet delta A B", (*CARNET, "delta", a, b, out)),
        Contender("carnet delta A B, A as Megatron's", (*CARNET, "delta", str(ranks), b, out)),
        Contender("carnet apply A DELTA", (*CARNET, "apply", a, d, out)),
        Contender("carnet verify A DELTA --against B", (*CARNET, "verify", a, d, "--against", b)),
    ]
    measured, written = take_turns(contenders, asked.rounds, first, output, also=(second, ranks, delta))
    size = nbytes(first)
    print(
        f"\n{asked.at}, {len(os.sched_getaffinity(0))} cores; a delta is {nbytes(delta) / size:.2%} of {size / 1e9:.2f} GB",
        flush=True,
    )
    report("delta", measured, written, 2 * size)
    for folder in (second, ranks, delta):
        shutil.rmtree(folder)


def next_version(folder: Path, share: float) -> Path:
    """Return the folder of a model whose elements have other low bits, as many of them as a share says."""
    other, random = folder.with_name(f"{folder.name}-next"), np.random.default_rng(1)
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    for path in sorted(other.glob("*.safetensors")):
        with path.open("r+b") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            file.seek(8)
            assert all(
                each["dtype"] == "BF16" for name, each in json.loads(file.read(begin - 8)).items() if name != "__metadata__"
            )
            for at in range(begin, path.stat().st_size, PIECE):
                file.seek(at)
                numbers = np.frombuffer(bytearray(file.read(PIECE)), np.uint16)
                low = random.integers(1, 8, numbers.size, np.uint16)
                low[random.random(numbers.size, np.float32) >= share] = 0
                file.seek(at)
                file.write((numbers ^ low).tobytes())
    return other


if __name__ == "__main__":
    main()
