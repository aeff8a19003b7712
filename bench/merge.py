"""An average of two checkpoints next to `cp -r` of one, and next to mergekit where `make test` has brought it.

The model is that of bench.machine; another of its size is written once beside it, and the first once more as Megatron stores it.
Preparation and ratios are those of bench.cross. Every merge of carnet's is proven; mergekit compares nothing.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from bench.cross import COPY, Contender, prepare, report, take_turns
from bench.delta import next_version
from bench.machine import CARNET, write
from bench.measure import nbytes, run, size_and_place

WEIGHTS = ("--weights", "0.5,0.5")


def main() -> None:
    """Measure all contenders and show them side by side."""
    asked = size_and_place(__doc__, 2, "size of the model")
    first, output, ranks = write(asked.at, asked.gb), asked.at / "output", asked.at / "megatron"
    second = next_version(first, 0.5)
    shutil.rmtree(ranks, ignore_errors=True)
    run([*CARNET, "cross", str(first), str(ranks), "--to", "megatron"])
    a, b, out = map(str, (first, second, output))
    contenders = [
        Contender(COPY, ("cp", "-r", a, out)),
        Contender("carnet merge A B", (*CARNET, "merge", a, b, out, *WEIGHTS)),
        Contender("carnet merge A B, A as Megatron's", (*CARNET, "merge", str(ranks), b, out, *WEIGHTS)),
        Contender("carnet verify A B OUT", (*CARNET, "verify", a, b, str(asked.at / "merged"), *WEIGHTS)),
        *mergekit(first, second, asked.at / "merge.yaml", output),
    ]
    prepare(first, asked.at / "merged")
    run([*CARNET, "merge", a, b, str(asked.at / "merged"), *WEIGHTS])
    measured, written = take_turns(contenders, asked.rounds, first, output, also=(second, ranks))
    size = nbytes(first)
    print(f"\n{asked.at}, {len(os.sched_getaffinity(0))} cores; two checkpoints of {size / 1e9:.2f} GB", flush=True)
    report("merge", measured, written, size)
    for folder in (second, ranks, asked.at / "merged"):
        shutil.rmtree(folder)


def mergekit(first: Path, second: Path, said: Path, out: Path) -> list[Contender]:
    """Return mergekit's average of two folders, in f32 as carnet's, where it is there."""
    brought = next(iter(sorted(Path(sys.prefix).glob("mergekit-*"))), None)
    if brought is None:
        return []
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (first, second)]
    said.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": "bfloat16"}))
    space = f"PYTHONPATH={brought}:{os.environ.get('PYTHONPATH', '')}"
    words = ("-m", "mergekit.scripts.run_yaml", str(said), str(out), "--no-copy-tokenizer")
    return [Contender("mergekit 0.1.5, linear", ("env", space, "HF_HUB_OFFLINE=1", sys.executable, *words))]


if __name__ == "__main__":
    main()
