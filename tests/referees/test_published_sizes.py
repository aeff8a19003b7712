"""Published models in their own sizes, headers only: inspected, and planned to every target whose config can say them.

Names and shapes are what transformers saves of the class. All of them are planned by ``make bench``.
"""

import pytest

import carnet
from bench.published import published, shapes, words_of
from bench.skeleton import nbytes, write
from carnet.dialects.kinds import KINDS, RANKS

pytestmark = pytest.mark.referee

FEW = (  # one of each class that is planned in a moment, or two that differ in more than numbers
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct",
    "Qwen/Qwen3.5-27B",
    "google/gemma-4-26B-A4B",
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "meta-llama/Meta-Llama-3.1-405B",
    "mistralai/Mixtral-8x22B-v0.1",
    "nvidia/Gemma-4-31B-IT-NVFP4",
    "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",  # says layers for further tokens that transformers does not save
    "nvidia/Nemotron-H-56B-Base-8K",
    "openai/gpt-oss-120b",
)
MODELS = dict(published())
WIDE = "e_score_correction_bias"  # written in f32, as the hub has it
LESS_ONE = "linear_attn.norm.weight"  # in Megatron, which bf16 cannot hold: f32


def grown(tensors, kind):
    """Return how many bytes a target has more than its source: what is in f32 there, and keys that are values too."""
    ends = (WIDE, LESS_ONE) if kind == "megatron" else (WIDE,)
    wider = [each for each in tensors if each.endswith(ends) and tensors[each][0] == "BF16"]
    values = [each for each in tensors if each.endswith("self_attn.k_proj.weight")] if kind == "megatron" else []
    values = [each for each in values if "language_model" in each and each.replace("k_proj", "v_proj") not in tensors]
    return sum(nbytes(tensors[each]) for each in [*wider, *values])


@pytest.mark.skipif(not MODELS, reason="`make test` fetches them")
@pytest.mark.parametrize("name", FEW)
def test_a_published_model_is_planned_in_its_own_size_to_every_target_that_can_say_it(tmp_path, name):
    tensors = shapes(MODELS[name])
    write(tmp_path, tensors, MODELS[name])
    size = sum(map(nbytes, tensors.values()))
    assert carnet.inspect(tmp_path).refusal is None
    kinds = set()
    for kind, words in words_of(MODELS[name], name):
        options = dict(zip((word.strip("-").replace("-", "_") for word in words[::2]), words[1::2], strict=True))
        options |= {key: int(value) for key, value in options.items() if value.isdigit()}
        proof = carnet.plan(tmp_path, to=kind, **options).proof
        kinds.add(kind)
        assert (proof["source tensors"], proof["source bytes"]) == (len(tensors), size)
        if KINDS[kind].files != RANKS:  # where each rank holds some tensors whole
            assert proof["target bytes"] - proof["target padding bytes"] == size + grown(tensors, kind)
    assert {"hf", "megatron"} <= kinds
