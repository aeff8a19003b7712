"""What the table of docs/families.md says stands against a family is what a plan for Megatron of transformers' own model says."""

import subprocess
import sys

import pytest
import torch
import transformers

import carnet

pytestmark = pytest.mark.referee

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 8, **HEAD}
CONFIGS = {
    "GemmaForCausalLM": transformers.GemmaConfig(**SIZES, **HEAD),
    "Gemma2ForCausalLM": transformers.Gemma2Config(**SIZES, **WINDOW),
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig(**SIZES, **WINDOW),
    "Gemma4ForCausalLM": transformers.Gemma4TextConfig(**SIZES, **WINDOW, hidden_size_per_layer_input=0),
    "Olmo2ForCausalLM": transformers.Olmo2Config(**SIZES),
    "OlmoeForCausalLM": transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "Ernie4_5ForCausalLM": transformers.Ernie4_5Config(**SIZES, **HEAD),
    "Ernie4_5_MoeForCausalLM": transformers.Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=48),
    "Glm4ForCausalLM": transformers.Glm4Config(**SIZES, **HEAD),
    "Olmo3ForCausalLM": transformers.Olmo3Config(**SIZES),
    "Exaone4ForCausalLM": transformers.Exaone4Config(**SIZES, **HEAD),
    "CohereForCausalLM": transformers.CohereConfig(**SIZES),
    "Cohere2ForCausalLM": transformers.Cohere2Config(**SIZES),
    "HunYuanDenseV1ForCausalLM": transformers.HunYuanDenseV1Config(**SIZES, **HEAD),
    "HunYuanMoEV1ForCausalLM": transformers.HunYuanMoEV1Config(**SIZES, **HEAD, num_experts=4, moe_topk=2),
    "MiniMaxM2ForCausalLM": transformers.MiniMaxM2Config(**SIZES, **HEAD, num_local_experts=4, num_experts_per_tok=2),
    "Ministral3ForCausalLM": transformers.Ministral3Config(**SIZES, **HEAD),
    "Llama4ForCausalLM": transformers.Llama4TextConfig(
        **SIZES, **HEAD, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1
    ),
}


@pytest.fixture(scope="module")
def said():
    """What the table says that Megatron has no word for: architecture -> fields and values in turn."""
    shown = subprocess.run([sys.executable, "-m", "carnet.architectures"], capture_output=True, text=True, check=True).stdout
    against = (line.partition("no word for ") for line in shown.splitlines() if "no word for " in line)
    found = {before.split()[1]: after.split("  ")[0].split() for before, _, after in against}
    return {
        name: words for name, words in found.items() if hasattr(transformers, name)
    }  # a head that guesses tokens is none of its


def test_the_table_names_the_families_that_megatron_cannot_say(said):
    assert said.keys() == CONFIGS.keys()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_plan_is_refused_with_what_the_table_says_stands_against_the_family(architecture, said, tmp_path):
    torch.manual_seed(1)
    getattr(transformers, architecture)(CONFIGS[architecture]).save_pretrained(tmp_path)
    with pytest.raises(carnet.CarnetError) as caught:
        carnet.plan(tmp_path, to="megatron")
    words = str(caught.value).replace("'", " ").split()
    assert "cannot say" in caught.value.what or "has no place for" in caught.value.what
    assert [word for word in said[architecture] if word not in words] == []
