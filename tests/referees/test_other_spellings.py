"""Checkpoints of those who build Megatron's layers otherwise: slime and mbridge, under the names and arguments of their own scripts.

THUDM/slime: slime_plugins/models/{glm4,qwen3_next,hf_attention}.py, scripts/models/glm4-9B.sh, megatron_to_hf/{glm4,qwen3_next}.py.
"""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Glm4Config, Qwen3_5TextConfig, Qwen3NextConfig

import carnet
from carnet.errors import CarnetError
from carnet.formats.detect import open_checkpoint
from tests.formats.test_torch_dist_goldens import rebuilt
from tests.referees.sizes import HEADS, TOKENS
from tests.referees.test_family_qwen3_next import SIZES

pytestmark = [
    pytest.mark.referee,
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]
GLM4 = Glm4Config(**HEADS, **TOKENS, intermediate_size=56, attention_bias=True)
SCRIPT = {
    "swiglu": True,
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "normalization": "RMSNorm",
    "post_self_attn_layernorm": True,
    "post_mlp_layernorm": True,
    "rotary_interleaved": True,
    "rotary_percent": 0.5,
    "untie_embeddings_and_output_weights": True,
    "spec": ["slime_plugins.models.glm4", "get_glm_spec"],
}
THEIRS = {
    "self_attention.linear_proj.post_layernorm.": "post_self_attn_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_mlp_layernorm.",
}
SIZED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}


def published(config, folder, seed=3):
    """Save a random model of transformers', its norms unlike each other; return what the files hold."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def core(folder, out):
    """Return the tensors of a model in megatron-core's own spelling, each layer's under its number."""
    carnet.cross(folder, out, to="megatron", accept=["needs"])
    store = open_checkpoint(out)
    found = {name: rebuilt(store, tensor) for (_, name), tensor in store.tensors.items()}
    layers = [name for name in found if name.startswith("decoder.layers.") and not name.split(".")[2].isdigit()]
    for name in layers:
        stack = found.pop(name)
        found |= {name.replace("layers.", f"layers.{at}.", 1): layer.clone() for at, layer in enumerate(stack)}
    return found


def rank(root, state, said):
    """Save the file of the one rank that there is."""
    file = root / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    args = Namespace(**said, **sizes, params_dtype=torch.bfloat16, padded_vocab_size=len(state["output_layer.weight"]))
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": state}, file)
    return root


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def renamed(state, names):
    for own, theirs in names.items():
        state = {name.replace(own, theirs): tensor for name, tensor in state.items()}
    return state


@pytest.fixture
def glm4(tmp_path):
    """What slime has of a GLM-4: its tensors, its arguments, and what transformers saved."""
    weights = published(GLM4, tmp_path / "hf")
    state = renamed(core(tmp_path / "hf", tmp_path / "core"), THEIRS)
    assert sum(".post_" in name for name in state) == 2 * GLM4.num_hidden_layers
    return state, {**SCRIPT, **{ours: getattr(GLM4, theirs) for ours, theirs in SIZED.items()}}, weights


def test_norms_behind_the_attention_and_the_mlp_are_glm_4_s(glm4, tmp_path):
    state, said, weights = glm4
    root = rank(tmp_path / "slime", state, said)
    seen = carnet.inspect(root)
    assert seen.inventory, str(seen.refusal)
    assert seen.inventory.family.name == "glm4"
    carnet.cross(root, tmp_path / "again", to="hf")
    assert_same(load_file(tmp_path / "again/model.safetensors"), weights)


@pytest.mark.parametrize("lost", ["post_self_attn_layernorm", "rotary_interleaved"])
def test_one_of_the_arguments_alone_is_another_model(lost, glm4, tmp_path):
    state, said, _ = glm4
    root = rank(tmp_path / "slime", state, {**said, lost: False})
    with pytest.raises(CarnetError):
        carnet.cross(root, tmp_path / "again", to="hf")


def test_a_norm_that_is_missing_is_missed(glm4, tmp_path):
    state, said, _ = glm4
    del state["decoder.layers.1.post_mlp_layernorm.weight"]
    with pytest.raises(CarnetError, match=r"lacks .layers\.1\.mlp_out_norm"):
        carnet.cross(rank(tmp_path / "slime", state, said), tmp_path / "again", to="hf")


FIVE = {name: value for name, value in SIZES.items() if "expert" not in name and "moe" not in name}


@pytest.mark.parametrize("config", [Qwen3NextConfig(**SIZES), Qwen3_5TextConfig(**FIVE)], ids=["Qwen3-Next", "Qwen3.5"])
def test_transformers_own_module_of_gated_deltanet_lies_in_the_layer(config, tmp_path):
    weights = published(config, tmp_path / "hf")
    state = core(tmp_path / "hf", tmp_path / "core")
    linear = [at for at, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    for at in linear:
        here, theirs = f"decoder.layers.{at}.self_attention.", f"model.layers.{at}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(here)}
        state |= {
            f"{here}{name.removeprefix(theirs)}": t for name, t in weights.items() if name.startswith(f"{theirs}linear_attn")
        }
        state[f"{here}input_layernorm.weight"] = weights[f"{theirs}input_layernorm.weight"]
    root = rank(tmp_path / "slime", state, {"apply_layernorm_1p": True})
    carnet.cross(root, tmp_path / "again", to="hf", config=tmp_path / "hf/config.json")
    assert_same(load_file(tmp_path / "again/model.safetensors"), weights)
