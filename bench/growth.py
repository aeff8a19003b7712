"""Measure how planning, proving and verifying grow: models with twice the layers, twice the experts, cut for twice the ranks.

Processor time, in one process, of the best of three; a time that doubles with the model is as it should be. Weights are tiny and
random, so that what is measured is the work for each tensor.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import carnet
from bench.measure import record, table
from carnet.planner.reproof import reprove

HIDDEN, HEADS, DIM, FFN, VOCAB = 32, 32, 8, 64, 64
ROUNDS = 3

# what grows, its sizes, the other numbers of the model, and the target
GROWN: tuple[tuple[str, tuple[int, ...], dict[str, int], dict[str, object]], ...] = (
    ("layers", (32, 64, 128), {}, {"to": "hf"}),
    ("layers", (32, 64, 128), {}, {"to": "megatron", "tp": 2}),
    ("experts", (32, 64, 128), {"layers": 4}, {"to": "hf"}),
    ("experts", (32, 64, 128), {"layers": 4}, {"to": "megatron"}),
    ("ranks", (8, 16, 32), {"layers": 16}, {"to": "trtllm"}),
)


def save(folder: Path, layers: int, experts: int) -> None:
    """Write a Llama of random weights, or a Mixtral of so many experts, as transformers names its tensors."""
    config = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{part}_proj.weight": (HEADS * DIM, HIDDEN) for part in "qkv"}
        shapes[f"{at}self_attn.o_proj.weight"] = (HIDDEN, HEADS * DIM)
        if not experts:
            shapes |= {f"{at}mlp.{part}_proj.weight": (FFN, HIDDEN) for part in ("gate", "up")}
            shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, FFN)
            continue
        mixture = f"{at}block_sparse_moe."
        shapes[f"{mixture}gate.weight"] = (experts, HIDDEN)
        for expert in range(experts):
            shapes |= {f"{mixture}experts.{expert}.{part}.weight": (FFN, HIDDEN) for part in ("w1", "w3")}
            shapes[f"{mixture}experts.{expert}.w2.weight"] = (HIDDEN, FFN)
    draw = np.random.default_rng(0)
    folder.mkdir()
    tensors = {name: draw.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of the best of some rounds."""
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def measure(folder: Path, grown: str, size: int, others: dict[str, int], options: dict[str, object]) -> tuple[int, list[float]]:
    """Return the number of tensors of the target, and the times of plan, proof and verification."""
    counts = {"layers": 0, "experts": 0} | others | ({grown: size} if grown != "ranks" else {})
    options = options | ({"tp": size} if grown == "ranks" else {})
    save(folder / "source", counts["layers"], counts["experts"])
    plan = carnet.plan(folder / "source", **options)  # type: ignore[arg-type]  # a table of options
    sizes = {"model.safetensors": (folder / "source/model.safetensors").stat().st_size}
    carnet.run(plan, folder / "target")
    times = [
        seconds(lambda: carnet.plan(folder / "source", **options)),  # type: ignore[arg-type]  # as above
        seconds(lambda: reprove(plan, sizes)),
        seconds(lambda: carnet.verify(folder / "source", folder / "target")),
    ]
    return plan.proof["target tensors"], times


def main() -> None:
    """Show a line for each model, with how many times the one before it each took."""
    rows, results = list[list[str]](), list[dict[str, object]]()
    for grown, numbers, others, options in GROWN:
        before: list[float] | None = None
        for size in numbers:
            with tempfile.TemporaryDirectory() as folder:
                tensors, times = measure(Path(folder), grown, size, others, options)
            factors = [
                "" if before is None else f" (x{now / then:.1f})" for now, then in zip(times, before or times, strict=True)
            ]
            cells = [f"{now:.2f}{factor}" for now, factor in zip(times, factors, strict=True)]
            rows.append([f"{size} {grown}, to {options['to']}", f"{tensors:,}", *cells])
            results.append({"grown": grown, "size": size, **options, "tensors": tensors, "seconds": times})
            before = times
    print(table([["model", "tensors", "plan s", "proof s", "verify s"], *rows]))
    record("growth", {"rounds": ROUNDS, "grown": results})


if __name__ == "__main__":
    main()
