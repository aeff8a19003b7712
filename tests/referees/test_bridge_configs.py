"""What Megatron-Bridge says of a model in its run_config.yaml, for models that transformers makes: the weights come back by that alone.

``tests/goldens/bridge`` has the section ``model`` as Megatron-Bridge wrote it (NVIDIA-NeMo/Megatron-Bridge 067f987d: AutoBridge's
provider, or its builder's config, of the config here, in a ConfigContainer's to_yaml).
"""

import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import carnet
from carnet.errors import CarnetError

pytestmark = pytest.mark.referee

CONFIGS = Path(__file__).parents[1] / "goldens/bridge"
ALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES = {**ALL, "head_dim": 16}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}  # what Megatron-Bridge makes of a quarter
CAPS = {"query_pre_attn_scalar": 16, "sliding_window": 32}
MODELS = {
    "llama.provider": hf.LlamaConfig(**SIZES),
    "llama.builder": hf.LlamaConfig(**SIZES),
    "qwen3_next.provider": hf.Qwen3NextConfig(
        **{**SIZES, **ROUTED, **DELTA, "rope_parameters": WHOLE},
        num_experts=4,
        shared_expert_intermediate_size=48,
    ),
    "deepseek_v3.provider": hf.DeepseekV3Config(**{**ALL, "num_key_value_heads": 4}, **ROUTED, **LATENT, **GROUPS),
    "gemma.provider": hf.GemmaConfig(**SIZES),
    "gemma2.provider": hf.Gemma2Config(**SIZES, **CAPS),
    "olmoe.provider": hf.OlmoeConfig(**ALL, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False),
    "minimax_m2.provider": hf.MiniMaxM2Config(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "exaone4.provider": hf.Exaone4Config(
        **SIZES, sliding_window=None, sliding_window_pattern=4, layer_types=["full_attention"] * 4
    ),
}


@pytest.fixture
def stored(saved, tmp_path):
    """Return a folder of transformers, and its weights as Megatron-Bridge stores them: run_config.yaml alone says what they are."""

    def make(name):
        before, root = saved(MODELS[name], torch.bfloat16), tmp_path / "megatron"
        carnet.cross(before, root, to="megatron", accept=["needs"])
        common = root / "iter_0000001/common.pt"
        said = {
            key: value
            for key, value in torch.load(common, weights_only=False).items()
            if key in ("iteration", "checkpoint_version")
        }
        torch.save(said, common)
        (root / "carnet.json").unlink()
        shutil.copy(CONFIGS / f"{name}.yaml", root / "iter_0000001/run_config.yaml")
        return before, root

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_by_what_megatron_bridge_says_of_it(name, stored, tmp_path):
    before, root = stored(name)
    seen = carnet.inspect(root)
    assert seen.checkpoint.program == "megatron-bridge"
    assert carnet.cross(root, tmp_path / "back", to="hf").equal
    assert [each.what for each in carnet.verify(before, tmp_path / "back").findings if each.where != "dtype"] == []
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", before))
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key].to(theirs[key].dtype), theirs[key])] == []


@pytest.mark.parametrize(
    ("name", "now", "then"),
    [
        ("gemma.provider", "megatron.core.activations.fast_gelu", "torch.nn.functional.gelu"),
        ("gemma2.provider", "attn_logit_softcapping: 50.0", "attn_logit_softcapping: -1.5e400"),
        ("llama.provider", "_target_: torch.nn.functional.silu", "_target_: torch.nn.functional.elu"),
    ],
    ids=lambda said: said[:12],
)
def test_words_that_the_provider_does_not_have_are_refused(name, now, then, stored):
    _, root = stored(name)
    said = root / "iter_0000001/run_config.yaml"
    text = said.read_text()
    assert now in text
    said.write_text(text.replace(now, then))
    with pytest.raises(CarnetError):
        carnet.plan(root, to="hf")
