"""A small model of every family whose sizes the blocks of every scheme divide, as transformers saves it with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from carnet.model.fields import Value
from tests.families.samples import FAMILY, SAMPLES, Fields, family_of, said

WIDTH = 128  # rows and columns of a block
WIDE = """
    hidden head_dim ffn moe_ffn moe_latent shared_ffn nope_dim rope_dim v_dim kv_lora q_lora ssm_head_dim ssm_state
    gdn_key_dim gdn_value_dim index_dim attention_root
""".split()
EVERY: Fields = {"positions": 128, "vocab": 96, "bos": None, "eos": None, "pad": 0, "norm_eps": 1e-5, "dtype": "bf16"}
SMALL = {"window": 8, "chunk": 16}  # shorter than the text
APART: Fields = {"window_layers": (1, 0), "value_layers": (1, 0), "layer_head_dim": (128, 256)}
LISTS: Fields = {"rope_short": (1.0, 1.5) * 64, "rope_long": (1.0, 2.0) * 64, "rope_original": 16}
OF: dict[str, Fields] = {  # a sample's own
    # eight times as long as before
    "phi3, each frequency stretched for itself": {**LISTS, "rope_attention": 1.32287565553},
    "qwen3_next": {"blocks": "GE *E"},
    "qwen3_next, some layers dense": {"blocks": "G- *E"},
    "qwen3_5": {"blocks": "G- *-"},
    "gemma4": APART,
    "gemma4, mixtures": APART,
    "qwen3_5_moe": {"blocks": "GE *E"},
    "glm_moe_dsa": {"index_layers": (1, 0)},
    "mamba": {"ssm_channels": 2 * WIDTH},
    "nemotron_h": {"layers": 3, "blocks": "M * -"},
    "nemotron_h, mixtures": {"layers": 3, "blocks": "E M *"},
    "nemotron_h, latent mixtures": {"layers": 3, "blocks": "E M *"},
}
NO_CLASS = dict.fromkeys(
    ("bailing_moe_v2", "mimo", "nemotron_nas"), "its class lies beside published weights, not in transformers"
) | {"eagle3": "its class is of engines; tests/megatron computes with transformers' modules"}
NAMES = [name for name in SAMPLES if name not in NO_CLASS]
TOKENS = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(5))


class Least(Random):
    """Draws twos where it may, and one choice after the other."""

    turn = -1

    def randint(self, low, high):
        """Return two, or what is nearest to it."""
        return min(high, max(low, 2))

    def choice(self, among):
        """Return the first, then the second."""
        self.turn += 1
        return among[self.turn % len(among)]


def fields(name: str, **more: Value) -> Fields:
    """Return the canonical fields of a sample."""
    sample, random = SAMPLES[name], Least(1)
    config: Fields = {"position": "rope", **FAMILY[family_of(name).name].traits, **sample.fields}
    for part in sample.parts:
        config |= part(random, 1, config)
    config |= OF.get(name, {})
    for field in WIDE:
        if isinstance(config.get(field), int):
            config[field] = WIDTH * max(1, int(str(config[field])) // 2)
    return {**config, **EVERY, **{field: small for field, small in SMALL.items() if config.get(field)}, **more}


def save(name: str, folder: Path, **more: Value) -> Path:
    """Have transformers save the model; every parameter is random."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(said(family_of(name).name, "hf", fields(name, **more))))
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.bfloat16, attn_implementation="eager"
    )
    for at, tensor in model.named_parameters():
        torch.nn.init.normal_(tensor, 1.0 if "norm" in at and at.endswith("weight") else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, unexpected: Callable[[str], bool] = lambda name: False, **more: object) -> torch.nn.Module:
    """Return the model that transformers makes of a folder, after asking whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, **more
    )
    model, missed = asked
    missed["unexpected_keys"] = [name for name in missed["unexpected_keys"] if not unexpected(name)]
    assert {what: list(names) for what, names in missed.items() if names} == {}
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return what the model says of the next tokens, its activations as they are."""
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all that is in the one file of a folder."""
    return load_file(folder / "model.safetensors")
