"""A tiny transformers model, taken to Megatron, loaded strictly by the real megatron-core and run: the same logits."""

from typing import Any

import pytest
import torch
import transformers

import carnet

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SILU = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96, "moe_token_dispatcher_type": "allgather"}

# name -> (transformers model, arguments of TransformerConfig beside the sizes, of the layer spec, of GPTModel)
MODELS: dict[str, Any] = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), SILU, {}, {}),
    "llama with tied embeddings": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        SILU,
        {},
        {"share_embeddings_and_output_weights": True},
    ),
    "llama with rope stretched as Llama 3 does": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"rope_scaling": LLAMA3}))),
        SILU,
        {},
        {"rope_scaling": True, "rope_scaling_factor": 8.0},
    ),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)), {**SILU, "add_qkv_bias": True}, {}, {}),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)), SILU, {"qk_layernorm": True}, {}),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        ),
        {**SILU, **EXPERTS},
        {"num_experts": 4},
        {},
    ),
}


def random(model):
    """Fill a model with numbers that no two tensors share, norms and biases included."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model.float().eval()


@pytest.mark.parametrize("cut", [{}, {"tp": 2, "pp": 2}, {"tp": 4, "pp": 3}], ids=["one rank", "tp 2 pp 2", "tp 4 pp 3"])
@pytest.mark.parametrize("name", MODELS)
def test_megatron_core_computes_what_transformers_does(name, cut, megatron_world, tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 forgets to define it where Transformer Engine is not installed
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    build, given, spec, built = MODELS[name]
    model = random(build())
    model.save_pretrained(tmp_path / "hf")
    if "mixtral" in name and cut:
        cut = {**cut, "tp": 1, "ep": 2}
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", spelling="local", **cut).equal
    config = TransformerConfig(
        num_layers=5,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=16,
        ffn_hidden_size=96,
        layernorm_epsilon=model.config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        **given,
    )
    padded = -(-97 // (128 * cut.get("tp", 1))) * 128 * cut.get("tp", 1)
    theirs = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", **spec),
        vocab_size=padded,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=50000,
        **{"share_embeddings_and_output_weights": False} | built,
    )
    theirs = theirs.float().eval()
    state = {"model": theirs.sharded_state_dict()}
    folder = str(tmp_path / "megatron/iter_0000001")
    loaded = dist_checkpointing.load(state, folder, strict=StrictHandling.RAISE_ALL)
    theirs.load_state_dict(loaded["model"])
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16)[None].expand(2, -1)
    future = torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), 1)
    with torch.no_grad():
        found, expected = theirs(tokens, positions, future), model(tokens).logits
    assert found.shape[-1] == padded
    assert torch.allclose(found[..., :97], expected, atol=1e-4, rtol=1e-4)
