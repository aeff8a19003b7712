"""GPT-2: LayerNorm with bias, learned positions, plain MLP, biases everywhere, usually tied.

transformers stores its projections transposed, as [in, out] (``Conv1D`` in pytorch_utils.py): modeling_gpt2.py. TensorRT-LLM:
tensorrt_llm/models/gpt/config.py.
"""

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm, vllm
from carnet.dialects.configs import place
from carnet.dialects.rows import biased, fuse, row
from carnet.model.model import head_share, number

LAYER = "h.{layer}."

HF_ROWS = (
    row("wte.weight", "vocab hidden", "embed"),
    row("wpe.weight", "position hidden", "position"),
    *biased(LAYER + "ln_1", "hidden", "attention_norm"),
    fuse(LAYER + "attn.c_attn.weight", "hidden *", trtllm.QKV),
    fuse(LAYER + "attn.c_attn.bias", "*", trtllm.QKV_BIAS),
    row(LAYER + "attn.c_proj.weight", "(kv rep dim) hidden", "attention.o"),
    row(LAYER + "attn.c_proj.bias", "hidden", "attention.o_bias"),
    *biased(LAYER + "ln_2", "hidden", "mlp_norm"),
    row(LAYER + "mlp.c_fc.weight", "hidden ffn", "mlp.up"),
    row(LAYER + "mlp.c_fc.bias", "ffn", "mlp.up_bias"),
    row(LAYER + "mlp.c_proj.weight", "ffn hidden", "mlp.down"),
    row(LAYER + "mlp.c_proj.bias", "hidden", "mlp.down_bias"),
    *biased("ln_f", "hidden", "final_norm"),
    hf.HEAD,
)
ACTIVATIONS = (("gelu_tanh", "gelu_new"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu_tanh", "gelu_fast"), ("gelu", "gelu"))

# vllm 0.32 model_executor/models/gpt2.py: outputs come first there
ENGINE = vllm.Spelling(
    everywhere=(*vllm.AROUND, "position"),
    renames={"embed_tokens.": "wte."},
    rows=(
        row("wpe.weight", "position hidden", "position"),
        fuse(LAYER + "attn.c_attn.weight", "* hidden", trtllm.QKV, cut="kv"),
        row(LAYER + "attn.c_proj.weight", "hidden (kv rep dim)", "attention.o", cut="kv"),
        row(LAYER + "mlp.c_fc.weight", "ffn hidden", "mlp.up", cut="ffn"),
        row(LAYER + "mlp.c_proj.weight", "hidden ffn", "mlp.down", cut="ffn"),
    ),
)

GPT2 = Family(
    name="gpt2",
    vllm=ENGINE,
    traits={
        "norm": "layer",
        "gated": False,
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    hf=hf.dialect(
        "GPT2LMHeadModel",
        "gpt2",
        HF_ROWS,
        (
            place("layers", "n_layer"),
            place("hidden", "n_embd"),
            place("heads", "n_head"),
            place("kv_heads", default=lambda c: c["heads"]),
            place("head_dim", default=head_share),
            place("ffn", "n_inner", default=lambda c: 4 * number(c, "hidden")),
            place("vocab", "vocab_size"),
            place("positions", "n_positions"),
            place("norm_eps", "layer_norm_epsilon", default=1e-5),
            place("activation", "activation_function", default="gelu_tanh", words=ACTIVATIONS),
            place("tied", "tie_word_embeddings", default=True),
            hf.DTYPE,
            *hf.TOKENS,
        ),
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        written={"reorder_and_upcast_attn": False},
        guards={"add_cross_attention": (False,)},
        ignored="attn_pdrop embd_pdrop n_ctx summary_activation summary_first_dropout summary_proj_to_labels summary_type "
        "summary_use_proj",
        prefixes=("transformer.", ""),
    ),
    trtllm=trtllm.dialect(
        "GPT2LMHeadModel",
        trtllm.PLAIN_MLP,
        (
            *trtllm.SIZES,
            place("activation", "hidden_act", words=ACTIVATIONS),
            # NVIDIA's config does not say it; where the copies then differ the crossing stops
            place("tied", "tie_word_embeddings", "share_embedding_table", default=True),
        ),
        fixed={
            **trtllm.GPT_FIXED,
            "gpt_variant": "gpt2",
            "bias": True,
            "position_embedding_type": "learned_absolute",
        },
        written={**trtllm.GPT_WRITTEN, "rotary_pct": 1.0, "rotary_base": 10000.0},
    ),
)
