"""A checkpoint that carnet writes for Megatron, read by the real megatron-core."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.formats.detect import open_checkpoint

pytestmark = pytest.mark.referee

GOLDENS = Path(__file__).parents[1] / "goldens"
MEGATRON = GOLDENS / "megatron"


def kept(root):
    """Return name -> (element type, shape) of the model's tensors, and the names of its empty states."""
    found = open_checkpoint(root)
    tensors = {name: (t.dtype, t.shape) for (_, name), t in found.tensors.items() if not name.startswith("optimizer.")}
    return tensors, {name for name in found.objects if "_extra_state" in name}


@pytest.mark.parametrize(
    ("golden", "spelling"),
    [
        ("llama_te_pp2_vpp", "te"),
        ("llama_tp2pp2", "local"),
        ("llama_dist", "local"),
        ("gpt_te_tp2", "te"),
        ("v019_llama_te_tp2", "te"),
    ],
)
@pytest.mark.parametrize("cut", [{}, {"tp": 2}, {"tp": 2, "pp": 2}, {"pp": 3}])
def test_what_went_to_hugging_face_and_back_has_megatron_s_own_keys_shapes_and_states(golden, spelling, cut, tmp_path):
    assert carnet.cross(MEGATRON / golden, tmp_path / "hf", to="hf").equal
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", spelling=spelling, **cut).equal
    assert kept(tmp_path / "megatron") == kept(MEGATRON / golden)
    assert carnet.cross(tmp_path / "megatron", tmp_path / "again", to="hf").equal
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


MODELS = {
    "llama_tp2pp2": (
        {"num_query_groups": 2, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "ffn_hidden_size": 96}
        | {"normalization": "RMSNorm", "add_bias_linear": False, "layernorm_epsilon": 1e-6},
        {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False},
    ),
    "gpt_te_tp2": (
        {"ffn_hidden_size": 256, "normalization": "LayerNorm", "layernorm_epsilon": 1e-5},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    ),
}


# megatron-core 0.16 calls torch's older name
@pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning")
@pytest.mark.parametrize("golden", MODELS)
def test_megatron_core_loads_it_strictly_into_a_real_model(golden, megatron_world, tmp_path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    carnet.cross(MEGATRON / golden, tmp_path / "hf", to="hf")
    carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", spelling="local", tp=2, pp=2)
    given, built = MODELS[golden]
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        **given,
    )
    rotary = {"rotary_base": 500000} if built["position_embedding_type"] == "rope" else {}
    spec = get_gpt_layer_local_spec(normalization=given["normalization"])
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=64, **built, **rotary).to(torch.bfloat16)
    state = {"model": model.sharded_state_dict()}
    folder = tmp_path / "megatron/iter_0000001"
    loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"])
    expected = load_file(MEGATRON / golden / "full.safetensors")
    found = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    renamed = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    for name, value in found.items():
        spelled = name
        for local, fused in renamed.items():
            if local in name and name not in expected:
                spelled = name.replace(local, fused)
        if "word_embeddings" in name or name == "output_layer.weight":
            assert not value[251:].any()  # the target pads with zeros
            assert torch.equal(value[:251], expected[spelled][:251]), name
        else:
            assert torch.equal(value, expected[spelled]), name
