"""GPT-NeoX and Pythia: LayerNorm with bias, partly rotated heads, plain MLP beside the attention or after it.

transformers: modeling_gpt_neox.py. Megatron's GPT adds the MLP after the attention, so a model with both at once stays here.
TensorRT-LLM: tensorrt_llm/models/gptneox/model.py, examples/gptneox/convert_checkpoint.py.
"""

from dataclasses import replace

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm
from carnet.dialects.configs import Table, place
from carnet.dialects.hf import LAYER
from carnet.dialects.megatron.rows import QKV, QKV_BIAS
from carnet.dialects.rows import MODULE, biased, fuse, row
from carnet.model.model import head_share, number

ROWS = (
    row("embed_in.weight", "vocab hidden", "embed"),
    *hf.NORMS,
    row(LAYER + "input_layernorm.bias", "hidden", "attention_norm_bias"),
    row(LAYER + "post_attention_layernorm.bias", "hidden", "mlp_norm_bias"),
    # per head: its query, its key, its value
    fuse(LAYER + "attention.query_key_value.weight", "(kv *) hidden", QKV),
    fuse(LAYER + "attention.query_key_value.bias", "(kv *)", QKV_BIAS),
    *biased(LAYER + "attention.dense", "hidden (kv rep dim)", "attention.o"),
    *biased(LAYER + "mlp.dense_h_to_4h", "ffn hidden", "mlp.up"),
    *biased(LAYER + "mlp.dense_4h_to_h", "hidden ffn", "mlp.down"),
    *biased("final_layer_norm", "hidden", "final_norm"),
    row("/embed_out.weight", "vocab hidden", "head"),
    row("/lm_head.weight", "vocab hidden", "head", written=MODULE),  # the class's own name; transformers saves the other one
)

# The class reads little and builds the rest: both branches at once, biases everywhere, an MLP four times as wide. Its config is written
# by the converter itself, not by a class.
TRTLLM_TABLE = Table(
    (
        place("layers", "num_hidden_layers"),
        place("hidden", "hidden_size"),
        place("heads", "num_attention_heads"),
        place("kv_heads", default=lambda c: c["heads"]),
        place("head_dim", default=head_share),
        place("ffn", default=lambda c: 4 * number(c, "hidden")),
        place("vocab", "vocab_size"),
        place("positions", "max_position_embeddings"),
        place("norm_eps", default=1e-5),
        place("activation", "hidden_act", words=hf.ACTIVATIONS),
        place("rope_theta", "rotary_emb_base", default=10000.0),
        place("rope_percent", "rotary_pct"),
        place("parallel_residual", default=True),
        place("qkv_bias", default=True),
        place("out_bias", default=True),
        place("tied", default=False),
        place("dtype", "dtype", words=hf.DTYPES),
        place("tp", "mapping.tp_size", "tp_size", default=1),
        *trtllm.ONE_STAGE,
        place("world", "mapping.world_size", default=lambda c: c["tp"]),
        trtllm.EMBEDDING,
    ),
    fixed={
        "architecture": "GPTNeoXForCausalLM",
        "position_embedding_type": "rope_gpt_neox",
        "quantization.quant_algo": None,
    },
    guards={trtllm.SHARED: (False,)},
    ignored=trtllm.IGNORED,
)
TRTLLM_NORMS = biased(LAYER + "post_attention_layernorm", "hidden", "mlp_norm")

GPT_NEOX = Family(
    name="gpt_neox",
    traits={"norm": "layer", "gated": False, "position": "rope", "mlp_bias": True},
    hf=hf.dialect(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        ROWS,
        (
            place("layers", "num_hidden_layers"),
            place("hidden", "hidden_size"),
            place("heads", "num_attention_heads"),
            place("kv_heads", default=lambda c: c["heads"]),
            place("head_dim", default=head_share),
            place("ffn", "intermediate_size"),
            place("vocab", "vocab_size"),
            place("positions", "max_position_embeddings"),
            place("norm_eps", "layer_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="gelu", words=hf.ACTIVATIONS),
            place("rope_theta", "rotary_emb_base", "rope_theta", "rope_parameters.rope_theta", default=10000.0),
            *hf.rope("rope_scaling", "rope_parameters"),
            place("rope_percent", "rotary_pct", "partial_rotary_factor", "rope_parameters.partial_rotary_factor", default=0.25),
            place("parallel_residual", "use_parallel_residual", default=True),
            place("qkv_bias", "attention_bias", default=True),
            place("out_bias", "attention_bias", default=True),
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        ignored="classifier_dropout",
        prefixes=("gpt_neox.", ""),
        dropped={"*.attention.bias": "causal mask", "*.attention.masked_bias": "causal mask"},
    ),
    trtllm=replace(
        trtllm.dialect("GPTNeoXForCausalLM", (*trtllm.PLAIN_MLP, *TRTLLM_NORMS), (), common=trtllm.WITHOUT_POST_NORM),
        table=TRTLLM_TABLE,
    ),
)
