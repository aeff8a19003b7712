"""Llama 1, 2 and 3: RMSNorm, grouped-query attention, gated MLP, rotary positions.

transformers: modeling_llama.py, configuration_llama.py. TensorRT-LLM: tensorrt_llm/models/llama/config.py.
"""

from carnet.families import hf, trtllm
from carnet.families.family import Family
from carnet.families.fields import Table, place
from carnet.families.rows import Dialect

# transformers' attention_bias gives all four projections a bias
BIASES = (
    place("qkv_bias", "attention_bias", default=False),
    place("out_bias", "attention_bias", default=False),
    place("mlp_bias", "mlp_bias", default=False),
)

LLAMA = Family(
    name="llama",
    traits={"norm": "rms", "gated": True, "position": "rope"},
    hf=Dialect(
        name="hf",
        architecture="LlamaForCausalLM",
        prefixes=("model.", ""),
        rows=(hf.EMBED, *hf.NORMS, *hf.ATTENTION, *hf.GATED_MLP, hf.FINAL_NORM, hf.HEAD),
        stacked=False,
        ranked=False,
        writes_tied=False,
        further=("", ""),
        zero_centred=False,
        table=Table(
            (
                *hf.SIZES,
                place("norm_eps", "rms_norm_eps", default=1e-6),
                place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
                *hf.ROPE,
                *BIASES,
                place("tied", "tie_word_embeddings", default=False),
                hf.DTYPE,
                *hf.TOKENS,
            ),
            fixed={"model_type": "llama"},
            written={"architectures": ["LlamaForCausalLM"], "use_cache": True},
            ignored=hf.IGNORED,
        ),
        dropped=hf.DROPPED,
    ),
    trtllm=Dialect(
        name="trtllm",
        architecture="LlamaForCausalLM",
        prefixes=("transformer.",),
        rows=trtllm.rows(trtllm.GATED_MLP),
        stacked=False,
        ranked=True,
        writes_tied=True,
        further=("", ""),
        zero_centred=False,
        table=Table(
            (
                *trtllm.SIZES,
                place("activation", "hidden_act", words=hf.ACTIVATIONS),
                *trtllm.ROPE,
                place("qkv_bias", "attn_bias", default=False),
                place("out_bias", "attn_bias", default=False),
                place("mlp_bias", "mlp_bias", default=False),
                place("tied", "tie_word_embeddings", default=False),
            ),
            fixed={
                **trtllm.FIXED,
                "architecture": "LlamaForCausalLM",
                "position_embedding_type": "rope_gpt_neox",
                "residual_mlp": False,
                "fc_after_embed": False,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "layer_idx_offset": 0,
                "moe.num_experts": 0,
                "remove_duplicated_kv_heads": False,
            },
            written={
                **trtllm.WRITTEN,
                **trtllm.MOE_NONE,
                "moe.normalization_mode": None,
                "rotary_scaling": None,
                "disable_weight_only_quant_plugin": False,
            },
            ignored=trtllm.IGNORED,
        ),
        dropped=trtllm.DROPPED,
    ),
)
