"""vLLM applies the adapters that carnet wrote for peft: the log-probabilities are those of weights that they were added to by hand."""

import gc
import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

import carnet

pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op. is deprecated:FutureWarning")  # by torch itself

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
COMMON = {**SIZES, "intermediate_size": 96, "vocab_size": 97, "max_position_embeddings": 64, "tie_word_embeddings": False}
QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CONFIG, MODULES = hf.LlamaConfig(**COMMON), (*QKVO, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
RANK, ALPHA = 8, 16
VOCAB = 97
TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(5))


def drawn(config, modules, out):
    """Save a tiny model, adapters of random numbers as peft stores them, and the model that both are together."""
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(out / "base")
    weights, adapters = load_file(out / "base/model.safetensors"), dict[str, torch.Tensor]()
    for layer in range(config.num_hidden_layers):
        for module in modules:
            name, last = f"model.layers.{layer}.{module}", module.rpartition(".")[2]
            weight = weights[f"{name}.weight"]
            first = next((group[0] for group in GROUPS if last in group), last)  # one A where Megatron joins weights
            shared = f"base_model.model.{name.removesuffix(last)}{first}.lora_A.weight"
            a = adapters.get(shared, torch.randn(RANK, weight.shape[1]) * 0.2)
            b = torch.randn(weight.shape[0], RANK) * 0.2
            adapters |= {f"base_model.model.{name}.lora_A.weight": a.clone(), f"base_model.model.{name}.lora_B.weight": b}
            weights[f"{name}.weight"] = weight + ALPHA / RANK * b @ a
    for folder, tensors, file in (("merged", weights, "model"), ("source", adapters, "adapter_model")):
        (out / folder).mkdir()
        save_file(tensors, out / folder / f"{file}.safetensors", {"format": "pt"})
        shutil.copy(out / "base/config.json", out / folder)
    lasts = sorted({module.rpartition(".")[2] for module in modules})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": lasts, "bias": "none"}
    (out / "source/adapter_config.json").write_text(json.dumps(said))


PROMPTS = [prompt[:length] for prompt in TOKENS.tolist() for length in (7, 23, 40)]


def by_vllm(folder, adapters):
    """Return the log-probability of every token behind each prompt; within one vLLM 0.32 fails where adapters are loaded."""
    engine = LLM(
        str(folder),
        dtype="float32",
        max_model_len=64,
        max_logprobs=-1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=RANK,
    )
    asked = SamplingParams(max_tokens=1, logprobs=-1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    request = LoRARequest("adapters", 1, str(adapters))
    answers = [
        answer.outputs[0].logprobs[0] for answer in engine.generate(prompts, asked, use_tqdm=False, lora_request=request)
    ]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return torch.tensor([[said[token].logprob for token in range(VOCAB)] for said in answers])


def by_transformers(folder):
    """Return the same as transformers computes it."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS])


def test_vllm_computes_with_the_adapters(tmp_path):
    drawn(CONFIG, MODULES, tmp_path)
    assert carnet.cross(tmp_path / "source", tmp_path / "megatron", to="megatron", tp=2).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "peft", to="peft").equal
    expected = by_transformers(tmp_path / "merged")
    assert (by_vllm(tmp_path / "base", tmp_path / "peft") - expected).abs().max() < 1e-3
    assert (by_transformers(tmp_path / "base") - expected).abs().max() > 1e-1
