"""Compare crossings from an object store into one with `s5cmd`, which copies the same bytes from and to the same server.

The server is `rclone serve s3` of this machine, over folders of its disk. s5cmd brings the checkpoint to a folder and the folder
back, as whoever converts without carnet has to; within a store it would let the server copy, and no byte would pass this machine.
The rounds go A B C, A B C, ...; a first round is not counted.
"""

import argparse
import os
import shutil
from pathlib import Path

from bench.measure import Measured, nbytes, record, run, summary, table, work_folder
from tests.stores.server import environment, serving

SHARD = "100MB"
COPY = "s5cmd, down and up"


def main() -> None:
    """Measure all contenders and show them side by side."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3, help="measurements of each contender (3)")
    options.add_argument("--layers", type=int, default=2, help="of the model: 2 make 0.5 GB (2)")
    asked = options.parse_args()
    work = work_folder() / "store"
    buckets, here = work / "buckets", work / "here"
    shutil.rmtree(work, ignore_errors=True)
    source = buckets / "models" / "source"
    write(source, asked.layers)
    plan = work / "copy.plan"
    with serving(buckets, "--etag-hash", "") as relay:  # rclone would digest a whole file at each request
        os.environ |= environment(relay.port)
        run(("carnet", "plan", "s3://models/source", "--to", "hf", "--shard-size", SHARD, "-o", str(plan)))
        fetch = f"s5cmd cp 's3://models/source/*' {here}/ && s5cmd cp {here}/ s3://models/out/"
        commands = {
            COPY: ("sh", "-c", fetch),
            "carnet run": ("carnet", "run", str(plan), "s3://models/out"),
            "carnet cross": ("carnet", "cross", "s3://models/source", "s3://models/out", "--to", "hf", "--shard-size", SHARD),
        }
        measured: dict[str, list[Measured]] = {name: [] for name in commands}
        for count in range(asked.rounds + 1):
            for name, command in commands.items():
                shutil.rmtree(buckets / "models" / "out", ignore_errors=True)
                shutil.rmtree(here, ignore_errors=True)
                os.sync()
                relay.seen.clear()
                one = run(command)
                if count:
                    measured[name].append(one)
                written, requests = nbytes(buckets / "models" / "out"), len(relay.seen)
                said = f"{one.seconds:6.2f} s, {requests} requests, {written:,} bytes"
                print(f"{f'round {count}' if count else 'not counted'}: {name:<20}{said}", flush=True)
    report(measured, nbytes(source))
    shutil.rmtree(work)


def write(folder: Path, layers: int) -> None:
    """Write a Llama of random bf16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=SHARD)


def report(measured: dict[str, list[Measured]], source: int) -> None:
    """Print the table and keep the numbers."""
    rows = [["contender", "median s", "x s5cmd", "private MB", "processor s"]]
    facts: dict[str, object] = {"source bytes": source}
    for name, runs in measured.items():
        ratios = [one.seconds / other.seconds for one, other in zip(runs, measured[COPY], strict=True)]
        seconds, ratio = summary([one.seconds for one in runs]), summary(ratios)
        private, processor = max(one.private for one in runs), summary([one.processor for one in runs])
        facts[name] = {"seconds": seconds, "ratio": ratio, "private": private, "processor": processor}
        rows.append(
            [name, f"{seconds['median']:.2f}", f"{ratio['median']:.2f}", f"{private // 10**6}", f"{processor['median']:.1f}"]
        )
    print("", table(rows), sep="\n")
    record("store", facts)


if __name__ == "__main__":
    main()
