"""All of one machine: `cross`, `run` and `verify` as people type them, next to `cp -r`, on every disk that is named, by threads.

The model is a Llama of random bf16 weights in Hugging Face's layout, of as many layers as make up the size that is asked for; it is
written once for each disk. A round is each contender in turn, prepared as bench.cross prepares them. `verify` looks at a target that
`cross` made before. Nothing but carnet and safetensors is needed, so that any machine can be measured.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench.cross import COPY, Contender, report, take_turns
from bench.measure import nbytes, run, work_folder

HIDDEN, FFN, HEADS, KV, DIM, VOCAB = 4096, 14336, 32, 8, 128, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
LAYER = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (KV * DIM, HIDDEN),
    "self_attn.v_proj": (KV * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
CACHES = Path("/proc/sys/vm/drop_caches")  # proc(5): 3 frees the page cache
CARNET = (sys.executable, "-m", "carnet")


def main() -> None:
    """Measure on every disk and show a table for each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, default=4, help="size of the model (4)")
    options.add_argument("--at", type=Path, nargs="+", default=[work_folder()], help="folders on the disks to measure")
    options.add_argument(
        "--threads", type=int, nargs="*", default=[], help="numbers of threads to measure beside what carnet takes"
    )
    options.add_argument("--schemes", nargs="*", default=[], help="schemes that quantize without a file of activations")
    options.add_argument("--rounds", type=int, default=3, help="measurements of each contender (3)")
    options.add_argument(
        "--cold", action="store_true", help="read the source from the disk each time (root alone may ask for it)"
    )
    asked = options.parse_args()
    for place in asked.at:
        source, output, proven = write(place, asked.gb), place / "output", place / "proven"
        plan = place / "hf.plan"
        plan.unlink(missing_ok=True)
        shutil.rmtree(proven, ignore_errors=True)
        run([*CARNET, "plan", str(source), "--to", "hf", "-o", str(plan)])
        run([*CARNET, "cross", str(source), str(proven), "--to", "hf"])
        contenders = [Contender(COPY, ("cp", "-r", str(source), str(output)))]
        for threads in (None, *asked.threads):
            words: tuple[str, ...] = () if threads is None else ("--threads", str(threads))
            name = "" if threads is None else f", {threads} threads"
            contenders += [
                Contender(f"carnet run{name}", (*CARNET, "run", str(plan), str(output), *words)),
                Contender(f"carnet cross{name}", (*CARNET, "cross", str(source), str(output), "--to", "hf", *words)),
                Contender(f"carnet verify CKPT OUT{name}", (*CARNET, "verify", str(source), str(proven), *words)),
                Contender(f"carnet verify OUT{name}", (*CARNET, "verify", str(proven), *words)),
            ]
        for scheme in asked.schemes:
            words = ("--to", "hf", "--quantize", scheme, "--style", "compressed-tensors", "--activations", "dynamic")
            contenders.append(Contender(f"carnet cross, {scheme}", (*CARNET, "cross", str(source), str(output), *words)))
        measure(place, contenders, source, output, asked.rounds, cold=asked.cold)
        shutil.rmtree(proven)


def measure(place: Path, contenders: list[Contender], source: Path, output: Path, rounds: int, *, cold: bool) -> None:
    """Let the contenders take turns on one disk, and print their table."""
    forget = (lambda: CACHES.write_text("3")) if cold else (lambda: None)
    measured, written = take_turns(contenders, rounds, source, output, before=forget)
    print(f"\n{place}, {len(os.sched_getaffinity(0))} cores", flush=True)
    report(f"machine-{place.name}", measured, written, nbytes(source))


def write(place: Path, gigabytes: float) -> Path:
    """Return the model's folder, written where it is not there yet in this size."""
    layers = max(
        1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / sum(np.prod(shape, dtype=int) for shape in LAYER.values()))
    )
    folder = place / f"llama-{layers}-layers"
    if (folder / "config.json").exists():  # written last
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0).standard_normal(1 << 25, np.float32).astype(ml_dtypes.bfloat16)

    def tensor(shape: tuple[int, ...], turn: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        return np.resize(np.roll(numbers, 4097 * turn), shape)

    names = dict[str, str]()
    for layer in range(layers):
        held = {
            f"model.layers.{layer}.{name}.weight": tensor(shape, 16 * layer + turn)
            for turn, (name, shape) in enumerate(LAYER.items())
        }
        if layer == 0:
            held |= {"model.embed_tokens.weight": tensor((VOCAB, HIDDEN), -1), "lm_head.weight": tensor((VOCAB, HIDDEN), -2)}
            held |= {"model.norm.weight": tensor((HIDDEN,), -3)}
        save_file(held, folder / (name := f"model-{layer:05}.safetensors"), {"format": "pt"})
        names |= dict.fromkeys(held, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return folder


if __name__ == "__main__":
    main()
