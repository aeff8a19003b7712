"""Falcon 7B, 40B, 180B, RW and Falcon2 11B: LayerNorm with bias, MLP beside the attention, one norm for both or one for each.

transformers: modeling_falcon.py. TensorRT-LLM: tensorrt_llm/models/falcon/config.py, model.py.
"""

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm, vllm
from carnet.dialects.configs import ANY, Choice, Spread, place
from carnet.dialects.megatron.rows import QKV, QKV_BIAS
from carnet.dialects.rows import biased, fuse, row
from carnet.model.fields import Condition
from carnet.model.model import head_share, number

LAYER = "h.{layer}."
NEW: Condition = {"new_decoder": True}
OLD: Condition = {"new_decoder": False}

# the norms are called otherwise where the MLP has one of its own beside the attention's
BOTH = {"parallel_residual": True, "one_norm": False}
ONE = {"parallel_residual": True, "one_norm": True}
AFTER = {"parallel_residual": False}
HF_ROWS = (
    row("word_embeddings.weight", "vocab hidden", "embed"),
    *(row(LAYER + "input_layernorm.weight", "hidden", "attention_norm", when=when) for when in (ONE, AFTER)),
    *(row(LAYER + "input_layernorm.bias", "hidden", "attention_norm_bias", when=when) for when in (ONE, AFTER)),
    *biased(LAYER + "post_attention_layernorm", "hidden", "mlp_norm", when=AFTER),
    *biased(LAYER + "ln_attn", "hidden", "attention_norm", when=BOTH),
    *biased(LAYER + "ln_mlp", "hidden", "mlp_norm", when=BOTH),
    # per KV head, be there one, a few or one for each query: its queries, its key, its value
    fuse(LAYER + "self_attention.query_key_value.weight", "(kv *) hidden", QKV),
    fuse(LAYER + "self_attention.query_key_value.bias", "(kv *)", QKV_BIAS),
    *biased(LAYER + "self_attention.dense", "hidden (kv rep dim)", "attention.o"),
    *biased(LAYER + "mlp.dense_h_to_4h", "ffn hidden", "mlp.up"),
    *biased(LAYER + "mlp.dense_4h_to_h", "hidden ffn", "mlp.down"),
    *biased("ln_f", "hidden", "final_norm"),
    hf.HEAD,
)
TRTLLM_ROWS = (
    *trtllm.PLAIN_MLP,
    *biased("layers.{layer}.mlp_layernorm", "hidden", "mlp_norm", when=BOTH),
)


def _decoder(parallel: str, *, null: bool) -> Choice:
    """Write the three decoders: the newer one is always parallel and has two norms unless it says one."""
    return Choice(
        ("new_decoder", "parallel_residual", "one_norm"),
        (("new_decoder_architecture", False), (parallel, null), ("num_ln_in_parallel_attn", None)),
        (
            ((True, True, False), (True, True, 2)),
            ((True, True, False), (True, True, None)),
            ((True, True, True), (True, True, 1)),
            ((False, True, True), (False, True, None)),
            ((False, True, True), (False, True, 1)),
            ((False, False, False), (False, False, None)),
            ((False, False, False), (False, False, ANY)),
        ),
    )


# one flag gives every linear layer a bias
BIASES = tuple(place(name, "bias", default=False) for name in ("qkv_bias", "out_bias", "mlp_bias"))

# vllm 0.32 model_executor/models/falcon.py: all queries, all keys, all values
ENGINE = vllm.Spelling(
    everywhere=vllm.AROUND,
    renames={"embed_tokens.": "word_embeddings."},
    rows=(
        fuse(LAYER + "self_attention.query_key_value.weight", "* hidden", trtllm.QKV, cut="kv"),
        fuse(LAYER + "self_attention.query_key_value.bias", "*", trtllm.QKV_BIAS, cut="kv"),
    ),
)

FALCON = Family(
    name="falcon",
    vllm=ENGINE,
    traits={"norm": "layer", "gated": False},
    hf=hf.dialect(
        "FalconForCausalLM",
        "falcon",
        HF_ROWS,
        (
            place("layers", "num_hidden_layers"),
            place("hidden", "hidden_size"),
            place("heads", "num_attention_heads"),
            _decoder("parallel_attn", null=False),
            place("kv_heads", "num_kv_heads", default=lambda c: c["heads"], only=NEW),
            Spread("kv_heads", "multi_query", False, lambda said, c: 1 if said else c["heads"], lambda c: (True, False), OLD),
            # what the other decoder reads is there and means nothing
            Spread("kv_heads", "multi_query", False, lambda said, c: c["kv_heads"], lambda c: (True,), NEW),
            Spread("kv_heads", "num_kv_heads", int, lambda said, c: c["kv_heads"], lambda c: (c["heads"],), OLD),
            place("head_dim", default=head_share),
            place("ffn", "ffn_hidden_size", default=lambda c: 4 * number(c, "hidden")),
            place("vocab", "vocab_size"),
            place("positions", "max_position_embeddings", default=2048),
            place("norm_eps", "layer_norm_epsilon", default=1e-5),
            place("activation", "activation", default="gelu", words=hf.ACTIVATIONS),
            place("position", "alibi", default="rope", words=(("rope", False), ("alibi", True))),
            *hf.ROPE,
            *BIASES,
            place("tied", "tie_word_embeddings", default=True),
            hf.DTYPE,
            *hf.TOKENS,
        ),
        absent={"multi_query": True, "parallel_attn": True},  # null is taken for false
        guards={"apply_residual_connection_post_layernorm": (False,)},
        ignored="ff_factor",
        prefixes=("transformer.", ""),
    ),
    trtllm=trtllm.dialect(
        "FalconForCausalLM",
        TRTLLM_ROWS,
        (
            *trtllm.SIZES,
            _decoder("parallel_attention", null=True),
            place("position", "position_embedding_type", words=(("rope", "rope_gpt_neox"), ("alibi", "alibi_with_scale"))),
            place("rope_theta", "rotary_base", default=10000.0),
            # NVIDIA writes the exact gelu's name and computes the tanh form: tensorrt_llm/functional.py
            trtllm.ACTIVATION,
            *BIASES,
            # NVIDIA's config does not say it, and neither does carnet's unless it must
            place("tied", "tie_word_embeddings", "share_embedding_table", default=True, omit=True),
        ),
    ),
)
