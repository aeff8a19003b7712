"""Cut the crossings of the largest published models for 1,000 machines, and pass a crossing's tasks through a Ray cluster on this one.

Two tables. ``cut``: what the head of ``carnet cross --on`` does before the first task, headers only, the files sparse: its time and its
private memory, what it sends to a node, and by how much parts differ. ``tasks``: what a task costs that has next to nothing to do.

``python -m bench.fleet cut`` or ``tasks``; without a word both.
"""

import json
import pickle
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from math import prod
from pathlib import Path

from bench.measure import record, run, table, work_folder
from bench.published import published, shapes
from bench.skeleton import write

PARTS = 1000
MODELS = "deepseek-ai/DeepSeek-V3", "moonshotai/Kimi-K2-Instruct"
FP8: dict[str, object] = {"to": "hf", "quantize": "fp8-block", "style": "deepseek"}
DYNAMIC: dict[str, object] = {"to": "hf", "quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic"}
ASKED: dict[str, dict[str, object]] = {
    "hf": {"to": "hf"},
    "hf, fp8-block": FP8,
    "hf, fp8, measured": DYNAMIC,
    "megatron, EP 8": {"to": "megatron", "ep": 8, "read_by": "megatron-bridge"},
}
TASKS = 1000


def head(folder: Path, asked: dict[str, object], told: Path) -> None:
    """Do what a head does, and write down how long it took and what came out."""
    from carnet import api
    from carnet.executor import shares
    from carnet.executor.jobs import jobs_of
    from carnet.executor.owning import proven
    from carnet.storage.protocol import Part

    begun = time.perf_counter()
    made = api.plan(folder, **asked, memory="2G")  # type: ignore[arg-type]  # options by name
    planned = time.perf_counter()
    proven(made)
    jobs = jobs_of(made)
    sent = len(pickle.dumps((made, jobs), protocol=5))
    nbytes, seconds = jobs.rows["nbytes"], time.perf_counter()
    found = dict[str, list[int]]()
    for name, cut in (("writing", shares.writing), ("measuring", shares.measuring)):
        found[name] = [int(nbytes[cut(jobs, Part(number, PARTS))].sum()) for number in range(1, PARTS + 1)]
    facts = {
        "steps": len(made.steps),
        "jobs": len(jobs),
        "sent": sent,
        "bytes": {name: sum(each) for name, each in found.items()},
    }
    spread = {name: [min(each), max(each)] for name, each in found.items()}
    times = {"plan": planned - begun, "jobs": seconds - planned, "cuts": time.perf_counter() - seconds}
    told.write_text(json.dumps({**facts, "spread": spread, "seconds": times}))


def cut() -> None:
    """Show a line for each model and target."""
    folder, rows, results = work_folder() / "fleet", list[list[str]](), list[dict[str, object]]()
    configs = dict(published())
    for name in MODELS:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tensors = shapes(configs[name])
        write(folder, tensors, configs[name])
        billions = sum(prod(shape) for _, shape in tensors.values()) / 1e9
        for target, asked in ASKED.items():
            with tempfile.NamedTemporaryFile() as told:
                words = [sys.executable, "-m", "bench.fleet", "head", str(folder), json.dumps(asked), told.name]
                one = run(words, sync=False)
                found = json.loads(Path(told.name).read_text())
            mean = found["bytes"]["writing"] / PARTS
            low, high = found["spread"]["writing"]
            apart = f"{100 * (low / mean - 1):+.1f} .. {100 * (high / mean - 1):+.1f} %"
            cells = [f"{found['steps']:,}", f"{found['jobs']:,}", f"{one.seconds:.1f}", f"{one.private / 1e6:,.0f}"]
            rows.append(
                [f"{name} ({billions:,.0f}B), {target}", *cells, f"{found['sent'] / 1e6:.1f}", f"{mean / 1e6:,.0f}", apart]
            )
            results.append({"model": name, "target": target, "billions": billions, **found, **asdict(one)})
            print(".", end="", flush=True, file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    print(table([["", "steps", "jobs", "head s", "private MB", "sent MB", "a part MB", "parts differ"], *rows]))
    record("fleet_cut", {"parts": PARTS, "plans": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["head"]:
        head(Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
    if sys.argv[1:] in ([], ["cut"]):
        cut()
