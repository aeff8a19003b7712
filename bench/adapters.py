"""Adding adapters (LoRA, rank 16, beside all linear layers) to a model, next to `cp -r` of it, and to peft's merge_and_unload.

The model is that of bench.machine; the adapters are random. Preparation and ratios are those of bench.cross. `carnet run` writes,
`carnet cross` also proves; peft adds in the model's bf16 on the CPU, loads and saves with transformers, and compares nothing.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench.cross import COPY, Contender, prepare, report, take_turns
from bench.machine import CARNET, LAYER, write
from bench.measure import nbytes, run, size_and_place

RANK = 16
PEFT = """
import sys, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def main() -> None:
    """Measure all contenders and show them side by side."""
    asked = size_and_place(__doc__, 2, "size of the model")
    base, output, merged, plan = write(asked.at, asked.gb), asked.at / "output", asked.at / "merged", asked.at / "adapted.plan"
    adapter = beside(base, asked.at / "adapter")
    words = ("--to", "hf", "--adapter", str(adapter))
    plan.unlink(missing_ok=True)
    run([*CARNET, "plan", str(base), *words, "-o", str(plan)])
    contenders = [
        Contender(COPY, ("cp", "-r", str(base), str(output))),
        Contender("carnet run, --adapter", (*CARNET, "run", str(plan), str(output))),
        Contender("carnet cross --adapter", (*CARNET, "cross", str(base), str(output), *words)),
        Contender("carnet verify --adapter", (*CARNET, "verify", str(base), str(merged), "--adapter", str(adapter))),
        Contender("peft merge_and_unload, bf16", (sys.executable, "-c", PEFT, str(base), str(adapter), str(output))),
    ]
    prepare(base, merged)
    run([*CARNET, "cross", str(base), str(merged), *words])
    measured, written = take_turns(contenders, asked.rounds, base, output, also=(adapter,))
    print(f"\n{asked.at}, {len(os.sched_getaffinity(0))} cores; a model of {nbytes(base) / 1e9:.2f} GB", flush=True)
    report("adapters", measured, written, nbytes(base))
    for folder in (merged, adapter):
        shutil.rmtree(folder)


def beside(base: Path, out: Path) -> Path:
    """Write adapters of a model as peft does."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    random, found = np.random.default_rng(1), dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]()
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    modules = {name: shape for name, shape in LAYER.items() if name.endswith("_proj")}
    for layer in range(layers):
        for name, (outputs, inputs) in modules.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            for end, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                numbers = random.standard_normal(shape, np.float32) * np.float32(0.02)
                found[f"{module}.{end}.weight"] = numbers.astype(ml_dtypes.bfloat16)
    save_file(found, out / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted(name.rpartition(".")[2] for name in modules)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (out / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(base)}))
    return out


if __name__ == "__main__":
    main()
