"""Measure the planning of a checkpoint with 100,000 tensors. It is all headers: the weights are holes in sparse files."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench import skeleton
from bench.measure import record, run, summary, table, work_folder

LAYERS, HIDDEN, FFN, HEADS, KV, DIM, VOCAB = 11_111, 512, 1024, 16, 8, 32, 32_000
FILES = 64
ROUNDS = 3
# the budget is that of the run, which reads the plan again: a plan of this size has no room in the default
REQUEST = ("--to", "trtllm", "--tp", "2", "--pp", "1", "--memory", "8G")

# name within a layer, shape: transformers/models/llama/modeling_llama.py
LAYER = (
    ("input_layernorm.weight", (HIDDEN,)),
    ("self_attn.q_proj.weight", (HEADS * DIM, HIDDEN)),
    ("self_attn.k_proj.weight", (KV * DIM, HIDDEN)),
    ("self_attn.v_proj.weight", (KV * DIM, HIDDEN)),
    ("self_attn.o_proj.weight", (HIDDEN, HEADS * DIM)),
    ("post_attention_layernorm.weight", (HIDDEN,)),
    ("mlp.gate_proj.weight", (FFN, HIDDEN)),
    ("mlp.up_proj.weight", (FFN, HIDDEN)),
    ("mlp.down_proj.weight", (HIDDEN, FFN)),
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "bfloat16",
}


def main() -> None:
    """Write the headers, and plan a crossing some times."""
    work = work_folder()
    source, plan = work / "hf-100k", work / "hf-100k.plan"
    count = write(source)
    seconds, private, resident = [], 0, 0
    for _ in range(ROUNDS):
        plan.unlink(missing_ok=True)
        one = run(["carnet", "plan", str(source), *REQUEST, "-o", str(plan)])
        seconds.append(one.seconds)
        private, resident = max(private, one.private), max(resident, one.resident)
    times, size = summary(seconds), plan.stat().st_size
    shutil.rmtree(source)
    plan.unlink()
    head = ("", "median s", "min", "max", "private MB", "resident MB", "plan MB")
    numbers = (f"{times['median']:.2f}", f"{times['min']:.2f}", f"{times['max']:.2f}")
    print(table([head, (f"plan {count:,} tensors", *numbers, *(f"{n / 1e6:,.0f}" for n in (private, resident, size)))]))
    memory = {"peak_private_bytes": private, "peak_resident_bytes": resident, "plan_bytes": size}
    record("plan", {"tensors": count, "rounds": ROUNDS, "seconds": times, **memory})


def write(folder: Path) -> int:
    """Write a Hugging Face checkpoint without weights and return its number of tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {name: ("BF16", shape) for name, shape in _tensors()}
    skeleton.write(folder, tensors, CONFIG, shard=math.ceil(sum(map(skeleton.nbytes, tensors.values())) / FILES))
    return len(tensors)


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in LAYER:
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


if __name__ == "__main__":
    main()
