"""What referees of vLLM share: its settings, read before it is imported, and how it and transformers are asked.

One process, a small cache, no word to anybody outside.
"""

import gc
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the test's own process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two cores may be shared
    "OMP_NUM_THREADS": "2",
    "TORCHDYNAMO_DISABLE": "1",  # no C++ compiler is asked for
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

VOCAB = 97
TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(5))


def _by_transformers(folder):
    """Return the log-probability of every token of the vocabulary after every token of the prompts but the last."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits[:, :-1].log_softmax(-1)


def _by_vllm(folder, settings, dtype="float32"):
    """Return the same as vLLM computes it."""
    engine = LLM(
        str(folder),
        dtype=dtype,
        max_model_len=64,
        max_logprobs=-1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **settings,
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in TOKENS]
    answers = [answer.prompt_logprobs[1:] for answer in engine.generate(prompts, asked, use_tqdm=False)]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return torch.tensor([[[said[token].logprob for token in range(VOCAB)] for said in answer] for answer in answers])


@pytest.fixture
def by_transformers():
    """How transformers answers."""
    return _by_transformers


@pytest.fixture
def by_vllm():
    """How vLLM answers."""
    return _by_vllm
