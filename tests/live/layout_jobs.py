"""What the ranks do where a layout of the pipeline says which layers each stage has: a model as DeepSeek-V3's, saved rank by rank."""

import warnings
from zlib import crc32

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import MLATransformerConfig, multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import moe_utils

from carnet.megatron.models import arguments
from tests.live.jobs import build, on_chunk, parallel, save


class Attention(DotProductAttention):
    """Attention that is told how wide its keys and values are: latent attention says it, 0.16.1's own class takes no such word."""

    def __init__(self, *, k_channels=None, v_channels=None, **given):
        assert k_channels == v_channels
        super().__init__(**given)


LAYERS = 4
# words of a config and of the arguments alike
SAID = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "qk_layernorm": True,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "mtp_num_layers": 1,
    "layernorm_epsilon": 1e-6,
}
ARGUMENTS = {
    "multi_latent_attention": True,
    "group_query_attention": False,
    "num_query_groups": 1,
    "num_experts": 4,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "max_position_embeddings": 64,
    "vocab_size": 97,
    "padded_vocab_size": 128,
}


def save_layout(layout, pp, vp, folder):
    """Save what this rank has of the model, and return its tensors: one table for each virtual chunk."""
    # language_module.py puts the embedding's copy on a GPU, whatever there is
    torch.Tensor.cuda = lambda held, *_, **__: held
    # 0.16.1 forgets to define them where Transformer Engine is not installed
    moe_utils.te_general_gemm = None
    multi_latent_attention.TELinear = type("TELinear", (), {})
    with parallel(pp=pp, vp=vp):
        states = []
        for chunk in range(vp or 1):
            with on_chunk(chunk if vp else None):
                states.append(_state(layout, pp, vp, chunk))
        model = {f"model{at}": state for at, state in enumerate(states)} if vp else states[0]
        said = SAID | ARGUMENTS | {"virtual_pipeline_model_parallel_size": vp, "pipeline_model_parallel_layout": layout}
        save(model, {"pp": pp}, said, folder)
        return [_numbers(state) for state in states]


def save_dense(folder):
    """Save a model as Llama's, with a further-token layer, which no Llama has."""
    with parallel():
        model = build({"layers": 2, "hidden": 32, "ffn": 48, "heads": 4, "kv": 4, "padded": 128, "mtp": 1})
        save(model.state_dict(), {}, arguments(model) | {"vocab_size": 97, "mtp_num_layers": 1}, folder)
        return _numbers(model.state_dict())


def _numbers(state):
    return {name: held.float().numpy() for name, held in state.items() if torch.is_tensor(held)}


def _state(layout, pp, vp, chunk):
    config = MLATransformerConfig(
        **SAID,
        num_moe_experts=4,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        pipeline_dtype=torch.bfloat16,
        pipeline_model_parallel_layout=layout,
        moe_token_dispatcher_type="allgather",
    )
    stage = chunk if vp else None
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    mixture = get_gpt_layer_local_spec(4, qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm")
    for layer in (*spec.layer_specs, mixture):
        layer.submodules.self_attention.submodules.core_attention = Attention
    at = parallel_state.get_pipeline_model_parallel_rank()
    model = GPTModel(
        config,
        spec,
        mtp_block_spec=get_gpt_mtp_block_spec(config, mixture, use_transformer_engine=False, vp_stage=stage),
        vocab_size=128,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pre_process=at == chunk == 0,
        post_process=at == pp - 1 and chunk == (vp or 1) - 1,
        vp_stage=stage,
    )
    state = model.state_dict()
    for name, held in state.items():
        if torch.is_tensor(held):
            # the embedding stands again beside the further-token layer, and is the same there
            words = name if "word_embeddings" in name else f"{name} {at} {chunk}"
            held.normal_(generator=torch.Generator().manual_seed(crc32(words.encode())))
    return state
