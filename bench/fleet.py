"""Cut the crossings of the largest published models for 1,000 machines, and pass a crossing's tasks through a Ray cluster on this one.

Two tables. ``cut``: what the head of ``carnet cross --on`` does before the first task, headers only, the files sparse: its time and its
private memory, what it sends to a node, and by how much parts differ. ``tasks``: what a task costs that has next to nothing to do, and
what a core takes for a gigabyte.

``python -m bench.fleet cut`` or ``tasks``; without a word both.
"""

import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from ray.cluster_utils import Cluster
from safetensors.numpy import save_file

from bench.measure import nbytes, record, run, table, work_folder
from bench.published import published, shapes
from bench.skeleton import write
from carnet import api
from carnet.executor import parts
from carnet.executor.jobs import jobs_of
from carnet.executor.owning import held, proven
from carnet.executor.run import prepared
from carnet.fleet import tasks as sent
from carnet.fleet.cluster import reached
from carnet.storage.protocol import Part
from carnet.storage.schemes import folder_at

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
TASKS, ROUNDS = 1000, 2
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
WIDTHS: dict[str, tuple[int, ...]] = {  # of a layer of a Llama of 8B
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
    "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
}
MEASURED: dict[str, dict[str, object]] = {
    "hf": {"to": "hf"},
    "trtllm, TP 2": {"to": "trtllm", "tp": 2},
    "hf, fp8, measured": DYNAMIC,
}


def head(folder: Path, asked: dict[str, object], told: Path) -> None:
    """Do what a head does, and write down how long it took and what came out."""
    begun = time.perf_counter()
    made = api.plan(folder, **asked, memory="2G")  # type: ignore[arg-type]  # options by name
    planned = time.perf_counter()
    proven(made)
    jobs = jobs_of(made)
    sent = len(pickle.dumps((made, jobs), protocol=5))
    nbytes, seconds = jobs.rows["nbytes"], time.perf_counter()
    found = dict[str, list[int]]()
    for name, cut in (("writing", parts.writing), ("measuring", parts.measuring)):
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


def save(folder: Path, layers: int) -> None:
    """Write a Llama of random weights, of so many of the layers that one of 8B has."""
    layer = [*WIDTHS.items()]
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer}
    shapes |= {"model.embed_tokens.weight": (8192, 4096), "model.norm.weight": (4096,), "lm_head.weight": (8192, 4096)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    numbers = np.random.default_rng(0)
    folder.mkdir(parents=True)
    held = {name: numbers.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def overhead(folder: Path) -> dict[str, float]:
    """Return the seconds that many tasks take which have little to do, nothing, and none of carnet's."""
    with reached("ray", lambda nodes: None) as cluster:
        made, out = api.plan(folder, to="trtllm", tp=2), folder.with_name("out")
        of, jobs = proven(made), jobs_of(made)
        with held(of, folder_at(str(out)), Part(1, TASKS)) as target:
            prepared(made, target.staging)
        known = sent.Sent(of.crossing.plan, cluster.keep((made, jobs)), str(out), 1)
        calls = [(known, Part(number, TASKS, joins=True), [cluster.keep({})]) for number in range(1, TASKS + 1)]
        seconds = dict[str, float]()
        for name in ("doing them", "done before"):
            begun = time.perf_counter()
            cluster.all(sent.write, calls, lambda nbytes: None)
            seconds[name] = time.perf_counter() - begun
        nothing = cluster.ray.remote(num_cpus=1)(lambda: None)
        begun = time.perf_counter()
        cluster.ray.get([nothing.remote() for _ in range(TASKS)])
        seconds["Ray alone"] = time.perf_counter() - begun
    return seconds


def cores(source: Path) -> tuple[list[list[str]], list[dict[str, object]]]:
    """Return the processor time that crossings take for each gigabyte of the source, as rows and as numbers."""
    rows, results, size = list[list[str]](), list[dict[str, object]](), nbytes(source) / 1e9
    out, plan = source.with_name("out"), source.with_name("a.plan")
    for name, asked in MEASURED.items():
        words = [word for option, value in asked.items() for word in (f"--{option}", str(value))]
        run(["carnet", "plan", str(source), *words, "-o", str(plan)], sync=False)
        taken = dict[str, float]()
        for verb, command in (("run", [str(plan), str(out)]), ("cross", [str(source), str(out), *words])):
            taken[verb] = min(_once(["carnet", verb, *command], out) for _ in range(ROUNDS)) / size
        rows.append([name, *(f"{each:.2f}" for each in taken.values())])
        results.append({"target": name, "processor seconds a GB": taken})
    return rows, results


def _once(command: list[str], out: Path) -> float:
    taken = run(command, sync=False).processor
    shutil.rmtree(out)
    return taken


def tasks() -> None:
    """Show what a task costs, and what a core does."""
    folder, nodes = work_folder() / "fleet", len(os.sched_getaffinity(0))
    shutil.rmtree(folder, ignore_errors=True)
    local = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(nodes - 1):
        local.add_node(wait=True, **NODE)
    os.environ["RAY_ADDRESS"] = local.address
    save(folder / "small", 1)
    seconds = overhead(folder / "small")
    print(
        table(
            [["tasks a second", *seconds], [f"{nodes} nodes of a core", *(f"{TASKS / each:,.0f}" for each in seconds.values())]]
        )
    )
    shutil.rmtree(folder)
    local.shutdown()  # type: ignore[no-untyped-call]  # Ray's own
    save(folder / "source", 2)
    rows, results = cores(folder / "source")
    shutil.rmtree(folder)
    print(table([["processor seconds a GB of bf16", "run", "cross"], *rows]))
    record("fleet_tasks", {"nodes": nodes, "tasks": TASKS, "seconds": seconds, "crossings": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["head"]:
        head(Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
    if sys.argv[1:] in ([], ["cut"]):
        cut()
    if sys.argv[1:] in ([], ["tasks"]):
        tasks()
