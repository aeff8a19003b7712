"""What carnet promises of memory holds for adapters too, whose matrices are read as they are needed."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.peak import SAMPLED

HIDDEN, FFN, LAYERS, RANK, BUDGET = 1024, 2048, 3, 512, 120_000_000
MODULES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (FFN, HIDDEN)),
    "mlp.down_proj": (HIDDEN, FFN),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "max_position_embeddings": 64,
}  # fmt: skip
CHILD = f"""
{SAMPLED}
import carnet
verb, folder = sys.argv[1], Path(sys.argv[2])
plan = carnet.plan(folder / "base", to="hf", adapter=folder / "adapter", memory={BUDGET})
thread.start()
if verb == "run":
    carnet.run(plan, folder / "out", threads=2)
else:
    assert carnet.verify(folder / "base", folder / "out", adapter=folder / "adapter", memory={BUDGET}, threads=2).equal
stop()
print(peak)
"""


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)

    def numbers(*shape):
        return (random.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)

    base = {name: numbers(64, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    base["model.norm.weight"] = numbers(HIDDEN)
    added = {}
    for layer in range(LAYERS):
        for name, shape in MODULES.items():
            module = f"model.layers.{layer}.{name}"
            base[f"{module}.weight"] = numbers(*shape)
            added[f"base_model.model.{module}.lora_A.weight"] = numbers(RANK, shape[1])
            added[f"base_model.model.{module}.lora_B.weight"] = numbers(shape[0], RANK)
        base |= {f"model.layers.{layer}.{name}_layernorm.weight": numbers(HIDDEN) for name in ("input", "post_attention")}
    for name, tensors, file in (("base", base, "model"), ("adapter", added, "adapter_model")):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / f"{file}.safetensors", {"format": "pt"})
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG))
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*MODULES]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(said))
    return tmp_path


def test_writing_and_examining_stay_inside_the_budget(folder):
    for verb in ("run", "verify"):
        done = subprocess.run([sys.executable, "-c", CHILD, verb, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= BUDGET, (verb, done.stdout)
