"""Tiny models with adapters that peft made, and what they are merged, by torch alone and by peft."""

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tensors(folder):
    """Return the tensors of a folder, as safetensors reads them."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def with_adapters(base, out, seed=1, **options):
    """Save adapters that peft makes beside a model, of random numbers."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter) * 0.1
    made.save_pretrained(out)
    return out


def summed(base, adapter, factor=1.0):
    """Return the weights of a folder with its adapters, as the merge is defined, in torch: every operation is rounded by itself."""
    found, added = tensors(base), tensors(adapter)
    said = peft.LoraConfig.from_pretrained(adapter)
    for name, a in added.items():
        module, _, end = name.removeprefix("base_model.model.").rpartition(".lora_A.weight")
        if not module or end:
            continue
        b = added[name.replace("lora_A", "lora_B")].float()
        total = b[:, :1] * a[:1].float()
        for rank in range(1, len(a)):
            total = total + b[:, rank : rank + 1] * a[rank : rank + 1].float()
        weight = found[f"{module}.weight"]
        total = total if total.shape == weight.shape else total.T  # GPT-2's rows are inputs
        scale = torch.tensor(said.lora_alpha / said.r * factor, dtype=torch.float32)
        found[f"{module}.weight"] = (weight.float() + total * scale).to(weight.dtype)
    return found


def same(one, other):
    """Say whether two models have the same bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Return a tiny Llama in bf16."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_key_value_heads=2, num_attention_heads=4, num_hidden_layers=3, vocab_size=97
    )
    out = tmp_path_factory.mktemp("llama") / "base"
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def adapter(llama, tmp_path_factory):
    """Return adapters of all its layers."""
    return with_adapters(llama, tmp_path_factory.mktemp("adapter") / "adapter")
